"""A double of tensorrt, pycuda, cuda-python and the CUDA driver library, for machines without a GPU.

"Device" memory is host memory at real addresses; a stream is a queue that is worked off only when someone waits, so a
missing wait gives stale data; a stage is executed by onnxruntime on the addresses it was given. Addresses outside of
what was allocated, stages whose outputs overlap their inputs, and contexts without scratch memory are errors.

What it cannot show: TensorRT's kernels and their numerics, which operators and types its builder takes (the
TensorRT-RTX test asks a real parser and builder), what real hardware may capture in a graph, alignment and memory
limits, and speed.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from .cudadouble import World, cuda_python_driver, pycuda_driver

_NUMPY = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 9: "bool", 10: "float16"}
_ENUMS = {
    "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8",
    "TensorIOMode": "NONE INPUT OUTPUT",
    "MemoryPoolType": "WORKSPACE",
    "DeviceType": "GPU DLA",
    "LayerType": "CONSTANT SHAPE QUANTIZE DEQUANTIZE CONVOLUTION",
}


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.3.0", bindings: str = "pycuda") -> World:
    """Put the doubles in place of the real modules. bindings: pycuda or cuda-python."""
    world = World(version)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(world))
    if bindings == "pycuda":
        driver = pycuda_driver(world)
        monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    else:
        monkeypatch.setitem(sys.modules, "pycuda", None)
        driver = cuda_python_driver(world)
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(driver=driver)))
        monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr("andon.runtime.engine.cuda.driver_library", lambda: world)
    monkeypatch.setattr("andon.runtime.engine.probe.cuda_devices", lambda: (1, ""))
    monkeypatch.setattr(
        "andon.runtime.engine.probe._module", lambda name: name in ("tensorrt", bindings, "cuda.bindings")
    )
    return world


# -- TensorRT ----------------------------------------------------------------------------------------------------------


def tensorrt(world: World) -> Any:
    """The module tensorrt of a version; what a version does not have, this does not have either."""
    trt: Any = ModuleType("tensorrt")
    new = world.major >= 10
    trt.__version__ = world.version
    for name, members in _ENUMS.items():
        setattr(trt, name, SimpleNamespace(**{m: f"{name}.{m}" for m in members.split()}))
    trt.ILogger = type("ILogger", (), {k: k for k in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")})
    flags = "TF32 GPU_FALLBACK" if world.major >= 11 else "TF32 GPU_FALLBACK FP16 INT8 OBEY_PRECISION_CONSTRAINTS"
    trt.BuilderFlag = SimpleNamespace(**{f: f for f in flags.split()})
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(**({"STRONGLY_TYPED": 1} if new else {"EXPLICIT_BATCH": 0}))
    if new:
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
        trt.IProgressMonitor = type("IProgressMonitor", (), {})

    def start(kind: Any, logger: Any) -> Any:
        if world.refuse_start:
            logger.log("ERROR", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return kind(world, trt, logger)

    trt.Runtime = lambda logger: start(Runtime, logger)
    trt.Builder = lambda logger: start(Builder, logger)
    trt.OnnxParser = Parser
    return trt


class Parser:
    """Parses with onnx's checker; the operator `Det` stands for one that TensorRT refuses."""

    def __init__(self, network: Any, logger: Any):
        self._network = network
        self._bad: list[str] = []

    def parse(self, model: bytes) -> bool:
        self._network.model = model
        self._bad = [n.op_type for n in onnx.load_from_string(model).graph.node if n.op_type == "Det"]
        return not self._bad

    @property
    def num_errors(self) -> int:
        return len(self._bad)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(node=lambda: index, desc=lambda: f"no importer for operator {self._bad[index]}")


class Builder:
    """ "Builds" by wrapping the ONNX with the version and the flags it was built with."""

    def __init__(self, world: World, trt: Any, logger: Any):
        self._world, self._trt, self._logger = world, trt, logger
        self.num_DLA_cores = world.dla_cores

    def create_network(self, flags: int) -> Any:
        layers = [
            SimpleNamespace(name=n, type="LayerType.CONVOLUTION", num_outputs=1, set=[]) for n in ("conv", "topk")
        ]
        for layer in layers:
            layer.get_output = lambda i: SimpleNamespace(dtype="DataType.HALF")
            layer.set_output_type = lambda i, kind, layer=layer: layer.set.append(kind)
        network = SimpleNamespace(flags=flags, num_layers=2, get_layer=lambda i: layers[i], model=b"")
        self._world.network = network
        return network

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(flags={"TF32"}, limits={}, cache=None, progress_monitor=None)
        config.set_flag = config.flags.add
        config.clear_flag = config.flags.discard
        config.set_memory_pool_limit = config.limits.__setitem__
        config.can_run_on_DLA = lambda layer: layer.name == "conv"
        config.create_timing_cache = lambda data: SimpleNamespace(data=data or b"0", serialize=lambda: b"timings")

        def set_timing_cache(cache: Any, ignore_mismatch: bool) -> bool:
            config.cache = cache
            return cache.data in (b"0", b"timings")

        config.set_timing_cache = set_timing_cache
        self._world.config = config
        return config

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        self._world.builds += 1
        outputs = [o.name for o in onnx.load_from_string(network.model).graph.output]
        if self._world.interrupt_build_of in outputs:
            raise KeyboardInterrupt
        if self._world.refuse_build:
            self._logger.log("ERROR", self._world.refuse_build_with)
            return None
        if config.progress_monitor is not None:
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Timing", "Building", 4)
            if not all(monitor.step_complete("Timing", i) for i in range(4)):
                return None
            monitor.phase_finish("Timing")
            assert monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
        head = {"version": self._world.version, "flags": network.flags}
        return json.dumps(head).encode() + b"\n" + network.model


