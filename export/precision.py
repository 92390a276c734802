"""FP16 by explicit casts (METHODS.md 6.1): the types in the file are the types that run.

A strongly typed TensorRT network takes precision from the ONNX alone, so every tensor gets its type here. Graph inputs
and outputs stay FP32, weights of FP16 nodes are stored as FP16, and nodes that need FP32 stay there: the cut's islands,
operators that sum or compare, what prepares the camera frame, and what leaves FP16's range on real frames
(export/ranges.py). Operators that only move data follow their input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.errors import ConfigError

FP16_MAX = 65504.0
FP16_TINY = 2.0**-24

#: Sums, statistics, comparisons and steep functions: FP32 wherever they stand.
FP32_OPERATORS = frozenset(
    [
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "LogSoftmax",
        "ReduceSum",
        "ReduceMean",
        "ReduceSumSquare",
        "ReduceL1",
        "ReduceL2",
        "ReduceProd",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ArgMax",
        "ArgMin",
        "TopK",
        "CumSum",
        "Exp",
        "Log",
        "Pow",
        "Reciprocal",
        "Einsum",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)
#: Operators that move data without changing it.
MOVES = frozenset(
    [
        "Identity",
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Concat",
        "Gather",
        "GatherElements",
        "GatherND",
        "Expand",
        "Tile",
        "Pad",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
#: Elementwise operators between the camera frame and the first product with weights.
_FRAME_OPERATORS = MOVES | frozenset(["Cast", "Add", "Sub", "Mul", "Div", "Clip"])
#: (operator, input index) that ONNX defines as FP32 whatever the rest is.
_ALWAYS_FP32 = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}
#: A bound outside FP16's range means no bound there, so it is clipped instead of keeping the node in FP32.
_BOUNDS = {"Clip", "Min", "Max"}


@dataclass(frozen=True)
class Fp16Graph:
    """model: the converted graph. fp32: node -> why it stayed FP32. clipped: constants cut to FP16's range."""

    model: onnx.ModelProto
    fp32: Mapping[str, str]
    clipped: tuple[str, ...]


