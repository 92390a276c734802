"""The little of CUDA that the TensorRT backend needs: memory, one stream, graphs. pycuda first, else cuda-python.

Both share the device's primary context, which TensorRT uses too. Graphs are captured through the driver library itself:
pycuda has no call for them, and the driver's C interface is stable across CUDA versions.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError
from .base import Array, Launch

log = logging.getLogger(__name__)
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may call CUDA while this one captures


@dataclass(frozen=True)
class Device:
    """The GPU. sm: compute capability, "8.7"."""

    name: str
    sm: str
    memory_bytes: int
    multiprocessors: int


class Cuda(Protocol):
    """One device, one stream, one owning thread. Pointers are integers; copies are asynchronous on the stream."""

    name: str
    stream: int
    device: Device

    def malloc(self, size: int) -> int:
        """Zero-filled device memory, aligned to 256 bytes at least."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array: ...

    def upload(self, target: int, array: Array) -> None: ...

    def download(self, out: Array, source: int) -> None: ...

    def copy(self, target: int, source: int, size: int) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None:
        """Free everything, as far as the device lets us; the context leaves the thread in any case."""
        ...


def open_cuda(device: int = 0) -> Cuda:
    """Open a GPU with whichever bindings are installed.

    Raises:
        EngineError: there are none, or the driver refuses.
    """
    reasons = []
    for opener in (PyCuda, CudaPython):
        try:
            return opener(device)
        except ImportError as error:
            reasons.append(f"{opener.name}: {error}")
    raise EngineError(
        "no CUDA bindings for Python",
        found="; ".join(reasons),
        expected="pycuda or cuda-python",
        next_step="pip install pycuda (docs/jetson.md)",
    )


class PyCuda:
    """pycuda.driver behind the interface."""

    name = "pycuda"

    def __init__(self, device: int = 0):
        import pycuda.driver as driver

        self._driver = driver
        self._call(driver.init)
        handle = self._call(driver.Device, device)
        self._context = self._call(handle.retain_primary_context)
        self._blocks: list[Any] = []
        self._context.push()
        try:
            self._stream = self._call(driver.Stream)
            self.stream = int(self._stream.handle)
            major, minor = handle.compute_capability()
            count = int(handle.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT))
            self.device = Device(handle.name(), f"{major}.{minor}", int(handle.total_memory()), count)
        except BaseException:
            self.close()
            raise

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._driver.Error as error:
            raise _failed("pycuda", error) from error

    def malloc(self, size: int) -> int:
        block = self._call(self._driver.mem_alloc, max(size, 1))
        self._blocks.append(block)
        self._call(self._driver.memset_d8, int(block), 0, max(size, 1))
        return int(block)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array:
        array: Array = self._call(self._driver.pagelocked_zeros, shape, np.dtype(dtype))
        return array

    def upload(self, target: int, array: Array) -> None:
        self._call(self._driver.memcpy_htod_async, target, array, self._stream)

    def download(self, out: Array, source: int) -> None:
        self._call(self._driver.memcpy_dtoh_async, out, source, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        self._call(self._driver.memcpy_dtod_async, target, source, size, self._stream)

    def synchronize(self) -> None:
        self._call(self._stream.synchronize)

    def close(self) -> None:
        for block in self._blocks:
            _let_go(self._call, block.free)
        self._blocks.clear()
        _let_go(self._call, self._context.pop)
        _let_go(self._call, self._context.detach)


class CudaPython:
    """NVIDIA's cuda-python (the package cuda-bindings) behind the interface."""

    name = "cuda-python"

    def __init__(self, device: int = 0):
        self._driver = _cuda_python()
        self._call("cuInit", 0)
        self._handle = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._handle)
        self._stream: Any = None
        self._blocks: list[Any] = []
        self._pinned: list[int] = []
        self._call("cuCtxPushCurrent", self._context)
        try:
            self._stream = self._call("cuStreamCreate", 0)
            self.stream = int(self._stream)
            self.device = self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> Device:
        kinds = self._driver.CUdevice_attribute
        major, minor, count = (
            int(self._call("cuDeviceGetAttribute", kind, self._handle))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        name = self._call("cuDeviceGetName", 128, self._handle).split(b"\0")[0].decode()
        return Device(name, f"{major}.{minor}", int(self._call("cuDeviceTotalMem", self._handle)), count)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A driver call: the error code comes first in its result."""
        code, *values = getattr(self._driver, name)(*arguments)
        if int(code) != 0:
            raise _failed("cuda-python", f"{name}: {code}")
        return values[0] if values else None

    def malloc(self, size: int) -> int:
        block = self._call("cuMemAlloc", max(size, 1))
        self._blocks.append(block)
        self._call("cuMemsetD8Async", block, 0, max(size, 1), self._stream)
        return int(block)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array:
        kind = np.dtype(dtype)
        size = max(int(np.prod(shape, dtype=np.int64)) * kind.itemsize, 1)
        address = int(self._call("cuMemHostAlloc", size, 0))
        self._pinned.append(address)
        block = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        block.fill(0)
        return block[: int(np.prod(shape, dtype=np.int64)) * kind.itemsize].view(kind).reshape(shape)

    def upload(self, target: int, array: Array) -> None:
        self._call("cuMemcpyHtoDAsync", target, array.ctypes.data, array.nbytes, self._stream)

    def download(self, out: Array, source: int) -> None:
        self._call("cuMemcpyDtoHAsync", out.ctypes.data, source, out.nbytes, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        for block in self._blocks:
            _let_go(self._call, "cuMemFree", block)
        for address in self._pinned:
            _let_go(self._call, "cuMemFreeHost", address)
        self._blocks.clear()
        self._pinned.clear()
        if self._stream is not None:
            _let_go(self._call, "cuStreamDestroy", self._stream)
        _let_go(self._call, "cuCtxPopCurrent")
        _let_go(self._call, "cuDevicePrimaryCtxRelease", self._handle)


class Graphs:
    """CUDA graphs of one stream."""

    def __init__(self, stream: int):
        self._library = driver_library()
        self._stream = ctypes.c_void_p(stream)
        self._executables: list[ctypes.c_void_p] = []

    def capture(self, work: Launch) -> Launch:
        """Record what `work` puts on the stream, without running it, and return the launch that runs it all.

        Raises:
            EngineError: the work cannot be captured (it synchronises or allocates); the stream is usable again.
        """
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        graph = ctypes.c_void_p()
        try:
            work()
        except EngineError:
            self._library.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cuGraphDestroy(graph)
        self._executables.append(executable)
        return lambda: self._call("cuGraphLaunch", executable, self._stream)

    def close(self) -> None:
        """Destroy all graphs; their launches must not be called any more."""
        while self._executables:
            self._library.cuGraphExecDestroy(self._executables.pop())

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise _failed("the CUDA driver", f"{name}: error {code}")


def driver_library() -> Any:
    """The driver's C library."""
    return ctypes.CDLL("libcuda.so.1")


def _cuda_python() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError:
        # Before 12.6 the driver module was cuda.cuda: https://nvidia.github.io/cuda-python/cuda-bindings/latest/
        from cuda import cuda as driver
    return driver


def _let_go(call: Callable[..., Any], *arguments: Any) -> None:
    """A call of the end, of which none may keep the next from being made: after a fault every one of them fails."""
    try:
        call(*arguments)
    except EngineError as error:
        log.debug("while CUDA was closed: %s", error.found)


def _failed(who: str, error: object) -> EngineError:
    return EngineError(f"{who} reports an error", found=error, next_step="andon doctor")
