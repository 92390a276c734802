"""Patch features: backbone taps, 3x3 mean, one grid, one row per patch. Shared by knn and foct (METHODS.md 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....runtime.errors import ConfigError
from ...align import Align
from ...backbones import Backbone

if TYPE_CHECKING:
    from ...method import BackboneConfig
    from .config import PatchConfig


class PatchFeatures(nn.Module):
    """uint8 [B, S, S, 3] to patches [B, grid * grid, d] float32, row by row of the grid.

    Raises:
        ConfigError: `reduce` does not divide the taps' channels.
    """

    def __init__(self, backbone: BackboneConfig, patches: PatchConfig) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        # Zeros count at the border, as in PatchCore's unfold: it shrinks border patches, where the padding of the
        # backbone makes features that vary for no reason of the part. Tile: AUROC .82 with, .73 without.
        self.smooth = nn.AvgPool2d(3, stride=1, padding=1)
        self.align = Align(patches.grid, "bilinear", align_corners=False)
        self.grid = patches.grid
        channels = self.backbone.channels
        self.reduce = tuple(patches.reduce or channels)
        fits = len(self.reduce) == len(channels)
        if not fits or any(c % r for c, r in zip(channels, self.reduce, strict=True)):
            raise ConfigError(
                "patches.reduce does not fit the backbone",
                found=self.reduce,
                expected=f"for each tap a divisor of its channels {channels}",
                next_step="correct patches.reduce",
            )
        self.dim = sum(self.reduce)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, S, S, 3] uint8 RGB."""
        maps = []
        for x, width in zip(self.backbone(images), self.reduce, strict=True):
            smooth = self.smooth(x)
            if x.shape[1] != width:
                smooth = smooth.unflatten(1, (width, x.shape[1] // width)).mean(2)
            maps.append(smooth)
        return self.align(maps).flatten(2).transpose(1, 2)


class PatchFrontend(nn.Module):
    """The cached part: dict with one feature, "patches"."""

    def __init__(self, features: PatchFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: [B, S, S, 3] uint8; patches: [B, m, d]."""
        return {"patches": self.features(images)}


def squared_distances(rows: Tensor, bank: Tensor, valid: Tensor | None = None) -> Tensor:
    """max(|x|^2 + |b|^2 - 2 x b^T, 0) in MatMul form (METHODS.md 6.2): rows [m, d], bank [n, d] -> [m, n].

    valid: [n] of 0 or 1; empty rows come out farther than any patch can be. Both sides should be centred.
    """
    far = torch.sum(bank * bank, dim=1)
    if valid is not None:
        far = far + (1.0 - valid) * EMPTY
    squared = torch.sum(rows * rows, dim=1, keepdim=True) + (far[None, :] - 2.0 * torch.matmul(rows, bank.T))
    return torch.clamp(squared, min=0.0)


#: Squared distance added to empty rows; float32 still resolves 1 beside it, and no feature comes near.
EMPTY = 1e7
