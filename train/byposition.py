"""What good images of a product have at each position, from a few of them.

A camera over a station sees the same part of the product at the same place: where good parts vary (an edge, a bus bar)
a large value means little. Not in the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scoremap import gaussian_matrix

_BLUR = 1.0  # positions; neighbours see nearly the same part, so they help where images are few


def position_statistics(values: Tensor, grid: int, prior: float, spread_prior: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation at each position, both [N]: values [images, N], N = grid^2.

    All positions together count for `prior` more images in the mean and `spread_prior` in the variance, so that a few
    images do not make a position overconfident. The deviation is above 0.
    """
    mean = typical(values, grid, prior)
    squares = (values - mean).square()
    variance = typical(squares, grid, spread_prior)
    return mean, variance.clamp_min(1e-6 * squares.mean()).sqrt().clamp_min(1e-6)


def typical(values: Tensor, grid: int, prior: float) -> Tensor:
    """Mean over images, a little blurred, drawn to the mean over all positions as if `prior` more images were there.

    values: [images, N], N = grid^2; returns [N].
    """
    mean, images = values.mean(0), len(values)
    blur = gaussian_matrix(grid, _BLUR).to(mean)
    local = (blur @ mean.reshape(grid, grid) @ blur.T).flatten()
    return torch.lerp(local, mean.mean(), prior / (images + prior)) if prior else local
