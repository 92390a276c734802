"""The static TensorRT check: the table holds together, and each rule refuses what it is there for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from andon.export import trtcheck
from onnx import TensorProto, defs, helper, numpy_helper

F, I32, U8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8


def model(
    node: onnx.NodeProto, inputs: dict[str, tuple[int, list[int]]], opset: int = 17, **constants: Any
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in node.output],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(operator: str, *inputs: str, outputs: tuple[str, ...] = ("y",), **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), list(outputs), name="/it", **attributes)


ACCEPTED = [
    model(node("Add", "x", "x"), {"x": (F, [2, 3])}),
    model(node("Cast", "x", to=F), {"x": (U8, [1, 4, 4, 3])}),
    model(node("Gather", "x", "i"), {"x": (F, [5, 3]), "i": (I32, [2])}),
    model(node("TopK", "x", "k", outputs=("v", "i")), {"x": (F, [4, 9])}, k=np.int64([3])),
    model(node("ReduceMean", "x", axes=[1]), {"x": (F, [2, 3])}),
    model(node("Where", "c", "x", "x"), {"c": (TensorProto.BOOL, [2]), "x": (F, [2])}),
    model(node("QuantizeLinear", "x", "s", "z"), {"x": (F, [4])}, s=np.float32(0.1), z=np.int8(0)),
]

REFUSED = {
    "not in the table": model(node("Det", "x"), {"x": (F, [1, 3, 3])}),
    "uint8": model(node("Transpose", "x", perm=[1, 0]), {"x": (U8, [2, 3])}),
    "int64 input": model(node("Add", "x", "x"), {"x": (TensorProto.INT64, [2])}),
    "is double": model(node("Exp", "x"), {"x": (TensorProto.DOUBLE, [2])}),
    "no fixed shape": model(node("Expand", "x", "s"), {"x": (F, [1]), "s": (TensorProto.INT64, [1])}),
    "9 dimensions": model(node("Exp", "x"), {"x": (F, [1] * 9)}),
    "opset 26": model(node("Exp", "x"), {"x": (F, [2])}, opset=26),
    "at most 3840": model(node("TopK", "x", "k", outputs=("v", "i")), {"x": (F, [1, 5000])}, k=np.int64([4000])),
    "must be a constant": model(
        node("TopK", "x", "k", outputs=("v", "i")), {"x": (F, [1, 9]), "k": (TensorProto.INT64, [1])}
    ),
    "last four": model(node("ArgMax", "x", axis=0), {"x": (F, [2, 1, 1, 1, 1])}),
    "zero point": model(node("QuantizeLinear", "x", "s", "z"), {"x": (F, [4])}, s=np.float32(0.1), z=np.uint8(3)),
    "int32 bias": model(node("DequantizeLinear", "x", "s"), {"x": (I32, [4])}, s=np.float32(0.1)),
    "further output": model(
        node("LayerNormalization", "x", "w", outputs=("y", "m")), {"x": (F, [2, 4])}, w=np.ones(4, np.float32)
    ),
    "cubic": model(node("Resize", "x", "", "s", mode="cubic"), {"x": (F, [1, 1, 4, 4])}, s=np.float32([1, 1, 2, 2])),
    "equation": model(node("Einsum", "x", equation="ii->i"), {"x": (F, [3, 3])}),
    "dilations": model(node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2]), {"x": (F, [1, 1, 6, 6])}),
}


@pytest.mark.parametrize("accepted", ACCEPTED, ids=lambda m: m.graph.node[0].op_type)
def test_what_the_parsers_take_passes(accepted: onnx.ModelProto) -> None:
    assert trtcheck.check(accepted) == []


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_node_and_reason(reason: str) -> None:
    refusals = trtcheck.check(REFUSED[reason])
    assert any(reason in str(r) for r in refusals), [str(r) for r in refusals]
    assert all(r.source for r in refusals)


def test_the_table_holds_together() -> None:
    table = trtcheck.support()
    for operator, row in table["operators"].items():
        assert defs.has(operator), operator
        assert row["source"] in table["sources"], operator
        assert set(row.get("rules", ())) <= set(trtcheck._RULES), operator
    for version in table["versions"].values():
        assert version["source"] in table["sources"] and version["opset"][0] <= 17 <= version["opset"][1]
    used = {rule for row in table["operators"].values() for rule in row.get("rules", ())}
    assert used == set(trtcheck._RULES)


def test_every_operator_without_a_fixed_output_shape_is_absent() -> None:
    assert not {"NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan"} & set(
        trtcheck.support()["operators"]
    )
