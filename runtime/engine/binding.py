"""Checks that every backend makes before anything is bound: names, shapes and types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import EngineError
from ..manifest import Stage, Tensor
from .base import Buffer, TensorSpec


def check_stage(name: str, stage: Stage, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    """Compare an opened engine with the manifest.

    Raises:
        EngineError: a tensor is missing, unexpected, or has another shape or type.
    """
    for what, found, expected in (("input", inputs, stage.inputs), ("output", outputs, stage.outputs)):
        actual = {t.name: (t.shape, t.dtype) for t in found}
        promised: dict[str, tuple[tuple[int, ...], str]] = {
            key: (tensor.shape, tensor.dtype) for key, tensor in expected.items() if isinstance(tensor, Tensor)
        }
        if actual != promised:
            raise EngineError(
                f"stage {name}: the engine's {what}s are not those of the manifest",
                found=_list(actual, promised),
                expected=_list(promised, actual),
                next_step="export the bundle again: andon export --method METHOD",
            )


def check_bindings(name: str, tensors: Iterable[TensorSpec], bindings: Mapping[str, Buffer]) -> None:
    """Compare buffers with the tensors they are bound to.

    Raises:
        EngineError: a tensor has no buffer, a buffer no tensor, or shape or type differ.
    """
    specs = {t.name: t for t in tensors}
    if set(specs) != set(bindings):
        raise EngineError(
            f"stage {name}: not every tensor is bound",
            found=", ".join(sorted(bindings)),
            expected=", ".join(sorted(specs)),
        )
    for key, spec in specs.items():
        buffer = bindings[key]
        if (tuple(buffer.shape), buffer.dtype.name) != (spec.shape, spec.dtype):
            raise EngineError(
                f"stage {name}: {key} is bound to another shape or type",
                found=f"{buffer.dtype.name}{list(buffer.shape)}",
                expected=f"{spec.dtype}{list(spec.shape)}",
            )


def _list(tensors: Mapping[str, tuple[tuple[int, ...], str]], other: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    different = [f"{k} {d}{list(s)}" for k, (s, d) in tensors.items() if other.get(k) != (s, d)]
    return ", ".join(different) or "nothing"
