"""The precision passes on small graphs: casts, islands, ranges, constants, quantisation, and rounding as on a GPU."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from andon.export.precision import FP16_MAX, keep_fp32, simulate, to_fp16
from andon.export.quantize import int8_errors, quantisable, to_int8
from andon.export.ranges import measure
from andon.export.reduce import Reduced
from andon.export.sensitivity import followers, fp16_errors, node_errors, root_sum_square, select
from andon.runtime.errors import ConfigError
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def graph(nodes: list[Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]], **constants: Any):
    """A checked model with float32 inputs, outputs and constants (uint8 for an input called frame)."""
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [info(name, TensorProto.UINT8 if name == "frame" else FLOAT, shape) for name, shape in inputs.items()],
        [info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"/{output}", **attributes)


def run(model: onnx.ModelProto, **inputs: Any) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {k: np.asarray(v) for k, v in inputs.items()})[0]


def types(model: onnx.ModelProto) -> dict[str, int]:
    infos = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {i.name: i.type.tensor_type.elem_type for i in infos} | {
        t.name: t.data_type for t in model.graph.initializer
    }


def two_layers() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("w1", "w2")}
    nodes = [node("MatMul", ["x", "w1"], "a"), node("Relu", ["a"], "b"), node("MatMul", ["b", "w2"], "y")]
    return graph(nodes, {"x": [4, 8]}, {"y": [4, 8]}, **weights)


def test_weights_are_fp16_and_inputs_and_outputs_stay_fp32() -> None:
    model = to_fp16(two_layers(), {}).model
    kinds = types(model)
    assert kinds["x"] == kinds["y"] == FLOAT and kinds["a"] == kinds["b"] == HALF
    assert {t.data_type for t in model.graph.initializer} == {HALF}
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x), run(two_layers(), x=x), rtol=1e-2, atol=1e-2)


def test_an_island_is_wide_with_casts_around_it() -> None:
    converted = to_fp16(two_layers(), {"/b": "island b"})
    kinds = types(converted.model)
    assert kinds["a"] == HALF and kinds["b"] == FLOAT and converted.fp32 == {"/b": "island b"}
    assert [n.op_type for n in converted.model.graph.node].count("Cast") == 4  # in, to b, from b, out


def test_a_constant_used_on_both_sides_is_there_in_both_types() -> None:
    nodes = [node("Add", ["x", "c"], "a"), node("Mul", ["a", "c"], "y")]
    model = to_fp16(graph(nodes, {"x": [2]}, {"y": [2]}, c=np.float32([1, 2])), {"/y": "island"}).model
    assert {t.data_type for t in model.graph.initializer} == {FLOAT, HALF}


def test_data_movement_between_islands_stays_wide() -> None:
    nodes = [node("Mul", ["x", "x"], "a"), node("Reshape", ["a", "s"], "b"), node("Mul", ["b", "b"], "y")]
    model = graph(nodes, {"x": [2, 3]}, {"y": [6]}, s=np.int64([6]))
    assert HALF not in types(to_fp16(model, {"/a": "island", "/y": "island"}).model).values()


def test_an_output_that_is_also_read_inside_is_right() -> None:
    nodes = [node("Relu", ["x"], "y"), node("Add", ["y", "y"], "z")]
    model = to_fp16(graph(nodes, {"x": [3]}, {"y": [3], "z": [3]}), {}).model
    assert types(model)["y"] == types(model)["z"] == FLOAT
    assert run(model, x=np.float32([-1, 2, 3])).tolist() == [0, 2, 3]


def test_the_frame_is_prepared_in_fp32() -> None:
    nodes = [
        node("Cast", ["frame"], "a", to=FLOAT),
        node("Transpose", ["a"], "b", perm=[0, 3, 1, 2]),
        node("Div", ["b", "c"], "d"),
        node("Conv", ["d", "w"], "y"),
    ]
    model = graph(
        nodes,
        {"frame": [1, 4, 4, 3]},
        {"y": [1, 2, 4, 4]},
        c=np.float32(255),
        w=np.ones((2, 3, 1, 1), np.float32),
    )
    kinds = types(to_fp16(model, keep_fp32(model, {}, {})).model)
    assert kinds["a"] == kinds["b"] == kinds["d"] == FLOAT and kinds["d_fp16"] == HALF


@pytest.mark.parametrize(
    ("operator", "constant", "reason"),
    [("Add", 1e6, "leaves FP16's range"), ("Mul", 1e-9, "vanishes"), ("Add", 0.5, None), ("Max", -1e9, None)],
)
def test_constants_that_fp16_cannot_hold_keep_their_node_wide(operator: str, constant: float, reason: str) -> None:
    model = graph([node(operator, ["x", "c"], "y")], {"x": [2]}, {"y": [2]}, c=np.float32([constant]))
    keep = keep_fp32(model, {}, {})
    assert (keep == {}) if reason is None else reason in keep["/y"]
    converted = to_fp16(model, keep)
    assert bool(converted.clipped) == (operator == "Max")
    assert run(converted.model, x=np.float32([1, 2])) == pytest.approx(run(model, x=np.float32([1, 2])), rel=1e-3)


def test_what_a_tiny_guard_protects_stays_wide() -> None:
    nodes = [node("Max", ["x", "eps"], "a"), node("Div", ["one", "a"], "y")]
    model = graph(nodes, {"x": [1]}, {"y": [1]}, eps=np.float32(1e-10), one=np.float32(1e-3))
    converted = to_fp16(model, keep_fp32(model, {}, {}))
    assert np.isfinite(run(simulate(converted.model), x=np.float32([0]))).all()


def test_ranges_find_what_overflows_and_keep_it_wide() -> None:
    nodes = [node("Mul", ["x", "c"], "a"), node("Mul", ["a", "a"], "b"), node("Sqrt", ["b"], "y")]
    model = graph(nodes, {"x": [2]}, {"y": [2]}, c=np.float32(300))
    report = measure(model, [{"x": np.float32([1, 2])}])
    assert set(report.nodes) == {"/b", "/y"} and "3.6e+05" in report.nodes["/b"]
    x = np.float32([1, 2])
    assert not np.isfinite(run(simulate(to_fp16(model, {}).model), x=x)).all()
    wide = to_fp16(model, keep_fp32(model, {}, report.nodes)).model
    np.testing.assert_allclose(run(simulate(wide), x=x), [300, 600], rtol=1e-2)


def test_the_rounded_form_overflows_where_onnxruntime_hides_it() -> None:
    """Why the gate does not judge by onnxruntime's CPU run of an FP16 file: it computes FP16 chains in FP32."""
    nodes = [node("Mul", ["x", "c"], "a"), node("Div", ["a", "c"], "y")]
    model = to_fp16(graph(nodes, {"x": [1]}, {"y": [1]}, c=np.float32(300)), {}).model
    x = np.float32([300])
    assert run(simulate(model), x=x) == np.inf
    assert FP16_MAX < 300 * 300