def keep_fp32(model: onnx.ModelProto, islands: Mapping[str, str], ranges: Mapping[str, str]) -> dict[str, str]:
    """Which nodes stay FP32 and why. islands, ranges: node name -> island, node name -> range finding."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    keep: dict[str, str] = {}
    tiny: set[str] = set()
    frame = {info.name for info in graph.input if info.type.tensor_type.elem_type == TensorProto.UINT8}
    for node in graph.node:
        data = [name for name in node.input if name and name not in constants]
        reason = None
        if node.name in islands:
            reason = f"island {islands[node.name]}"
        elif node.op_type in FP32_OPERATORS:
            reason = f"operator {node.op_type}"
        elif node.name in ranges:
            reason = ranges[node.name]
        elif data and node.op_type in _FRAME_OPERATORS and all(name in frame for name in data):
            reason = "prepares the frame"
            frame.update(node.output)
        else:
            reason = _constant_reason(node, constants)
            if reason is None and any(name in tiny for name in node.input):
                reason = "reads a value guarded by a constant too small for FP16"
        if reason:
            keep[node.name] = reason
        if any(name in constants and _vanishes(constants[name]) for name in node.input):
            tiny.update(node.output)
    return keep


def _vanishes(array: np.ndarray) -> bool:  # type: ignore[type-arg]
    """A scalar that FP16 would turn into 0, such as the guard of a division or root."""
    return array.dtype == np.float32 and array.size == 1 and 0 < abs(float(array.reshape(-1)[0])) < FP16_TINY * 16


def _constant_reason(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> str | None:  # type: ignore[type-arg]
    for name in node.input:
        array = constants.get(name)
        if array is None or array.dtype != np.float32 or array.size == 0:
            continue
        if _vanishes(array):
            return f"constant {float(array.reshape(-1)[0]):.1e} vanishes in FP16"
        finite = np.abs(array[np.isfinite(array)])
        if node.op_type not in _BOUNDS and finite.size and float(finite.max()) > FP16_MAX:
            return f"constant {float(finite.max()):.1e} leaves FP16's range"
    return None


def to_fp16(model: onnx.ModelProto, keep: Mapping[str, str]) -> Fp16Graph:
    """Convert a shape-inferred FP32 graph; nodes in `keep` stay FP32.

    Raises:
        ConfigError: the graph has control flow or an operator whose FP16 form is not defined here.
    """
    return _Converter(model, keep).convert()


class _Converter:
    """State of one pass over the nodes in order."""

    def __init__(self, model: onnx.ModelProto, keep: Mapping[str, str]):
        self._source = model
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self._keep = keep
        self._fp32: dict[str, str] = {}
        self._clipped: list[str] = []
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._stored: dict[str, TensorProto] = {}
        self._floats = _float_tensors(model)
        self._half: set[str] = set()
        self._casts: dict[tuple[str, int], str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def convert(self) -> Fp16Graph:
        for node in self._source.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self._node(copy)
        self._outputs()
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        del graph.initializer[:]
        graph.initializer.extend(self._stored.values())
        del graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(self._model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(inferred, full_check=True)
        return Fp16Graph(inferred, self._fp32, tuple(self._clipped))

    def _node(self, node: onnx.NodeProto) -> None:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ConfigError(
                f"node {node.name} cannot be converted to FP16",
                found=f"control flow operator {node.op_type}",
                expected="static stages; loops belong in the program",
            )
        half = self._is_half(node)
        for i, name in enumerate(node.input):
            if name in self._floats:
                want_half = half and (node.op_type, i) not in _ALWAYS_FP32
                node.input[i] = self._read(name, want_half, node.op_type)
            elif name in self._constants:
                self._stored[name] = self._constants[name]
        if half:
            _retype_attributes(node)
        self._half.update(name for name in node.output if half and name in self._floats)
        self._nodes.append(node)

    def _is_half(self, node: onnx.NodeProto) -> bool:
        touched = [name for name in (*node.input, *node.output) if name in self._floats]
        if not touched:
            return False
        if node.name in self._keep:
            self._fp32[node.name] = self._keep[node.name]
            return False
        if node.op_type in MOVES:
            data = [name for name in node.input if name in self._floats and name not in self._constants]
            return all(name in self._half for name in data) if data else True
        return True

    def _read(self, name: str, half: bool, operator: str) -> str:
        """The name under which a tensor is there in the wanted type; inserts a cast or a converted constant."""
        if name in self._constants:
            tensor = self._constants[name]
            stored = f"{name}_fp16" if half else name
            if stored not in self._stored:
                self._stored[stored] = self._constant16(tensor, stored, operator) if half else tensor
            return stored
        if (name in self._half) == half:
            return name
        to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        if (name, to) not in self._casts:
            cast = f"{name}_{'fp16' if half else 'fp32'}"
            self._nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}/Cast", to=to))
            self._casts[name, to] = cast
        return self._casts[name, to]

    def _constant16(self, tensor: TensorProto, name: str, operator: str) -> TensorProto:
        array = numpy_helper.to_array(tensor)
        outside = np.isfinite(array) & (np.abs(array) > FP16_MAX)
        if outside.any():
            self._clipped.append(f"{tensor.name} ({operator}): {int(outside.sum())} of {array.size} values")
            array = np.where(outside, np.sign(array) * FP16_MAX, array)
        return numpy_helper.from_array(array.astype(np.float16), name)

    def _outputs(self) -> None:
        """Graph outputs stay FP32: an FP16 one is renamed inside and cast at the end."""
        for info in self._model.graph.output:
            if info.name not in self._half:
                continue
            inner = f"{info.name}_half"
            for node in self._nodes:
                for names in (node.input, node.output):
                    for i, name in enumerate(names):
                        if name == info.name:
                            names[i] = inner
            self._nodes.append(
                helper.make_node("Cast", [inner], [info.name], name=f"{info.name}/Cast", to=TensorProto.FLOAT)
            )


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    graph = model.graph
    typed = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info, *graph.output)}
    typed.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return {name for name, kind in typed.items() if kind == TensorProto.FLOAT}


def _retype_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(half, attribute.t.name))
        if attribute.name == "dtype" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def simulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 graph that rounds as the FP16 graph does on a GPU: after every FP16 node, to FP16 and back.

    onnxruntime's CPU kernels have no FP16 and run an FP16 chain in FP32 without rounding between its nodes (an overflow
    inside it never shows), so the decision gate uses this form. Rounding pairs written in the graph are kept by it.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info, *graph.output)}
    half = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT16}
    for i, tensor in enumerate(graph.initializer):
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            graph.initializer[i].CopyFrom(wide)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
        rounded = [name for name in node.output if name in half and node.op_type not in MOVES]
        nodes.append(node)
        for name in rounded:
            index = list(node.output).index(name)
            node.output[index] = f"{name}_wide"
            nodes.append(helper.make_node("Cast", [f"{name}_wide"], [f"{name}_r"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}_r"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return copy


def _widen_attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
        attribute.i = TensorProto.FLOAT
    if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.to_array(attribute.t).astype(np.float32)
        attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
