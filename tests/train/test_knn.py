"""knn: the banks, their sharing, and distances against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from andon.calib.distance import nearest
from andon.export.methods import get_cut
from andon.export.walk import Walk, torch_call
from andon.runtime.errors import CalibrationError, ConfigError
from andon.train.config import load_config
from andon.train.features import FeatureSet
from andon.train.methods.knn.features import EMPTY
from andon.train.methods.knn.model import BankDistance, Knn
from torch.utils._python_dispatch import TorchDispatchMode

TINY = ("backbone.weights=random:0", "size=64", "patches.grid=8", "coreset=30", "pool=100", "episodic=5")


def images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (count, 64, 64, 3), np.uint8))


def data(model, count=4, classes=2):
    with torch.no_grad():
        features = {k: v.numpy() for k, v in model.frontend(images(count)).items()}
    return FeatureSet(tuple(range(count)), features, None, np.arange(count) % classes)


def made(*overrides, classes=("a", "b"), count=4):
    model = Knn(load_config("knn", overrides=(*TINY, *overrides)), classes).eval()
    model.prepare(data(model, count, len(classes)))
    return model


@pytest.mark.parametrize("banks", ["product", "shared"])
def test_score_is_the_largest_distance_to_the_products_bank(banks):
    model = made(f"banks={banks}")
    test = images(3, seed=9)
    ids = torch.tensor([0, 1, 1])
    with torch.no_grad():
        scores = model(test, ids)
        patches = (model.features(test) - model.center).numpy()
    for k, index in enumerate(ids.tolist() if banks == "product" else [0, 0, 0]):
        rows = model.bank[index][model.valid[index] > 0].numpy()
        distance, _ = nearest(patches[k], rows)
        assert float(scores.score[k]) == pytest.approx(float(distance.max()), rel=1e-4)
    assert model.bank.shape[0] == (2 if banks == "product" else 1)


def test_banks_hold_rows_of_their_own_product_only():
    model = made("coreset=64", "pool=10000")
    everything = data(model)
    for index in range(2):
        own = everything.features["patches"][everything.class_ids == index].reshape(-1, model.features.dim)
        rows = model.bank[index][model.valid[index] > 0].numpy()
        distance, _ = nearest(rows, own - model.center.numpy())
        assert distance.max() < 0.02
        assert int(model.valid[index].sum()) == 64 and not model.bank[index][64:].any()


def test_fewer_patches_than_rows_leave_the_rest_empty_and_unmatched():
    model = made("coreset=500", classes=("a",), count=2)
    assert int(model.valid.sum()) == 100  # the pool
    with torch.no_grad():
        score = model(images(1, seed=3), torch.tensor([0])).score
    assert float(score[0]) < 1e3, "empty rows are farther than anything"


def test_the_same_data_give_the_same_bank():
    a, b = made(), made()
    assert torch.equal(a.bank, b.bank) and torch.equal(a.center, b.center)
    assert not torch.equal(a.bank, made("seed=1").bank)


def test_a_product_without_images_is_named():
    model = Knn(load_config("knn", overrides=TINY), ("a", "b", "c")).eval()
    with pytest.raises(CalibrationError, match="'c'"):
        model.prepare(data(model))


def test_channels_are_reduced_in_neighbouring_groups():
    model = Knn(load_config("knn", overrides=(*TINY, "patches.reduce=[20,56]")), ("a",)).eval()
    full = Knn(load_config("knn", overrides=TINY), ("a",)).eval()
    with torch.no_grad():
        small, whole = model.features(images(1)), full.features(images(1))
    pairs = whole.unflatten(2, (76, 2)).mean(3)
    torch.testing.assert_close(small, pairs)
    with pytest.raises(ConfigError, match="reduce"):
        Knn(load_config("knn", overrides=(*TINY, "patches.reduce=[21,56]")), ("a",))


@pytest.mark.parametrize("banks", ["product", "shared"])
def test_the_cut_computes_what_the_model_does(banks):
    model = made(f"banks={banks}")
    staged = get_cut("knn")(model, {})
    assert staged.memory.per_class == (banks == "product")
    walk = Walk(staged, torch_call(staged))
    test = images(2, seed=5)
    for index in range(2):
        with torch.no_grad():
            expected = model(test[index : index + 1], torch.tensor([index]))
        values = walk.frame(test[index : index + 1].numpy(), index)
        assert values["score.score"][0] == pytest.approx(float(expected.score[0]), rel=1e-5)
        np.testing.assert_allclose(values["score.map"][0], expected.map.numpy(), rtol=1e-4)


def test_distances_are_those_of_the_scaled_bank_and_the_bank_is_not_scaled():
    """A power of two changes no digit, so it goes to the smaller side."""
    generator = torch.Generator().manual_seed(0)
    patches, bank = torch.randn(16, 24, generator=generator), torch.randn(60, 24, generator=generator)
    valid = (torch.rand(60, generator=generator) < 0.8).float()
    distance = BankDistance(grid=4, size=32, sigma=1.0, semantic=40, episodic=20)
    multiplied: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mul.Tensor:
                multiplied.append(result.numel())
            return result

    with Counting():
        found = distance(patches, bank, valid)[2]
    far = torch.sum(bank * bank, dim=1) + (1.0 - valid) * EMPTY
    squared = (far[None, :] + torch.matmul(patches, bank.T * -2.0)).amin(dim=1) + torch.sum(patches * patches, dim=1)
    assert torch.equal(found, torch.sqrt(torch.clamp(squared, min=0.0)))
    assert multiplied.count(bank.numel()) == 1, "its norms"


@pytest.mark.parametrize(("semantic", "episodic"), [(40, 20), (41, 19), (20, 40), (59, 1)])
def test_anchors_are_distances_to_rows_that_nothing_learnt_moves(semantic, episodic):
    """Whatever size both parts of the bank are of; empty rows count in neither."""
    rng = np.random.default_rng(semantic)
    patches, bank = (rng.standard_normal((n, 24)).astype(np.float32) for n in (16, 60))
    bank[semantic:] = np.resize(patches + 0.1, (episodic, 24))  # learnt from what is seen
    valid = np.ones(60, np.float32)
    bank[3], valid[3] = patches[5], 0  # an empty row may hold anything
    distance = BankDistance(grid=4, size=32, sigma=1.0, semantic=semantic, episodic=episodic)
    _, _, patch_score, anchor = distance(*map(torch.from_numpy, (patches, bank, valid)))
    known = bank[:semantic][valid[:semantic] > 0]
    np.testing.assert_allclose(anchor, nearest(patches, known)[0], rtol=1e-5)
    np.testing.assert_allclose(patch_score, nearest(patches, bank[valid > 0])[0], rtol=1e-4)
    assert (anchor >= patch_score).all() and (anchor[:episodic] > patch_score[:episodic]).all()


@pytest.mark.parametrize(("semantic", "episodic"), [(40, 20), (41, 20), (42, 20)])
def test_anchors_take_no_matrix_of_minima(semantic, episodic):
    """Whatever sizes somebody chooses: minima of single rows would be a pass over as much again."""
    kept: list[int] = []

    class Minima(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if func.overloadpacket is torch.ops.aten.amin:
                kept.append(made.numel())
            return made

    rows = semantic + episodic
    with Minima():
        BankDistance(4, 32, 1.0, semantic, episodic)(torch.randn(16, 24), torch.randn(rows, 24), torch.ones(rows))
    assert kept and max(kept) <= 16 * rows // 8


def test_there_is_no_training_step():
    model = made()
    with pytest.raises(CalibrationError, match="no gradient training"):
        model.training_step(next(iter(data(model).batches(2))), 0)
