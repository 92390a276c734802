"""Backbone maps of an image's tiles, and the image to reconstruct; alone in its file, which keys the feature cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones import Backbone
from .config import PwaeConfig
from .tiles import split


class TileMaps(nn.Module):
    """uint8 [B, S, S, 3] to ``maps`` [B, T, C, h, w], one per tile in row-major order, and ``target`` [B, 3, t, t].

    The target is the image in the backbone's normalised colours, reduced by averaging.
    """

    def __init__(self, config: PwaeConfig) -> None:
        super().__init__()
        self.grid = config.tiles.grid
        self.factor = config.size // config.decoder.target
        self.backbone = Backbone(config.backbone, trainable=not config.encoder.frozen)
        self.channels = self.backbone.channels[-1]
        tile = config.size // config.tiles.grid
        with torch.no_grad():
            probe = torch.zeros(2, tile, tile, 3, dtype=torch.uint8)
            mode = self.backbone.training
            self.side = int(self.backbone.eval()(probe)[-1].shape[-1])
            self.backbone.train(mode)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: [B, S, S, 3] uint8 RGB."""
        x = self.backbone.normalize(images)
        tiles = split(x, self.grid)
        maps = self.backbone.maps(tiles.flatten(0, 1))[-1].unflatten(0, (-1, self.grid**2))
        return {"maps": maps, "target": F.avg_pool2d(x, self.factor) if self.factor > 1 else x}
