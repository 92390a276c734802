"""What the TensorRT backend needs on this machine and what of it is missing; asks nothing that could crash.

The driver is asked first and through ctypes: without one, TensorRT's own calls may abort the process (STACK.md).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import EngineError

_JETSON = "docs/jetson.md"


@dataclass(frozen=True)
class Need:
    """One thing the TensorRT backend needs. found: what is there, empty if nothing; remedy: how to get it."""

    name: str
    found: str
    why: str
    remedy: str

    @property
    def met(self) -> bool:
        return bool(self.found)


def cuda_devices() -> tuple[int, str]:
    """Number of CUDA devices, and why there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return 0, f"no NVIDIA driver ({error})"
    code = driver.cuInit(0)
    if code != 0:
        return 0, f"the NVIDIA driver does not start (cuInit: error {code})"
    count = ctypes.c_int(0)
    code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code != 0 or count.value == 0:
        return 0, f"the NVIDIA driver sees no GPU (cuDeviceGetCount: error {code}, {count.value} devices)"
    return count.value, ""


def _module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def tensorrt_needs() -> tuple[Need, ...]:
    """Driver, TensorRT and CUDA bindings, in the order in which they should be seen to."""
    devices, why = cuda_devices()
    bindings = next((m for m in ("pycuda", "cuda.bindings", "cuda.cuda") if _module(m)), "")
    return (
        Need(
            "driver",
            f"{devices} CUDA device(s)" if devices else "",
            why,
            f"use a Jetson or a machine with an NVIDIA GPU; {_JETSON}",
        ),
        Need(
            "tensorrt",
            "Python module" if _module("tensorrt") else "",
            "the Python module tensorrt is not installed",
            f"it comes with JetPack: make the environment with --system-site-packages, see {_JETSON}",
        ),
        Need(
            "cuda bindings",
            bindings,
            "neither pycuda nor cuda-python is installed",
            f"pip install pycuda (or cuda-python), see {_JETSON}",
        ),
    )


def tensorrt_missing() -> str:
    """Why the TensorRT backend cannot run here; empty if it can."""
    return "; ".join(need.why for need in tensorrt_needs() if not need.met)


def require_tensorrt() -> None:
    """Refuse, in one screen, if the TensorRT backend cannot run here.

    Raises:
        EngineError: naming everything that is missing and the remedy of the first.
    """
    missing = [need for need in tensorrt_needs() if not need.met]
    if missing:
        raise EngineError(
            "TensorRT cannot be used on this machine",
            found="; ".join(need.why for need in missing),
            expected="an NVIDIA driver with a GPU, tensorrt, and pycuda or cuda-python",
            next_step=f"{missing[0].remedy}; or go on with --backend onnxruntime; andon doctor shows the whole picture",
        )
