"""The HVQ-Trans cut: the stages are the model, in torch and in onnxruntime; the product is a pointer."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from andon.export.methods.hvq import cut
from andon.export.onnx import export_stage
from andon.export.stage import StagedModel
from andon.export.walk import Walk, examples, torch_call
from andon.runtime.errors import ConfigError
from andon.train.methods.hvq.config import HvqConfig
from andon.train.methods.hvq.model import HvqModel

MODES = ("off", "ct_level1", "sinkhorn_all")
FRAME = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)


@cache
def small_model(mode: str) -> HvqModel:
    """Two products, two levels, a 4 x 4 grid; codes and experts differ between the products."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = HvqConfig.model_validate(
        {
            "method": "hvq",
            "size": 64,
            "backbone": {"id": "tf_efficientnet_lite0", "weights": "random:0", "taps": [2, 3]},
            "features": {"grid": 4, "align": "area", "smooth": True, "standardize": True},
            "transformer": {"dim": 32, "heads": 2, "ffn": 64, "decoder_heads": 2, "decoder_ffn": 64, "layers": 2},
            "codebook": {"size": 24},
            "pot": {"mode": mode, "lam": 2.0, "iterations": 10},
            "score": {"mode": "pool", "window": 16, "sigma": 2.0},
            "schedule": {"steps": 1},
        }
    )
    model = HvqModel(config, ("mono", "poly")).eval()
    for book in model.books:
        book.codes.mul_(0.5).add_(torch.tensor([0.0, 1.0])[:, None, None])
    model.epsilon.uniform_(0.3, 0.8)
    model.map_mean.normal_()
    model.map_std.uniform_(0.5, 2)
    standardize = model.encoder.get_submodule("standardize")
    standardize.get_buffer("std").uniform_(0.5, 2)
    return model


def staged(mode: str) -> StagedModel:
    return cut(small_model(mode), {})


@pytest.mark.parametrize("mode", MODES)
def test_stages_are_the_model(mode: str) -> None:
    walk = Walk(staged(mode), torch_call(staged(mode)))
    scores = []
    for class_id in (0, 1):
        values = walk.frame(FRAME, class_id)
        with torch.no_grad():
            expected = small_model(mode)(torch.from_numpy(FRAME), torch.tensor([class_id]))
        np.testing.assert_allclose(values["score.score"], expected.score, rtol=1e-4)
        np.testing.assert_allclose(values["score.map"][:, 0], expected.map, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values["encode.logits"], expected.logits, rtol=1e-4, atol=1e-5)
        scores.append(float(values["score.score"][0]))
    assert abs(scores[0] - scores[1]) > 1e-2, "the class pointer changes the score"


@pytest.mark.parametrize("mode", MODES)
def test_stages_export_and_match(mode: str) -> None:
    model = staged(mode)
    seen = examples(model, FRAME)
    for stage in model.stages:
        inputs, outputs = seen[stage.name]
        graph = export_stage(stage, inputs, outputs).model
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for name, value in zip(stage.outputs, session.run(list(stage.outputs), inputs), strict=True):
            scale = np.abs(outputs[name]).max()
            np.testing.assert_allclose(value, outputs[name], rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def test_class_state_is_bound_not_gathered() -> None:
    model = staged("off")
    assert all(len(model.state[name]) == 2 for name in model.class_bound)
    encode, decode, score = (
        {s.removeprefix("class:") for s in stage.inputs.values() if s.startswith("class:")} for stage in model.stages
    )
    assert not encode
    assert score == {"map_mean", "map_std"}
    assert decode | score == model.class_bound


def test_codes_are_stored_centred() -> None:
    model = staged("off")
    np.testing.assert_allclose(model.state["codes"].mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(model.state["top"].mean(axis=1), 0, atol=1e-5)
    restored = model.state["codes"] + model.state["codes_mean"]
    np.testing.assert_allclose(restored[:, 0], small_model("off").books[0].codes, atol=1e-5)


def test_telemetry_counts_the_model_s_own_codes() -> None:
    values = Walk(staged("off"), torch_call(staged("off"))).frame(FRAME, 1)
    model = small_model("off")
    with torch.no_grad():
        aligned = model.features(torch.from_numpy(FRAME))["aligned"]
        decoded = model.decode(model.encode(aligned), torch.tensor([1]))
    assert values["decode.idx"].dtype == np.int32
    np.testing.assert_array_equal(values["decode.idx"], torch.cat([q.indices for q in decoded.quantized]))


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="no export options"):
        cut(small_model("off"), {"steps": 3})
