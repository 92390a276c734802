"""What a stage costs: multiply-accumulates and stored parameters, read off its ONNX graph."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

_COUNTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def stage_cost(path: Path) -> tuple[int, int]:
    """Multiply-accumulates of convolutions and matrix products, and elements of all weights, of one run of a stage.

    Element-wise work is not counted, as in the tables of papers.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), data_prop=True)
    graph = model.graph
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    macs = sum(_macs(node, shapes) for node in graph.node if node.op_type in _COUNTED)
    return macs, sum(math.prod(i.dims) for i in graph.initializer)


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Conv":  # weight [out, in / groups, *kernel]
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight [in, out / groups, *kernel]
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = attributes["transA"].i if "transA" in attributes else 0
        return math.prod(out) * (first[0] if transposed else first[1])
    return math.prod(out) * first[-1]
