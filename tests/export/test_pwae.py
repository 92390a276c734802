"""The P-WAE cut: stages are the model, the folded decoder is the decoder."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from andon.export.methods.pwae import cut, fold
from andon.export.onnx import export_stage
from andon.export.walk import Walk, examples, torch_call
from andon.runtime.errors import ConfigError
from andon.train.methods.pwae.config import PwaeConfig
from andon.train.methods.pwae.model import PwaeModel

FRAME = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)


@cache
def small_model(mode: str) -> PwaeModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = PwaeConfig.model_validate(
        {
            "method": "pwae",
            "size": 96,
            "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2]},
            "mode": mode,
            "tiles": {"permutations": 10},
            "encoder": {"frozen": True, "latent": 16, "code": 8},
            "decoder": {
                "target": 48,
                "layers": [
                    {"channels": 16, "up": True},
                    {"channels": 12, "kernel": 3},
                    {"channels": 8, "up": True},
                ],
            },
            "schedule": {"steps": 1},
        }
    )
    model = PwaeModel(config, ("a", "b")).eval()
    for layer in model.decoder.each_layer:
        for value in (*layer.norm.parameters(), *layer.norm.buffers()):
            if value.is_floating_point():
                value.data.uniform_(0.5, 1.5)
    model.nu.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("mode", ["bottleneck", "spatial"])
def test_stages_are_the_model(mode: str) -> None:
    staged = cut(small_model(mode), {})
    walk = Walk(staged, torch_call(staged))
    for class_id in (0, 1):
        values = walk.frame(FRAME, class_id)
        with torch.no_grad():
            expected = small_model(mode)(torch.from_numpy(FRAME), torch.tensor([class_id]))
        np.testing.assert_allclose(values["score.score"], expected.score, rtol=1e-4)
        np.testing.assert_allclose(values["score.map"][:, 0], expected.map, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["bottleneck", "spatial"])
def test_stages_export_and_match(mode: str) -> None:
    staged = cut(small_model(mode), {})
    seen = examples(staged, FRAME)
    for stage in staged.stages:
        inputs, outputs = seen[stage.name]
        graph = export_stage(stage, inputs, outputs).model
        assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, value in zip(stage.outputs, session.run(list(stage.outputs), inputs), strict=True):
            scale = np.abs(outputs[name]).max()
            np.testing.assert_allclose(value, outputs[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_folding_leaves_the_model_alone() -> None:
    decoder = small_model("bottleneck").decoder
    before = decoder.each_layer[0].conv.weight.clone()
    grid = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(fold(decoder)(grid), decoder(grid), rtol=1e-4, atol=1e-4)
    assert torch.equal(decoder.each_layer[0].conv.weight, before)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="no export options"):
        cut(small_model("spatial"), {"steps": 3})
