"""Errors of the training side."""

from __future__ import annotations

from ..calib.errors import AndonError
from ..runtime.errors import CalibrationError


class TrainingError(AndonError):
    """Training cannot start, go on or be resumed."""


class CheckpointError(AndonError):
    """A checkpoint is missing, incomplete, altered or of another model."""


def no_constants(product: str, good: int | None = None) -> CalibrationError:
    """A product has no image for the constants of its score. good: how many good training images it has."""
    return CalibrationError(
        f"no held-out good image of product {product!r} to calibrate on",
        found=0 if good is None else f"{good} good training images, none of which is held out",
        expected="at least one, as of four good images",
        next_step="add good images of this product or raise `holdout` (vpdm: or set score.by_position=false)",
    )
