"""Statistics by position: what is there with many images, careful with few, never without a spread."""

from __future__ import annotations

import pytest
import torch
from andon.train.byposition import position_statistics, typical


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def halves(images: int, grid: int = 12) -> torch.Tensor:
    """[images, grid^2]: about 5 with a deviation of 2 on the left half, about 1 with a deviation of .5 on the right."""
    left = (torch.arange(grid) < grid // 2).repeat(grid)
    return torch.where(left, 5.0, 1.0) + torch.where(left, 2.0, 0.5) * torch.randn(images, grid * grid)


def ends(values: torch.Tensor) -> tuple[float, float]:
    """Means of the first three columns and of the last three, where the blur does not reach the other half."""
    grid = values.reshape(12, 12)
    return float(grid[:, :3].mean()), float(grid[:, -3:].mean())


def test_many_images_give_what_is_there() -> None:
    mean, deviation = position_statistics(halves(2000), 12, prior=10, spread_prior=1)
    assert ends(mean) == (pytest.approx(5, abs=0.1), pytest.approx(1, abs=0.1))
    assert ends(deviation) == (pytest.approx(2, rel=0.05), pytest.approx(0.5, rel=0.1))


def test_few_images_are_drawn_to_what_is_usual_anywhere() -> None:
    few = halves(4)
    trusting, careful = (typical(few, 12, prior) for prior in (0, 12))
    low, high = ends(careful)[1], ends(careful)[0]
    assert high - low == pytest.approx((ends(trusting)[0] - ends(trusting)[1]) * 4 / 16, rel=1e-3)
    assert careful.mean() == pytest.approx(float(few.mean()), rel=1e-3)
    spreads = [ends(position_statistics(few, 12, 0, prior)[1]) for prior in (1, 100)]
    assert spreads[0][0] / spreads[0][1] > 1.5 > spreads[1][0] / spreads[1][1]


def test_one_image_and_no_spread_are_finite() -> None:
    for values in (torch.randn(1, 16), torch.zeros(3, 16), torch.full((3, 16), 0.1), 1e-12 * torch.randn(3, 16)):
        mean, deviation = position_statistics(values, 4, prior=10, spread_prior=1)
        assert mean.isfinite().all() and deviation.isfinite().all() and (deviation > 0).all()


def test_the_deviation_scales_with_the_values() -> None:
    values = halves(6)
    mean, deviation = position_statistics(values, 12, prior=10, spread_prior=1)
    for scale in (1e-9, 1e6):
        scaled = position_statistics(scale * values, 12, prior=10, spread_prior=1)
        torch.testing.assert_close(scaled[0], scale * mean)
        torch.testing.assert_close(scaled[1], scale * deviation)
    assert torch.equal(position_statistics(torch.full((3, 16), 0.1), 4, 10, 1)[1], torch.ones(16))
