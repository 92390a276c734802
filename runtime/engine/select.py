"""Which backend: by name, or the best this machine can use."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .base import Backend
from .probe import require_tensorrt, tensorrt_missing

BACKENDS = ("onnxruntime", "tensorrt")


def open_backend(
    name: str = "auto", *, threads: int | None = None, cache: Path | None = None, rebuild: bool = False
) -> Backend:
    """Open a backend. The caller closes it.

    Args:
        name: onnxruntime, tensorrt, or auto: tensorrt where it can run, else onnxruntime.
        threads: onnxruntime's threads per operator; None is every CPU this process may use.
        cache: folder of TensorRT plans; None is the default one.
        rebuild: build TensorRT plans again although they are there.

    Raises:
        EngineError: the backend cannot be used here; the message says what is missing and how to get it.
        ConfigError: there is no backend of that name.
    """
    if name == "auto":
        name = "onnxruntime" if tensorrt_missing() else "tensorrt"
    if name == "onnxruntime":
        from .onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads)
    if name == "tensorrt":
        require_tensorrt()
        from .tensorrt import TensorRTBackend

        backend = TensorRTBackend(cache)
        backend.plans.force = rebuild
        return backend
    raise ConfigError(
        f"there is no backend {name!r}",
        found=name,
        expected=", ".join(("auto", *BACKENDS)),
        next_step="choose one of these with --backend",
    )
