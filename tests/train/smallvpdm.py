"""A small VPDM's configuration, and features to train it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from andon.train.method import Batch
from andon.train.methods.vpdm.config import VpdmConfig
from andon.train.methods.vpdm.model import Vpdm
from torch import Tensor


def small_config(**changes: object) -> VpdmConfig:
    values: dict[str, object] = {
        "method": "vpdm",
        "size": 64,
        "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2, 3]},
        "features": {"grid": 4, "resample": "area", "smooth": True},
        "prototypes": {"count": 4, "grid": 2, "temperature": None, "queue": 8},
        "diffusion": {"prediction": "v"},
        "denoiser": {"kind": "flat", "width": 16, "blocks": 1, "groups": 4, "embedding": 16, "time": 16},
        "score": {"space": "std", "mode": "max"},
        "sampler": "restore",
        "schedule": {"steps": 30},
    }
    return VpdmConfig.model_validate(values | changes)


@dataclass
class Data:
    """Training data from a tensor, as the loop offers it."""

    features: Mapping[str, Any]
    class_ids: Any

    def __len__(self) -> int:
        return len(self.class_ids)

    def batches(self, size: int) -> Iterator[Batch]:
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index)

    def batch(self, index: Tensor) -> Batch:
        return Batch({k: v[index] for k, v in self.features.items()}, None, self.class_ids[index], index)


def feature_data(model: Vpdm, count: int) -> Data:
    """Two kinds of images, each a smooth pattern with noise."""
    g = model.config.features.grid
    kinds = torch.randn(2, model.front.channels, 2, 2, generator=torch.Generator().manual_seed(5))
    base = torch.nn.functional.interpolate(kinds, size=(g, g), mode="bilinear")
    ids = torch.arange(count) % 2
    return Data({"features": 3 * base[ids] + 0.3 * torch.randn(count, *base.shape[1:])}, torch.zeros_like(ids))
