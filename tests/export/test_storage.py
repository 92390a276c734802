"""Constants stored narrower than they are computed with, and what a bundle saves by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from andon.export import trtcheck
from andon.export.command import narrow_lines
from andon.export.exporter import Request, export_bundle
from andon.export.precision import simulate, to_fp16
from andon.export.quantize import to_int8
from andon.export.stage import StageDef
from andon.export.storage import int8_storage_errors, short_names, storable, store_fp16, store_int8
from onnx import TensorProto
from torch import Tensor, nn

from .conftest import Toy
from .test_precision import graph, node, run, types

RNG = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def size(model: onnx.ModelProto) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer)


def island(w: np.ndarray) -> onnx.ModelProto:
    return graph([node("MatMul", ["x", "w"], "y")], {"x": [4, len(w)]}, {"y": [4, w.shape[1]]}, w=w)


def test_weights_of_an_island_are_stored_as_fp16_and_computed_in_fp32() -> None:
    model = island(weights(64, 64))
    converted = to_fp16(model, {"/y": "island"})
    small = store_fp16(converted)
    assert size(small.model) == size(converted.model) // 2
    kinds = types(small.model)
    assert kinds["w"] == kinds["y"] == TensorProto.FLOAT and kinds["w_fp16"] == TensorProto.FLOAT16
    assert small.fp32 == converted.fp32
    # Large inputs and a sum of small differences: FP16 arithmetic would show, FP16 weights hardly do.
    x = 1e5 * weights(4, 64)
    difference = np.abs(run(small.model, x=x) - run(model, x=x)).max()
    assert 0 < difference < 1e-3 * np.abs(run(model, x=x)).max()


def test_small_constants_and_those_that_fp16_cannot_hold_stay_as_they_are() -> None:
    for w in (weights(8, 8), 1e6 * weights(64, 64), 1e-8 * weights(64, 64)):
        converted = to_fp16(island(w), {"/y": "island"})
        assert store_fp16(converted) is converted


@pytest.mark.parametrize(
    ("kernel", "group", "stored"),
    [((32, 160, 1, 1), 1, True), ((32, 160, 3, 3), 1, False), ((160, 32, 1, 1), 5, False)],
)
def test_only_pointwise_convolutions_are_stored_as_int8(kernel: tuple[int, ...], group: int, stored: bool) -> None:
    """They become the product that they are, over a batch; a kernel behind a Cast is nothing that TensorRT takes."""
    side = 6 - kernel[2] + 1
    conv = node("Conv", ["x", "w", "b"], "y", group=group, kernel_shape=kernel[2:])
    shapes = {"x": [3, 160, 6, 6]}, {"y": [3, kernel[0], side, side]}
    w = weights(*kernel) * np.where(np.arange(kernel[0]) == 3, 1000, 1)[:, None, None, None].astype(np.float32)
    model = graph([conv], *shapes, w=w, b=weights(kernel[0]))
    whole = to_fp16(model, {"/y": "island"})
    assert store_fp16(whole) is whole
    assert storable(model, {}, []) == (["/y"] if stored else [])
    if stored:
        x = weights(3, 160, 6, 6)
        narrow, reference = to_int8(model, {}, [], [], ["/y"]).model, run(model, x=x)
        assert "Conv" not in {n.op_type for n in narrow.graph.node}
        error = np.abs(run(simulate(narrow), x=x) - reference).max((0, 2, 3))
        assert (error < 0.02 * np.abs(reference).max((0, 2, 3))).all()
        assert not trtcheck.check(narrow)


def test_a_constant_that_is_there_in_both_types_is_stored_once() -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y")]
    model = graph(nodes, {"x": [4, 64]}, {"y": [4, 64]}, w=weights(64, 64))
    converted = to_fp16(model, {"/y": "island"})
    assert size(store_fp16(converted).model) == 2 * 64 * 64 == size(converted.model) // 3


def test_linear_layers_outside_int8_store_their_weights_as_int8() -> None:
    w, table = weights(64, 128), weights(8, 1, 128)
    nodes = [node("Gemm", ["x", "w"], "a", transB=0), node("Add", ["a", "t"], "b"), node("Relu", ["b"], "y")]
    model = graph(nodes, {"x": [4, 64]}, {"y": [8, 4, 128]}, w=w, t=np.tile(table, (1, 4, 1)))
    assert storable(model, {}, []) == ["/a", "/b"]
    assert storable(model, {"/b": "island"}, ["/a"]) == []
    converted = to_int8(model, {}, [], [], ["/a", "/b"]).model
    assert {t.data_type for t in converted.graph.initializer if len(t.dims) > 1} == {TensorProto.INT8}
    assert "QuantizeLinear" not in {n.op_type for n in converted.graph.node}
    kinds = types(converted)
    assert kinds["a"] == kinds["b"] == TensorProto.FLOAT16
    x = weights(4, 64)
    reference = run(model, x=x)
    assert np.abs(run(converted, x=x) - reference).max() < 0.03 * np.abs(reference).max()


def test_transposed_weights_get_a_scale_per_output_channel() -> None:
    """One output channel is a thousand times larger: with a scale per input channel the others would be lost."""
    w = weights(128, 64) * np.where(np.arange(128) == 3, 1000, 1)[:, None].astype(np.float32)
    model = graph([node("Gemm", ["x", "w"], "y", transB=1)], {"x": [4, 64]}, {"y": [4, 128]}, w=w)
    x = weights(4, 64)
    narrow, widening = store_int8(model, ["/y"])
    assert len(widening) == 1
    error = np.abs(run(narrow, x=x) - run(model, x=x)).max(0)
    assert (error < 0.05 * np.abs(run(model, x=x)).max(0)).all()
    assert int8_storage_errors(model, ["/y"], [{"x": x}])["/y"] < 0.01


def test_short_names_leave_inputs_outputs_and_nodes_alone() -> None:
    model = graph(
        [node("MatMul", ["_0", "w"], "a" * 50), node("MatMul", ["a" * 50, "w"], "y")],
        {"_0": [4, 8]},
        {"y": [4, 8]},
        w=weights(8, 8),
    )
    short = short_names(model)
    onnx.checker.check_model(short, full_check=True)
    assert [i.name for i in (*short.graph.input, *short.graph.output)] == ["_0", "y"]
    assert [n.name for n in short.graph.node] == [n.name for n in model.graph.node]
    assert len(short.SerializeToString()) < len(model.SerializeToString()) - 80
    x = weights(4, 8)
    np.testing.assert_array_equal(run(short, _0=x), run(model, _0=x))


class Blur(nn.Module):
    """The toy's score stage with a matrix large enough to be worth storing narrow; FP32 by its definition."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("matrix", torch.eye(64) + 0.01 * torch.rand(64, 64))

    def forward(self, f: Tensor, u: Tensor, prototype: Tensor) -> tuple[Tensor, Tensor]:
        apart, _ = self.inner(f, u, prototype)
        apart = (apart.reshape(1, 64) @ self.matrix).reshape(apart.shape)
        return apart, apart.amax((1, 2, 3))