class Runtime:
    """Deserialises plans of its own version."""

    def __init__(self, world: World, trt: Any, logger: Any):
        self._world, self._trt, self._logger = world, trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        head, _, model = plan.partition(b"\n")
        if self._world.refuse_plan or json.loads(head)["version"] != self._world.version:
            self._logger.log("ERROR", "the plan was made by another version")
            return None
        return Engine(self._world, self._trt, model, self._logger)


class Engine:
    """A plan: the ONNX, run by onnxruntime."""

    def __init__(self, world: World, trt: Any, model: bytes, logger: Any):
        self.world, self.trt, self.logger = world, trt, logger
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(model).graph
        self.tensors: dict[str, tuple[tuple[int, ...], str, bool]] = {}
        for values, is_input in ((graph.input, True), (graph.output, False)):
            for value in values:
                kind = value.type.tensor_type
                shape = tuple(d.dim_value for d in kind.shape.dim)
                self.tensors[value.name] = (shape, _NUMPY[kind.elem_type], is_input)
        if world.major < 10:
            self.num_bindings = len(self.tensors)
            self.device_memory_size = 1000
        else:
            self.device_memory_size_v2 = 1000 * len(self.tensors)

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    get_binding_name = get_tensor_name

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0]

    def get_tensor_mode(self, name: str) -> str:
        return "TensorIOMode.INPUT" if self.tensors[name][2] else "TensorIOMode.OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        kinds = {
            "float32": "FLOAT",
            "float16": "HALF",
            "uint8": "UINT8",
            "int32": "INT32",
            "int8": "INT8",
            "bool": "BOOL",
        }
        return f"DataType.{kinds[self.tensors[name][1]]}"

    def create_execution_context(self, strategy: str) -> Any:
        assert strategy == "user"
        return Context(self)

    def create_execution_context_without_device_memory(self) -> Any:
        assert self.world.major < 10
        return Context(self)


class Context:
    """Runs its engine on the addresses it was given, when the stream gets there."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._scratch = 0
        engine.world.contexts += 1

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._engine.world.view(address, size)
        self._scratch = address
        self._engine.world.scratch.add(address)

    device_memory = property(None, lambda self, address: setattr(self, "_scratch", address))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.tensors

    def execute_async_v3(self, stream: int) -> bool:
        assert self._engine.world.major >= 10 and stream == 77
        return self._execute(dict(self._addresses))

    def execute_async_v2(self, bindings: list[int], stream: int) -> bool:
        assert self._engine.world.major < 10 and stream == 77
        return self._execute(dict(zip(self._engine.tensors, bindings, strict=True)))

    def _execute(self, addresses: dict[str, int]) -> bool:
        engine, world = self._engine, self._engine.world
        world.enqueues += 1
        if world.refuse_execute:
            engine.logger.log("ERROR", "[executionContext] CUDA failure 700: an illegal memory access")
            return False
        assert self._scratch and set(addresses) == set(engine.tensors)
        world.submit(lambda: self._work(addresses))
        return True

    def _work(self, addresses: dict[str, int]) -> None:
        engine, world = self._engine, self._engine.world
        arrays = {}
        for name, (shape, dtype, _) in engine.tensors.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            arrays[name] = world.view(addresses[name], size).view(dtype).reshape(shape)
        inputs = [n for n, t in engine.tensors.items() if t[2]]
        outputs = [n for n in engine.tensors if n not in inputs]
        for out in outputs:
            assert not any(np.may_share_memory(arrays[out], arrays[i]) for i in inputs), f"{out} overlaps an input"
        world.executed.append((outputs[0], addresses))
        results = engine.session.run(outputs, {n: arrays[n].copy() for n in inputs})
        for name, value in zip(outputs, results, strict=True):
            np.copyto(arrays[name], value)