def test_the_rounded_form_rounds_like_numpy() -> None:
    nodes = [node("Add", ["x", "c"], "a"), node("Sub", ["a", "c"], "y")]
    model = to_fp16(graph(nodes, {"x": [64]}, {"y": [64]}, c=np.float32(100)), {}).model
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    expected = ((x.astype(np.float16) + np.float16(100)) - np.float16(100)).astype(np.float32)
    np.testing.assert_array_equal(run(simulate(model), x=x), expected)


def test_control_flow_is_refused() -> None:
    body = helper.make_graph([], "b", [], [])
    model = graph([node("Relu", ["x"], "y")], {"x": [1]}, {"y": [1]})
    model.graph.node[0].attribute.append(helper.make_attribute("then_branch", body))
    with pytest.raises(ConfigError, match="cannot be converted"):
        to_fp16(model, {})


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(size=(4, 8)).astype(np.float32)} for _ in range(count)]


def test_int8_quantises_what_it_is_told_and_the_rest_is_fp16() -> None:
    model = two_layers()
    assert quantisable(model, {"/y": "island"}) == ["/a"]
    converted = to_int8(model, {}, samples(), ["/a"]).model
    kinds = [n.op_type for n in converted.graph.node]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("MatMul") == 2  # its input and its output
    assert {t.data_type for t in converted.graph.initializer if len(t.dims) == 2} == {TensorProto.INT8, HALF}
    x = samples()[0]["x"]
    reference = run(model, x=x)
    assert np.abs(run(converted, x=x) - reference).max() < 0.05 * np.abs(reference).max()
    with pytest.raises(ValueError, match="no node"):
        to_int8(model, {}, samples(), [])


