"""Graph edits for INT8 that onnxruntime's quantiser does not do: probes of one node, and tables added by linear layers.

Symmetric INT8 throughout: value = integer * scale, integers -127..127, one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .ranges import Range
from .walk import Array

_TABLE = "/Table"


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A deep copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put these nodes in place of the graph's."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def symmetric(array: Array, axis: int) -> tuple[Array, Array]:
    """Integers (int8, shaped like `array`) and scales (float32, one per index of `axis`)."""
    others = tuple(a for a in range(array.ndim) if a != axis)
    scale = np.maximum(np.abs(array).max(others, keepdims=True) / 127, 1e-30).astype(np.float32)
    return np.round(array / scale).astype(np.int8), scale.reshape(-1)


def _rounded(array: Array, axis: int) -> Array:
    integers, scale = symmetric(array, axis)
    shape = [-1 if a == axis else 1 for a in range(array.ndim)]
    return (integers * scale.reshape(shape)).astype(np.float32)


def _channel_axis(node: onnx.NodeProto, rank: int) -> int:
    """Axis of the output channels in a product's weights."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else rank - 1


def _tables(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Constants that a linear layer adds row by row: position codes folded into the bias."""
    return {t.name: t for t in graph.initializer if len(t.dims) == 2 and t.dims[0] > 1}


def with_one_quantised(model: onnx.ModelProto, name: str, ranges: Mapping[str, Range]) -> onnx.ModelProto:
    """One product in INT8, the rest in FP32: its weights (and table) rounded, its input through Q and DQ."""
    probe = copy_of(model)
    graph = probe.graph
    index = next(i for i, node in enumerate(graph.node) if node.name == name)
    node, constants = graph.node[index], {t.name: t for t in graph.initializer}
    weights = numpy_helper.to_array(constants[node.input[1]])
    step = np.float32(max(ranges[node.input[0]].largest / 127, 1e-30))
    arrays = {
        "probe_weights": _rounded(weights, _channel_axis(node, weights.ndim)),
        "probe_scale": np.array(step),
        "probe_zero": np.array(0, np.int8),
    }
    scales = ["probe_scale", "probe_zero"]
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], *scales], ["probe_q"]),
        helper.make_node("DequantizeLinear", ["probe_q", *scales], ["probe_dq"]),
    ]
    node.input[0], node.input[1] = "probe_dq", "probe_weights"
    if len(node.input) == 3 and node.input[2] in _tables(graph):
        arrays["probe_table"] = _rounded(numpy_helper.to_array(constants[node.input[2]]), 1)
        node.input[2] = "probe_table"
    graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
    set_nodes(graph, [*graph.node[:index], *pair, *graph.node[index:]])
    return probe


def split_tables(model: onnx.ModelProto, chosen: Sequence[str]) -> onnx.ModelProto:
    """Linear layers among `chosen` that add a table become a layer and an addition, so that both can be quantised."""
    split = copy_of(model)
    graph = split.graph
    tables = _tables(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Gemm" and node.name in chosen and len(node.input) == 3 and node.input[2] in tables:
            table, output = node.input[2], node.output[0]
            product = f"{output}_product"
            nodes.append(helper.make_node("Add", [product, table], [output], name=f"{node.name}{_TABLE}"))
            del node.input[2:]
            node.output[0] = product
    set_nodes(graph, nodes)
    return onnx.shape_inference.infer_shapes(split, strict_mode=True, data_prop=True)


def quantise_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the tables that `split_tables` set apart as INT8 with a DequantizeLinear behind them."""
    small = copy_of(model)
    graph = small.graph
    constants = {t.name: t for t in graph.initializer}
    added = {node.input[1] for node in graph.node if node.name.endswith(_TABLE)}
    elsewhere = {n for node in graph.node if not node.name.endswith(_TABLE) for n in node.input}
    nodes: list[onnx.NodeProto] = []
    for table in sorted(added):
        integers, scale = symmetric(numpy_helper.to_array(constants[table]), 1)
        arrays = {f"{table}_q": integers, f"{table}_scale": scale, f"{table}_zero": np.zeros(len(scale), np.int8)}
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
        dequantised = f"{table}_dq"
        nodes.append(
            helper.make_node("DequantizeLinear", list(arrays), [dequantised], name=f"{table}/Dequantize", axis=1)
        )
        for node in graph.node:
            if node.name.endswith(_TABLE) and node.input[1] == table:
                node.input[1] = dequantised
    kept = [t for t in graph.initializer if t.name not in added or t.name in elsewhere]
    set_nodes(graph, [*nodes, *graph.node])
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return small
