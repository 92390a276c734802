"""VPDM: the algebra as corrected (and the printed one refuted), transport, prototypes, training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import yaml
from andon.cli import main
from andon.runtime.errors import CalibrationError, ConfigError
from andon.train.checkpoint import load_checkpoint
from andon.train.method import Batch
from andon.train.methods.vpdm.config import DenoiserConfig, VpdmConfig
from andon.train.methods.vpdm.denoiser import FlatDenoiser, UNet
from andon.train.methods.vpdm.model import Update, Vpdm, prediction_target, roll
from andon.train.methods.vpdm.prototypes import initial_prototypes, rms_distance, sinkhorn, temperature_for
from andon.train.methods.vpdm.samplers import (
    NoiseSchedule,
    Sampler,
    calibrated,
    coefficients,
    constants_of,
    find_sampler,
    samplers,
)
from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 0.02)
TIMES = np.arange(1, 1001)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


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


# The algebra (METHODS.md 2.1).


def test_composed_forward_steps_have_variance_one_minus_a() -> None:
    mean_x, mean_y, variance = 1.0, 0.0, 0.0
    for t in TIMES:
        root = np.sqrt(SCHEDULE.a[t])
        mean_x, mean_y, variance = root * mean_x, root * mean_y + 1 - root, SCHEDULE.a[t] * variance + SCHEDULE.beta[t]
        assert abs(variance - (1 - SCHEDULE.cumulative[t])) < 1e-12
        assert abs(mean_x - np.sqrt(SCHEDULE.cumulative[t])) < 1e-12
        assert abs(mean_y - (1 - np.sqrt(SCHEDULE.cumulative[t]))) < 1e-12
    printed = 1 - np.sqrt(SCHEDULE.cumulative[1:])  # eq. 14
    assert np.abs(printed - (1 - SCHEDULE.cumulative[1:])).max() > 0.2


def posterior(t: int) -> tuple[float, float, float, float]:
    """Mean weights of x0, x_t, yhat and variance of q(x_{t-1} | x_t, x0, yhat) by conditioning a joint Gaussian."""
    a, before, now = SCHEDULE.a[t], SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t]
    covariance, marginal, prior = np.sqrt(a) * (1 - before), 1 - now, 1 - before
    gain = covariance / marginal
    on_x0 = np.sqrt(before) - gain * np.sqrt(now)
    on_y = (1 - np.sqrt(before)) - gain * (1 - np.sqrt(now))
    return on_x0, gain, on_y, prior - gain * covariance


def gamma(t: int, printed: bool = False) -> tuple[float, float, float]:
    """gamma_0, gamma_1, gamma_2 of the appendix; printed: main text eq. 15."""
    a, before, now, beta = SCHEDULE.a[t], SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t], SCHEDULE.beta[t]
    first = np.sqrt(a if printed else now) - 1
    g2 = 1 + first * (np.sqrt(a) + np.sqrt(before)) / (1 - now)
    return beta * np.sqrt(before) / (1 - now), (1 - before) * np.sqrt(a) / (1 - now), g2


def test_posterior_is_the_conditioned_gaussian_and_its_weights_sum_to_one() -> None:
    for t in range(1, 1001):
        g, brute = gamma(t), posterior(t)
        np.testing.assert_allclose(g, brute[:3], atol=1e-10)
        assert abs(sum(g) - 1) < 1e-10
        assert abs(SCHEDULE.posterior_variance(np.array(t)) - brute[3]) < 1e-12


def test_printed_gamma2_is_wrong() -> None:
    wrong = [gamma(t, printed=True) for t in range(2, 1001)]
    assert max(abs(sum(g) - 1) for g in wrong) > 0.5
    assert max(abs(g[2] - posterior(t)[2]) for t, g in enumerate(wrong, 2)) > 0.5


def step(u: Tensor, net: Tensor, row: np.ndarray, noise: Tensor) -> tuple[Tensor, Tensor]:
    return Update()(u, net, torch.from_numpy(row)[None], noise)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_step_engine_is_card_in_x(prediction: str) -> None:
    """The step in u, shifted by yhat, is Algorithm 2 in x with the appendix's posterior and sqrt(btilde) noise."""
    config = small_config(diffusion={"prediction": prediction, "clip": 1e9})
    rows = coefficients(find_sampler(config, "ddpm1000"), config)
    shape = (1, 3, 2, 2)
    u, yhat, net, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    for k in (0, 300, 700, 990, 999):
        t = 1000 - k
        root, rest = np.sqrt(SCHEDULE.cumulative[t]), np.sqrt(1 - SCHEDULE.cumulative[t])
        eps = net if prediction == "eps" else rest * u + root * net
        x = u + yhat
        x0 = (x - (1 - root) * yhat - rest * eps) / root
        g0, g1, g2 = gamma(t)
        expected = g0 * x0 + g1 * x + g2 * yhat + np.sqrt(SCHEDULE.posterior_variance(np.array(t))) * noise
        u_next, u0 = step(u, net, rows[k], noise)
        torch.testing.assert_close(u_next + yhat, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(u0 + yhat, x0, rtol=1e-9, atol=1e-9)
        printed = (x - (1 - root) * yhat - rest * eps) / root**2  # 1/alpha without the root
        if t > 500:
            assert (u0 + yhat - printed).abs().max() > 1


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_perfect_prediction_gives_back_u0_and_eps(prediction: str) -> None:
    """What training aims at is what the step engine reads, for every call of a sampler."""
    config = small_config(diffusion={"prediction": prediction, "clip": 1e9})
    sampler = find_sampler(config, "ddim10")
    u0, eps = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    after = (*sampler.times[1:], 0)
    for t, s, row in zip(sampler.times, after, coefficients(sampler, config), strict=True):
        signal, spread = (torch.tensor(f(SCHEDULE.cumulative[t])) for f in (np.sqrt, lambda a: np.sqrt(1 - a)))
        u = signal * u0 + spread * eps
        u_next, found = step(u, prediction_target(prediction, signal, spread, u0, eps), row, torch.zeros_like(u))
        torch.testing.assert_close(found, u0, rtol=1e-8, atol=1e-8)
        expected = np.sqrt(SCHEDULE.cumulative[s]) * u0 + np.sqrt(1 - SCHEDULE.cumulative[s]) * eps
        torch.testing.assert_close(u_next, expected, rtol=1e-7, atol=1e-7)


def test_last_step_adds_no_noise_and_every_sampler_ends_at_u0() -> None:
    config = small_config()
    for sampler in samplers(config).values():
        row = coefficients(sampler, config)[-1]
        u, net, noise = (torch.randn(1, 3, 2, 2, dtype=torch.float64) for _ in range(3))
        u_next, u0 = step(u, net, row, noise)
        torch.testing.assert_close(u_next, u0, rtol=0, atol=1e-7)


def test_ddim_over_all_steps_with_posterior_noise_is_ddpm() -> None:
    """Same coefficients: DDIM with sigma^2 = btilde has direction sqrt(1 - A_s - sigma^2), which is DDPM's mean."""
    config = small_config(diffusion={"clip": 1e9})
    rows = coefficients(find_sampler(config, "ddpm1000"), config)
    u, u0 = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    for k in (0, 500, 990):
        t = 1000 - k
        before, now = SCHEDULE.cumulative[t - 1], SCHEDULE.cumulative[t]
        mean = (
            np.sqrt(before) * SCHEDULE.beta[t] / (1 - now) * u0 + np.sqrt(SCHEDULE.a[t]) * (1 - before) / (1 - now) * u
        )
        eps = (u - np.sqrt(now) * u0) / np.sqrt(1 - now)
        torch.testing.assert_close(rows[k][2] * u0 + rows[k][3] * eps, mean, rtol=1e-9, atol=1e-9)
        assert abs(rows[k][4] ** 2 - SCHEDULE.posterior_variance(np.array(t))) < 1e-12


def test_clip_bounds_the_estimate() -> None:
    config = small_config()
    row = coefficients(find_sampler(config, "ddim10"), config)[0]
    _, u0 = step(torch.full((1, 1, 2, 2), 1e3).double(), torch.zeros(1, 1, 2, 2).double(), row, torch.zeros(1).double())
    assert u0.abs().max() <= config.diffusion.clip


def test_sampler_times() -> None:
    config = small_config()
    assert find_sampler(config, "ddim10").times == (1000, 810, 640, 490, 360, 250, 160, 90, 40, 10)
    assert find_sampler(config, "ddim10_t400").times == (400, 324, 256, 196, 144, 100, 64, 36, 16, 4)
    assert find_sampler(config, "ddpm1000").times == tuple(range(1000, 0, -1))
    assert find_sampler(config, "restore") == Sampler("restore", (300,), start="input")
    for sampler in samplers(config).values():
        assert list(sampler.times) == sorted(set(sampler.times), reverse=True)
    with pytest.raises(ConfigError, match="unknown sampler"):
        find_sampler(config, "euler")


def test_rolled_noise_never_repeats_at_a_position() -> None:
    noise = torch.randn(1, 152, 14, 14)
    seen = [noise[0, 3, 5, 6]]
    for _ in range(999):
        noise = roll(noise)
        seen.append(noise[0, 3, 5, 6])
    assert len(set(torch.stack(seen).tolist())) == 1000


# Transport (METHODS.md 2.3).


@pytest.mark.parametrize("rows", [3, 40])
def test_sinkhorn_matches_pot(rows: int) -> None:
    cost = torch.rand(rows, 7, dtype=torch.float64)
    plan = sinkhorn(cost, 0.05, 500)
    uniform = np.full(rows, 1 / rows), np.full(7, 1 / 7)
    reference = ot.bregman.sinkhorn_log(*uniform, cost.numpy(), 0.05, numItermax=5000, stopThr=1e-14)
    np.testing.assert_allclose(plan.numpy(), reference, atol=1e-8)


def test_balanced_plan_of_one_query_is_uniform() -> None:
    """Why the condition is not the balanced plan: with one frame the cost has no say."""
    plan = sinkhorn(torch.rand(1, 9, dtype=torch.float64), 0.05, 50)
    torch.testing.assert_close(plan, torch.full((1, 9), 1 / 9, dtype=torch.float64))


def test_rms_distance() -> None:
    rows, prototypes = torch.randn(4, 30), torch.randn(5, 30)
    expected = torch.cdist(rows, prototypes) / 30**0.5
    torch.testing.assert_close(rms_distance(rows, prototypes, prototypes.square().sum(1)), expected)


def test_scope_is_decided_by_the_images_said_and_kept(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prototypes={"count": 4, "grid": 2, "scope": "auto"})
    assert [config.for_images(n).prototypes.scope for n in (7, 8)] == ["position", "image"]
    assert small_config().for_images(1) == small_config(), "what is set stays"
    short = ("backbone.weights=random:0", "schedule.steps=2", "schedule.warmup=1", "augment.images=0")
    for count, scope in ((16, "image"), (17, "position")):  # of 33 images
        settings = [part for s in (*short, f"prototypes.count={count}") for part in ("--set", s)]
        out = tmp_path / scope
        command = ["train", "--method", "vpdm", "--data", str(synthetic_data), "--no-eval", "--out", str(out)]
        assert main([*command, *settings]) == 0
        assert f'decided by the number of images: prototypes.scope="{scope}"\n' in capsys.readouterr().out
        model = load_checkpoint(out)
        assert isinstance(model, Vpdm) and model.config.prototypes.scope == scope
        assert model.prototypes.shape[1] == (152 * 49 if scope == "image" else 152)


@pytest.mark.parametrize("scope", ["image", "position"])
def test_condition_of_an_image_is_its_own(scope: str) -> None:
    config = small_config(prototypes={"count": 4, "grid": 2, "scope": scope, "temperature": None, "perplexity": 1.2})
    model = Vpdm(config, ("a",))
    data = feature_data(model, 12)
    model.prepare(data)
    with torch.no_grad():
        _, together, _ = model.conditioned(data.features["features"])
        x0, alone, weights = model.conditioned(data.features["features"][3:4])
    torch.testing.assert_close(alone, together[3:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert (x0 - alone).square().mean() < 0.8 * x0.square().mean()


def test_initial_prototypes_and_temperature() -> None:
    rows = torch.cat((torch.randn(20, 6), torch.randn(20, 6) + 8))
    centres = initial_prototypes(rows, 2, 0)
    means = torch.stack((rows[:20].mean(0), rows[20:].mean(0)))
    assert torch.cdist(centres, means).min(1).values.max() < 1e-4
    many = initial_prototypes(rows[:5], 12, 0)
    assert many.shape == (12, 6) and len(torch.unique(many, dim=0)) > 5
    distance = torch.rand(50, 12)
    p = torch.softmax(-distance / temperature_for(distance, 2.5), 1)
    assert abs(float(torch.exp(-(p * p.log()).sum(1).mean())) - 2.5) < 1e-3


# Denoiser, training, scoring.


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


def test_stop_gradient_keeps_the_residual_out_of_the_prototypes() -> None:
    def gradient(stop: bool) -> Tensor:
        torch.manual_seed(1)
        model = Vpdm(small_config(diffusion={"prediction": "v", "stop_gradient": stop}), ("a",))
        data = feature_data(model, 8)
        model.prepare(data)
        model.training_step(data.batch(torch.arange(8)), 0)["loss"].backward()
        assert model.prototypes.grad is not None
        return model.prototypes.grad

    assert not torch.allclose(gradient(True), gradient(False))


def test_queue_holds_the_newest_rows() -> None:
    model = Vpdm(small_config(), ("a",))
    data = feature_data(model, 12)
    model.prepare(data)
    for step_number in range(3):
        rows = model.condition.rows(
            model.standardize(data.batch(torch.arange(4) + 4 * step_number).features["features"])
        )
        model.training_step(data.batch(torch.arange(4) + 4 * step_number), step_number)
        model.after_step(step_number)
        assert int(model.queued) == min(8, 4 * (step_number + 1))
        torch.testing.assert_close(model.queue[:4], rows)


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


def test_calibration_is_the_products_own() -> None:
    """Where residuals of a product's good images are large, more is expected of that product and of no other."""
    config = small_config(score={"space": "std", "mode": "max", "by_position": True, "prior": 1, "spread_prior": 1})
    model = Vpdm(config, ("left", "right"))
    data = feature_data(model, 40)
    data.class_ids[:] = torch.arange(40) % 2
    features, grid = data.features["features"], config.features.grid
    model.prepare(data)
    features[0::2, :, :, : grid // 2] *= 4
    features[1::2, :, :, grid // 2 :] *= 4
    model.finalize(data)
    mean = model.get_buffer("mean_restore")[:, 0]
    left, right = mean[:, :, : grid // 2].mean((1, 2)), mean[:, :, grid // 2 :].mean((1, 2))
    assert left[0] > 1.5 * right[0] and right[1] > 1.5 * left[1]
    with torch.no_grad():
        own = model.score_features(features, data.class_ids).score
        other = model.score_features(features, 1 - data.class_ids).score
    assert own.max() < other.min()


def test_finalize_calibrates_when_asked() -> None:
    data = feature_data(Vpdm(small_config(), ("a",)), 12)
    for asked in (False, True):
        model = Vpdm(small_config(score={"space": "std", "mode": "max", "by_position": asked}), ("a",))
        model.prepare(data)
        before = {name: buffer.clone() for name, buffer in constants(model).items()}
        model.finalize(data)
        assert bool(before) == asked
        assert all((buffer != before[name]).all() for name, buffer in constants(model).items())
    with pytest.raises(CalibrationError, match="held-out good image of product 'a'"):
        model.finalize(Data({"features": data.features["features"][:0]}, data.class_ids[:0]))


def constants(model: Vpdm) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers() if name.startswith(("mean_", "deviation_"))}


def test_every_sampler_is_scored_by_its_own_constants() -> None:
    """What one sampler leaves of good images says nothing about another: constants are as if each were alone."""
    score = {"space": "std", "mode": "max", "by_position": True, "prior": 0, "spread_prior": 0}
    model = Vpdm(small_config(score=score), ("a",))
    for parameter in model.denoiser.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = feature_data(model, 30)
    model.prepare(data)
    model.finalize(data)
    features, class_ids = data.features["features"], data.class_ids
    for name in ("restore", "ddim25", "ddim10_t400"):
        alone = Vpdm(small_config(score=score, sampler=name), ("a",))
        alone.load_state_dict(model.state_dict(), strict=False)
        for buffer in constants(alone).values():
            buffer.fill_(9)
        alone.finalize(data)
        sampler = find_sampler(model.config, name)
        with torch.no_grad():
            torch.testing.assert_close(
                model.score_features(features, class_ids, sampler).map, alone.score_features(features, class_ids).map
            )
    assert not torch.allclose(model.get_buffer("mean_restore"), model.get_buffer("mean_ddim25"), rtol=0.05)


def test_ddpm_has_constants_of_its_own_only_where_it_is_the_configured_sampler() -> None:
    score = {"space": "std", "by_position": True}
    for name, expected in (("restore", "ddim50"), ("ddpm1000", "ddpm1000")):
        config = small_config(score=score, sampler=name)
        assert constants_of(config, find_sampler(config, "ddpm1000")) == expected
        model = Vpdm(config, ("a",))
        own = {buffer.removeprefix("mean_") for buffer in constants(model) if buffer.startswith("mean_")}
        assert own == {s.name for s in calibrated(config)}
        assert ("ddpm1000" in own) == (name == "ddpm1000")
        assert all(buffer in constants(model) for s in samplers(config).values() for buffer in model.usual(s))


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
