"""Errors of the training side."""

from __future__ import annotations

from ..calib.errors import AndonError
from ..runtime.errors import CalibrationError


class TrainingError(AndonError):
    """Training cannot start, go on or be resumed."""


class CheckpointError(AndonError):
    """A checkpoint is missing, incomplete, altered or of another model."""


def no_constants(product: str) -> CalibrationError:
    """A product has no image for the constants of its score."""
    return CalibrationError(
        f"no held-out good image of product {product!r} to calibrate on",
        found=0,
        expected="at least one",
        next_step="raise `holdout` or add good images of this product",
    )
