"""What is particular to TensorRT's Python module: its logger, its version, its names for types.

Nothing here is imported with the package; the module tensorrt is passed in by those who have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import EngineError

log = logging.getLogger(__name__)
Trt = ModuleType


def import_tensorrt() -> Trt:
    """The module tensorrt.

    Raises:
        EngineError: it is not installed or does not load.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise EngineError(
            "TensorRT's Python module does not load",
            found=error,
            expected="tensorrt 8.6, 10.x or 11.x, from JetPack",
            next_step="docs/jetson.md, then andon doctor",
        ) from error
    return tensorrt


def version(trt: Trt) -> tuple[int, int]:
    """Major and minor version."""
    major, minor, *_ = (int(part) for part in str(trt.__version__).split(".")[:2])
    return major, minor


def strongly_typed(trt: Trt) -> bool:
    """True if types come from the ONNX alone: TensorRT 10 and newer as we use it.

    Weak typing is deprecated from 10.12 and gone in 11.0:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes.html
    """
    return version(trt) >= (10, 0)


def dtypes(trt: Trt) -> dict[Any, str]:
    """TensorRT's tensor types as numpy names."""
    kinds = trt.DataType
    return {
        kinds.FLOAT: "float32",
        kinds.HALF: "float16",
        kinds.INT32: "int32",
        kinds.INT8: "int8",
        kinds.BOOL: "bool",
        kinds.UINT8: "uint8",
    }


def start(factory: Callable[[Any], Any], logger: Any) -> Any:
    """What `trt.Runtime` or `trt.Builder` makes with this logger.

    Raises:
        EngineError: it makes nothing, which the Python bindings report as a TypeError ("factory function returned
            nullptr"): TensorRT and the driver's CUDA do not fit, or memory is out.
    """
    try:
        return factory(logger)
    except TypeError as error:
        raise EngineError(
            "TensorRT does not start on this GPU",
            found=f"{error}; {logger.take()}",
            expected="a driver for the CUDA of this TensorRT, and free device memory",
            next_step="end what else uses the GPU; andon doctor",
        ) from error


def make_logger(trt: Trt) -> Any:
    """A TensorRT logger that writes to ours and remembers errors: `take()` returns and forgets them."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            levels = trt.ILogger
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self._errors.append(message.strip())
                log.error("TensorRT: %s", message.strip())
            elif severity == levels.WARNING:
                log.warning("TensorRT: %s", message.strip())
            else:
                log.debug("TensorRT: %s", message.strip())

        def take(self) -> str:
            errors, self._errors = self._errors, []
            return "; ".join(errors[-3:]) or "TensorRT gave no message"

    return Logger()
