"""Weights stored narrower than they are computed with: what makes a file small where arithmetic has to stay wide.

A constant that an FP32 node reads is stored as FP16 with a Cast behind it. In INT8 files the weights and tables of
products that stay FP16 are stored as INT8, one scale per output channel, with a DequantizeLinear behind them. Inputs,
sums and outputs of such a node keep its type; what changes is the constant, by its rounding. TensorRT takes the weights
of a convolution as constants or straight from a DequantizeLinear, not from a Cast: only pointwise ones are stored as
INT8, and become the MatMul that they are. Tensors inside a reduced graph get short names, because with small weights it
is names that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .precision import FP16_MAX, Fp16Graph
from .qdq import copy_of, set_nodes, symmetric
from .sensitivity import node_errors
from .walk import Array

#: Constants below these sizes are not worth the nodes that widen them again
FP16_LEAST = 512
INT8_LEAST = 4096
#: Rounding that a constant stored as FP16 may show, relative RMS (2^-11 is what normal numbers lose at most)
ROUNDING = 2.0**-11
#: Operators whose constants are tensors like any other to TensorRT's parser
_READERS = frozenset(("MatMul", "Gemm", "Add", "Sub", "Mul", "Div"))


def store_fp16(converted: Fp16Graph) -> Fp16Graph:
    """The graph with the large constants of its FP32 nodes stored as FP16; the same object if there is none."""
    model = copy_of(converted.model)
    graph = model.graph
    present = {tensor.name for tensor in graph.initializer}
    readers = _read_by(graph)
    stored: dict[str, TensorProto | None] = {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < FP16_LEAST:
            continue
        if all(node.op_type in _READERS for node in readers[tensor.name]) and _fits(numpy_helper.to_array(tensor)):
            narrow = f"{tensor.name}_fp16"  # there already where an FP16 node reads the constant too
            half = numpy_helper.to_array(tensor).astype(np.float16)
            stored[tensor.name] = None if narrow in present else numpy_helper.from_array(half, narrow)
    if not stored:
        return converted
    kept = [tensor for tensor in graph.initializer if tensor.name not in stored]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *filter(None, stored.values())])
    casts = [
        helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"{name}/Stored", to=TensorProto.FLOAT)
        for name in stored
    ]
    set_nodes(graph, [*casts, *graph.node])
    return replace(converted, model=_checked(model))


def _fits(array: Array) -> bool:
    if not np.isfinite(array).all() or np.abs(array).max(initial=0) > FP16_MAX:
        return False
    wide = array.astype(np.float64)
    lost = float(np.sqrt(np.square(wide - array.astype(np.float16)).sum()))
    return lost <= ROUNDING * float(np.sqrt(np.square(wide).sum()))


def fp16_storage_error(converted: Fp16Graph, stored: Fp16Graph, samples: Sequence[Mapping[str, Array]]) -> float:
    """What `store_fp16` alone costs the stage's outputs, relative RMS."""
    return node_errors(converted.model, ["stored"], lambda _: stored.model, samples)["stored"]


