"""From densities to map and score with constants calibrated on held-out good images (METHODS.md 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...scoremap import gaussian_matrix, interpolation_matrix
from .config import ScoreConfig


class DensityScore(nn.Module):
    """Per-position values of every level -> anomaly map and image score. FP32 throughout.

    Every level's value v becomes P = exp(min(v - m, 0)), so that the calibrated upper quantile m of good images maps to
    1, everywhere or position by position; the levels are added on the map's grid and subtracted from c, what good
    images reach.
    """

    blur: Tensor

    def __init__(self, grids: Sequence[int], config: ScoreConfig, classes: int) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.delta = config.delta if classes > 1 else None  # one class has no entropy to tell apart
        self.size = config.map
        self.register_buffer("blur", gaussian_matrix(config.map, config.sigma).float(), persistent=False)
        for level, grid in enumerate(self.grids):
            matrix = interpolation_matrix(grid, config.map, align_corners=True).float()
            self.register_buffer(f"upsample{level}", matrix, persistent=False)

    def total(self, values: Sequence[Tensor], ceilings: Sequence[Tensor]) -> Tensor:
        """Sum over levels of P on the map's grid, [B, size, size]. values: levels of [B, N_l]; ceilings m: the same."""
        out: Tensor | None = None
        for level, (value, ceiling, grid) in enumerate(zip(values, ceilings, self.grids, strict=True)):
            p = (value - ceiling).clamp_max(0).exp().reshape(-1, grid, grid)
            upsample = getattr(self, f"upsample{level}")
            up = upsample @ p @ upsample.T
            out = up if out is None else out + up
        if out is None:
            raise ValueError("a score needs at least one level")
        return out

    def _surprise(self, values: Sequence[Tensor], ceilings: Sequence[Tensor], reach: Tensor) -> Tensor:
        return self.blur @ (reach[:, None, None] - self.total(values, ceilings)).clamp_min(0) @ self.blur.T

    def forward(
        self, densities: Sequence[Tensor], entropies: Sequence[Tensor], ceilings: Sequence[Tensor], reach: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map [B, 1, size, size] and score [B].

        densities, entropies: levels of [B, N_l], log-likelihood per dimension and negative class entropy.
        ceilings: levels of [B, 2, N_l], m of densities and entropies; reach: [B, 2], c of both.
        """
        scores = self._surprise(densities, [m[:, 0] for m in ceilings], reach[:, 0])
        if self.delta is not None:
            scores = scores * (self.delta + self._surprise(entropies, [m[:, 1] for m in ceilings], reach[:, 1]))
        return scores[:, None], scores.flatten(1).amax(1)


def quantile(values: Sequence[Tensor], q: float) -> float:
    """Quantile over all elements of several tensors (torch.quantile refuses more than 2^24 elements)."""
    return float(np.quantile(torch.cat([v.flatten() for v in values]).double().cpu().numpy(), q))


def typical(values: Tensor, grid: int, prior: float) -> Tensor:
    """What good images have at each position, [N], from a few of them: values [images, N], N = grid^2.

    The mean over images, a little blurred, drawn to the mean over all positions as if `prior` more images were there.
    """
    mean, images = values.mean(0), len(values)
    blur = gaussian_matrix(grid, 1.0).to(mean)
    local = (blur @ mean.reshape(grid, grid) @ blur.T).flatten()
    return (images * local + prior * mean.mean()) / (images + prior)
