"""What the TensorRT backend needs on this machine and what of it is missing; asks nothing that could crash.

The driver is asked first and through ctypes: without one, TensorRT's own calls may abort the process (STACK.md).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..errors import EngineError

_JETSON = "docs/jetson.md"
_L4T_RELEASE = Path("/etc/nv_tegra_release")
#: What is looked for, and the part of it that loads its libraries
_TENSORRT = {"tensorrt": "tensorrt"}
_BINDINGS = {"pycuda": "pycuda.driver", "cuda.bindings": "cuda.bindings.driver", "cuda.cuda": "cuda.cuda"}


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


def l4t_release(path: Path = _L4T_RELEASE) -> str:
    """Release of Jetson Linux, "36.4.3"; empty where this is not a Jetson."""
    if not path.is_file():
        return ""
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", path.read_text(errors="replace"))
    return f"{found[1]}.{found[2]}" if found else "unknown"


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


def _fault(module: str) -> str:
    """Why a module that is installed does not load; empty if it does."""
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a missing library shows as any of these
        return f"{module} does not load: {error}"
    return ""


def tensorrt_needs() -> tuple[Need, ...]:
    """Driver, TensorRT and CUDA bindings, in the order in which they should be seen to.

    Where there is a GPU, the modules are loaded: what is installed may still miss its libraries.
    """
    devices, why = cuda_devices()

    def faults(modules: Mapping[str, str]) -> dict[str, str]:
        return {name: _fault(part) if devices else "" for name, part in modules.items() if _module(name)}

    trt, cuda = faults(_TENSORRT), faults(_BINDINGS)
    return (
        Need(
            "driver",
            f"{devices} CUDA device(s)" if devices else "",
            why,
            f"use a Jetson or a machine with an NVIDIA GPU; {_JETSON}",
        ),
        Need(
            "tensorrt",
            "Python module" if trt and not any(trt.values()) else "",
            "; ".join(trt.values()) or "the Python module tensorrt is not installed",
            f"it comes with JetPack: make the environment with --system-site-packages, see {_JETSON}"
            if not trt
            else f"give it its own version's libraries: nvidia-jetpack; in a container --runtime nvidia; see {_JETSON}",
        ),
        Need(
            "cuda bindings",
            next((name for name, fault in cuda.items() if not fault), ""),
            "; ".join(cuda.values()) or "neither pycuda nor cuda-python is installed",
            f"pip install pycuda (or cuda-python) for the CUDA of this machine, see {_JETSON}",
        ),
    )


def tensorrt_missing() -> str:
    """Why the TensorRT backend cannot run here; empty if it can."""
    return "; ".join(need.why for need in tensorrt_needs() if not need.met)


def require_tensorrt(instead: str = "go on with --backend onnxruntime") -> None:
    """Refuse, in one screen, if the TensorRT backend cannot run here.

    instead: what else the caller's user can do.

    Raises:
        EngineError: naming everything that is missing and the remedy of the first.
    """
    missing = [need for need in tensorrt_needs() if not need.met]
    if missing:
        raise EngineError(
            "TensorRT cannot be used on this machine",
            found="; ".join(need.why for need in missing),
            expected="an NVIDIA driver with a GPU, tensorrt, and pycuda or cuda-python",
            next_step=f"{missing[0].remedy}; or {instead}; andon doctor shows the whole picture",
        )
