"""HGAD: the flow is exact, the mixture is the mixture, and a frame's score depends on that frame alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from andon.runtime.errors import CalibrationError
from andon.train.byposition import typical
from andon.train.features import FeatureSet
from andon.train.loop import fit as run
from andon.train.method import Batch
from andon.train.methods.hgad.config import HgadConfig, LossConfig, ScoreConfig
from andon.train.methods.hgad.features import LevelFeatures
from andon.train.methods.hgad.flow import CouplingBlock, Flow, position_code, random_rotation
from andon.train.methods.hgad.mixture import Mixture, intra_density, negative_entropy
from andon.train.methods.hgad.model import Hgad
from andon.train.methods.hgad.score import calibrated
from torch.autograd.functional import jacobian
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from .tensordata import Data

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small_config(**changes: object) -> HgadConfig:
    values: dict[str, object] = {
        "method": "hgad",
        "size": 64,
        "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2, 3]},
        "levels": [{"size": 64, "tap": 2, "sample": 0.5}, {"size": 64, "tap": 3}],
        "smooth": True,
        "standardize": True,
        "centres": 3,
        "flow": {"blocks": 2, "position": 16},
        "loss": {"information": 1.0, "use_lz": False},
        "score": {"map": 16, "sigma": 1.0, "delta": None},
        "schedule": {"steps": 40, "lr": 5e-3},
    }
    return HgadConfig.model_validate(values | changes)


def feature_data(model: Hgad, count: int, classes: int, shift: float = 3.0) -> Data:
    """Feature maps whose first channels tell the class."""
    ids = torch.arange(count) % classes
    features = {}
    for name, d, g in zip(model.features.names, model.features.channels, model.features.grids, strict=True):
        x = torch.randn(count, d, g, g)
        x[:, : d // 2] += shift * ids[:, None, None, None]
        features[name] = x
    return Data(features, ids)


def fit(model: Hgad, data: Data, steps: int) -> None:
    model.prepare(data)
    optimizers = model.optimizers()
    for step in range(steps):
        batch = data.batch(torch.randint(len(data), (8,)))
        for o in optimizers:
            o.optimizer.zero_grad()
        model.training_step(batch, step)["loss"].backward()
        for o in optimizers:
            o.optimizer.step()
    model.eval()
    model.finalize(data)


def random_flow(channels: int, blocks: int) -> Flow:
    """A flow in float64 off its initial values, its rotations orthogonal to float64."""
    flow = Flow(channels, (5, 1), blocks=blocks, position=8, hidden=2.0, clamp=1.9, generator=generator()).double()
    for block in flow.each_block:
        block.rotation = random_rotation(channels, generator())
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return flow


def test_levels_and_map_are_as_large_as_the_image_unless_they_say_so() -> None:
    values = yaml.safe_load((CONFIGS / "edge/hgad.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    model = Hgad(HgadConfig.model_validate(values | {"size": 96}), ("a",))
    assert model.config.sizes == (96, 96) and model.features.grids == (12, 6) and model.scoring.size == 96
    smaller = {"levels": [{"tap": 2}, {"tap": 3, "size": 64}], "score": values["score"] | {"map": 32}, "size": 96}
    model = Hgad(HgadConfig.model_validate(values | smaller), ("a",))
    assert model.config.sizes == (96, 64) and model.features.grids == (12, 4) and model.scoring.size == 32
    with torch.no_grad():
        scores = model(torch.zeros(1, 96, 96, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    assert scores.map.shape == (1, 32, 32)


@pytest.mark.parametrize("channels", [6, 7])
def test_block_is_invertible(channels: int) -> None:
    flow = random_flow(channels, 1)
    x = torch.randn(5, channels).double()
    y, _ = flow(x)
    assert not torch.allclose(x, y, atol=0.1)
    torch.testing.assert_close(flow.each_block[0].inverse(y, flow.position), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels", [6, 7])
def test_log_determinant_is_the_jacobians(channels: int) -> None:
    flow = random_flow(channels, 3)
    x, third = torch.randn(1, channels).double(), torch.tensor([2])
    matrix = jacobian(lambda v: flow(v[None], third)[0][0], x[0])
    torch.testing.assert_close(flow(x, third)[1][0], torch.linalg.slogdet(matrix).logabsdet, rtol=1e-9, atol=1e-9)


def test_rotation_and_initial_scale() -> None:
    q = random_rotation(9, generator())
    torch.testing.assert_close(q @ q.T, torch.eye(9).double(), rtol=0, atol=1e-12)
    assert torch.linalg.det(q) > 0
    torch.testing.assert_close(CouplingBlock(6, 8, 2.0, 1.9, generator()).scale(), torch.ones(6))


def test_position_code_separates_axes() -> None:
    code = position_code(3, 4, 16).reshape(3, 4, 16)
    assert torch.equal(code[0, 1, :8], code[2, 1, :8]) and torch.equal(code[1, 0, 8:], code[1, 3, 8:])
    assert len(torch.unique(code.reshape(12, 16), dim=0)) == 12


def test_sampled_positions_see_their_own_code() -> None:
    flow = Flow(6, (3, 4), blocks=2, position=8, hidden=2.0, clamp=1.9, generator=generator())
    x, index = torch.randn(2, 12, 6), torch.tensor([7, 1, 4])
    full, full_det = flow(x)
    part, part_det = flow(x[:, index], index)
    torch.testing.assert_close(part, full[:, index])
    torch.testing.assert_close(part_det, full_det[:, index])


def test_density_is_that_of_the_gaussian_mixture() -> None:
    mixture = Mixture(2, 4, 5, generator())
    mixture.weight_logit.data.normal_()
    z, log_det = torch.randn(7, 5), torch.randn(7)
    centres, weights = mixture.centres()[1], mixture.log_weights()[1]
    reference = MixtureSameFamily(Categorical(logits=weights), MultivariateNormal(centres, torch.eye(5)))
    expected = (reference.log_prob(z) + log_det) / 5
    torch.testing.assert_close(intra_density(z, log_det, centres, weights), expected, rtol=1e-5, atol=1e-5)


def test_losses_against_plain_loops() -> None:
    mixture = Mixture(3, 2, 6, generator())
    mixture.main.data.normal_()
    mixture.class_logit.data.normal_()
    z, log_det, ids = torch.randn(2, 4, 6), torch.randn(2, 4), torch.tensor([2, 0])
    config = LossConfig(likelihood=0.5, information=7.0, smoothing=0.3, use_lz=True)
    terms = mixture.losses(z, log_det, ids, config, intra=True)
    prior = torch.log_softmax(mixture.class_logit, 0)
    likelihood, information, entropy, intra, lz = [], [], [], [], []
    for b in range(2):
        for n in range(4):
            half = torch.stack([-0.5 * (z[b, n] - mixture.main[y]).square().sum() for y in range(3)])
            likelihood.append(-(torch.logsumexp(half + prior, 0) + log_det[b, n]) / 6)
            target = torch.full((3,), 0.1)
            target[ids[b]] += 0.7
            information.append((target * (torch.log_softmax(half + prior, 0) - prior)).sum())
            p = torch.softmax(half, 0)
            entropy.append(-(p * p.log()).sum())
            own = torch.stack((mixture.main[ids[b]], mixture.main[ids[b]] + mixture.deltas[ids[b], 0]))
            logp = torch.logsumexp(-0.5 * (z[b, n] - own).square().sum(1) + mixture.log_weights()[ids[b]], 0)
            intra.append(-(logp + log_det[b, n]) / 6)
            lz.append(-torch.nn.functional.logsigmoid(-intra[-1] - 0.5 * torch.log(torch.tensor(2 * torch.pi))))
    mean = [torch.stack(x).mean() for x in (likelihood, information, entropy, intra, lz)]
    torch.testing.assert_close(terms["loss"], 0.5 * mean[0] - 7 * mean[1] + mean[2] + mean[3] + mean[4])


def test_intra_terms_leave_the_main_centres_alone() -> None:
    mixture = Mixture(2, 3, 6, generator())
    terms = mixture.losses(torch.randn(2, 4, 6), torch.randn(2, 4), torch.tensor([0, 1]), LossConfig(), intra=True)
    terms["intra"].backward()
    assert mixture.main.grad is None and mixture.deltas.grad is not None


def test_first_phase_has_no_intra_terms() -> None:
    model = Hgad(small_config(), ("a", "b"))
    data = feature_data(model, 4, 2)
    model.training_step(data.batch(torch.arange(4)), 0)["loss"].backward()
    assert all(level.mixture.deltas.grad is None for level in model.each_level)
    model.training_step(data.batch(torch.arange(4)), 10)["loss"].backward()
    assert all(level.mixture.deltas.grad is not None for level in model.each_level)


def test_first_phase_is_a_share_of_the_steps_that_the_images_allow() -> None:
    """24 images and `max_epochs` may leave a tenth of `schedule.steps`: the first phase would be most of the run."""
    settings = small_config()
    schedule = settings.schedule.model_copy(update={"steps": 1000, "batch": 4, "max_epochs": 5, "amp": "off"})
    model = Hgad(settings.model_copy(update={"schedule": schedule}), ("a", "b"))
    data = feature_data(model, 16, 2)  # 20 steps
    images = FeatureSet((None,) * 16, {k: v.numpy() for k, v in data.features.items()}, None, data.class_ids.numpy())
    log: list[Mapping[str, float]] = []
    run(model, images, torch.device("cpu"), log=log.append, progress=False)
    first = model.config.loss.first_phase * 20
    assert [r["step"] for r in log if "intra0" in r] == [step + 1 for step in range(20) if step >= first]


def test_first_phase_ends_by_the_clock_where_that_ends_the_run() -> None:
    """Else a run of 121 of 4,000 steps would score by centres that no step has moved."""
    model = Hgad(small_config(), ("a", "b"))
    data = feature_data(model, 4, 2)
    for done, moved in ((0.0, False), (0.5, True)):
        model.progress = done
        model.training_step(data.batch(torch.arange(4)), 0)["loss"].backward()
        assert all((level.mixture.deltas.grad is not None) == moved for level in model.each_level)


def test_every_parameter_has_one_optimizer() -> None:
    model = Hgad(small_config(), ("a", "b"))
    optimizers = model.optimizers()
    assert len(optimizers) == len(model.levels)
    held = [id(p) for o in optimizers for p in o.parameters]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}


def test_learns_normal_and_tells_the_class() -> None:
    model = Hgad(small_config(), ("a", "b"))
    fit(model, feature_data(model, 32, 2), 40)
    good = feature_data(model, 16, 2)
    bad = feature_data(model, 16, 2)
    for x in bad.features.values():
        x[:, :, 1:3, 1:3] *= 3
    names = model.features.names
    with torch.no_grad():
        of_good = model.score_features([good.features[n] for n in names], good.class_ids)
        of_bad = model.score_features([bad.features[n] for n in names], bad.class_ids)
        wrong = model.score_features([good.features[n] for n in names], 1 - good.class_ids)
    assert (of_bad.score > of_good.score.max()).float().mean() > 0.9
    assert of_good.logits is not None and (of_good.logits.argmax(1) == good.class_ids).all()
    assert wrong.score.mean() > of_good.score.mean()


@pytest.mark.parametrize("delta", [None, 0.0, 0.03])
def test_one_class_still_has_a_score(delta: float | None) -> None:
    config = small_config(score={"map": 16, "sigma": 1.0, "delta": delta})
    model = Hgad(config, ("only",))
    data = feature_data(model, 12, 1)
    fit(model, data, 12)
    with torch.no_grad():
        scores = model.score_features([data.features[n] for n in model.features.names], data.class_ids)
    assert torch.equal(negative_entropy(torch.randn(3, 6), torch.randn(1, 6)), torch.zeros(3))
    assert scores.score.std() > 1e-4 and scores.map.std() > 1e-4


def test_score_of_a_frame_is_its_own() -> None:
    model = Hgad(small_config(), ("a", "b")).eval()
    images, ids = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8), torch.tensor([0, 1, 0])
    with torch.no_grad():
        together = model(images, ids)
        alone = model(images[1:2], ids[1:2])
    torch.testing.assert_close(alone.score, together.score[1:2])
    torch.testing.assert_close(alone.map, together.map[1:2], rtol=1e-4, atol=1e-5)


def test_calibration_by_position_follows_the_positions() -> None:
    """Where good images are less likely, less is expected; a few images count less than many."""
    pattern = torch.zeros(8, 8)
    pattern[:, :4] = -2
    values = pattern.flatten() + 0.1 * torch.randn(40, 64)
    many, few = typical(values, 8, prior=10), typical(values[:2], 8, prior=10)
    for offset, share in ((many, 0.8), (few, 2 / 12)):
        contrast = offset.reshape(8, 8)[:, 6].mean() - offset.reshape(8, 8)[:, 1].mean()
        assert abs(contrast - 2 * share) < 0.15
    config = small_config(score={"map": 16, "sigma": 0.0, "delta": None, "by_position": True, "prior": 0.0})
    model = Hgad(config, ("a",))
    data = feature_data(model, 24, 1)
    for x in data.features.values():
        x[:, :, :, :2] *= 3  # good images vary more on the left
    fit(model, data, 5)
    left, right = (model.ceilings[0][0, 0].reshape(8, 8)[:, s].mean() for s in (slice(0, 1), slice(4, 8)))
    assert left < right
    with torch.no_grad():
        maps = model.score_features([data.features[n] for n in model.features.names], data.class_ids).map.mean(0)
        for ceiling in model.ceilings:
            ceiling[:] = ceiling.mean(-1, keepdim=True)
        flat = model.score_features([data.features[n] for n in model.features.names], data.class_ids).map.mean(0)
    assert (maps[:, :3].mean() - maps[:, 8:].mean()).abs() < (flat[:, :3].mean() - flat[:, 8:].mean()).abs()


def test_calibration_by_position_follows_the_spread() -> None:
    """A likelihood one deviation below what is usual at its position counts the same everywhere."""
    spread = torch.ones(8, 8)
    spread[:, :4] = 4
    values = spread.flatten() * torch.randn(400, 64) - 3
    config = ScoreConfig(by_position=True, prior=10, spread_prior=1, quantile=0.99)
    ceiling, gain = calibrated(values, 8, config)
    columns = gain.reshape(8, 8).mean(0)
    assert columns[7] / columns[0] == pytest.approx(4, rel=0.15)
    over = gain * (values - ceiling)
    assert (over > 0).float().mean() == pytest.approx(0.01, abs=0.001)  # m is the quantile of good images
    kept = over.reshape(-1, 8, 8).std(0)
    assert kept[:, 0].mean() == pytest.approx(float(kept[:, 7].mean()), rel=0.1)
    few = calibrated(values[:3], 8, ScoreConfig(by_position=True, spread_prior=30))[1].reshape(8, 8).mean(0)
    assert 1 < few[7] / few[0] < 1.5  # three images are not trusted with a spread


def test_calibration_of_values_without_spread_is_finite() -> None:
    """The entropy of products far apart is 0 at every position of every image."""
    for by_position in (True, False):
        for value in (0.0, 0.1):
            ceiling, gain = calibrated(torch.full((5, 16), value), 4, ScoreConfig(by_position=by_position))
            torch.testing.assert_close(ceiling, torch.full((16,), value))
            torch.testing.assert_close(gain, torch.ones(16))


@pytest.mark.parametrize("delta", [None, 0.03])
def test_the_score_uses_the_gains_that_finalize_found(delta: float | None) -> None:
    """S_l = c - sum over levels of the enlarged exp(min(k (v - m), 0)), from the constants by hand."""
    config = small_config(
        score={"map": 16, "sigma": 0.0, "delta": delta, "by_position": True, "prior": 0, "spread_prior": 0}
    )
    model = Hgad(config, ("a", "b"))
    data = feature_data(model, 48, 2)
    for x in data.features.values():
        x[..., : x.shape[-1] // 2] *= 1 + torch.rand(len(x), 1, 1, 1)  # on the left good images differ more
    fit(model, data, 5)
    for gain, grid in zip(model.gains, model.features.grids, strict=True):
        of_columns = gain[:, 0].reshape(2, grid, grid).mean(1)
        assert (of_columns[:, 0] < 0.8 * of_columns[:, -1]).all()
    features = [data.features[n] for n in model.features.names]
    with torch.no_grad():
        found, _ = model.densities(features, data.class_ids)
        maps = model.score_features(features, data.class_ids).map
        parts = []
        for kind, levels in enumerate((found.likelihood, found.entropy)):
            total = torch.zeros_like(maps)
            for v, m, k, grid in zip(levels, model.ceilings, model.gains, model.features.grids, strict=True):
                p = (k[data.class_ids, kind] * (v - m[data.class_ids, kind])).clamp_max(0).exp()
                p = p.reshape(-1, 1, grid, grid)
                total += torch.nn.functional.interpolate(p, size=(16, 16), mode="bilinear", align_corners=True)[:, 0]
            parts.append((model.reach[data.class_ids, kind, None, None] - total).clamp_min(0))
    expected = parts[0] if delta is None else parts[0] * (delta + parts[1])
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


def test_the_scored_log_determinant_has_its_weight() -> None:
    whole = Hgad(small_config(), ("a", "b")).eval()
    data = feature_data(whole, 4, 2)
    fit(whole, data, 5)  # before, every log-determinant is 0
    features = [data.features[n] for n in whole.features.names]
    scored = []
    for weight in (1.0, 0.5, 0.0):
        model = Hgad(small_config(score={"map": 16, "sigma": 1.0, "log_det": weight}), ("a", "b")).eval()
        model.load_state_dict(whole.state_dict())
        with torch.no_grad():
            scored.append(model.densities(features, data.class_ids))
    full, half, latent = (densities.likelihood for densities, _ in scored)
    for level, x, a, b, c in zip(whole.each_level, features, full, half, latent, strict=True):
        log_det = level(x)[1].detach()
        assert log_det.std() > 0
        torch.testing.assert_close(a - c, log_det / x.shape[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, (a + c) / 2, rtol=1e-4, atol=1e-5)
    for _, logits in scored:  # the product is told by the whole density
        assert torch.equal(logits, scored[0][1])


def test_noise_is_for_training_alone() -> None:
    plain, noisy = (Hgad(small_config(noise=noise), ("a", "b")) for noise in (0.0, 0.5))
    noisy.load_state_dict(plain.state_dict())
    data = feature_data(plain, 8, 2)
    batch = data.batch(torch.arange(8))
    losses = [m.training_step(batch, 0)["loss"].item() for m in (plain, plain, noisy, noisy)]
    assert losses[0] == losses[1] and len(set(losses)) == 3  # drawn anew at every step
    names = plain.features.names
    with torch.no_grad():
        scores = [m.score_features([data.features[n] for n in names], data.class_ids).map for m in (plain, noisy)]
    assert torch.equal(*scores)


def test_product_without_held_out_images_is_refused() -> None:
    model = Hgad(small_config(), ("a", "b"))
    with pytest.raises(CalibrationError, match="'b'"):
        model.finalize(feature_data(model, 4, 1))


def test_512_variant_of_the_pyramid() -> None:
    values = yaml.safe_load((CONFIGS / "methods/hgad.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    values |= {"size": 512, "levels": [{"size": s, "tap": 3} for s in (512, 256, 128)]}
    features = LevelFeatures(HgadConfig.model_validate(values))
    assert features.grids == (32, 16, 8) and features.channels == (200, 200, 200)


@pytest.mark.slow
def test_paper_preset_takes_a_step_at_paper_size() -> None:
    values = yaml.safe_load((CONFIGS / "methods/hgad.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    model = Hgad(HgadConfig.model_validate(values), tuple(f"class{i}" for i in range(15)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 14.2e6 < trainable < 14.5e6  # METHODS.md 4.1: 14.3 M
    with torch.no_grad():
        features = model.frontend(torch.randint(0, 256, (1, 1024, 1024, 3), dtype=torch.uint8))
    assert [tuple(v.shape[1:]) for v in features.values()] == [(200, 64, 64), (200, 32, 32), (200, 16, 16)]
    batch = Batch(features, None, torch.tensor([3]), torch.tensor([0]))
    before = [p.detach().clone() for p in model.levels[0].parameters()]
    loss = model.training_step(batch, 90_000)["loss"]
    loss.backward()
    for o in model.optimizers():
        o.optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.levels[0].parameters(), strict=True))
