"""A stage as ONNX: opset 17, fixed shapes, simplified, with node names that keep the torch module path.

The TorchScript exporter is used because it writes the module path into node names (``/encoder.0/norm/Add``), which is
how FP32 islands given as submodule names are found again, and because it takes a tenth of a second.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, cast

import numpy as np
import onnx
import onnxslim
import torch
from onnx import numpy_helper
from torch import nn

from ..runtime.errors import ConfigError
from .stage import StageDef
from .walk import Array

OPSET = 17
#: ONNX IR version that every supported onnxruntime and TensorRT parser reads
IR_VERSION = 8
DTYPES: dict[int, str] = {
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.BOOL: "bool",
}


@dataclass(frozen=True)
class StageGraph:
    """A stage's FP32 graph. islands: node name -> the FP32 submodule it belongs to."""

    model: onnx.ModelProto
    islands: Mapping[str, str]


def export_stage(stage: StageDef, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> StageGraph:
    """Export one stage; `inputs` and `outputs` are one call's arrays (export/walk.py examples).

    Raises:
        ConfigError: a type the manifest does not have, an island that is no submodule or owns no node, an input the
            stage does not use, or an output shape that changed on the way.
    """
    for name, array in (*inputs.items(), *outputs.items()):
        if array.dtype.name not in DTYPES.values():
            _fail(stage, f"tensor {name} has a type stages may not have", array.dtype.name, ", ".join(DTYPES.values()))
    if shared := set(inputs) & set(outputs):
        _fail(stage, "an input and an output have the same name", ", ".join(sorted(shared)), "different names")
    raw = _trace(stage, inputs)
    owned = islands(raw, stage)
    if "" not in stage.fp32:
        for empty in sorted(set(stage.fp32) - set(owned.values())):
            _fail(stage, f"FP32 island {empty!r} owns no node of the graph", "no node", "a submodule that computes")
    model = simplify(raw)
    _check_io(stage, model, inputs, outputs)
    present = {node.name for node in model.graph.node}
    return StageGraph(model, {name: island for name, island in islands(model, stage).items() if name in present})


def _trace(stage: StageDef, inputs: Mapping[str, Array]) -> onnx.ModelProto:
    stream = io.BytesIO()
    training = stage.module.training
    stage.module.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Sizes as Python numbers are wanted: shapes are fixed. What depends on values shows up in the parity check.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # Folding what the exporter leaves is onnxslim's work.
            warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)
            torch.onnx.export(
                stage.module,
                tuple(torch.from_numpy(np.array(array)) for array in inputs.values()),
                cast(str, stream),  # its annotation lacks file objects
                input_names=list(inputs),
                output_names=list(stage.outputs),
                opset_version=OPSET,
                dynamo=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ConfigError(
            f"stage {stage.name} cannot be exported to ONNX",
            found=str(error).strip().splitlines()[0],
            expected=f"a module that traces to opset {OPSET}",
            next_step="mend the cut in export/methods/",
        ) from error
    finally:
        stage.module.train(training)
    return onnx.load_from_string(stream.getvalue())


def islands(model: onnx.ModelProto, stage: StageDef) -> dict[str, str]:
    """Which nodes lie in the stage's FP32 islands: node name -> island.

    A node name is the path of *calls*, so a parent whose forward is bypassed is missing from it, and a second call of
    the same module appends ``_1``. A path that could be several submodules belongs to an island if any of them does:
    in doubt a node stays FP32.
    """
    if "" in stage.fp32:
        return {node.name: "whole stage" for node in model.graph.node}
    modules = dict(stage.module.named_modules(remove_duplicate=False))
    inside: dict[int, str] = {}
    for name in stage.fp32:
        if name not in modules:
            _fail(stage, f"FP32 island {name!r} is not a submodule", name, ", ".join(filter(None, modules)))
        inside.update({id(module): name for module in modules[name].modules()})
    found: dict[str, str] = {}
    for node in model.graph.node:
        owners = (inside.get(id(module)) for module in _owners(node.name, modules))
        island = next(filter(None, owners), None)
        if island:
            found[node.name] = island
    return found


def _owners(node_name: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Submodules that a node name's call path may mean."""
    paths = [""]
    for part in node_name.strip("/").split("/")[:-1]:
        plain = re.sub(r"_\d+$", "", part)
        tails = {part, plain}
        below = [f"{path}.{tail}".lstrip(".") for path in paths for tail in tails]
        known = [path for path in below if path in modules]
        paths = known or [name for name in modules for tail in tails if name == tail or name.endswith(f".{tail}")]
    return [modules[path] for path in paths if path]


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold, fuse, share equal constants, name every node once, infer all shapes."""
    for node in model.graph.node:
        # An empty list attribute means "not given"; graph tools cannot write it back.
        kept = [a for a in node.attribute if not (a.type == onnx.AttributeProto.INTS and not a.ints)]
        del node.attribute[:]
        node.attribute.extend(kept)
    model = onnxslim.slim(model)
    _constants_to_initializers(model)
    _share_initializers(model)
    _name_nodes(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "andon", "", ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def _constants_to_initializers(model: onnx.ModelProto) -> None:
    graph = model.graph
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _share_initializers(model: onnx.ModelProto) -> None:
    """One copy of equal constants; constants that nothing reads are dropped."""
    graph = model.graph
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    alias: dict[str, str] = {}
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        alias[tensor.name] = first.setdefault(key, tensor.name)
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = alias.get(name, name)
    used = {name for node in graph.node for name in node.input} | outputs
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _name_nodes(model: onnx.ModelProto) -> None:
    seen: set[str] = set()
    for node in model.graph.node:
        base = node.name or f"/{node.op_type}"
        name, n = base, 0
        while name in seen:
            n += 1
            name = f"{base}_{n}"
        node.name = name
        seen.add(name)


def tensor_type(info: onnx.ValueInfoProto) -> tuple[tuple[int, ...], str]:
    """Shape and dtype name of a graph input or output; a free dimension is -1, an unknown type its ONNX name."""
    tensor = info.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    dtype = DTYPES.get(tensor.elem_type) or onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return shape, dtype


def _check_io(
    stage: StageDef, model: onnx.ModelProto, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> None:
    for kind, infos, arrays in (("input", model.graph.input, inputs), ("output", model.graph.output, outputs)):
        found = {info.name: tensor_type(info) for info in infos}
        expected = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
        if list(found) != list(expected):
            _fail(stage, f"the graph has other {kind}s than the stage", ", ".join(found), ", ".join(expected))
        for name, wanted in expected.items():
            if found[name] != wanted:
                _fail(stage, f"{kind} {name} changed on export", found[name], wanted)


def _fail(stage: StageDef, what: str, found: object, expected: object) -> NoReturn:
    raise ConfigError(
        f"stage {stage.name}: {what}", found=found, expected=expected, next_step="mend the cut in export/methods/"
    )
