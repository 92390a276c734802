"""Errors of the device side; all are :class:`AndonError` and carry found, expected and the next command."""

from __future__ import annotations

from ..calib.errors import AndonError, CalibrationError, quoted

__all__ = [
    "AndonError",
    "BundleError",
    "CalibrationError",
    "ConfigError",
    "DeliveryError",
    "EngineError",
    "NotNowError",
    "ProductError",
    "SourceError",
    "quoted",
]


class BundleError(AndonError):
    """The bundle is missing, tampered with, incomplete or of another schema."""


class ConfigError(AndonError):
    """A configuration file is missing, malformed or contradicts the bundle."""


class EngineError(AndonError):
    """A backend is not available, or an engine failed to build, open or run."""


class NotNowError(EngineError):
    """What was asked was not begun, and may be asked again as it is."""


class ProductError(AndonError):
    """The product is not one the bundle was trained for."""


class SourceError(AndonError):
    """A camera, file or folder cannot deliver frames."""


class DeliveryError(AndonError):
    """The outbox or the broker cannot take messages."""
