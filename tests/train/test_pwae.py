"""P-WAE: tiles, priors, dependence, decoder, score (METHODS.md 3 and 11.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from andon.train.method import Batch
from andon.train.methods.pwae import METHOD, loss
from andon.train.methods.pwae.config import LayerConfig, PwaeConfig
from andon.train.methods.pwae.model import ErrorScore, Layer, PwaeModel
from andon.train.methods.pwae.tiles import assemble, inverse, permutations, reorder, split
from scipy.stats import t as student

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(preset: str, classes: tuple[str, ...] = ("a", "b"), **changes: Any) -> PwaeModel:
    values = yaml.safe_load((CONFIGS / preset / "pwae.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    model = METHOD.build(PwaeConfig.model_validate(values | changes), classes)
    assert isinstance(model, PwaeModel)
    return model


# ---------------------------------------------------------------- tiles


def test_inverse_permutation_restores_the_image() -> None:
    images = torch.randn(4, 3, 30, 30)
    tiles = split(images, 3)
    assert torch.equal(tiles[:, 5], images[:, :, 10:20, 20:30])
    order = permutations(9, 20, seed=0)[torch.tensor([0, 3, 7, 20])]
    shuffled = reorder(tiles, order)
    assert torch.equal(assemble(shuffled, 3)[0], images[0])
    assert not torch.equal(assemble(shuffled, 3)[1], images[1])
    assert torch.equal(assemble(reorder(shuffled, inverse(order)), 3), images)


def test_permutations_are_distinct_and_far_apart() -> None:
    orders = permutations(9, 100, seed=0)
    assert orders.shape == (101, 9)
    assert torch.equal(orders[0], torch.arange(9))
    assert (orders.sort(dim=1).values == torch.arange(9)).all()
    different = (orders[:, None] != orders[None]).sum(dim=-1) + 9 * torch.eye(101, dtype=torch.long)
    assert different.min() >= 6
    assert torch.equal(orders, permutations(9, 100, seed=0))
    assert len(permutations(4, 1000, seed=0)) == 24, "four tiles have no more orders"


def test_codes_of_shuffled_tiles_are_the_shuffled_codes() -> None:
    model = build("edge").eval()
    frames = torch.randint(0, 256, (1, 240, 240, 3), dtype=torch.uint8)
    order = model.orders[torch.tensor([5])]
    mosaic = assemble(reorder(split(frames.permute(0, 3, 1, 2), 3), order), 3).permute(0, 2, 3, 1).contiguous()
    with torch.no_grad():
        straight, shuffled = model.maps(frames)["maps"], model.maps(mosaic)["maps"]
    torch.testing.assert_close(model.codes(shuffled), reorder(model.codes(straight), order), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.latents(shuffled), reorder(model.latents(straight), order), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- losses


def test_prior_is_student_t() -> None:
    drawn = loss.student_t(200_000, 1, 5.0, torch.zeros(1)).flatten().numpy()
    for level in (0.05, 0.25, 0.5, 0.9, 0.99):
        assert np.quantile(drawn, level) == pytest.approx(student.ppf(level, df=5), abs=0.04)


def test_sliced_distance_is_zero_to_itself_and_grows_with_a_shift() -> None:
    codes = torch.randn(32, 1, 8)
    theta = loss.directions(64, 8, codes)
    shifts = torch.zeros(1, 8)
    assert loss.sliced_wasserstein(codes, codes[:, 0], shifts, theta) == 0
    prior = loss.student_t(256 * 32, 8, 5.0, codes)
    sample = loss.student_t(32, 8, 5.0, codes)[:, None]
    distances = [float(loss.sliced_wasserstein(sample + s, prior, shifts, theta)) for s in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]
    moved = loss.sliced_wasserstein(sample + 4.0, prior, torch.full((1, 8), 4.0), theta)
    assert float(moved) == pytest.approx(distances[0], rel=1e-3), "each tile is held to its own centre"


def test_nhsic_tells_dependence_from_independence() -> None:
    x = torch.randn(64, 3)
    same = loss.normalised_hsic(loss.normalised_gram(x), loss.normalised_gram(x @ torch.randn(3, 3)))
    other = loss.normalised_hsic(loss.normalised_gram(x), loss.normalised_gram(torch.randn(64, 3)))
    assert same > 1.5 * other > 0
    gram = loss.normalised_gram(x)
    centring = torch.eye(64, dtype=torch.float64) - 1 / 64
    kernel = torch.exp(-(torch.cdist(x.double(), x.double()) ** 2) / (2 * 25 * 3)) @ centring
    expected = kernel @ torch.linalg.inv(kernel + 1e-5 * 64 * torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(gram, expected, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- decoder and score


def test_convolution_before_the_resize_equals_after() -> None:
    layer = Layer(5, LayerConfig(channels=7, up=True), side=6)
    x = torch.randn(2, 5, 6, 6)
    resized = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(layer(x), layer.norm(layer.conv(resized)).relu(), rtol=1e-4, atol=1e-5)


def test_threshold_one_is_the_and_rule() -> None:
    score = ErrorScore(side=12, grid=3, sigma=0.0)
    x = torch.randn(200, 3, 12, 12)
    reconstruction = x + 0.5 * torch.randn(200, 1, 12, 12) * torch.rand(200, 1, 1, 1)
    nu = torch.full((200, 10), 0.3)
    errors, _, scores = score(x, reconstruction, nu)
    squared = (x - reconstruction).square()
    torch.testing.assert_close(errors[:, 0], squared.mean(dim=(1, 2, 3)).sqrt())
    torch.testing.assert_close(errors[:, 6], squared[:, :, 4:8, 8:12].mean(dim=(1, 2, 3)).sqrt())
    normal = (errors < nu).all(dim=1)
    assert 0 < normal.sum() < 200
    assert torch.equal(scores < 1, normal)


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("mode", ["bottleneck", "spatial"])
def test_learns_to_reconstruct_and_finds_a_blot(mode: str) -> None:
    decoder = {"target": 48, "layers": [{"channels": 32, "up": True}, {"channels": 16, "up": True}]}
    model = build("edge", mode=mode, size=96, decoder=decoder)
    ramp = torch.linspace(60, 180, 96)
    frames = (ramp[None, None, :, None] + 20 * torch.randn(8, 1, 1, 1)).clamp(0, 255).expand(8, 96, 96, 3)
    frames = frames.to(torch.uint8).contiguous()
    ids = torch.arange(8) % 2
    with torch.no_grad():
        features = model.maps(frames)
    batch = Batch(features, None, ids, torch.arange(8))
    (optimizer,) = model.optimizers()
    model.train()
    found = []
    for step in range(60):
        losses = model.training_step(batch, step)
        optimizer.optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.optimizer.step()
        found.append({k: float(v.detach()) for k, v in losses.items()})
    assert found[-1]["mse"] < 0.5 * found[0]["mse"]
    assert found[-1]["swd"] < found[0]["swd"]

    class Holdout:
        def __init__(self) -> None:
            self.features: Mapping[str, Any] = batch.features
            self.class_ids: Any = ids

        def __len__(self) -> int:
            return 8

        def batches(self, size: int) -> Any:
            return iter([batch])

    model.finalize(Holdout())
    with torch.no_grad():
        good = model(frames, ids)
        blot = frames.clone()
        blot[:, 40:52, 40:52] = 255
        bad = model(blot, ids)
    assert good.score.max() < 1.1
    assert bad.score.min() > good.score.max()
    peak = bad.map.flatten(1).argmax(dim=1)
    assert ((peak // 48 >= 17) & (peak // 48 <= 28) & (peak % 48 >= 17) & (peak % 48 <= 28)).all()


def test_paper_preset_takes_a_training_step_at_full_size() -> None:
    model = build("methods", classes=("screw",))
    assert [layer.side for layer in model.decoder.each_layer] == [24, 22, 44, 38, 76, 152, 304, 302]
    assert model.frontend is None
    frames = torch.randint(0, 256, (2, 300, 300, 3), dtype=torch.uint8)
    model.train()
    losses = model.training_step(Batch({}, frames, torch.zeros(2, dtype=torch.long), torch.arange(2)), 0)
    losses["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, "the backbone trains along"
    assert any(n.startswith("maps.backbone.net.layer4") for n, p in model.named_parameters() if p.grad is not None)
    (optimizer,) = model.optimizers()
    optimizer.optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_spatial_mode_at_full_size_has_the_paper_s_decoder() -> None:
    model = build("methods", classes=("screw",), mode="spatial")
    decoder = sum(p.numel() for n, p in model.decoder.named_parameters() if "norm" not in n)
    assert decoder == pytest.approx(6.81e6, rel=0.01)
