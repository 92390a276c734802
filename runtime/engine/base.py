"""What the executor asks of a backend. Two implement it: onnxruntime (the reference) and tensorrt.

A backend owns memory and opens stages; an engine turns a set of bound buffers into a :class:`Launch`, prepared once,
called every frame. Nothing is allocated, looked up or copied by a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..manifest import Stage, Variant

Array = NDArray[Any]
Launch = Callable[[], None]


@dataclass(frozen=True)
class TensorSpec:
    """Name, fixed shape and numpy dtype name of a stage input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Buffer(Protocol):
    """Device memory with a fixed shape and dtype. On the CPU backend it is a numpy array underneath."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def host(self) -> Array | None:
        """The same memory as a numpy array where the host can address it (zero copy), else None."""
        ...


class Engine(Protocol):
    """One opened stage."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def prepare(self, bindings: Mapping[str, Buffer]) -> Launch:
        """Bind every input and output to a buffer and return the launch that runs the stage on them.

        Several launches of one engine may exist at a time (ping-pong, table rows, classes); they are called from one
        thread, one after the other.

        Raises:
            EngineError: a name, shape or dtype does not match the stage.
        """
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A device: memory, engines, ordering. A context manager; everything it opened dies with it."""

    name: str
    #: True if a launch returns before its work is done; the executor then times whole frames, not stages.
    asynchronous: bool

    def allocate_host(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Zero-filled host array that uploads and downloads fastest (page-locked on the GPU)."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zero-filled buffer; lives until the backend closes."""
        ...

    def allocate_rows(self, rows: int, shape: tuple[int, ...], dtype: str) -> Sequence[Buffer]:
        """`rows` buffers of one block, each aligned for binding (256 bytes on the GPU): tables, class-bound state."""
        ...

    def upload(self, buffer: Buffer, array: Array, start: int = 0) -> None:
        """Host to rows `start` to `start + len(array)` of the buffer's leading axis, ordered before later launches.

        The array may still be read when this returns: it has to stay as it is until :meth:`synchronize` or a download.
        """
        ...

    def download(self, buffer: Buffer, out: Array) -> None:
        """Buffer to host after all launches so far have finished; `out` is filled."""
        ...

    def copy(self, target: Buffer, source: Buffer) -> Launch:
        """A launch that copies one buffer to another of the same size."""
        ...

    def open(self, name: str, stage: Stage, path: Path, variant: Variant) -> Engine:
        """Open (on TensorRT: build or load the plan of) one stage file."""
        ...

    def sequence(self, launches: Sequence[Launch]) -> Launch:
        """One launch that runs all of these in order (a captured CUDA graph where the backend can)."""
        ...

    def synchronize(self) -> None:
        """Wait until all launches have finished."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
