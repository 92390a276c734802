"""HVQ-Trans: quantiser, transport term, model (METHODS.md 1 and 11.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import yaml
from andon.train.method import Batch
from andon.train.methods.hvq import METHOD, pot
from andon.train.methods.hvq.calibration import equal_deviation, position_statistics
from andon.train.methods.hvq.config import CodebookConfig, HvqConfig
from andon.train.methods.hvq.model import HvqModel
from andon.train.methods.hvq.quantizer import ClassCodebooks, centre, kmeans_plus_plus, nearest_code
from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def config(preset: str = "edge", **changes: Any) -> HvqConfig:
    values = yaml.safe_load((CONFIGS / preset / "hvq.yaml").read_text())
    values["backbone"]["weights"] = "random:0"
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        target = values
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    return HvqConfig.model_validate(values)


def build(classes: tuple[str, ...] = ("a", "b"), **changes: Any) -> HvqModel:
    model = METHOD.build(config(**changes), classes)
    assert isinstance(model, HvqModel)
    return model


class Textures:
    """Aligned features of good images: each class has its own four prototype tokens, laid out at random, and noise."""

    def __init__(self, images: int = 24, classes: int = 2, channels: int = 152, grid: int = 14) -> None:
        draw = torch.Generator().manual_seed(5)
        self.class_ids = torch.arange(images) % classes
        prototypes = torch.randn(classes, 4, channels, generator=draw) * 2
        layout = torch.randint(4, (images, grid * grid), generator=draw)
        tokens = torch.stack([prototypes[c][i] for c, i in zip(self.class_ids, layout, strict=True)])
        tokens = tokens + 0.1 * torch.randn(tokens.shape, generator=draw)
        self.features: Mapping[str, Any] = {"aligned": tokens.transpose(1, 2).reshape(images, channels, grid, grid)}

    def __len__(self) -> int:
        return len(self.class_ids)

    def batch(self, indices: Tensor) -> Batch:
        return Batch({"aligned": self.features["aligned"][indices]}, None, self.class_ids[indices], indices)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))


# ---------------------------------------------------------------- quantiser


def test_centred_fp32_argmin_equals_float64() -> None:
    """A tight codebook far from the origin: plain FP32 distances would lose the right code, centred ones do not."""
    codes = 200.0 + 0.05 * torch.randn(512, 64)
    tokens = codes[torch.randint(512, (300,))] + 0.01 * torch.randn(300, 64)
    exact = torch.cdist(tokens.double(), codes.double()).argmin(dim=-1)
    plain = tokens.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * tokens @ codes.T
    assert (plain.argmin(dim=-1) != exact).any(), "the case must be one where centring matters"
    assert torch.equal(nearest_code(tokens, *centre(codes)), exact)


def test_straight_through_gradient_is_identity() -> None:
    book = ClassCodebooks(2, 8, CodebookConfig(size=16))
    tokens = torch.randn(3, 5, 8, requires_grad=True)
    weights = torch.randn(3, 5, 8)
    out = book(tokens, torch.tensor([0, 1, 0]))
    (out.tokens * weights).sum().backward()
    assert tokens.grad is not None and torch.equal(tokens.grad, weights)
    chosen = book.codes[torch.tensor([0, 1, 0])].gather(1, out.indices[..., None].expand(3, 5, 8))
    torch.testing.assert_close(out.tokens, chosen)


def test_update_is_one_moving_average_per_class_present() -> None:
    book = ClassCodebooks(3, 4, CodebookConfig(size=6, revive_below=0.0)).train()
    before = {name: value.clone() for name, value in book.state_dict().items()}
    tokens = torch.randn(4, 7, 4)
    ids = torch.tensor([0, 2, 0, 0])
    indices = book(tokens, ids).indices
    book.update(0)
    for name, value in book.state_dict().items():
        assert torch.equal(value[1], before[name][1]), "an absent class must not decay"
    for c in (0, 2):
        own, index = tokens[ids == c].reshape(-1, 4), indices[ids == c].flatten()
        counts = torch.bincount(index, minlength=6).float()
        count = 0.99 * before["count"][c] + 0.01 * counts
        total = 0.99 * before["total"][c]
        for row in range(6):
            total[row] += 0.01 * own[index == row].sum(0)
        torch.testing.assert_close(book.count[c], count)
        smoothed = (count + 1e-5) / (count.sum() + 6e-5) * count.sum()
        torch.testing.assert_close(book.codes[c], total / smoothed[:, None])


def test_dead_codes_come_back_from_tokens_of_their_class() -> None:
    book = ClassCodebooks(2, 4, CodebookConfig(size=6, decay=0.5)).train()
    for class_id, offset in ((0, 5), (1, -5)):
        book.seed(class_id, torch.randn(50, 4) + offset)
    book.codes[:, 2:] = 1e3
    book.count[:, 2:] = 0.0
    book(torch.cat([torch.randn(1, 30, 4) + 5, torch.randn(1, 30, 4) - 5]), torch.tensor([0, 1]))
    usage = book.update(0)
    assert usage["revived"] == 8
    assert (book.codes[0] > 0).all() and (book.codes[1] < 0).all()


def test_perplexity_counts_codes_in_use() -> None:
    book = ClassCodebooks(1, 4, CodebookConfig(size=8))
    book.count[0] = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert book.perplexity().item() == pytest.approx(4.0)


def test_kmeans_plus_plus_covers_clusters() -> None:
    centres = 100.0 * torch.randn(5, 3)
    tokens = centres.repeat_interleave(40, dim=0) + 0.01 * torch.randn(200, 3)
    chosen = kmeans_plus_plus(tokens, 5)
    assert torch.cdist(centres, chosen).amin(dim=1).max() < 1


# ---------------------------------------------------------------- transport


def test_conditional_transport_equals_its_formula() -> None:
    tokens, codes = torch.randn(2, 5, 8), torch.randn(2, 16, 8) + 1
    unit = torch.nn.functional.normalize(codes, dim=-1)
    centred = codes - codes.mean(dim=1, keepdim=True)
    got = pot.conditional_transport(tokens, centred, unit)
    plan = torch.softmax(torch.einsum("bnd,bkd->bnk", tokens, codes) / 16, dim=-1)
    cosine = torch.cosine_similarity(tokens[:, :, None], codes[:, None], dim=-1)
    torch.testing.assert_close(got, (plan * (1 - cosine)).sum(-1), rtol=1e-5, atol=1e-5)


def test_sinkhorn_equals_the_reference_library() -> None:
    tokens, codes = torch.randn(20, 6), torch.randn(9, 6)
    cost = pot.distances(tokens, codes)
    np.testing.assert_allclose(cost.numpy(), np.linalg.norm(tokens[:, None] - codes[None], axis=-1), rtol=1e-4)
    epsilon = 0.3 * cost.median()
    plan = ot.sinkhorn(np.full(20, 1 / 20), np.full(9, 1 / 9), cost.double().numpy(), float(epsilon), stopThr=1e-12)
    expected = 20 * (plan * cost.numpy()).sum(axis=1)
    got = pot.sinkhorn(tokens, codes, epsilon, iterations=500)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("mode", ["off", "ct_level1", "sinkhorn_all"])
def test_class_pointer_changes_the_output_and_images_do_not_mix(mode: str) -> None:
    model = build(pot__mode=mode)
    data = Textures()
    model.prepare(data)
    model.finalize(data)
    model.eval()
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        first = model(frames, torch.tensor([0, 0]))
        second = model(frames, torch.tensor([1, 1]))
        alone = model(frames[1:], torch.tensor([0]))
    assert first.map.shape == (2, 224, 224)
    assert not torch.allclose(first.score, second.score)
    torch.testing.assert_close(alone.score, first.score[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.logits, second.logits)


def test_lambda_equalises_standard_deviations() -> None:
    model = build(pot__mode="ct_level1")
    data = Textures()
    model.prepare(data)
    model.finalize(data)
    with torch.no_grad():
        error, term, _ = model.grid_maps(data.features["aligned"], data.class_ids)
    assert term is not None
    assert float(model.lam * term.std() / error.std()) == pytest.approx(1.0, rel=0.02)


def test_terms_that_are_the_same_everywhere_have_no_weight() -> None:
    """Only their rounding would be left, as large as the errors."""
    errors, flat = torch.rand(4, 36, generator=torch.Generator().manual_seed(0)), torch.full((4, 36), 3.0)
    assert equal_deviation(errors, torch.zeros(4, 36)) == equal_deviation(errors, flat) == 0
    flat[0, 0] += 2e-7  # the next float32
    assert equal_deviation(errors, flat) == 0
    assert equal_deviation(errors, 2 * errors) == pytest.approx(0.5)


def test_position_statistics_shrink_to_the_product_s_own() -> None:
    maps = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [10.0, 10.0]])
    ids = torch.tensor([0, 0, 0, 1])
    mean, std = position_statistics(maps, ids, classes=3, prior=1e-9)
    torch.testing.assert_close(mean[0], torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(std[0], torch.tensor([(2 / 3) ** 0.5, 1e-6]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean[2], torch.full((2,), float(maps.mean())))
    mean, std = position_statistics(maps, ids, classes=2, prior=1e9)
    torch.testing.assert_close(mean[0], torch.full((2,), 3.5))
    torch.testing.assert_close(std[0], torch.full((2,), float(maps[:3].std(correction=0))))


def test_calibrated_map_of_good_images_is_standard_at_every_place() -> None:
    model, data = build(score__prior=1e-6, score__mode="top", score__top_share=0.05), Textures(images=40)
    model.prepare(data)
    model.finalize(data)
    with torch.no_grad():
        error, _, _ = model.grid_maps(data.features["aligned"], data.class_ids)
        scores = model.score_features(data.features["aligned"], data.class_ids)
    own = (error - model.map_mean[data.class_ids]) / model.map_std[data.class_ids]
    for class_id in (0, 1):
        part = own[data.class_ids == class_id]
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(196), atol=1e-3, rtol=0)
        torch.testing.assert_close(part.std(dim=0, correction=0), torch.ones(196), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.score, own.topk(10, dim=1).values.mean(dim=1), rtol=1e-4, atol=1e-4)


def test_prepare_standardises_and_seeds_every_class() -> None:
    model = build()
    data = Textures()
    data.features = {"aligned": data.features["aligned"] * 3 + 7}
    untouched = model.books[-1].codes.clone()
    model.prepare(data)
    features = model.encode(data.features["aligned"]).features
    torch.testing.assert_close(features.mean((0, 1)), torch.zeros(152), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std((0, 1)), torch.ones(152), atol=1e-2, rtol=0)
    hidden = model.encode(data.features["aligned"][data.class_ids == 1]).hidden[-1].flatten(0, 1)
    assert torch.cdist(model.books[-1].codes[1], hidden).amin(dim=1).max() < 1e-2, "codes are tokens of their class"
    assert not torch.equal(untouched, model.books[-1].codes)


def fit(model: HvqModel, data: Textures, steps: int) -> list[float]:
    model.prepare(data)
    model.train()
    optimizers = model.optimizers()
    losses = []
    for step in range(steps):
        batch = data.batch(torch.randperm(len(data))[: model.config.schedule.batch])
        out = model.training_step(batch, step)
        for optimizer in optimizers:
            optimizer.optimizer.zero_grad()
        out["loss"].backward()
        for optimizer in optimizers:
            optimizer.optimizer.step()
        losses.append(float(out["reconstruction"].detach()))
        assert all(np.isfinite(v) for v in model.after_step(step).values())
    return losses


def test_learns_good_images_finds_defects_and_tells_products_apart() -> None:
    model, data = build(codebook__size=32), Textures()
    losses = fit(model, data, 60)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    model.eval()
    broken = data.features["aligned"].clone()
    broken[:, :, 3:5, 6:8] = 4 * torch.randn(len(data), 152, 2, 2)
    with torch.no_grad():
        good = model.score_features(data.features["aligned"], data.class_ids)
        bad = model.score_features(broken, data.class_ids)
    assert bad.score.min() > good.score.max()
    assert good.logits is not None
    assert (good.logits.argmax(dim=1) == data.class_ids).all()
    peak = bad.map.flatten(1).argmax(dim=1)
    assert ((peak // 224 > 40) & (peak // 224 < 90) & (peak % 224 > 80) & (peak % 224 < 140)).all()


def test_a_channel_that_is_silent_on_good_parts_does_not_choose_the_product() -> None:
    model, data = build(codebook__size=32), Textures()
    data.features["aligned"][:, :3] = 0.0
    fit(model, data, 30)
    model.eval()
    broken = data.features["aligned"].clone()
    broken[:, :3, 3:5, 6:8] = 0.01
    with torch.no_grad():
        good, bad = (model.encode(x).logits for x in (data.features["aligned"], broken))
    torch.testing.assert_close(good, bad)
    assert (good.argmax(dim=1) == data.class_ids).all()


def test_no_channel_counts_as_quieter_than_a_thousandth_of_the_usual_one() -> None:
    model, data = build(), Textures()
    data.features["aligned"][:, 3] *= 1e-7
    model.classifier.fit_scale(data)
    std = model.classifier.std
    assert std[3] == std.min() > 5e-4 * float(std.mean())


def test_transport_loss_reaches_codes_that_are_parameters() -> None:
    model = build(codebook__learn="gradient", pot__mode="sinkhorn_all", pot__alpha=0.01, codebook__size=16)
    before = [book.codes.detach().clone() for book in model.books]
    fit(model, Textures(), 2)
    assert all(not torch.equal(a, book.codes) for a, book in zip(before, model.books, strict=True))


def test_transport_loss_with_moving_average_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs codebook"):
        config(pot__mode="ct_level1", pot__alpha=0.01)


def test_paper_preset_takes_a_training_step_at_full_size() -> None:
    model = METHOD.build(config("methods"), ("a", "b", "c"))
    assert isinstance(model, HvqModel)
    assert model.features.channels == 272
    frames = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        aligned = model.features(frames)["aligned"]
    batch = Batch({"aligned": aligned}, None, torch.tensor([0, 2]), torch.arange(2))
    model.train()
    before = model.books[0].codes.clone()
    losses = model.training_step(batch, 0)
    losses["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    gradient = model.expert_weight.grad
    assert gradient is not None and gradient[1].abs().max() == 0 < gradient[0].abs().max()
    for optimizer in model.optimizers():
        optimizer.optimizer.step()
    model.after_step(0)
    assert torch.equal(before[1], model.books[0].codes[1])
    assert not torch.equal(before[0], model.books[0].codes[0])
