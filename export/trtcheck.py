"""A static check of every stage against what the TensorRT parsers take (export/trt_support.yaml).

It finds at the workstation what would stop `andon build` on the device. It is a table, not the parser: the stages are
also built by TensorRT-RTX in tests/export/test_trt_rtx.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from ..runtime.manifest import Manifest
from .onnx import DTYPES
from .verify import Check

_TABLE = Path(__file__).with_name("trt_support.yaml")


@dataclass(frozen=True)
class Refusal:
    """A node that a TensorRT version does not take. version "": all of them."""

    node: str
    operator: str
    reason: str
    source: str
    version: str = ""

    def __str__(self) -> str:
        where = f"TensorRT {self.version}" if self.version else "TensorRT"
        return f"{self.node} ({self.operator}): {self.reason} [{where}; {self.source}]"


@cache
def support() -> dict[str, Any]:
    """The table."""
    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return table


def versions() -> list[str]:
    """TensorRT versions that are checked."""
    return list(support()["versions"])


def checks(root: Path, manifest: Manifest) -> list[Check]:
    """One line per stage file for the verification table; the note names node and reason of the first refusal."""
    found = []
    for name, stage in manifest.stages.items():
        for file in sorted(set(stage.files.values())):
            refusals = check(onnx.load(str(root / file)))
            note = str(refusals[0]) if refusals else f"TensorRT {', '.join(versions())}"
            found.append(Check(name, f"trtcheck {Path(file).name}", len(refusals), "0 refusals", not refusals, note))
    return found


def check(model: onnx.ModelProto) -> list[Refusal]:
    """Every reason why a stage would be refused; empty if there is none."""
    return list(_Graph(model).refusals())


class _Graph:
    """A stage with its types, shapes and constants looked up."""

    def __init__(self, model: onnx.ModelProto):
        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
        self.shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
        self.frames = {i.name for i in graph.input if i.type.tensor_type.elem_type == TensorProto.UINT8}
        for info in (*graph.input, *graph.value_info, *graph.output):
            tensor = info.type.tensor_type
            self.types[info.name] = tensor.elem_type
            self.shapes[info.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)

    def refusals(self) -> Iterator[Refusal]:
        table = support()
        opset = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        for version, row in table["versions"].items():
            low, high = row["opset"]
            if not low <= opset <= high:
                yield Refusal("graph", "-", f"opset {opset} is not in {low}..{high}", row["source"], version)
        for info in self.model.graph.input:
            if self.types[info.name] in (TensorProto.INT64, TensorProto.DOUBLE):
                yield Refusal(info.name, "input", f"{self._type(info.name)} input", "DESIGN.md 3: no int64 inputs")
        for node in self.model.graph.node:
            yield from self._node(node, table)

    def _node(self, node: onnx.NodeProto, table: Mapping[str, Any]) -> Iterator[Refusal]:
        row = table["operators"].get(node.op_type)
        if row is None or node.domain not in ("", "ai.onnx"):
            reason = "the operator is not in the table of supported ones"
            yield Refusal(node.name, node.op_type, reason, "export/trt_support.yaml")
            return
        source = table["sources"].get(row["source"], row["source"])
        for name in (*node.input, *node.output):
            if not name:
                continue
            yield from self._tensor(node, name, row, source, table["limits"])
        for rule in row.get("rules", ()):
            broken = _RULES[rule](self, node)
            if broken:
                yield Refusal(node.name, node.op_type, broken, source)

    def _tensor(
        self, node: onnx.NodeProto, name: str, row: Mapping[str, Any], source: str, limits: Mapping[str, int]
    ) -> Iterator[Refusal]:
        shape = self.shapes.get(name)
        if shape is None or -1 in shape:
            yield Refusal(node.name, node.op_type, f"{name} has no fixed shape: {shape}", "DESIGN.md 3: fixed shapes")
            return
        if len(shape) > limits["rank"]:
            yield Refusal(
                node.name, node.op_type, f"{name} has {len(shape)} dimensions, at most {limits['rank']}", source
            )
        if int(np.prod(shape, dtype=np.int64)) > limits["elements"]:
            yield Refusal(node.name, node.op_type, f"{name} has more than {limits['elements']} elements", source)
        kind = self._type(name)
        allowed = row["types"]
        # Shape arguments are int64 constants, indices and conditions are results of their own type: only data count.
        argument = name in self.constants and kind == "int64"
        result = name in node.output and kind in ("bool", "int64", "int32")
        index = kind in ("int64", "int32", "bool") and name in node.input and list(node.input).index(name) > 0
        condition = kind == "bool" and node.op_type == "Where"
        if name in self.frames and node.op_type != "Cast":
            yield Refusal(node.name, node.op_type, f"{name} is uint8: it must be cast before anything else", source)
        elif kind not in allowed and not (argument or result or index or condition):
            yield Refusal(node.name, node.op_type, f"{name} is {kind}, not {', '.join(allowed)}", source)

    def _type(self, name: str) -> str:
        kind = self.types.get(name, TensorProto.UNDEFINED)
        return DTYPES.get(kind) or TensorProto.DataType.Name(kind).lower()


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    found: AttributeProto | None = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _constant(index: int) -> Callable[[_Graph, onnx.NodeProto], str | None]:
    def rule(graph: _Graph, node: onnx.NodeProto) -> str | None:
        if len(node.input) <= index or not node.input[index] or node.input[index] in graph.constants:
            return None
        return f"input {index} ({node.input[index]}) must be a constant"

    return rule


def _two_or_three_dims(graph: _Graph, node: onnx.NodeProto) -> str | None:
    rank = len(graph.shapes.get(node.input[0], ()))
    return None if rank in (3, 4, 5) else f"works on {rank - 2} spatial dimensions, not 1, 2 or 3"


def _no_dilations(graph: _Graph, node: onnx.NodeProto) -> str | None:
    dilations = _attribute(node, "dilations", [])
    return f"dilations {list(dilations)}" if any(d != 1 for d in dilations) else None


def _first_output_only(graph: _Graph, node: onnx.NodeProto) -> str | None:
    return "a further output is used" if any(node.output[1:]) else None


def _last_four_axes(graph: _Graph, node: onnx.NodeProto) -> str | None:
    rank = len(graph.shapes.get(node.input[0], ()))
    axis = _attribute(node, "axis", -1 if node.op_type == "TopK" else 0)
    return None if axis < 0 or axis >= rank - 4 else f"axis {axis} of {rank} is not one of the last four"


def _at_most_3840(graph: _Graph, node: onnx.NodeProto) -> str | None:
    if node.input[1] not in graph.constants:
        return None  # constant_1 says so
    k = int(numpy_helper.to_array(graph.constants[node.input[1]]).reshape(-1)[0])
    return f"k = {k}, at most 3840" if k > 3840 else None


def _zero_point_zero(graph: _Graph, node: onnx.NodeProto) -> str | None:
    if graph.types.get(node.input[0]) == TensorProto.INT32:
        return "dequantises an int32 bias"
    if len(node.input) < 3 or not node.input[2]:
        return None
    zero = graph.constants.get(node.input[2])
    return None if zero is not None and not numpy_helper.to_array(zero).any() else "the zero point is not 0"


def _plain_einsum(graph: _Graph, node: onnx.NodeProto) -> str | None:
    equation = _attribute(node, "equation", b"").decode()
    terms = equation.split("->")[0].split(",")
    repeated = any(len(set(t.strip())) < len(t.strip()) for t in terms)
    return f"equation {equation}" if "..." in equation or repeated else None


def _resize(graph: _Graph, node: onnx.NodeProto) -> str | None:
    mode = _attribute(node, "mode", b"nearest").decode()
    transform = _attribute(node, "coordinate_transformation_mode", b"half_pixel").decode()
    modes = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    if mode not in ("nearest", "linear"):
        return f"mode {mode}"
    if transform not in modes:
        return f"coordinate transformation {transform}"
    return "antialiasing" if _attribute(node, "antialias", 0) else None


_RULES: Mapping[str, Callable[[_Graph, onnx.NodeProto], str | None]] = {
    "constant_1": _constant(1),
    "constant_3": _constant(3),
    "two_or_three_dims": _two_or_three_dims,
    "no_dilations": _no_dilations,
    "first_output_only": _first_output_only,
    "last_four_axes": _last_four_axes,
    "at_most_3840": _at_most_3840,
    "zero_point_zero": _zero_point_zero,
    "plain_einsum": _plain_einsum,
    "resize": _resize,
}
