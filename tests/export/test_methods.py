"""Every registered method's edge preset with random weights: cut, stages, parity, precision passes, trtcheck."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from andon.export import trtcheck, verify
from andon.export.methods import list_cuts
from andon.export.onnx import OPSET, export_stage, tensor_type
from andon.export.precision import FP32_OPERATORS, simulate
from andon.export.stage import StageDef
from andon.export.walk import Walk, torch_call
from andon.runtime.agreement import difference
from andon.train.registry import list_methods

from .edge import STORED, VARIANTS, edge, stage_model

METHODS = list_methods()


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )


class Strided(torch.nn.Module):
    """A constant with a strided slice, which the exporter says it does not fold."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(8.0)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[:, ::2] + x


def test_an_export_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Neither of the exporter's age nor of what it leaves unfolded: neither is a user's business."""
    x = np.zeros((1, 4), np.float32)
    stage = StageDef("strided", Strided(), {"x": "frame"}, ("y",))
    export_stage(stage, {"x": x}, {"y": np.array([[0, 2, 4, 6]], np.float32)})
    assert [str(w.message) for w in recwarn] == []


def test_every_method_has_a_cut() -> None:
    assert list_cuts() == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_cut_computes_what_the_model_does(method: str) -> None:
    made = edge(method)
    walk = Walk(made.staged, torch_call(made.staged))
    for image, class_id in zip(made.frames.images[:3], made.frames.class_ids[:3], strict=True):
        walk.reset()
        values = walk.frame(image[None], int(class_id))
        with torch.no_grad():
            scores = made.model(torch.from_numpy(image[None]), torch.tensor([int(class_id)]))
        assert values[made.staged.outputs.score][0] == pytest.approx(float(scores.score[0]), rel=verify.SCORE_PARITY)


@pytest.mark.parametrize("method", METHODS)
def test_fp32_stages_match_torch_and_keep_the_rules(method: str) -> None:
    made = edge(method)
    for stage in made.staged.stages:
        model = stage_model(method, stage.name, "fp32")
        assert model.opset_import[0].version == OPSET
        for info in (*model.graph.input, *model.graph.output):
            shape, dtype = tensor_type(info)
            assert dtype in ("uint8", "float32", "int32", "bool") and -1 not in shape, (stage.name, info.name)
        for inputs, outputs in made.calls[stage.name]:
            for (name, reference), value in zip(outputs.items(), run(model, inputs), strict=True):
                assert difference(value, reference) <= stage.tolerance, (stage.name, name)


@pytest.mark.parametrize("method", ["hgad", "hvq"])
def test_one_product_alone_has_no_classifier_to_export(method: str) -> None:
    assert edge(method).staged.outputs.logits is not None
    alone = edge(method, ("only",))
    assert alone.staged.outputs.logits is None
    for stage in alone.staged.stages:
        assert "logits" not in stage.outputs
        for inputs, outputs in alone.calls[stage.name]:
            for (name, reference), value in zip(
                outputs.items(), run(alone.graphs[stage.name].model, inputs), strict=True
            ):
                assert difference(value, reference) <= stage.tolerance, (stage.name, name)


@pytest.mark.parametrize("variant", (*VARIANTS[1:], STORED))
@pytest.mark.parametrize("method", METHODS)
def test_reduced_stages_run_stay_finite_and_keep_islands_wide(method: str, variant: str) -> None:
    made = edge(method)
    for stage in made.staged.stages:
        model = stage_model(method, stage.name, variant)
        types = {i.name: i.type.tensor_type.elem_type for i in model.graph.value_info}
        islands = made.graphs[stage.name].islands
        for node in model.graph.node:
            narrow = [n for n in node.output if types.get(n) == onnx.TensorProto.FLOAT16]
            wide = node.name in islands or node.op_type in FP32_OPERATORS
            assert not (wide and narrow), f"{stage.name}: {node.name} is in FP16"
        inputs, outputs = made.calls[stage.name][0]
        for form in (model, simulate(model)):
            for (name, reference), value in zip(outputs.items(), run(form, inputs), strict=True):
                assert value.dtype == reference.dtype and value.shape == reference.shape, (stage.name, name)
                assert np.isfinite(value).all() == np.isfinite(reference).all(), (stage.name, name)


@pytest.mark.parametrize("variant", (*VARIANTS, STORED))
@pytest.mark.parametrize("method", METHODS)
def test_tensorrt_takes_the_stages(method: str, variant: str) -> None:
    for stage in edge(method).staged.stages:
        refusals = trtcheck.check(stage_model(method, stage.name, variant))
        assert not refusals, "\n".join(f"{stage.name}: {refusal}" for refusal in refusals)


@pytest.mark.parametrize("method", METHODS)
def test_nodes_keep_their_module_path(method: str) -> None:
    named = [n for g in edge(method).graphs.values() for n in g.model.graph.node if re.match(r"/[a-z_]+[./]", n.name)]
    everything = [n for g in edge(method).graphs.values() for n in g.model.graph.node]
    assert len(named) > len(everything) / 4
