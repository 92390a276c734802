"""FOCT: gradients by hand, Adam, masked rows, soft nearest neighbour, enrolment; torch against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from andon.runtime.enrolment import transport as ct
from andon.train.method import BackboneConfig, Schedule
from andon.train.methods.foct.config import FoctConfig, NavigatorConfig
from andon.train.methods.foct.model import Foct, adam_table
from andon.train.methods.foct.transport import CARRIED, CtCost, PairStep, SiameseScore, SiameseStep
from andon.train.methods.knn.config import PatchConfig

GRID = 6


def case(seed, n=None, d=None, p=None, h=None, empty=0):
    """Random memory, queries and phi in float64."""
    rng = np.random.default_rng(seed)
    n, d = n or int(rng.integers(5, 40)), d or int(rng.integers(3, 12))
    p, h = p or int(rng.integers(1, d + 1)), h or int(rng.integers(2, 9))

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape))

    valid = torch.ones(n, dtype=torch.float64)
    valid[n - empty :] = 0
    bank = draw(n, d) * valid[:, None]
    return {
        "patches": draw(GRID * GRID, d),
        "bank": bank,
        "valid": valid,
        "projection": draw(p, d) / np.sqrt(d),
        "inv_tau": torch.tensor([0.7], dtype=torch.float64),
        "phi": [draw(h, d) / np.sqrt(d), draw(h) * 0.1, draw(p, h) / np.sqrt(h)],
    }


def siamese_loss(x, phi, rho, stride):
    """The objective as METHODS.md 5.3 writes it, for autograd: memory in rows, valid rows only."""
    keep = x["valid"] > 0
    m = x["bank"][keep]
    side = x["patches"].reshape(GRID, GRID, -1)
    f = side[stride // 2 :: stride, stride // 2 :: stride].reshape(-1, side.shape[2])
    w1, b1, w2 = phi

    def g(v):
        return v @ x["projection"].T + torch.relu(v @ w1.T + b1) @ w2.T

    d = (g(m)[:, None] - g(f)[None]).square().sum(2) * x["inv_tau"]
    c = (m[:, None] - f[None]).square().sum(2).sqrt()
    p, q = torch.softmax(-d, 0), torch.softmax(-d, 1)
    return rho * (p * c).sum() / len(f) + (1 - rho) * (q * c).sum() / len(m)


def pair_loss(x, phi, rho, stride):
    keep = x["valid"] > 0
    m = x["bank"][keep]
    side = x["patches"].reshape(GRID, GRID, -1)
    f = side[stride // 2 :: stride, stride // 2 :: stride].reshape(-1, side.shape[2])
    w1, b1, w2 = phi
    u, v = m @ x["projection"].T, f @ x["projection"].T
    d = (torch.relu((u[:, None] - v[None]).square() @ w1.T + b1) @ w2.T)[..., 0]
    c = (m[:, None] - f[None]).square().sum(2).sqrt()
    p, q = torch.softmax(-d, 0), torch.softmax(-d, 1)
    return rho * (p * c).sum() / len(f) + (1 - rho) * (q * c).sum() / len(m)


def run_step(kind, x, carried, row, rho=0.5, stride=2):
    made = CtCost(GRID, stride)(x["patches"], x["bank"], x["valid"], x["projection"])
    fixed = made[3:]
    if kind == "siamese":
        out = SiameseStep(rho)(*fixed, x["inv_tau"], row, *carried)
    else:
        out = PairStep(rho)(*(fixed[i] for i in (1, 3, 4, 5, 6)), row, *carried)
    return list(out[:-1]), out[-1]


def pair_phi(x, seed):
    rng = np.random.default_rng(seed)
    p, h = x["projection"].shape[0], 5
    return [torch.from_numpy(rng.standard_normal(s)) for s in ((h, p), (h,), (1, h))]


def start(phi):
    return [*phi, *(torch.zeros_like(w) for _ in range(2) for w in phi)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["siamese", "pair"])
def test_hand_derived_gradient_equals_autograd(kind, seed):
    """Random shapes, half of them with empty memory rows. After one step from zero moments m = 0.1 gradient."""
    x = case(seed, empty=seed % 2 * 3)
    phi = x["phi"] if kind == "siamese" else pair_phi(x, seed)
    rho, stride = (0.5, 0.3)[seed % 2], 1 + seed % 3
    leaves = [w.clone().requires_grad_() for w in phi]
    loss = (siamese_loss if kind == "siamese" else pair_loss)(x, leaves, rho, stride)
    expected = torch.autograd.grad(loss, leaves)
    carried, value = run_step(kind, x, start(phi), torch.tensor([1.0, 1.0, 0.0]), rho, stride)
    torch.testing.assert_close(value[0], loss.detach(), rtol=1e-6, atol=0)
    for moment, gradient in zip(carried[3:6], expected, strict=True):
        torch.testing.assert_close(moment / 0.1, gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["siamese", "pair"])
def test_a_hundred_steps_equal_torch_adam(kind):
    x = case(3, n=30, d=8, p=4, h=6)
    phi = x["phi"] if kind == "siamese" else pair_phi(x, 3)
    leaves = [w.clone().requires_grad_() for w in phi]
    adam = torch.optim.Adam(leaves, lr=1e-2)
    table = torch.from_numpy(adam_table(100, 1e-2).astype(np.float64))
    carried = start(phi)
    losses = []
    for k in range(100):
        adam.zero_grad()
        loss = (siamese_loss if kind == "siamese" else pair_loss)(x, leaves, 0.5, 2)
        loss.backward()
        adam.step()
        carried, value = run_step(kind, x, carried, table[k])
        losses.append(float(value))
        assert losses[-1] == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in zip(carried[:3], leaves, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def judge(x, phi):
    cost, mask, bank_r, *_ = CtCost(GRID, 2)(x["patches"], x["bank"], x["valid"], x["projection"])
    score = SiameseScore(GRID, 24, 0.0).double()
    return score(x["patches"], x["bank"], bank_r, cost, mask, x["projection"], x["inv_tau"], *phi)


def test_without_steps_the_score_is_the_soft_nearest_neighbour():
    x = case(5, empty=2)
    phi = [x["phi"][0], x["phi"][1], torch.zeros_like(x["phi"][2])]
    keep = x["valid"] > 0
    memory = x["bank"][keep]
    projected = torch.cdist(x["patches"] @ x["projection"].T, memory @ x["projection"].T).square()
    cost = torch.cdist(x["patches"], memory)
    expected = (torch.softmax(-projected * x["inv_tau"], 1) * cost).sum(1)
    _, score, patch_score, _, _, nearest = judge(x, phi)
    torch.testing.assert_close(patch_score, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score[0], expected.max(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nearest, cost.min(1).values, rtol=1e-5, atol=1e-5)


def test_empty_rows_get_no_probability_and_give_no_gradient():
    """The same memory with and without empty rows, whatever they contain, gives the same scores and the same step."""
    x = case(6, n=20, d=6, p=3, h=4)
    padded = dict(x)
    padded["bank"] = torch.cat([x["bank"], torch.full((7, 6), 0.01, dtype=torch.float64)])
    padded["valid"] = torch.cat([x["valid"], torch.zeros(7, dtype=torch.float64)])
    for a, b in zip(judge(x, x["phi"]), judge(padded, x["phi"]), strict=True):
        torch.testing.assert_close(a, b)
    row = torch.tensor([1.0, 1.0, 1e-2])
    for kind, phi in (("siamese", x["phi"]), ("pair", pair_phi(x, 1))):
        a, b = (run_step(kind, y, start(phi), row) for y in (x, padded))
        for left, right in zip([*a[0], a[1]], [*b[0], b[1]], strict=True):
            torch.testing.assert_close(left, right)


def test_numpy_and_torch_agree():
    x = case(7, n=25, d=6, p=4, h=5)
    single = {k: (v.float() if isinstance(v, torch.Tensor) else [w.float() for w in v]) for k, v in x.items()}
    w1, b1, w2 = (w.numpy() for w in single["phi"])
    navigator = ct.Navigator(single["projection"].numpy(), w1, b1, w2, 0.7)
    patches, bank = single["patches"].numpy(), single["bank"].numpy()
    some = patches.reshape(GRID, GRID, -1)[1::2, 1::2].reshape(-1, 6)
    moments, carried = ct.Moments.zeros(navigator), start(single["phi"])
    table = torch.from_numpy(adam_table(10, 1e-2))
    for k in range(10):
        navigator, moments, loss = ct.step(navigator, moments, some, bank, ct.costs(some, bank), 1e-2)
        carried, value = run_step("siamese", single, carried, table[k])
        assert loss == pytest.approx(float(value), rel=1e-4)
    for mine, theirs in zip((navigator.w1, navigator.b1, navigator.w2), carried[:3], strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-3, atol=1e-5)
    cost, mask, bank_r, *_ = CtCost(GRID, 2)(single["patches"], single["bank"], single["valid"], single["projection"])
    module = SiameseScore(GRID, 24, 0.0)
    _, _, score, transport, matched, nearest = module(
        single["patches"], single["bank"], bank_r, cost, mask, single["projection"], single["inv_tau"], *carried[:3]
    )
    found = ct.score(navigator, patches, bank)
    np.testing.assert_allclose(found.score, score.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.transport, transport.numpy(), rtol=1e-3)
    np.testing.assert_allclose(found.nearest, nearest.numpy(), rtol=1e-4)
    assert (found.matched == matched.numpy()).all()


def test_temperature_gives_the_perplexity_and_leaves_self_matches_out():
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((60, 8)).astype(np.float32)
    fresh = rng.standard_normal((200, 8)).astype(np.float32)
    navigator = ct.Navigator.create(bank, 8, 4, 0).calibrate(fresh, bank, 3.0)
    squared = ((fresh[:, None] - bank[None]) ** 2).sum(2)
    assert ct._perplexity(squared, 1 / navigator.inv_tau) == pytest.approx(3.0, rel=0.01)
    with_self = ct.Navigator.create(bank, 8, 4, 0).calibrate(np.concatenate([fresh, bank]), bank, 3.0)
    assert with_self.inv_tau == pytest.approx(navigator.inv_tau, rel=0.15)


def test_steps_may_see_a_part_of_the_episodic_rows():
    """Thinned to every second row behind the semantic ones, a step equals that of the smaller memory."""
    x = case(8, n=20, d=6, p=3, h=4)
    kept = [*range(10), *range(10, 20, 2)]
    small = x | {"bank": x["bank"][kept], "valid": x["valid"][kept]}
    thin = CtCost(GRID, 2, semantic=10, thin=2)(x["patches"], x["bank"], x["valid"], x["projection"])
    all_of_small = CtCost(GRID, 2)(small["patches"], small["bank"], small["valid"], x["projection"])
    for a, b in zip(thin[3:], all_of_small[3:], strict=True):
        torch.testing.assert_close(a, b)
    assert thin[0].shape == (GRID * GRID, 20)


def tiny(**navigator):
    settings = {"dims": 8, "hidden": 6, "stride": 2, "steps": 4, "enroll_steps": 5, **navigator}
    return FoctConfig(
        method="foct",
        size=64,
        backbone=BackboneConfig(id="tf_efficientnet_lite0", weights="random:0", taps=(2, 3)),
        schedule=Schedule(steps=0),
        patches=PatchConfig(grid=8),
        pca=None,
        semantic=40,
        episodic=20,
        navigator=NavigatorConfig(**settings),
    )


def enrolled(config, shots=2, seed=0):
    torch.manual_seed(seed)
    model = Foct(config, ("a",)).eval()
    images = torch.randint(0, 255, (shots, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        support = [p.numpy() for p in model.features(images)]
    model.enroll(0, support, [np.ones(64, bool)] * shots)
    return model, images


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("pca", [None, 16])
def test_enrolment_fills_the_memory_and_support_scores_lower_than_noise(shots, pca):
    model, images = enrolled(tiny().model_copy(update={"pca": pca}), shots)
    assert int(model.valid.sum()) == int(64 * shots * 0.1)
    noise = torch.randint(0, 255, (1, 64, 64, 3), dtype=torch.uint8) // 2 * 2
    noise[:, 20:40, 20:40] = 255
    with torch.no_grad():
        known, other = (model(x, torch.zeros(len(x), dtype=torch.long)).score for x in (images, noise))
    assert known.max() < other.max()


def test_navigators_differ_and_both_run():
    scores = []
    for kind in ("siamese", "pair"):
        model, images = enrolled(tiny(kind=kind))
        with torch.no_grad():
            scores.append(float(model(images[:1], torch.zeros(1, dtype=torch.long)).score[0]))
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_carried_names_are_what_a_step_takes_and_gives():
    x = case(1)
    carried, _ = run_step("siamese", x, start(x["phi"]), torch.tensor([1.0, 1.0, 1e-3]))
    assert len(carried) == len(CARRIED) and [w.shape for w in carried] == [w.shape for w in start(x["phi"])]
