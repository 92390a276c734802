"""What a report says about where and when it was made, so that its figures can be held against others; no host name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from .. import __version__
from .verdict import timestamp

_CPUINFO, _BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")


def hardware() -> str:
    """The board or processor, how many CPUs may be used, and the system, in one line."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_model() or platform.machine()}, {cpus} CPUs, {platform.system()} {platform.machine()}"


def _model() -> str:
    """Name of the board (a Jetson's device tree has it), else of the processor; empty where neither is told."""
    try:
        if _BOARD.is_file():
            return _BOARD.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def made_here() -> dict[str, str]:
    """The facts that every report ends with: machine, version and time (UTC)."""
    return {"machine": hardware(), "made": f"{timestamp()} with Andon {__version__}"}
