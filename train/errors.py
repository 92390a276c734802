"""Errors of the training side."""

from __future__ import annotations

from ..calib.errors import AndonError


class TrainingError(AndonError):
    """Training cannot start, go on or be resumed."""


class CheckpointError(AndonError):
    """A checkpoint is missing, incomplete, altered or of another model."""
