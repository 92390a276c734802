"""Feature modules that several methods share; all export with static shapes at opset 17."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone, static_size
from .method import BackboneConfig, TrainingData

Resample = Literal["area", "bilinear"]


class Mean3x3(nn.Module):
    """3x3 average of each channel over the pixels that exist (no zeros from outside). [B, C, H, W] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Align(nn.Module):
    """Bring maps to one grid and concatenate them: a list of [B, C_i, H_i, W_i] to [B, sum C_i, grid, grid].

    area: average pooling, for maps that are an integer multiple of the grid; smaller ones are enlarged bilinearly.
    bilinear: sparse point sampling without antialiasing, as UniAD and HVQ-Trans do it (METHODS.md 0.3).
    """

    def __init__(self, grid: int, mode: Resample = "area", *, align_corners: bool = True):
        super().__init__()
        self.grid = grid
        self.mode = mode
        self.align_corners = align_corners

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: [B, C_i, H_i, W_i] each."""
        return torch.cat([self._one(m) for m in maps], dim=1)

    def _one(self, x: Tensor) -> Tensor:
        size = static_size(x)[1]
        if size == self.grid:
            return x
        if self.mode == "area" and size % self.grid == 0:
            return F.avg_pool2d(x, size // self.grid)
        return F.interpolate(x, size=(self.grid, self.grid), mode="bilinear", align_corners=self.align_corners)


class Standardize(nn.Module):
    """(x - mean) / std per channel, with constants from the training set. [B, C, H, W] to the same."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return (x - self.mean) / self.std

    @torch.no_grad()
    def fit(self, data: TrainingData, feature: str, *, batch: int = 64, floor: float = 1e-3) -> None:
        """Set the constants from `data.features[feature]`, in float64 and one pass.

        floor: smallest std, as a share of the mean over the channels. A channel that is constant on good images and
        moves on a defect would else leave FP16's range; in the edge presets the quietest has .6 of the median.
        """
        channels = self.mean.shape[1]
        total = torch.zeros(channels, dtype=torch.float64)
        square = torch.zeros(channels, dtype=torch.float64)
        count = 0
        for part in data.batches(batch):
            x = part.features[feature].double()
            total += x.sum((0, 2, 3))
            square += x.square().sum((0, 2, 3))
            count += x.shape[0] * x.shape[2] * x.shape[3]
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        self.mean.copy_(mean.view(1, -1, 1, 1))
        std = variance.sqrt()
        self.std.copy_(std.clamp_min(max(floor * float(std.mean()), 1e-6)).view(1, -1, 1, 1))


class AlignedFeatures(nn.Module):
    """Backbone, 3x3 average of each tap if asked for, alignment: uint8 [B, S, S, 3] to [B, C, grid, grid]."""

    def __init__(
        self,
        config: BackboneConfig,
        grid: int,
        *,
        mode: Resample = "area",
        align_corners: bool = True,
        smooth: bool = True,
    ):
        super().__init__()
        self.backbone = Backbone(config)
        self.channels = sum(self.backbone.channels)
        self.smooth = Mean3x3() if smooth else nn.Identity()
        self.align = Align(grid, mode, align_corners=align_corners)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, S, S, 3] uint8 RGB."""
        return self.align([self.smooth(m) for m in self.backbone(images)])
