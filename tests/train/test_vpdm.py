"""VPDM: the denoiser, training, scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from andon.train.methods.vpdm.config import DenoiserConfig, VpdmConfig
from andon.train.methods.vpdm.denoiser import FlatDenoiser, UNet
from andon.train.methods.vpdm.model import Vpdm
from andon.train.methods.vpdm.samplers import find_sampler

from .smallvpdm import Data, feature_data, small_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def fit(model: Vpdm, data: Data, steps: int) -> None:
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        adam.zero_grad()
        model.training_step(data.batch(torch.randint(len(data), (8,))), step)["loss"].backward()
        adam.step()
        model.after_step(step)
    model.eval()


def diffusion_loss(model: Vpdm, data: Data) -> float:
    """Mean over many draws of t and noise, the same ones at every call."""
    torch.manual_seed(7)
    batch = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return float(np.mean([float(model.training_step(batch, 0)["diffusion"]) for _ in range(20)]))


@pytest.mark.parametrize(
    ("channels", "grid", "config", "millions"),
    [
        (272, 32, DenoiserConfig(), 30.0),
        (192, 32, DenoiserConfig(width=64, embedding=256), 7.6),
        (152, 14, DenoiserConfig(kind="flat", width=64, blocks=4, groups=8, embedding=256), 0.79),
    ],
)
def test_denoiser_sizes(channels: int, grid: int, config: DenoiserConfig, millions: float) -> None:
    net = FlatDenoiser(channels, config) if config.kind == "flat" else UNet(channels, grid, config)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count - millions) < 0.01 * millions + 0.005  # METHODS.md 2.4, Annex F.4


def test_unet_uses_every_parameter_and_input() -> None:
    net = UNet(6, 8, DenoiserConfig(width=8, attention=(4,), heads=2, groups=4, embedding=16, time=16))
    inputs = [torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8, requires_grad=True)]
    code = torch.randn(2, 16, requires_grad=True)
    assert torch.equal(net(*inputs, code), torch.zeros(2, 6, 8, 8))
    for parameter in net.head.parameters():
        torch.nn.init.normal_(parameter)
    net(*inputs, code).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*net.parameters(), *inputs, code))


@pytest.mark.parametrize("kind", ["flat", "unet"])
def test_learns_normal(kind: str) -> None:
    denoiser = {"kind": kind, "width": 16, "blocks": 1, "groups": 4, "embedding": 16, "time": 16, "attention": [2]}
    model = Vpdm(small_config(denoiser=denoiser), ("a",))
    data = feature_data(model, 32)
    model.prepare(data)
    before = diffusion_loss(model, data)
    fit(model, data, 60)
    assert diffusion_loss(model, data) < 0.9 * before
    good = feature_data(model, 16).features["features"]
    bad = good.clone()
    bad[:, :, 1:3, 1:3] += 1.5 * torch.randn(16, bad.shape[1], 2, 2)
    with torch.no_grad():
        for name in ("restore", "ddim10"):
            sampler = find_sampler(model.config, name)
            of_good, of_bad = (model.score_features(x, data.class_ids[:16], sampler) for x in (good, bad))
            assert of_bad.score.min() > of_good.score.max()
            again = model.score_features(good, data.class_ids[:16], sampler)
            assert torch.equal(of_good.score, again.score)


def test_score_of_a_frame_is_its_own() -> None:
    model = Vpdm(small_config(), ("a", "b")).eval()
    model.prototypes.data.normal_()
    for parameter in model.denoiser.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        together = model(images, torch.tensor([0, 1, 0])).score
        alone = model(images[1:2], torch.tensor([0])).score
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-5)
    assert together.std() > 0


def test_corner_rule_moves_the_map_and_not_the_score() -> None:
    score = {"space": "std", "mode": "max"}
    outer, inner = (
        Vpdm(small_config(score=score | {"align_corners": rule}), ("a",)).eval().scoring for rule in (True, False)
    )
    grid = small_config().features.grid
    x0 = torch.zeros(1, 3, grid, grid)
    x0[:, :, 0, 0] = 1
    nothing, std = torch.zeros_like(x0), torch.ones(1, 3, 1, 1)
    (a, of_a), (b, of_b) = outer(x0, nothing, nothing, std), inner(x0, nothing, nothing, std)
    assert torch.equal(of_a, of_b)
    assert a[0, 0, 0, 0] == b[0, 0, 0, 0] > a[0, 0, 1, 1]
    assert b[0, 0, 1, 1] == b[0, 0, 0, 0]


@pytest.mark.slow
def test_paper_preset_takes_a_step_at_paper_size() -> None:
    values = yaml.safe_load((CONFIGS / "methods/vpdm.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    model = Vpdm(VpdmConfig.model_validate(values), tuple(f"class{i}" for i in range(15)))
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        features = model.frontend(images)
    assert features["features"].shape == (2, 272, 32, 32) and model.prototypes.shape == (50, 17408)
    data = Data({"features": features["features"]}, torch.zeros(2, dtype=torch.int64))
    model.prepare(data)
    (optimizer,) = model.optimizers()
    before = model.prototypes.detach().clone()
    loss = model.training_step(data.batch(torch.arange(2)), 0)["loss"]
    loss.backward()
    optimizer.optimizer.step()
    assert torch.isfinite(loss) and not torch.equal(before, model.prototypes)
