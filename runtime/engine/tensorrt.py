"""The TensorRT backend: engines built on this device from the stages' ONNX, run on one CUDA stream.

All I/O is allocated once; a stage's output address is the next stage's input address; contexts share one scratch block;
a whole frame is captured as one CUDA graph where it can be. One thread owns the CUDA context: the one that opened the
backend.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np

from ..errors import EngineError
from ..manifest import Stage, Variant
from .base import Array, Buffer, Launch, TensorSpec
from .binding import check_bindings, check_stage
from .build import PlanStore
from .cuda import Cuda, Graphs, open_cuda
from .plans import default_cache
from .target import BuildOptions, Target
from .trt import Trt, dtypes, import_tensorrt, make_logger, strongly_typed

log = logging.getLogger(__name__)
#: Rows of tables and per-class state start at multiples of this (METHODS.md 7.2)
ROW_ALIGNMENT = 256


class DeviceBuffer:
    """Device memory at a fixed address."""

    host: Array | None = None

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str):
        self.address = address
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize


class Scratch:
    """The block that all execution contexts compute in, one after the other; it grows before contexts are made."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._address, self._size = 0, 0

    def reserve(self, size: int) -> tuple[int, int]:
        """Address and size of a block of at least `size` bytes. A smaller one given out before stays valid."""
        if size > self._size or not self._address:
            self._address, self._size = self._cuda.malloc(size), size
        return self._address, self._size


