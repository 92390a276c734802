"""The executor: runs any method's program on any backend.

All tensors are allocated when the program is opened (tensors.py), a program and a class compiled once (compiler.py). A
frame is then nothing but calling launches: no lookup, no allocation, no copy between stages (DESIGN.md 3, METHODS.md
7.2).
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import numpy as np

from .bundle import Bundle
from .compiler import Compiled, Compiler, Group, output_key
from .engine.base import Array, Backend, Buffer, Engine
from .errors import ConfigError, EngineError
from .manifest import Variant
from .tensors import Tensors
from .wiring import wire

#: Frames after which a launch is what it stays: engine/tensorrt.py FrameGraph.
_WARM_FRAMES = 2


@dataclass(frozen=True)
class Result:
    """One frame's outputs. The arrays are views of the program's buffers, valid until its next frame.

    score: image score; map: [h, w] float32; logits: [classes] float32 if the program has a product classifier.
    """

    score: float
    map: Array
    class_index: int
    logits: Array | None


class Program:
    """A bundle's program opened on a backend. A context manager; it closes its engines, not the backend.

    Args:
        bundle: the loaded bundle.
        backend: an open backend; it outlives the program.
        variant: precision variant of the stages.
        program: "default" or the name of an alternative.
        per_stage: time every stage. None: where the backend is synchronous. On an asynchronous one it waits after each
            stage, which costs time; without it a frame is one launch and one timing, called "frame".

    Attributes:
        frame: uint8 [height, width, 3], what the next run judges; fill it in place.
        stage_names: names of the timings in `stage_ms`, in order.

    Raises:
        BundleError, EngineError, ConfigError: the program cannot be opened; the message says why.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        variant: Variant = "fp32",
        program: str = "default",
        per_stage: bool | None = None,
    ):
        self.bundle = bundle
        self.backend = backend
        self.variant = variant
        self.name = program
        self._manifest = bundle.manifest
        self._steps = wire(bundle.manifest, program)
        self._per_stage = not backend.asynchronous if per_stage is None else per_stage
        self._engines: dict[str, Engine] = {}
        self._current: Compiled | None = None
        self._readback: dict[int, Array] = {}
        try:
            for step in self._steps:
                path = bundle.stage_path(step.stage, variant)
                self._engines[step.stage] = backend.open(step.stage, self._manifest.stages[step.stage], path, variant)
            self._tensors = Tensors(bundle, backend, self._steps)
        except BaseException:
            self._close_engines()
            raise
        self._compiler = Compiler(bundle.manifest, self._steps, self._tensors, self._engines, backend, self._per_stage)
        self._upload = self._tensors.staging is not self._tensors.frame.host
        self.frame: Array = self._tensors.staging[0]
        self._head = self._compiler.head
        self.stage_names = tuple(step.stage for step in self._steps) if self._per_stage else ("frame",)
        self._index = {name: i for i, name in enumerate(self.stage_names)}
        self._zeros = array("d", bytes(8 * len(self.stage_names)))
        self._ms = array("d", self._zeros)
        self._to_reset = False

    # -- the frame -------------------------------------------------------------------------------------------------

    def run(self, class_index: int | None = None) -> Result:
        """Run the program on what is in `frame`.

        Args:
            class_index: index of the product; None runs to the logits, chooses the most likely product and goes on.

        Raises:
            EngineError: a stage failed; persistent state is back at the bundle's values before the next frame runs.
            ConfigError: None was given and the program has no classifier, or the index is out of range.
        """
        self._ms[:] = self._zeros
        if self._to_reset:
            self.reset()
        try:
            if self._upload:
                self.backend.upload(self._tensors.frame, self._tensors.staging)
            if class_index is None:
                class_index = self._classify()
                compiled = self._compiler.for_class(class_index)
                self._execute(compiled.tail if self._head else compiled.all, class_index)
            else:
                compiled = self._compiler.for_class(class_index)
                self._execute(compiled.all, class_index)
            for counter in self._tensors.counters.values():
                counter.advance(class_index)
            self._current = compiled
            logits = None if compiled.logits is None else self._fetch(compiled.logits)[0]
            return Result(float(self._fetch(compiled.score)[0]), self._fetch(compiled.map)[0, 0], class_index, logits)
        except EngineError:
            self._to_reset = True
            with suppress(EngineError):  # after a fault of the device it fails as well, and is not what went wrong
                self.reset()
            raise

    def warm_up(self, class_index: int | None) -> None:
        """Run what is in `frame` until :meth:`run` of this argument has nothing left to prepare.

        On TensorRT the first frame makes execution contexts, the second is captured as a graph, for each product and,
        where the product is to be told, for what follows on telling each.

        Raises:
            EngineError, ConfigError: as :meth:`run`.
        """
        for _ in range(_WARM_FRAMES):
            self.run(class_index)
        if class_index is None and self._head:
            for index in range(len(self._manifest.classes)):
                for _ in range(_WARM_FRAMES):
                    self._execute(self._compiler.for_class(index).tail, index)

    def _classify(self) -> int:
        if self._head:
            compiled = self._compiler.for_class(0)
            self._execute(compiled.head, 0)
            assert compiled.logits is not None  # there is a head
            return int(self._fetch(compiled.logits).argmax())
        if len(self._manifest.classes) == 1:
            return 0
        raise ConfigError(
            f"program {self.name} cannot tell the product by itself",
            found="product: auto",
            expected=f"one of {', '.join(self._manifest.classes)}",
            next_step="name it: the camera's product or the command product (a line), --product given (andon eval)",
        )

    def _execute(self, groups: tuple[Group, ...], class_index: int) -> None:
        for counter in self._tensors.counters.values():
            counter.stage(self.backend, class_index)
        times, index, wait = self._ms, self._index, self.backend.asynchronous
        start = perf_counter()
        for name, launches in groups:
            for launch in launches:
                launch()
            if wait:
                self.backend.synchronize()
            now = perf_counter()
            times[index[name]] += (now - start) * 1e3
            start = now

    def _fetch(self, buffer: Buffer) -> Array:
        if buffer.host is not None:
            return buffer.host
        key = id(buffer)
        if key not in self._readback:
            self._readback[key] = self.backend.allocate_host(buffer.shape, buffer.dtype.name)
        self.backend.download(buffer, self._readback[key])
        return self._readback[key]

    @property
    def stage_ms(self) -> dict[str, float]:
        """Milliseconds each stage took in the last frame (all steps of a loop together)."""
        return dict(zip(self.stage_names, self._ms, strict=True))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs ``<stage>.<output>`` that the last frame's program has; none before the first frame."""
        return () if self._current is None else tuple(f"{s}.{o}" for s, o in self._current.outputs)

    def read(self, output: str) -> Array:
        """The value of ``<stage>.<output>`` in the last frame, valid until the next one.

        Raises:
            EngineError: no frame has run yet, or the program has no such output.
        """
        if self._current is None:
            raise EngineError(f"{output} has no value yet", found="no frame", expected="run() before read()")
        buffer = self._current.outputs.get(output_key(output))
        if buffer is None:
            names = ", ".join(self.outputs)
            raise EngineError(f"program {self.name} has no output {output}", found=output, expected=names)
        return self._fetch(buffer)

    # -- state between frames --------------------------------------------------------------------------------------

    def read_state(self, name: str, class_index: int = 0) -> Array:
        """A copy of a state's current value (of a class-bound one, the row of the class).

        Raises:
            EngineError: the program uses no such state.
        """
        buffer = self._state(name, class_index)
        out = np.empty(buffer.shape, buffer.dtype)
        self.backend.download(buffer, out)
        return out

    def write_state(self, name: str, values: Array, rows: slice | None = None, class_index: int = 0) -> None:
        """Change a state between two frames.

        Args:
            values: what to write, of the state's dtype: the whole state, or the rows of its leading axis in `rows`.
            class_index: which row of a class-bound state.

        Raises:
            EngineError: unknown state, or `values` has another shape or type than the place it goes to.
        """
        buffer = self._state(name, class_index)
        start, stop, step = (rows or slice(None)).indices(buffer.shape[0])
        expected = (stop - start, *buffer.shape[1:])
        if step != 1 or values.shape != expected or values.dtype != buffer.dtype:
            raise EngineError(
                f"state {name} cannot take these values",
                found=f"{values.dtype.name}{list(values.shape)}",
                expected=f"{buffer.dtype.name}{list(expected)}",
            )
        self.backend.upload(buffer, values, start)
        self.backend.synchronize()  # the caller may go on changing them

    def has_state(self, name: str) -> bool:
        """Whether a stage reads this state or a loop keeps it; a bundle may have others, which only the host reads."""
        return name in self._tensors.states

    def _state(self, name: str, class_index: int) -> Buffer:
        if name not in self._tensors.states:
            expected = ", ".join(self._tensors.states) or "no state"
            raise EngineError(f"program {self.name} has no state {name}", found=name, expected=expected)
        return self._tensors.state(name, class_index)

    def reset(self) -> None:
        """Bring persistent carries and counters back to the bundle's values (new product, or after a failure).

        Those of when it was opened: the folder may have been replaced or removed since, and is not read again.
        """
        self._tensors.restore()
        for counter in self._tensors.counters.values():
            counter.reset()
        self._to_reset = False

    def close(self) -> None:
        """Close the engines."""
        self._compiler.clear()
        self._close_engines()

    def _close_engines(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
