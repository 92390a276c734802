"""The HGAD cut: folding changes nothing, the stages are the model, the class is an input."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from andon.export.methods.hgad import FoldedFlow, FoldedSubnet, cut
from andon.export.onnx import export_stage
from andon.export.walk import Walk, examples, torch_call
from andon.runtime.errors import ConfigError
from andon.train.methods.hgad.config import HgadConfig
from andon.train.methods.hgad.flow import Flow
from andon.train.methods.hgad.model import Hgad


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_model(
    classes: int, delta: float | None, by_position: bool = False, sigma: float = 1.0, log_det: float = 1.0
) -> Hgad:
    config = HgadConfig.model_validate(
        {
            "method": "hgad",
            "size": 64,
            "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2, 3]},
            "levels": [{"size": 64, "tap": 2}, {"size": 32, "tap": 2}, {"size": 64, "tap": 3}],
            "smooth": True,
            "standardize": True,
            "centres": 3,
            "flow": {"blocks": 3, "position": 16},
            "score": {"map": 16, "sigma": sigma, "delta": delta, "by_position": by_position, "log_det": log_det},
            "schedule": {"steps": 1},
        }
    )
    model = Hgad(config, tuple(f"class{i}" for i in range(classes))).eval()
    for level in model.each_level:
        for parameter in level.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        level.standardize.mean.normal_()
        level.standardize.std.uniform_(0.5, 2)
    for ceiling in model.ceilings:
        ceiling.normal_(-3, 1)
    for gain in model.gains:
        gain.uniform_(0.3, 3)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels", [12, 13])
def test_folding_is_exact(dtype: torch.dtype, tolerance: float, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    flow = Flow(channels, (3, 5), blocks=12, position=16, hidden=2.0, clamp=1.9, generator=generator)
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    flow = flow.to(dtype)
    x = torch.randn(15, channels, dtype=dtype)
    z, log_det = flow(x[None])
    folded_z, folded_det = FoldedFlow(flow)(x)
    assert (folded_z - z[0]).abs().max() <= tolerance * z.abs().max()
    assert (folded_det - log_det[0]).abs().max() <= tolerance * log_det.abs().max().clamp_min(1)


@pytest.mark.parametrize("log_det", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(("classes", "delta"), [(1, None), (1, 0.03), (3, None), (3, 0.03)])
def test_stages_are_the_model(classes: int, delta: float | None, by_position: bool, log_det: float) -> None:
    model = small_model(classes, delta, by_position, sigma=0.0 if by_position else 1.0, log_det=log_det)
    staged = cut(model, {})
    assert ("log_det1" in staged.stages[1].outputs) == (log_det > 0)  # nothing is computed that no stage reads
    assert ("gain1" in staged.state) == by_position  # one product needs no entropy, one gain everywhere no constants
    assert (staged.outputs.logits is None) == (classes == 1)
    frame = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    walk = Walk(staged, torch_call(staged))
    for class_id in range(classes):
        values = walk.frame(frame.numpy(), class_id)
        with torch.no_grad():
            expected = model(frame, torch.tensor([class_id]))
        np.testing.assert_allclose(values["hgad_score.score"], expected.score, rtol=1e-4)
        np.testing.assert_allclose(values["hgad_score.map"][:, 0], expected.map, rtol=1e-4, atol=1e-5)
        if staged.outputs.logits:
            np.testing.assert_allclose(values[staged.outputs.logits], expected.logits, rtol=1e-4, atol=1e-5)


def test_only_the_density_and_the_score_know_the_class() -> None:
    staged = cut(small_model(3, 0.03), {})
    bound = [any(source.startswith("class:") for source in stage.inputs.values()) for stage in staged.stages]
    assert bound == [False, False, True, True]
    assert all(len(staged.state[name]) == 3 for name in staged.class_bound)


@pytest.mark.parametrize("log_det", [0.0, 1.0])
@pytest.mark.parametrize("by_position", [False, True])
def test_stages_export_and_match(by_position: bool, log_det: float) -> None:
    staged = cut(small_model(3, 0.03, by_position, sigma=0.0 if by_position else 1.0, log_det=log_det), {})
    frame = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    seen = examples(staged, frame)
    for stage in staged.stages:
        inputs, outputs = seen[stage.name]
        graph = export_stage(stage, inputs, outputs)
        session = onnxruntime.InferenceSession(graph.model.SerializeToString())
        for name, value in zip(stage.outputs, session.run(None, inputs), strict=True):
            np.testing.assert_allclose(value, outputs[name], rtol=1e-3, atol=1e-4 * np.abs(outputs[name]).max())


def test_position_channels_are_gone_from_the_graph() -> None:
    model = small_model(1, None)
    subnet = FoldedFlow(model.each_level[0].flow).subnets[0]
    block = model.each_level[0].flow.each_block[0]
    assert isinstance(subnet, FoldedSubnet)
    assert subnet.inner.in_features == block.kept < block.inner.in_features


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="no export options"):
        cut(small_model(1, None), {"sampler": "ddim10"})
