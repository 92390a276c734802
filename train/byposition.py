"""What good images of a product have at each position, from a few of them.

A camera over a station sees the same part of the product at the same place: where good parts vary (an edge, a bus bar)
a large value means little. Not in the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scoremap import gaussian_matrix

_BLUR = 1.0  # positions; neighbours see nearly the same part, and no part lies still to the pixel


def position_statistics(values: Tensor, grid: int, prior: float, spread_prior: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation at each position, both [N]: values [images, N], N = grid^2.

    All positions together count for `prior` more images in the mean and `spread_prior` in the variance, so that a few
    images (views count as images) do not make a position overconfident. The deviation is that of the values from this
    mean, not from their own: where the mean is uncertain or neighbours differ (an edge, which no two images have at the
    same pixel), it is larger. A blur that fades as images become many was no better (configs/selection.yaml).
    Values that are all the same have a deviation of 1.
    """
    mean = typical(values, grid, prior)
    squares = (values - mean).square()
    usual = squares.mean()
    if usual.sqrt() <= 1e-6 * values.abs().max():  # rounding
        return mean, torch.ones_like(mean)
    return mean, typical(squares, grid, spread_prior).clamp_min(1e-6 * usual).sqrt()


def typical(values: Tensor, grid: int, prior: float) -> Tensor:
    """Mean over images, a little blurred, drawn to the mean over all positions as if `prior` more images were there.

    values: [images, N], N = grid^2; returns [N].
    """
    mean, images = values.mean(0), len(values)
    blur = gaussian_matrix(grid, _BLUR).to(mean)
    local = (blur @ mean.reshape(grid, grid) @ blur.T).flatten()
    return torch.lerp(local, mean.mean(), prior / (images + prior)) if prior else local
