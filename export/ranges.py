"""Range report: what a stage's tensors reach on real frames, and which nodes FP16 cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from .precision import FP16_MAX
from .walk import Array

#: A tensor must stay below half of FP16's largest number: other frames go further than the ones seen.
LIMIT = FP16_MAX / 2
#: Below this FP16 loses mantissa bits (subnormal numbers).
NORMAL = 2.0**-14


@dataclass
class Range:
    """Of one tensor over all frames: largest magnitude, smallest one above zero, share of values below NORMAL."""

    largest: float = 0.0
    smallest: float = float("inf")
    subnormal: float = 0.0
    finite: bool = True
    calls: int = 0

    def add(self, array: Array) -> None:
        """Take in one call's values."""
        magnitude = np.abs(array[np.isfinite(array)])
        self.finite &= bool(magnitude.size == array.size)
        above = magnitude[magnitude > 0]
        if above.size:
            self.largest = max(self.largest, float(above.max()))
            self.smallest = min(self.smallest, float(above.min()))
        low = float((above < NORMAL).sum()) / max(1, array.size)
        self.subnormal += (low - self.subnormal) / (self.calls + 1)
        self.calls += 1

    @property
    def finding(self) -> str | None:
        """Why FP16 cannot hold this tensor, or None."""
        if not self.finite:
            return "range: not finite"
        if self.largest > LIMIT:
            return f"range: reaches {self.largest:.3g}"
        if 0 < self.largest < NORMAL:
            return f"range: never above {self.largest:.3g}, below FP16's normal numbers"
        return None


@dataclass(frozen=True)
class RangeReport:
    """tensors: every float tensor of the stage. nodes: node -> finding, for all that touch an unfit tensor."""

    tensors: Mapping[str, Range]
    nodes: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """For report.json: the unfit tensors, and the widest and the smallest of the others."""
        ordered = sorted(self.tensors.items(), key=lambda item: -item[1].largest)
        return {
            "tensors": len(ordered),
            "outside": {name: asdict(r) | {"finding": r.finding} for name, r in ordered if r.finding},
            "widest": {name: r.largest for name, r in ordered[:8]},
            "mostly_subnormal": {name: r.subnormal for name, r in ordered if r.subnormal > 0.5},
            "nodes_fp32": dict(self.nodes),
        }


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session that runs the graph node by node as it is written."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Fusion would remove the tensors that are to be looked at.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(model: onnx.ModelProto, samples: Iterable[Mapping[str, Array]]) -> RangeReport:
    """Run a shape-inferred FP32 stage on real inputs and look at every float tensor in it."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    known = {info.name for info in graph.output}
    for info in graph.value_info:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT and info.name not in known:
            graph.output.append(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, None))
    session = open_session(probe)
    names = [output.name for output in session.get_outputs()]
    tensors: dict[str, Range] = {}
    for inputs in samples:
        arrays = {**inputs, **dict(zip(names, session.run(names, dict(inputs)), strict=True))}
        for name, array in arrays.items():
            if array.dtype == np.float32:
                tensors.setdefault(name, Range()).add(array)
    return RangeReport(tensors, _touching(model, tensors))


def _touching(model: onnx.ModelProto, tensors: Mapping[str, Range]) -> dict[str, str]:
    nodes = {}
    for node in model.graph.node:
        for name in (*node.output, *node.input):
            finding = tensors[name].finding if name in tensors else None
            if finding:
                nodes[node.name] = f"{finding} ({name})"
                break
    return nodes