class TensorRTEngine:
    """One deserialised plan. `context` is the execution context of launches outside graphs."""

    def __init__(self, name: str, plan: Any, trt: Trt, cuda: Cuda, scratch: Scratch, logger: Any):
        self.name = name
        self._plan = plan
        self._trt = trt
        self._cuda = cuda
        self._scratch = scratch
        self._logger = logger
        specs = [_spec(trt, plan, plan.get_tensor_name(i)) for i in range(plan.num_io_tensors)]
        self._inputs = tuple(spec for spec, is_input in specs if is_input)
        self._outputs = tuple(spec for spec, is_input in specs if not is_input)
        self._context: Any = None
        self.scratch_bytes = _scratch_bytes(plan)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def prepare(self, bindings: Mapping[str, Buffer]) -> Launch:
        """See base.Engine.prepare."""
        check_bindings(self.name, self._inputs + self._outputs, bindings)
        addresses = {}
        for name, buffer in bindings.items():
            if not isinstance(buffer, DeviceBuffer):
                raise EngineError(f"stage {self.name}: {name} is not in device memory", expected="a DeviceBuffer")
            addresses[name] = buffer.address
        return StageLaunch(self, addresses)

    def new_context(self) -> Any:
        """An execution context that works in the shared scratch block.

        Raises:
            EngineError: out of memory, or the plan is of another device.
        """
        trt, plan = self._trt, self._plan
        # USER_MANAGED came with 10.0, the other call is deprecated there:
        # https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html
        if strongly_typed(trt):
            context = plan.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = plan.create_execution_context_without_device_memory()
        if context is None:
            raise EngineError(
                f"stage {self.name}: no execution context",
                found=self._logger.take(),
                expected="enough free device memory",
                next_step="andon doctor",
            )
        address, size = self._scratch.reserve(self.scratch_bytes)
        if strongly_typed(trt):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address
        return context

    def enqueue(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Put the stage on the stream.

        Raises:
            EngineError: with TensorRT's own message.
        """
        if strongly_typed(self._trt):
            done = all([context.set_tensor_address(name, address) for name, address in addresses.items()])
            done = done and context.execute_async_v3(self._cuda.stream)
        else:
            # 8.6, the binding API: addresses by index, one call (removed in 10.0).
            # https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/api/python_api/infer/Core/ExecutionContext.html
            names = [self._plan.get_binding_name(i) for i in range(self._plan.num_bindings)]
            done = context.execute_async_v2([addresses[name] for name in names], self._cuda.stream)
        if not done:
            raise EngineError(
                f"stage {self.name} failed in TensorRT",
                found=self._logger.take(),
                next_step="andon verify --bundle BUNDLE --backend tensorrt",
            )

    def run(self, addresses: Mapping[str, int]) -> None:
        """Put the stage on the stream, in the engine's own context."""
        if self._context is None:
            self._context = self.new_context()
        self.enqueue(self._context, addresses)

    def close(self) -> None:
        """Contexts go before their engine."""
        self._context = None
        self._plan = None


class StageLaunch:
    """One stage on fixed addresses."""

    def __init__(self, engine: TensorRTEngine, addresses: Mapping[str, int]):
        self.engine = engine
        self.addresses = addresses

    def __call__(self) -> None:
        self.engine.run(self.addresses)


class FrameGraph:
    """All launches of a frame as one CUDA graph.

    The first frame runs plainly (TensorRT settles what it defers to the first enqueue), the second is captured. The
    graph has execution contexts of its own, so that nothing outside it touches what was captured. What cannot be
    captured goes on running plainly, and the log says why.
    """

    def __init__(self, launches: Sequence[Launch], graphs: Graphs):
        self._launches = tuple(launches)
        self._graphs = graphs
        self._contexts: dict[TensorRTEngine, Any] = {}
        self._warm = False
        self._replay: Launch | None = None

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
        elif not self._warm:
            self._plain()
            self._warm = True
        else:
            self._replay = self._capture()
            self._replay()

    def _capture(self) -> Launch:
        try:
            return self._graphs.capture(self._plain)
        except EngineError as error:
            log.warning("the frame cannot be captured as a CUDA graph and is launched stage by stage: %s", error.found)
            return self._plain

    def _plain(self) -> None:
        for launch in self._launches:
            if isinstance(launch, StageLaunch):
                engine = launch.engine
                if engine not in self._contexts:
                    self._contexts[engine] = engine.new_context()
                engine.enqueue(self._contexts[engine], launch.addresses)
            else:
                launch()

    def close(self) -> None:
        """Drop the contexts; the graph itself is destroyed with the others."""
        self._contexts.clear()
        self._replay = None


class TensorRTBackend:
    """TensorRT on one GPU.

    Args:
        cache: folder of plans; None is :func:`plans.default_cache`.
        options: how missing plans are built; None: as `andon build` last built the stage, else by default.
        graphs: capture frames as CUDA graphs.

    Raises:
        EngineError: TensorRT, the driver or the CUDA bindings are missing; probe.require_tensorrt says it better. Or
            TensorRT does not start.
        ConfigError: $ANDON_CACHE_LIMIT is not a size.
    """

    name = "tensorrt"
    asynchronous = True

    def __init__(self, cache: Path | None = None, options: BuildOptions | None = None, *, graphs: bool = True):
        self._trt = import_tensorrt()
        self._thread = threading.get_ident()
        self._cuda = open_cuda()
        try:
            self._logger = make_logger(self._trt)
            self._graphs = Graphs(self._cuda.stream) if graphs else None
            target = Target.of(self._trt, self._cuda.device)
            self.plans = PlanStore(self._trt, self._logger, cache or default_cache(), target, options)
        except BaseException:
            self._cuda.close()  # with a context left on its thread, pycuda ends the process with that thread
            raise
        self._scratch = Scratch(self._cuda)
        self._engines: list[TensorRTEngine] = []
        self._frames: WeakSet[FrameGraph] = WeakSet()  # a closed program lets go of its contexts

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        self._check_thread()
        buffer = DeviceBuffer(0, shape, dtype)
        buffer.address = self._cuda.malloc(buffer.nbytes)
        return buffer

    def allocate_rows(self, rows: int, shape: tuple[int, ...], dtype: str) -> Sequence[DeviceBuffer]:
        self._check_thread()
        size = DeviceBuffer(0, shape, dtype).nbytes
        stride = -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT
        block = self._cuda.malloc(rows * stride)
        return tuple(DeviceBuffer(block + row * stride, shape, dtype) for row in range(rows))

    def allocate_host(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self._cuda.pinned(shape, dtype)

    def upload(self, buffer: Buffer, array: Array, start: int = 0) -> None:
        self._check_thread()
        target = _device(buffer)
        row = target.nbytes // target.shape[0] if target.shape and start else 0
        if array.nbytes + start * row > target.nbytes:
            raise EngineError("upload past the end of a buffer", found=array.shape, expected=target.shape)
        whole = np.ascontiguousarray(array)  # itself where it is
        self._cuda.upload(target.address + start * row, whole)
        if whole is not array:
            self._cuda.synchronize()  # the copy goes with this call

    def download(self, buffer: Buffer, out: Array) -> None:
        self._check_thread()
        self._cuda.download(out, _device(buffer).address)
        self._cuda.synchronize()

    def copy(self, target: Buffer, source: Buffer) -> Launch:
        return partial(self._cuda.copy, _device(target).address, _device(source).address, _device(source).nbytes)

    def open(self, name: str, stage: Stage, path: Path, variant: Variant) -> TensorRTEngine:
        """Load the stage's plan, or build it (minutes, with a progress bar) and keep it.

        Raises:
            EngineError: TensorRT refuses the stage; the message is TensorRT's.
        """
        self._check_thread()
        plan = self.plans.load(name, path, variant)
        engine = TensorRTEngine(name, plan, self._trt, self._cuda, self._scratch, self._logger)
        check_stage(name, stage, engine.inputs, engine.outputs)
        self._engines.append(engine)
        self._scratch.reserve(engine.scratch_bytes)
        return engine

    def sequence(self, launches: Sequence[Launch]) -> Launch:
        self.plans.prune()  # a program asks for its launches when all of its stages are open
        if self._graphs is None:
            return partial(_run_all, tuple(launches))
        frame = FrameGraph(launches, self._graphs)
        self._frames.add(frame)
        return frame

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def close(self) -> None:
        """Wait for the stream, then let go of graphs, contexts, engines, memory and device, in this order."""
        try:
            self._cuda.synchronize()
        except EngineError as error:
            log.warning("the GPU was in an error state when it was closed: %s", error.found)
        if self._graphs is not None:
            self._graphs.close()
        for frame in tuple(self._frames):
            frame.close()
        while self._engines:
            self._engines.pop().close()
        self.plans.close()
        self._cuda.close()

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise EngineError(
                "the TensorRT backend was called from another thread",
                found=threading.current_thread().name,
                expected="the thread that opened it",
            )

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _device(buffer: Buffer) -> DeviceBuffer:
    if not isinstance(buffer, DeviceBuffer):
        raise EngineError("a buffer of another backend", found=type(buffer).__name__, expected="DeviceBuffer")
    return buffer


def _run_all(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch()


def _spec(trt: Trt, plan: Any, name: str) -> tuple[TensorSpec, bool]:
    shape = tuple(int(d) for d in plan.get_tensor_shape(name))
    kind = plan.get_tensor_dtype(name)
    dtype = dtypes(trt).get(kind, str(kind))
    return TensorSpec(name, shape, dtype), plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT


def _scratch_bytes(plan: Any) -> int:
    """Bytes a context computes in. From 10.1 as device_memory_size_v2; 11 has no other:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html"""
    size = plan.device_memory_size_v2 if hasattr(plan, "device_memory_size_v2") else plan.device_memory_size
    return int(size)