def blurred(toy: Toy) -> Toy:
    stages: tuple[StageDef, ...] = toy.staged.stages
    module = Blur(stages[-1].module)
    toy.model.score = module  # type: ignore[assignment]
    return replace(toy, staged=replace(toy.staged, stages=(*stages[:-1], replace(stages[-1], module=module))))


def test_a_stage_that_is_fp32_throughout_is_half_the_size_all_the_same(toy: Toy, tmp_path: Path) -> None:
    made = blurred(toy)
    request = Request(tmp_path / "b", ("fp16", "int8"))
    result = export_bundle(made.model, made.staged, made.evidence, made.provenance, request)
    files = result.manifest.stages["score"].files
    assert files["fp16"] == files["int8"] == "stages/score.fp16.onnx"
    model = onnx.load(str(tmp_path / "b" / files["fp16"]))
    assert [t.data_type for t in model.graph.initializer if len(t.dims) == 2] == [TensorProto.FLOAT16]
    assert [n.op_type for n in model.graph.node].count("Cast") == 1  # nothing is computed in FP16
    assert result.manifest.stages["score"].fp32_nodes["fp16"] >= 5
    assert result.report["variants"]["fp16"]["stored"]["score"]["fp16"]["taken"] is True
    assert result.report["variants"]["fp16"]["fallbacks"] == {}
    said = list(narrow_lines(result.manifest, result.report["variants"]))
    reason = "FP32 throughout by design (METHODS.md 6.1); its large constants are stored as FP16"
    assert f"fp16: stage score uses score.fp16.onnx: {reason}" in said
    assert f"int8: stage score uses score.fp16.onnx: {reason}" in said
    assert any(line.startswith("int8: stage encode computes ") for line in said)
