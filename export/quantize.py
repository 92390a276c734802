"""INT8 by explicit Q/DQ, calibrated on good images: what a strongly typed TensorRT network quantises is in the file.

Products with weights (convolutions, linear layers, heads included) are quantised symmetrically, weights per channel,
biases left in float (TensorRT's parser refuses an int32 bias behind a DequantizeLinear). What stays is FP16, except
the elementwise operators between quantised products: they stay FP32 so that nothing stands between Q and DQ. Linear
layers that stay FP16 may still store their weights as INT8 (storage.py).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from .onnx import IR_VERSION
from .precision import MOVES, Fp16Graph, to_fp16
from .qdq import copy_of, quantise_tables, split_tables, with_one_quantised
from .ranges import Range
from .sensitivity import node_errors
from .storage import store_int8
from .walk import Array

_PRODUCTS = ("Conv", "Gemm", "MatMul")
#: Constants above this many values are worth storing as FP16
_SMALL = 4096
#: Elementwise operators that stay as wide as what they read
BETWEEN = MOVES | frozenset(("Clip", "Relu", "LeakyRelu", "HardSwish", "Sigmoid", "Mul", "Add", "MaxPool"))


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """Feeds recorded stage inputs to the calibrator."""

    def __init__(self, samples: Sequence[Mapping[str, Array]]):
        self._rest = iter(samples)

    def get_next(self) -> dict[str, Array] | None:
        """The next inputs, or None at the end."""
        inputs = next(self._rest, None)
        return None if inputs is None else dict(inputs)


def quantisable(model: onnx.ModelProto, keep: Mapping[str, str]) -> list[str]:
    """Nodes that INT8 takes: products with constant weights outside the FP32 islands."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _PRODUCTS and node.name not in keep and node.input[1] in constants
    ]


def int8_errors(
    model: onnx.ModelProto, nodes: Sequence[str], ranges: Mapping[str, Range], samples: Sequence[Mapping[str, Array]]
) -> dict[str, float]:
    """What INT8 in one node alone costs the stage (export/sensitivity.py).

    ranges: of the stage's tensors on good images (export/ranges.py); their largest magnitude sets the input's scale.
    """
    return node_errors(model, nodes, lambda name: with_one_quantised(model, name, ranges), samples)


def to_int8(
    model: onnx.ModelProto,
    keep: Mapping[str, str],
    samples: Sequence[Mapping[str, Array]],
    chosen: Sequence[str],
    stored: Sequence[str] = (),
) -> Fp16Graph:
    """Quantise the `chosen` nodes of a shape-inferred FP32 graph; nodes in `keep` stay FP32, the rest becomes FP16.

    samples: inputs of this stage on good images. stored: nodes that only store their weights as INT8
    (export/storage.py).

    Raises:
        ValueError: nothing was chosen or stored.
    """
    if not chosen and not stored:
        raise ValueError("no node to quantise")
    quantised, inside = model, dict[str, str]()
    if chosen:
        quantised = _quantised(model, samples, chosen)
        inside = _between(quantised, set(chosen))
    quantised, widening = store_int8(quantised, stored)
    return to_fp16(quantised, {**inside, **keep, **widening})


def _quantised(
    model: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], chosen: Sequence[str]
) -> onnx.ModelProto:
    """Q and DQ around the chosen nodes, of which there is at least one: an empty list means all to onnxruntime."""
    model = split_tables(model, chosen)
    with tempfile.TemporaryDirectory(prefix="andon-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        logging.getLogger().addFilter(_no_preprocessing_advice)
        try:
            quantize_static(
                model_input=copy_of(model),
                model_output=str(path),
                calibration_data_reader=_Samples(samples),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_PRODUCTS),
                nodes_to_quantize=list(chosen),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "QuantizeBias": False,
                    "QDQDisableWeightAdjustForInt32Bias": True,  # there is no int32 bias to adjust them for
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                },
            )
        finally:
            logging.getLogger().removeFilter(_no_preprocessing_advice)
        quantised = quantise_tables(onnx.load(str(path)))
    quantised.ir_version = IR_VERSION
    quantised.producer_name, quantised.producer_version = "andon", ""
    return onnx.shape_inference.infer_shapes(quantised, strict_mode=True, data_prop=True)


def _no_preprocessing_advice(record: logging.LogRecord) -> bool:
    """The graph has been simplified and shape-inferred already (export/onnx.py)."""
    return "pre-processing before quantization" not in record.getMessage()


def _between(model: onnx.ModelProto, chosen: set[str]) -> dict[str, str]:
    """Q/DQ, quantised nodes, and the elementwise nodes that only quantised ones feed."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    constants = set(sizes)
    inside: set[str] = set()
    keep = {}
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in constants]
        quantised = node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in chosen
        small = all(sizes.get(name, 0) <= _SMALL for name in node.input)
        if quantised or (node.op_type in BETWEEN and small and data and all(name in inside for name in data)):
            keep[node.name] = "int8" if quantised else "between int8 products"
            inside.update(node.output)
    return keep
