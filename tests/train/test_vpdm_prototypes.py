"""VPDM's condition: transport (METHODS.md 2.3), prototypes and their temperature, the queue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from andon.cli import main
from andon.train.checkpoint import load_checkpoint
from andon.train.methods.vpdm.model import Vpdm
from andon.train.methods.vpdm.prototypes import initial_prototypes, rms_distance, sinkhorn, temperature_for
from torch import Tensor

from .smallvpdm import feature_data, small_config


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


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
