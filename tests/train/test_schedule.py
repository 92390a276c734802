"""The schedule of a small training set."""

from __future__ import annotations

import pytest
from andon.train.loop import bounded
from andon.train.method import Schedule


@pytest.mark.parametrize(
    ("epochs", "images", "steps"), [(None, 24, 2000), (150, 24, 450), (150, 1000, 2000), (1, 25, 4)]
)
def test_epochs_bound_the_steps(epochs: float | None, images: int, steps: int) -> None:
    assert bounded(Schedule(steps=2000, batch=8, max_epochs=epochs), images).steps == steps
