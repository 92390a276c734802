"""Patch features of images by the feature stage of a bundle, on this machine's engines."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..engine.base import Backend
from ..errors import ConfigError
from ..manifest import Memory
from ..wiring import parse_source

Array = NDArray[Any]


def memory_of(bundle: Bundle) -> Memory:
    """The bundle's memory section.

    Raises:
        ConfigError: the method keeps no memory, so there is nothing to enroll into.
    """
    memory = bundle.manifest.memory
    if memory is None:
        raise ConfigError(
            f"{bundle.manifest.method} keeps no memory of normal: a new product cannot be enrolled into it",
            found=bundle.manifest.method,
            expected="a knn or foct bundle",
            next_step="andon enroll --method foct --support DIR",
        )
    return memory


class FeatureExtractor:
    """uint8 frames to raw patch features [m, c], by the stage that makes the memory's candidates.

    Its `center` is bound to zero; a stage that projects gives the unprojected features as output `raw`.

    Args:
        bundle: any product's bundle of the method.
        backend: an open backend; it outlives this.

    Raises:
        ConfigError: the bundle's first stage is not such a stage.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        name = parse_source(memory_of(bundle).candidates).name
        stage = bundle.manifest.stages[name]
        output = "raw" if "raw" in stage.outputs else parse_source(memory_of(bundle).candidates).output
        sources = {key: parse_source(spec.source) for key, spec in stage.inputs.items()}
        frames = [key for key, source in sources.items() if source.kind == "frame"]
        others = {source.name for source in sources.values() if source.kind != "frame"}
        if len(frames) != 1 or not others <= {"center", "basis"}:
            raise ConfigError(
                f"stage {name} cannot be used to enroll",
                found=f"inputs from {', '.join(sorted(others))}",
                expected="the frame, and center and basis at most",
                next_step="enroll with a knn or foct bundle",
            )
        self._backend = backend
        buffers = {key: backend.allocate(spec.shape, spec.dtype) for key, spec in stage.inputs.items()}
        buffers |= {key: backend.allocate(spec.shape, spec.dtype) for key, spec in stage.outputs.items()}
        self._frame, self._out = buffers[frames[0]], buffers[output]
        with ExitStack() as stack:
            engine = backend.open(name, stage, bundle.stage_path(name, "fp32"), "fp32")
            stack.callback(engine.close)
            self._launch = engine.prepare(buffers)
            self._owned = stack.pop_all()
        self.patches, self.dim = self._out.shape

    def __call__(self, frame: Array) -> Array:
        """frame: uint8 [height, width, 3] at network size; returns [m, c] float32, the caller's own."""
        self._backend.upload(self._frame, frame[None])
        self._launch()
        out = np.empty(self._out.shape, self._out.dtype)
        self._backend.download(self._out, out)
        return out.astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the engine."""
        self._owned.close()

    def __enter__(self) -> FeatureExtractor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