def storable(model: onnx.ModelProto, keep: Mapping[str, str], chosen: Sequence[str]) -> list[str]:
    """Nodes of an FP32 graph that stay FP16 in an INT8 file and read large weights or tables.

    keep: nodes that stay FP32. chosen: products that INT8 takes.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = {*keep, *chosen}
    return [n.name for n in model.graph.node if n.name not in taken and _large(n, constants)]


def _large(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> list[int]:
    """Which inputs of a node are constants worth storing as INT8."""
    if node.op_type not in ("MatMul", "Gemm", "Add") and not _pointwise(node, constants):
        return []
    return [
        i
        for i, name in enumerate(node.input)
        if name in constants
        and constants[name].data_type == TensorProto.FLOAT
        and len(constants[name].dims) > 1
        and int(np.prod(constants[name].dims)) >= INT8_LEAST
    ]


def _pointwise(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """A convolution that is a matrix product at every position."""
    if node.op_type != "Conv" or node.input[1] not in constants:
        return False
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = given.get("group", 1) == 1 and not any(given.get("pads", ()))
    plain &= all(s == 1 for s in given.get("strides", ())) and given.get("auto_pad", b"NOTSET") == b"NOTSET"
    kernel = constants[node.input[1]].dims[2:]
    return plain and len(kernel) == 2 and all(size == 1 for size in kernel)


def store_int8(model: onnx.ModelProto, nodes: Sequence[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Store the large constants of these nodes of a shape-inferred graph as INT8; also returns the nodes that widen
    them, for `keep`."""
    model = copy_of(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    wanted, made, rest = set(nodes), dict[str, onnx.NodeProto](), list[onnx.NodeProto]()
    shapes = _shapes(graph)
    for node in graph.node:
        large = _large(node, constants) if node.name in wanted else []
        for i in large:
            tensor = constants[node.input[i]]
            axis = _channel_axis(node, i, tensor)
            name = f"{tensor.name}_w8_{axis}"
            if name not in made:
                array = numpy_helper.to_array(tensor)
                made[name] = _dequantised(graph, name, array[:, :, 0, 0] if node.op_type == "Conv" else array, axis)
            node.input[i] = name
        rest += _as_matmul(graph, node, shapes) if large and node.op_type == "Conv" else [node]
    used = {name for node in (*made.values(), *rest) for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    set_nodes(graph, [*made.values(), *rest])
    return _checked(model), {node.name: "widens weights stored as int8" for node in made.values()}


def _dequantised(graph: onnx.GraphProto, name: str, array: Array, axis: int) -> onnx.NodeProto:
    """The node that makes a tensor of integers and scales, which are added to the graph."""
    integers, scale = symmetric(array, axis)
    parts = {f"{name}_q": integers, f"{name}_scale": scale, f"{name}_zero": np.zeros(len(scale), np.int8)}
    graph.initializer.extend(numpy_helper.from_array(part, key) for key, part in parts.items())
    return helper.make_node("DequantizeLinear", list(parts), [name], name=f"{name}/Dequantize", axis=axis)


def _as_matmul(
    graph: onnx.GraphProto, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]
) -> list[onnx.NodeProto]:
    """A pointwise convolution whose weights are [out, in] by now: weights times positions, under its name."""
    (batch, channels, *_), output = shapes[node.input[0]], shapes[node.output[0]]
    rows, product = f"{node.output[0]}_rows", f"{node.output[0]}_product"
    flat, full = f"{rows}_shape", f"{product}_shape"
    for name, shape in ((flat, (batch, channels, -1)), (full, output)):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    nodes = [
        helper.make_node("Reshape", [node.input[0], flat], [rows], name=f"{node.name}/Rows"),
        helper.make_node("MatMul", [node.input[1], rows], [product], name=node.name),
    ]
    if len(node.input) > 2:
        bias = next(numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[2])
        graph.initializer.append(numpy_helper.from_array(bias[:, None], f"{product}_bias"))
        nodes.append(
            helper.make_node("Add", [product, f"{product}_bias"], [f"{product}_sum"], name=f"{node.name}/Bias")
        )
        product = f"{product}_sum"
    return [*nodes, helper.make_node("Reshape", [product, full], [node.output[0]], name=f"{node.name}/Map")]


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}


def _channel_axis(node: onnx.NodeProto, index: int, tensor: TensorProto) -> int:
    """The axis of a constant along which the node's output channels lie."""
    if node.op_type == "Conv":
        return 0
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed and index == 1 else len(tensor.dims) - 1


def int8_storage_errors(
    model: onnx.ModelProto, nodes: Sequence[str], samples: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """What INT8 storage in one node alone costs the stage (export/sensitivity.py)."""
    return node_errors(model, nodes, lambda name: store_int8(model, [name])[0], samples)


def short_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with short names for the tensors inside it; inputs, outputs and nodes keep theirs.

    Every tensor is named where it is made and wherever it is read: with Q/DQ that is a twentieth of a small file.
    """
    model = copy_of(model)
    graph = model.graph
    kept = {info.name for info in (*graph.input, *graph.output)}
    inside = [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.output]
    free = (name for name in map("_{:x}".format, count()) if name not in kept)
    short = {name: next(free) for name in inside if name and name not in kept}
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
    del graph.value_info[:]
    return model


def _read_by(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {tensor.name: [] for tensor in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node)
    return readers


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)
    return inferred
