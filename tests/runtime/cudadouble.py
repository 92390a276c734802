"""The machine under the double of TensorRT (trtdouble.py): memory, one stream, graphs, and the two CUDA bindings."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class World:
    """The machine: memory, one stream, and a record of what happened.

    executed: (stage's first output name, addresses by tensor) of every stage run. log: calls in order.
    """

    def __init__(self, version: str = "10.3.0"):
        self.version = version
        self.major = int(version.split(".")[0])
        self.blocks: dict[int, np.ndarray] = {}
        self.pinned: list[np.ndarray] = []
        self.borrowed: list[np.ndarray] = []
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executed: list[tuple[str, dict[str, int]]] = []
        self.mallocs = self.enqueues = self.graph_launches = self.builds = self.syncs = 0
        self.refuse_capture = self.refuse_execute = self.refuse_build = self.refuse_plan = False
        self.refuse_build_with = "[optimizer] no implementation for node MatMul_3"
        self.fault = self.refuse_stream = self.refuse_start = False
        self.pushed = 0  # contexts on the thread
        self.scratch: set[int] = set()
        self.contexts = 0
        self.dla_cores = 0
        self.memory, self.multiprocessors = 8 << 30, 8
        self.interrupt_build_of = ""
        self.network: Any = None
        self.config: Any = None

    # -- memory and stream ---------------------------------------------------------------------------------------------

    def malloc(self, size: int) -> int:
        block = np.zeros(size + 256, np.uint8)
        address = block.ctypes.data + (-block.ctypes.data) % 256
        self.blocks[address] = block
        self.mallocs += 1
        return address

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes at an address; they must lie in one allocated block."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.size - 256:
                return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else block[:0]
        raise AssertionError(f"access to {size} bytes at {address:#x}, which was never allocated")

    def submit(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def synchronize(self) -> None:
        assert self.recording is None, "synchronising while capturing"
        self.syncs += 1
        while self.queue:
            self.queue.pop(0)()

    def copy_in(self, target: int, array: np.ndarray) -> None:
        """The driver may read the array, pageable memory too, until somebody waits for the stream."""
        assert array.flags.c_contiguous
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        kept, address, size = weakref.ref(owner), array.ctypes.data, array.nbytes
        self.view(target, size)

        def work() -> None:
            assert kept() is not None, "what was uploaded is gone before anybody waited"
            ctypes.memmove(self.view(target, size).ctypes.data, address, size)

        self.submit(work)

    def copy_out(self, out: np.ndarray, source: int) -> None:
        self.submit(lambda: np.copyto(out.reshape(-1).view(np.uint8), self.view(source, out.nbytes)))

    def copy(self, target: int, source: int, size: int) -> None:
        self.submit(lambda: np.copyto(self.view(target, size), self.view(source, size)))

    def fill(self, target: int, size: int) -> None:
        self.submit(lambda: self.view(target, size).fill(0))

    # -- graphs, as libcuda.so.1 has them ------------------------------------------------------------------------------

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        assert self.recording is None
        self.recording = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        work, self.recording = self.recording, None
        assert work is not None
        if self.refuse_capture:
            return 901  # CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value] = work
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = graph.value
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        self.graph_launches += 1
        self.queue.extend(self.graphs[executable.value])
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        self.graphs.pop(executable.value, None)
        return 0


# -- CUDA bindings -----------------------------------------------------------------------------------------------------


def pycuda_driver(world: World) -> Any:
    """pycuda.driver, the part that is used."""

    class Error(Exception):
        pass

    def check() -> None:
        """After a fault every call fails with it, whatever it is for."""
        if world.fault:
            raise Error("an illegal memory access was encountered")

    def checked(work: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            check()
            work(*arguments)

        return call

    def push(step: int) -> None:
        world.pushed += step

    class Allocation:
        def __init__(self, size: int):
            self.address = world.malloc(size)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            check()
            del world.blocks[self.address]

    class Stream:
        handle = 77

        def __init__(self) -> None:
            if world.refuse_stream:
                raise Error("out of memory")

        def synchronize(self) -> None:
            check()
            world.synchronize()

    class Device:
        def __init__(self, index: int):
            self.index = index

        def retain_primary_context(self) -> Any:
            return SimpleNamespace(push=lambda: push(1), pop=lambda: push(-1), detach=check)

        def name(self) -> str:
            return "Orin (double)"

        def compute_capability(self) -> tuple[int, int]:
            return 8, 7

        def total_memory(self) -> int:
            return world.memory

        def get_attribute(self, kind: str) -> int:
            return {"multiprocessors": world.multiprocessors}[kind]

    def pagelocked_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        world.pinned.append(np.zeros(shape, dtype))
        return world.pinned[-1]

    return SimpleNamespace(
        Error=Error,
        init=lambda: None,
        Device=Device,
        device_attribute=SimpleNamespace(MULTIPROCESSOR_COUNT="multiprocessors"),
        Stream=Stream,
        mem_alloc=Allocation,
        memset_d8=lambda target, value, count: world.fill(target, count),
        pagelocked_zeros=pagelocked_zeros,
        memcpy_htod_async=checked(lambda target, source, stream: world.copy_in(target, source)),
        memcpy_dtoh_async=checked(lambda target, source, stream: world.copy_out(target, source)),
        memcpy_dtod_async=checked(lambda target, source, size, stream: world.copy(target, source, size)),
    )


def cuda_python_driver(world: World) -> Any:
    """cuda.bindings.driver, the part that is used: every call returns its error code first."""

    def at(address: int, size: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def borrowed(address: int, size: int) -> np.ndarray:
        """Whose memory an address is cannot be told: of pageable memory a copy is kept here."""
        array = at(address, size)
        pinned = any(np.shares_memory(array, p) for p in world.pinned)
        world.borrowed.append(array if pinned else array.copy())
        return world.borrowed[-1]

    def host_alloc(size: int, flags: int) -> tuple[int, int]:
        world.pinned.append(np.zeros(size, np.uint8))
        return 0, world.pinned[-1].ctypes.data

    def done(work: Callable[..., object]) -> Callable[..., tuple[int]]:
        def call(*arguments: Any) -> tuple[int]:
            if world.fault:
                return (700,)
            work(*arguments)
            return (0,)

        return call

    def push(step: int) -> Callable[..., tuple[int, ...]]:
        def call(*_: Any) -> tuple[int, ...]:
            world.pushed += step
            return (0, 1)

        return call

    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="multiprocessors",
    )
    values = {"major": 8, "minor": 7, "multiprocessors": world.multiprocessors}
    return SimpleNamespace(
        CUdevice_attribute=attributes,
        cuInit=lambda flags: (0,),
        cuDeviceGet=lambda index: (0, index),
        cuDevicePrimaryCtxRetain=lambda device: (0, 1),
        cuDevicePrimaryCtxRelease=done(lambda device: None),
        cuCtxPushCurrent=push(1),
        cuCtxPopCurrent=push(-1),
        cuStreamCreate=lambda flags: (2, None) if world.refuse_stream else (0, 77),
        cuStreamDestroy=done(lambda stream: None),
        cuStreamSynchronize=done(lambda stream: world.synchronize()),
        cuDeviceGetAttribute=lambda attribute, device: (0, values[attribute]),
        cuDeviceGetName=lambda length, device: (0, b"Orin (double)\0"),
        cuDeviceTotalMem=lambda device: (0, world.memory),
        cuMemAlloc=lambda size: (0, world.malloc(size)),
        cuMemFree=done(lambda block: world.blocks.pop(block)),
        cuMemHostAlloc=host_alloc,
        cuMemFreeHost=done(lambda address: None),
        cuMemsetD8Async=done(lambda target, value, count, stream: world.fill(target, count)),
        cuMemcpyHtoDAsync=done(lambda target, source, size, stream: world.copy_in(target, borrowed(source, size))),
        cuMemcpyDtoHAsync=done(lambda target, source, size, stream: world.copy_out(at(target, size), source)),
        cuMemcpyDtoDAsync=done(lambda target, source, size, stream: world.copy(target, source, size)),
    )
