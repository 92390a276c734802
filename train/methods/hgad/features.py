"""The frozen front end of HGAD: an image pyramid through one backbone, one feature map per level."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...align import Mean3x3
from ...backbones import Backbone
from .config import HgadConfig


class LevelFeatures(nn.Module):
    """uint8 [B, S, S, 3] at network size -> {"e1": [B, d_1, g_1, g_1], "e2": ...}.

    channels, grids: d_l and g_l of every level; names: the keys.
    """

    def __init__(self, config: HgadConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        self.smooth = Mean3x3() if config.smooth else nn.Identity()
        self.names = tuple(f"e{number + 1}" for number in range(len(config.levels)))
        taps = config.backbone.taps
        self.channels = tuple(self.backbone.channels[taps.index(level.tap)] for level in config.levels)
        strides = [self.backbone.strides[taps.index(level.tap)] for level in config.levels]
        self.grids = tuple(-(-size // s) for size, s in zip(config.sizes, strides, strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pixels = self.backbone.normalize(images)
        out: dict[str, Tensor] = {}
        passes: dict[int, list[Tensor]] = {}
        for name, level, size in zip(self.names, self.config.levels, self.config.sizes, strict=True):
            if size not in passes:
                passes[size] = self.backbone.maps(self._resize(pixels, size))
            maps = passes[size][self.config.backbone.taps.index(level.tap)]
            out[name] = self.smooth(maps)
        return out

    @staticmethod
    def _resize(pixels: Tensor, size: int) -> Tensor:
        if pixels.shape[-1] == size:
            return pixels
        return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=True)
