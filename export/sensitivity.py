"""Which products of a stage can be narrow: each one's precision is lowered alone and the stage's outputs are looked at.

The first layers of a network usually cost the most accuracy and hold the fewest weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from .precision import simulate, to_fp16
from .ranges import open_session
from .walk import Array

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def node_errors(
    model: onnx.ModelProto,
    nodes: Sequence[str],
    probe: Callable[[str], onnx.ModelProto],
    samples: Sequence[Mapping[str, Array]],
) -> dict[str, float]:
    """Per node, the largest relative RMS error over the stage's float outputs of `probe(node)` against `model`.

    Infinite where an output is not a number: no budget has room for it.
    """
    names = [o.name for o in model.graph.output if o.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    session = open_session(model)
    reference = [session.run(names, dict(inputs)) for inputs in samples]
    found = {}
    for node in nodes:
        narrow = open_session(probe(node))
        outputs = [narrow.run(names, dict(inputs)) for inputs in samples]
        errors = [_relative_rms([o[i] for o in outputs], [r[i] for r in reference]) for i in range(len(names))]
        found[node] = max(error if np.isfinite(error) else float("inf") for error in errors)
    return found


def fp16_errors(
    model: onnx.ModelProto, keep: Mapping[str, str], samples: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """What FP16 in one product alone costs the stage, for the products with constant weights outside `keep`."""
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes = [
        n.name
        for n in model.graph.node
        if n.op_type in PRODUCTS and n.name not in keep and any(i in constants for i in n.input)
    ]
    everything = {node.name: "probe" for node in model.graph.node}

    def probe(name: str) -> onnx.ModelProto:
        return simulate(to_fp16(model, {k: v for k, v in everything.items() if k != name}).model)

    return node_errors(model, nodes, probe, samples)


def select(model: onnx.ModelProto, errors: Mapping[str, float], budget: float) -> list[str]:
    """The nodes to make narrow: most bytes saved per error first, the root sum of squares of errors within `budget`."""
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    weights = {n.name: sum(sizes.get(i, 0) for i in n.input) for n in model.graph.node if n.name in errors}
    chosen, spent = [], 0.0
    for node in sorted(errors, key=lambda name: errors[name] ** 2 / weights[name]):
        if spent + errors[node] ** 2 <= budget**2:
            spent += errors[node] ** 2
            chosen.append(node)
    return chosen


def root_sum_square(errors: Mapping[str, float]) -> float:
    """All errors together, as if independent."""
    return float(np.sqrt(sum(error**2 for error in errors.values())))


def _relative_rms(values: Sequence[Array], references: Sequence[Array]) -> float:
    difference = sum(float(np.square(v - r, dtype=np.float64).sum()) for v, r in zip(values, references, strict=True))
    power = sum(float(np.square(r, dtype=np.float64).sum()) for r in references)
    return float(np.sqrt(difference / max(power, 1e-30)))


def followers(model: onnx.ModelProto, wide: Mapping[str, str], operators: frozenset[str]) -> dict[str, str]:
    """Nodes of these `operators` that read only what wide nodes give: narrowing them would round it after all."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inside: set[str] = set()
    found = {}
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in constants]
        follows = node.op_type in operators and bool(data) and all(name in inside for name in data)
        if node.name in wide or follows:
            inside.update(node.output)
            if node.name not in wide:
                found[node.name] = "follows nodes kept in FP32"
    return found
