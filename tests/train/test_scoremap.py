"""The score matrices equal the operations they replace (METHODS.md 0.4, 11.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from andon.train.scoremap import ScoreMap
from scipy.ndimage import gaussian_filter


@pytest.mark.parametrize(
    ("grid", "size", "align", "sigma"), [(14, 224, True, 0.0), (42, 336, False, 4.0), (16, 256, True, 4.0)]
)
def test_map_equals_interpolate_and_gaussian(grid: int, size: int, align: bool, sigma: float) -> None:
    values = torch.rand(2, 1, grid, grid, generator=torch.Generator().manual_seed(0))
    pixel_map, score = ScoreMap(grid, size, align_corners=align, sigma=sigma)(values)
    expected = F.interpolate(values, size=size, mode="bilinear", align_corners=align).numpy()
    if sigma:
        expected = np.stack([gaussian_filter(m[0], sigma)[None] for m in expected])
    np.testing.assert_allclose(pixel_map.numpy(), expected, atol=2e-6)
    torch.testing.assert_close(score, values.flatten(1).amax(1))


def test_pool_score_equals_average_pool() -> None:
    values = torch.rand(3, 1, 14, 14, generator=torch.Generator().manual_seed(1)) * 10
    _, score = ScoreMap(14, 224, mode="pool", window=16)(values)
    upsampled = F.interpolate(values, size=224, mode="bilinear", align_corners=True)
    expected = F.avg_pool2d(upsampled, 16, stride=1).flatten(1).amax(1)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


def test_top_and_mean_scores() -> None:
    values = torch.arange(196.0).reshape(1, 1, 14, 14)
    assert ScoreMap(14, 224, mode="top", top_share=0.02).score(values).item() == pytest.approx(193.5)
    assert ScoreMap(14, 224, mode="mean").score(values).item() == pytest.approx(97.5)
