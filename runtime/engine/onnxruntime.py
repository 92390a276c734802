"""The reference backend: onnxruntime on the CPU, with I/O binding to buffers that are numpy arrays underneath."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from ..errors import EngineError
from ..manifest import Stage, Variant
from .base import Array, Buffer, Launch, TensorSpec
from .binding import check_bindings, check_stage

_ALIGN = 64  # a cache line, and the widest vector load
_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
}


class HostBuffer:
    """A 64-byte aligned numpy array."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self._array = aligned(shape, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    @property
    def host(self) -> Array:
        return self._array


def aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """Zero-filled array whose data start on a 64-byte boundary."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    block = np.zeros(size + _ALIGN, np.uint8)
    offset = -block.ctypes.data % _ALIGN
    return block[offset : offset + size].view(kind).reshape(shape)


class OnnxRuntimeEngine:
    """One session. Launches are I/O bindings made once; running one neither allocates outputs nor copies inputs."""

    def __init__(self, name: str, session: Any, errors: tuple[type[Exception], ...]):
        self._name = name
        self._session = session
        self._errors = errors
        self._inputs = tuple(_spec(i) for i in session.get_inputs())
        self._outputs = tuple(_spec(o) for o in session.get_outputs())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def prepare(self, bindings: Mapping[str, Buffer]) -> Launch:
        """See base.Engine.prepare. The launch keeps the bound arrays alive."""
        check_bindings(self._name, self._inputs + self._outputs, bindings)
        binding = self._session.io_binding()
        arrays = []
        for specs, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for spec in specs:
                array = bindings[spec.name].host
                if array is None:
                    raise EngineError(f"stage {self._name}: {spec.name} is not in host memory", expected="a HostBuffer")
                bind(spec.name, "cpu", 0, array.dtype.type, spec.shape, array.ctypes.data)
                arrays.append(array)
        return partial(self._run, self._session.run_with_iobinding, binding, arrays)

    def _run(self, run: Any, binding: Any, arrays: list[Array]) -> None:
        try:
            run(binding)
        except self._errors as error:
            raise EngineError(
                f"stage {self._name} failed in onnxruntime",
                found=error,
                next_step="andon verify --bundle BUNDLE --backend onnxruntime",
            ) from error

    def close(self) -> None:
        self._session = None


class OnnxRuntimeBackend:
    """onnxruntime's CPU provider.

    Args:
        threads: threads inside an operator; None is every CPU this process may use.
        spin: let idle worker threads spin between operators: lower latency, but a full core burnt per thread.
    """

    name = "onnxruntime"
    asynchronous = False

    def __init__(self, threads: int | None = None, spin: bool = False):
        self._runtime = _import()
        self.threads = threads or _available_cpus()
        self._spin = spin
        self._engines: list[OnnxRuntimeEngine] = []
        state = self._runtime.capi.onnxruntime_pybind11_state
        names = [
            n for n in dir(state) if isinstance(getattr(state, n), type) and issubclass(getattr(state, n), Exception)
        ]
        self._errors: tuple[type[Exception], ...] = tuple(getattr(state, n) for n in names)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(shape, dtype)

    def allocate_rows(self, rows: int, shape: tuple[int, ...], dtype: str) -> Sequence[HostBuffer]:
        return tuple(HostBuffer(shape, dtype) for _ in range(rows))

    def allocate_host(self, shape: tuple[int, ...], dtype: str) -> Array:
        return aligned(shape, dtype)

    def upload(self, buffer: Buffer, array: Array, start: int = 0) -> None:
        target = buffer.host
        assert target is not None  # all buffers of this backend are HostBuffer
        if start == 0 and target.shape == array.shape:
            np.copyto(target, array)
        else:
            np.copyto(target[start : start + len(array)], array)

    def download(self, buffer: Buffer, out: Array) -> None:
        np.copyto(out, buffer.host)  # type: ignore[arg-type]

    def copy(self, target: Buffer, source: Buffer) -> Launch:
        return partial(np.copyto, target.host, source.host)  # type: ignore[arg-type]

    def open(self, name: str, stage: Stage, path: Path, variant: Variant) -> OnnxRuntimeEngine:
        """Open a stage's file; its inputs and outputs must be what the manifest says.

        Raises:
            EngineError: onnxruntime refuses the file, or shapes or types differ from the manifest.
        """
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._runtime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spin else "0")
        # Weights come from plain memory, not from the arena, which would keep its doubled blocks for good.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # 1: a product whose weights are only stored as INT8 is computed in floating point, as the export judged it. By
        # itself onnxruntime (1.31) would quantise its activations, too: one outlier among them spoils the map.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = self._runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise EngineError(
                f"onnxruntime cannot open stage {name} ({path.name})",
                found=error,
                expected=f"a model that onnxruntime {self._runtime.__version__} runs on the CPU",
                next_step="andon export --method METHOD",
            ) from error
        engine = OnnxRuntimeEngine(name, session, self._errors)
        check_stage(name, stage, engine.inputs, engine.outputs)
        self._engines.append(engine)
        return engine

    def sequence(self, launches: Sequence[Launch]) -> Launch:
        return partial(_run_all, tuple(launches))

    def synchronize(self) -> None:
        """Launches are synchronous here."""

    def close(self) -> None:
        while self._engines:
            self._engines.pop().close()

    def __enter__(self) -> OnnxRuntimeBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run_all(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch()


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else -1 for d in node.shape)
    return TensorSpec(node.name, shape, _DTYPES.get(node.type, node.type))


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed",
            found=error,
            expected="onnxruntime >= 1.18",
            next_step="pip install onnxruntime",
        ) from error
    return onnxruntime