def test_a_table_in_a_linear_layer_is_quantised_too() -> None:
    rng = np.random.default_rng(0)
    w, table = rng.normal(size=(64, 128)).astype(np.float32), rng.normal(size=(64, 128)).astype(np.float32)
    model = graph([node("Gemm", ["x", "w", "t"], "y")], {"x": [64, 64]}, {"y": [64, 128]}, w=w, t=table)
    calls = [{"x": rng.normal(size=(64, 64)).astype(np.float32)}]
    converted = to_int8(model, {}, calls, ["/y"]).model
    assert {t.data_type for t in converted.graph.initializer if tuple(t.dims) == (64, 128)} == {TensorProto.INT8}
    reference = run(model, **calls[0])
    assert np.abs(run(converted, **calls[0]) - reference).max() < 0.05 * np.abs(reference).max()


def test_sensitivity_names_the_layer_that_quantisation_hurts() -> None:
    """Layer one sees an outlier that takes the whole INT8 range; layer two is harmless."""
    rng = np.random.default_rng(0)
    w1 = rng.normal(size=(8, 8)).astype(np.float32)
    w1[0] = 0  # nothing comes of the outlier
    model = graph(
        [node("MatMul", ["x", "w1"], "a"), node("MatMul", ["a", "w2"], "y")],
        {"x": [4, 8]},
        {"y": [4, 8]},
        w1=w1,
        w2=rng.normal(size=(8, 8)).astype(np.float32),
    )
    calls = samples()
    for call in calls:
        call["x"][:, 0] = 500
    errors = int8_errors(model, ["/a", "/y"], measure(model, calls).tensors, calls)
    assert errors["/a"] > 10 * errors["/y"]
    assert select(model, errors, budget=0.05) == ["/y"]
    assert select(model, errors, budget=100) == ["/y", "/a"] and select(model, errors, budget=0) == []


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_product_that_spoils_one_output_of_several_is_never_narrow(spoilt: int) -> None:
    """Whichever output it is: one that is not a number compares as smaller than nothing."""
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    ends = [node("Identity", ["a"], "y0"), node("Sqrt", ["b"], "y1")][:: -1 if spoilt == 0 else 1]
    outputs = {end.output[0]: [4, 8] for end in ends}
    model = graph([node("MatMul", ["x", "w"], "a"), node("Abs", ["a"], "b"), *ends], {"x": [4, 8]}, outputs, w=w)

    def probe(name: str) -> onnx.ModelProto:
        negative = onnx.ModelProto()
        negative.CopyFrom(model)
        next(n for n in negative.graph.node if n.op_type == "Abs").op_type = "Neg"
        return negative

    errors = node_errors(model, ["/a"], probe, samples())
    assert errors == {"/a": float("inf")} and select(model, errors, budget=1e9) == []
    written = Reduced(widened={"stage": {"error": root_sum_square(errors)}}).record()
    assert json.loads(json.dumps(written, allow_nan=False))["widened"] == {"stage": {"error": "inf"}}


def test_fp16_widens_the_product_that_costs_most_and_what_follows_it() -> None:
    """Layer one gives large numbers whose rounding survives the subtraction after it; layer two is harmless."""
    rng = np.random.default_rng(0)
    w1 = rng.normal(size=(8, 8)).astype(np.float32)
    nodes = [
        node("Gemm", ["x", "w1", "big"], "a"),
        node("Relu", ["a"], "b"),
        node("Sub", ["b", "big"], "c"),
        node("MatMul", ["c", "w2"], "y"),
    ]
    big, w2 = np.full(8, 3000, np.float32), rng.normal(size=(8, 8)).astype(np.float32)
    model = graph(nodes, {"x": [4, 8]}, {"y": [4, 8]}, w1=w1, w2=w2, big=big)
    calls = samples()
    errors = fp16_errors(model, {}, calls)
    assert errors["/a"] > 100 * errors["/y"]
    narrow = select(model, errors, 0.5 * root_sum_square(errors))
    assert narrow == ["/y"]
    follow = followers(model, {"/a": "wide"}, frozenset({"Relu", "Sub"}))
    assert set(follow) == {"/b", "/c"}
    x, reference = calls[0]["x"], run(model, **calls[0])
    error = [
        np.abs(run(simulate(to_fp16(model, keep).model), x=x) - reference).max() for keep in ({}, {"/a": "", **follow})
    ]
    assert error[1] < 0.05 * error[0]
