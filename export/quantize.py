"""INT8 by explicit Q/DQ, calibrated on good images: what a strongly typed TensorRT network quantises is in the file.

Products with weights (convolutions, linear layers, heads included) are quantised symmetrically, weights per channel,
biases left in float (TensorRT's parser refuses an int32 bias behind a DequantizeLinear). What stays is FP16, except
the elementwise operators between quantised products: they stay FP32 so that nothing stands between Q and DQ.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from .onnx import IR_VERSION
from .precision import MOVES, Fp16Graph, to_fp16
from .walk import Array

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_BETWEEN = MOVES | {"Clip", "Relu", "LeakyRelu", "HardSwish", "Sigmoid", "Mul", "Add", "MaxPool"}


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


def to_int8(model: onnx.ModelProto, keep: Mapping[str, str], samples: Sequence[Mapping[str, Array]]) -> Fp16Graph:
    """Quantise a shape-inferred FP32 graph; nodes in `keep` stay FP32, what is not quantised becomes FP16.

    samples: inputs of this stage on good images.
    """
    chosen = quantisable(model, keep)
    with tempfile.TemporaryDirectory(prefix="andon-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        logging.getLogger().addFilter(_no_preprocessing_advice)
        try:
            quantize_static(
                model_input=_copy(model),
                model_output=str(path),
                calibration_data_reader=_Samples(samples),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_PRODUCTS),
                nodes_to_quantize=chosen,
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
        quantised = onnx.load(str(path))
    quantised.ir_version = IR_VERSION
    quantised.producer_name, quantised.producer_version = "andon", ""
    quantised = onnx.shape_inference.infer_shapes(quantised, strict_mode=True, data_prop=True)
    return to_fp16(quantised, {**_between(quantised, set(chosen)), **keep})


def _no_preprocessing_advice(record: logging.LogRecord) -> bool:
    """The graph has been simplified and shape-inferred already (export/onnx.py)."""
    return "pre-processing before quantization" not in record.getMessage()


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _between(model: onnx.ModelProto, chosen: set[str]) -> dict[str, str]:
    """Q/DQ, quantised nodes, and the elementwise nodes that only quantised ones feed."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inside: set[str] = set()
    keep = {}
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in constants]
        quantised = node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in chosen
        if quantised or (node.op_type in _BETWEEN and data and all(name in inside for name in data)):
            keep[node.name] = "int8" if quantised else "between int8 products"
            inside.update(node.output)
    return keep
