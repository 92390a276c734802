"""The VPDM cut: one step engine, every sampler a program, all equal to the model's own loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from andon.export import verify
from andon.export.bundle import Provenance
from andon.export.exporter import Request, export_bundle
from andon.export.methods.vpdm import cut
from andon.export.onnx import export_stage
from andon.export.walk import Walk, examples, programs, torch_call
from andon.runtime.errors import ConfigError
from andon.runtime.manifest import Loop
from andon.train.methods.vpdm.config import VpdmConfig
from andon.train.methods.vpdm.model import Vpdm
from andon.train.methods.vpdm.samplers import find_sampler

from .conftest import evidence  # type: ignore[import-not-found]

CLASSES = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_model(kind: str = "flat", prediction: str = "v", scope: str = "image", by_position: bool = True) -> Vpdm:
    config = VpdmConfig.model_validate(
        {
            "method": "vpdm",
            "size": 64,
            "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2, 3]},
            "features": {"grid": 4, "resample": "area", "smooth": True},
            "prototypes": {"count": 4, "grid": 2, "scope": scope},
            "diffusion": {"prediction": prediction, "steps": 100, "t": [1, 100]},
            "denoiser": {
                "kind": kind,
                "width": 16,
                "blocks": 1,
                "groups": 4,
                "embedding": 16,
                "time": 16,
                "attention": [2],
            },
            "sampler": "restore",
            "restore_t": 30,
            "score": {"space": "raw", "mode": "pool", "by_position": by_position},
            "schedule": {"steps": 1},
        }
    )
    model = Vpdm(config, ("a", "b")).eval()
    model.prototypes.data.normal_()
    model.standardize.mean.normal_()
    for name, buffer in model.named_buffers():
        if name.startswith("mean_"):
            buffer.normal_()
        if name.startswith("deviation_"):
            buffer.uniform_(0.5, 2)
    model.standardize.std.uniform_(0.5, 2)
    for parameter in model.denoiser.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("kind", "prediction", "scope", "by_position"),
    [("flat", "v", "image", True), ("unet", "eps", "image", False), ("flat", "v", "position", True)],
)
def test_every_program_is_the_models_sampler(kind: str, prediction: str, scope: str, by_position: bool) -> None:
    model = small_model(kind, prediction, scope, by_position)
    staged = cut(model, {})
    own = {"restore", "ddim50", "ddim25", "ddim10", "ddim10_t40"} if by_position else set()
    assert staged.class_bound == {f"{kind}_{sampler}" for kind in ("mean", "deviation") for sampler in own}
    assert set(staged.alternatives) == {"ddpm100", "ddim50", "ddim25", "ddim10", "ddim10_t40"}
    frame = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    scores = {}
    for name in programs(staged):
        sampler = find_sampler(model.config, "restore" if name == "default" else name)
        with torch.no_grad():
            expected = model.score_features(model.front(frame)["features"].expand(2, -1, -1, -1), CLASSES, sampler)
        walk = Walk(staged, torch_call(staged), name)
        for class_id in (0, 1):
            values = walk.frame(frame.numpy(), class_id)
            np.testing.assert_allclose(values["vpdm_score.score"], expected.score[[class_id]], rtol=1e-4)
            np.testing.assert_allclose(values["vpdm_score.map"][0], expected.map[[class_id]], rtol=1e-4, atol=1e-5)
        assert bool(expected.score[0] == expected.score[1]) != by_position
        scores[name] = float(values["vpdm_score.score"][0])
    assert len(set(scores.values())) == len(scores)


def test_default_program_calls_the_step_once_and_is_an_option() -> None:
    model = small_model()
    loops = [step for step in cut(model, {}).program if isinstance(step, Loop)]
    assert [loop.count for loop in loops] == [1]
    staged = cut(model, {"sampler": "ddim50"})
    assert [step.count for step in staged.program if isinstance(step, Loop)] == [50]
    assert "restore" in staged.alternatives and "ddim50" not in staged.alternatives
    with pytest.raises(ConfigError, match="unknown sampler"):
        cut(model, {"sampler": "euler"})
    with pytest.raises(ConfigError, match="export option"):
        cut(model, {"steps": 4})


@pytest.mark.parametrize(("kind", "scope"), [("flat", "image"), ("unet", "image"), ("flat", "position")])
def test_stages_export_and_match(kind: str, scope: str) -> None:
    staged = cut(small_model(kind, scope=scope), {})
    seen = examples(staged, np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    for stage in staged.stages:
        inputs, outputs = seen[stage.name]
        graph = export_stage(stage, inputs, outputs)
        assert "GroupNormalization" not in {node.op_type for node in graph.model.graph.node}
        session = onnxruntime.InferenceSession(graph.model.SerializeToString())
        for name, value in zip(stage.outputs, session.run(None, inputs), strict=True):
            np.testing.assert_allclose(value, outputs[name], rtol=1e-3, atol=1e-4 * np.abs(outputs[name]).max())


def test_another_default_sampler_is_held_against_itself(tmp_path: Path, provenance: Provenance) -> None:
    """docs/precision.md advises `--option sampler=...`, and the model itself goes on with the checkpoint's sampler."""
    model, some = small_model(), evidence(4, 64)
    staged = replace(cut(model, {"sampler": "ddim10"}), alternatives={})
    result = export_bundle(model, staged, some, provenance, Request(tmp_path / "b"))
    assert verify.passed(result.checks) and model.config.sampler == "restore"
    own = verify.reference(model, some.labelled).score
    other = verify.run_engines(tmp_path / "b", result.manifest, "fp32", some.labelled).score
    assert np.abs(other / own - 1).max() > verify.SCORE_PARITY, "two samplers that the test could not tell apart"
