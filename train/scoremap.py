"""Score-map post-processing as constant matrices (METHODS.md 0.4), the same module in training and in the engines.

Bilinear upsampling, a Gaussian filter and average pooling are linear and separable, so all of them together are
``A @ M @ A.T``: a few small MatMuls in FP32 instead of Resize, Pad and Conv corner cases in TensorRT.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

ScoreMode = Literal["max", "pool", "top", "mean"]


def interpolation_matrix(source: int, target: int, align_corners: bool) -> Tensor:
    """Matrix R [target, source] float64 such that R @ v is ``F.interpolate`` (linear) of v."""
    identity = torch.eye(source, dtype=torch.float64)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=align_corners)[0].T.contiguous()


def gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Toeplitz matrix [size, size] float64 of scipy's Gaussian filter ('reflect' borders, truncated at 4 sigma)."""
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    return torch.from_numpy(gaussian_filter1d(np.eye(size), sigma, axis=0, mode="reflect", truncate=4.0))


def pooling_matrix(size: int, window: int) -> Tensor:
    """Band matrix [size - window + 1, size] float64 of the stride-1 average pool."""
    rows = size - window + 1
    band = torch.zeros(rows, size, dtype=torch.float64)
    for i in range(rows):
        band[i, i : i + window] = 1.0 / window
    return band


class ScoreMap(nn.Module):
    """Grid map -> pixel map and image score.

    Args:
        grid: side of the input map.
        size: side of the output map.
        align_corners: corner rule of the bilinear upsampling.
        sigma: standard deviation of the Gaussian in output pixels, 0 for none.
        mode: image score: ``max`` of the grid map; ``pool``: maximum of the `window` x `window` stride-1 average pool
            of the upsampled map (HVQ-Trans, UniAD); ``top``: mean of the largest `top_share` of the grid map; ``mean``.
    """

    upsample: Tensor
    pool: Tensor

    def __init__(
        self,
        grid: int,
        size: int,
        *,
        align_corners: bool = True,
        sigma: float = 0.0,
        mode: ScoreMode = "max",
        window: int = 16,
        top_share: float = 0.02,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.top = max(1, round(top_share * grid * grid))
        upsample = gaussian_matrix(size, sigma) @ interpolation_matrix(grid, size, align_corners)
        pool = pooling_matrix(size, window) @ upsample
        self.register_buffer("upsample", upsample.float(), persistent=False)
        self.register_buffer("pool", pool.float(), persistent=False)

    def forward(self, grid_map: Tensor) -> tuple[Tensor, Tensor]:
        """grid_map: [B, 1, grid, grid] float32 -> map [B, 1, size, size], score [B]."""
        pixel_map = self.upsample @ grid_map @ self.upsample.T
        return pixel_map, self.score(grid_map)

    def score(self, grid_map: Tensor) -> Tensor:
        """Image score [B] of a grid map [B, 1, grid, grid]."""
        if self.mode == "pool":
            return (self.pool @ grid_map @ self.pool.T).flatten(1).amax(dim=1)
        flat = grid_map.flatten(1)
        if self.mode == "max":
            return flat.amax(dim=1)
        if self.mode == "mean":
            return flat.mean(dim=1)
        return flat.topk(self.top, dim=1).values.mean(dim=1)
