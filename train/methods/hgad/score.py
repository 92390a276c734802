"""From densities to map and score with constants calibrated on held-out good images (METHODS.md 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...byposition import position_statistics
from ...scoremap import gaussian_matrix, interpolation_matrix
from .config import ScoreConfig


class Constants(NamedTuple):
    """Calibration constants of the images' products; the second axis is density, entropy.

    ceilings: m of every level, [B, 2, N_l]; gains: k, the same, or empty for 1; reach: c, [B, 2].
    """

    ceilings: Sequence[Tensor]
    gains: Sequence[Tensor]
    reach: Tensor


class DensityScore(nn.Module):
    """Per-position values of every level -> anomaly map and image score. FP32 throughout.

    Every level's value v becomes P = exp(min(k (v - m), 0)), so that the calibrated upper quantile m of good images
    maps to 1: with k = 1 and one m everywhere, or with both position by position. The levels are added on the map's
    grid and subtracted from c, what good images reach.
    """

    blur: Tensor | None

    def __init__(self, grids: Sequence[int], size: int, config: ScoreConfig, classes: int) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.delta = config.delta if classes > 1 else None  # one class has no entropy to tell apart
        self.size = config.map or size
        self.by_position = config.by_position
        blur = gaussian_matrix(self.size, config.sigma).float() if config.sigma else None
        self.register_buffer("blur", blur, persistent=False)
        for level, grid in enumerate(self.grids):
            matrix = interpolation_matrix(grid, self.size, align_corners=True).float()
            self.register_buffer(f"upsample{level}", matrix, persistent=False)

    def total(self, values: Sequence[Tensor], ceilings: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
        """Sum over levels of P on the map's grid, [B, size, size].

        values: levels of [B, N_l]; ceilings m and gains k: the same, gains empty where every one is 1.
        """
        out: Tensor | None = None
        for level, (value, ceiling, grid) in enumerate(zip(values, ceilings, self.grids, strict=True)):
            over = value - ceiling
            if gains:
                over = over * gains[level]
            p = over.clamp_max(0).exp().reshape(-1, grid, grid)
            upsample = getattr(self, f"upsample{level}")
            up = upsample @ p @ upsample.T
            out = up if out is None else out + up
        if out is None:
            raise ValueError("a score needs at least one level")
        return out

    def _surprise(self, values: Sequence[Tensor], constants: Constants, kind: int) -> Tensor:
        ceilings, gains = ([x[:, kind] for x in of_levels] for of_levels in (constants.ceilings, constants.gains))
        reach = constants.reach[:, kind, None, None]
        out = (reach - self.total(values, ceilings, gains)).clamp_min(0)
        return out if self.blur is None else self.blur @ out @ self.blur.T

    def forward(
        self, densities: Sequence[Tensor], entropies: Sequence[Tensor], constants: Constants
    ) -> tuple[Tensor, Tensor]:
        """Map [B, 1, size, size] and score [B].

        densities, entropies: levels of [B, N_l], log-likelihood per dimension and negative class entropy.
        """
        scores = self._surprise(densities, constants, 0)
        if self.delta is not None:
            scores = scores * (self.delta + self._surprise(entropies, constants, 1))
        return scores[:, None], scores.flatten(1).amax(1)


def quantile(values: Sequence[Tensor], q: float) -> float:
    """Quantile over all elements of several tensors (torch.quantile refuses more than 2^24 elements)."""
    return float(np.quantile(torch.cat([v.flatten() for v in values]).double().cpu().numpy(), q))


def calibrated(values: Tensor, grid: int, config: ScoreConfig) -> tuple[Tensor, Tensor]:
    """Ceiling m and gain k of a level by position, both [N], from good images: values [images, N], N = grid^2.

    A position's gain is the usual deviation over its own, so that one k (v - m) means as much everywhere; it is 1 for
    values that are all the same (an entropy may be 0 everywhere).
    """
    if not config.by_position:
        one = torch.ones_like(values[0])
        return one * quantile([values], config.quantile), one
    mean, deviation = position_statistics(values, grid, config.prior, config.spread_prior)
    gain = deviation.square().mean().sqrt() / deviation
    return mean + quantile([gain * (values - mean)], config.quantile) / gain, gain
