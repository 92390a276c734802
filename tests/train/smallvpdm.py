"""A small VPDM's configuration, and features to train it on."""

from __future__ import annotations

import torch
from andon.train.methods.vpdm.config import VpdmConfig
from andon.train.methods.vpdm.model import Vpdm

from .tensordata import Data


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


def feature_data(model: Vpdm, count: int) -> Data:
    """Two kinds of images, each a smooth pattern with noise."""
    g = model.config.features.grid
    kinds = torch.randn(2, model.front.channels, 2, 2, generator=torch.Generator().manual_seed(5))
    base = torch.nn.functional.interpolate(kinds, size=(g, g), mode="bilinear")
    ids = torch.arange(count) % 2
    return Data({"features": 3 * base[ids] + 0.3 * torch.randn(count, *base.shape[1:])}, torch.zeros_like(ids))
