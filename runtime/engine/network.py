"""From a stage's ONNX to a TensorRT network and builder configuration, for 8.6, 10 and 11."""

from __future__ import annotations

import re
from typing import Any

from ..errors import EngineError
from .target import BuildOptions
from .trt import Trt, strongly_typed, version

#: Part of a plan's key. To be raised with every change here that makes another plan of the same ONNX and options: those
#: that were built before are then built again.
RECIPE = 1
#: How TensorRT and CUDA say that the device's memory is used up; too small a workspace is said in other words.
_NO_MEMORY = re.compile(r"out ?of ?memory|could not be allocated|not (be )?enough free memory", re.IGNORECASE)


def parse_network(trt: Trt, builder: Any, logger: Any, model: bytes, name: str) -> tuple[Any, Any]:
    """The network of an ONNX model, and the parser, which must outlive it.

    Raises:
        EngineError: the parser refuses a node; it is named with the parser's message.
    """
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EngineError(
            f"TensorRT's parser refuses {name}",
            found="; ".join(f"node {e.node()}: {e.desc()}" for e in errors) or logger.take(),
            expected=f"operators and types that TensorRT {trt.__version__} takes",
            next_step="export the bundle again with this version of Andon, whose trtcheck names the operator",
        )
    return network, parser


def make_config(trt: Trt, builder: Any, network: Any, options: BuildOptions, stage: str) -> tuple[Any, tuple[str, ...]]:
    """The builder configuration of a stage, and the layers that fall back from the DLA to the GPU.

    TF32 is off: its 10-bit mantissa would undo the FP32 islands (METHODS.md 6.1).

    Raises:
        EngineError: the DLA was asked for and there is none.
    """
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not strongly_typed(trt):
        _constrain_precision(trt, network, config)
    fallback = _use_dla(trt, builder, network, config, options, stage) if stage in options.dla else ()
    return config, fallback


def after_failure(said: str, variant: str, workspace_mb: int) -> str:
    """What to do about a build that failed with these words of TensorRT."""
    command = f"andon build --bundle BUNDLE --variant {variant} with a --workspace of"
    if _NO_MEMORY.search(said):
        return (
            "the device is out of memory: end what else uses it (desktop, other lines), give it swap space, or "
            f"{command} less than {workspace_mb} MB, which a run then uses too"
        )
    return f"{command} more than {workspace_mb} MB, which a run then uses too; or use --backend onnxruntime"


def _network_flags(trt: Trt) -> int:
    """Strong typing from 10 on; it is the only kind in 11, where the flag is deprecated and ignored.
    EXPLICIT_BATCH must be given on 8.6, means nothing on 10 and is gone in 11.

    https://docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/dla-standalone-mode.html (the flag in 11)
    https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration-guide.html (explicit batch)
    """
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if strongly_typed(trt) else "EXPLICIT_BATCH"
    flag = getattr(flags, name, None)
    return 0 if flag is None else 1 << int(flag)


def _constrain_precision(trt: Trt, network: Any, config: Any) -> None:
    """On 8.6, which has no strong typing that we could use: allow the narrow types, then hold every layer to the type
    that the ONNX gives its outputs.

    https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-861/developer-guide/index.html#reduced-precision
    """
    flags = trt.BuilderFlag
    for flag in (flags.FP16, flags.INT8, flags.OBEY_PRECISION_CONSTRAINTS):
        config.set_flag(flag)
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    fixed = (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds = [layer.get_output(i).dtype for i in range(layer.num_outputs)]
        if layer.type in fixed or not all(kind in floats for kind in kinds):
            continue
        layer.precision = trt.DataType.FLOAT if trt.DataType.FLOAT in kinds else trt.DataType.HALF
        for i, kind in enumerate(kinds):
            layer.set_output_type(i, kind)


def _use_dla(trt: Trt, builder: Any, network: Any, config: Any, options: BuildOptions, stage: str) -> tuple[str, ...]:
    """Put a stage on the DLA and name the layers that stay on the GPU.

    Which releases have it: https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html
    (10.x up to 10.7, and 11.4.1 with JetPack 7.2.2 on Orin); the builder knows best.
    """
    if builder.num_DLA_cores <= options.dla_core:
        raise EngineError(
            f"stage {stage} cannot go on the DLA",
            found=f"{builder.num_DLA_cores} DLA cores with TensorRT {'.'.join(map(str, version(trt)))}",
            expected=f"core {options.dla_core}: an Orin with TensorRT <= 10.7 (JetPack 6) or >= 11.4.1 (JetPack 7.2.2)",
            next_step="build without --dla",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer))
