"""This process: its age and memory, from /proc, and its allocator."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

_M_ARENA_MAX = -8  # malloc.h of glibc


def age_at(moment: float | None) -> float | None:
    """How old this process was at that time of time.monotonic(), in seconds: interpreter and imports included."""
    if moment is None:
        return None
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(age - (time.monotonic() - moment), 2)


def resident_memory() -> dict[str, float]:
    """Resident memory now and at its peak, in MB.

    Not getrusage's ru_maxrss: a child inherits its parent's at exec (the larger of both), and a service started by a
    large process would report that one's memory as its own.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {"resident": status["VmRSS"], "peak": status["VmHWM"]}  # "  1234 kB", proc(5)
    return {name: round(int(size.split()[0]) * 1024 / 1e6, 1) for name, size in sizes.items()}


def limit_arenas(count: int = 2) -> bool:
    """Let glibc's malloc keep `count` arenas instead of up to eight a CPU; call it before threads are started.

    A line has some thirty threads. Each gets an arena of its own as long as there are any, and pictures freed on
    another thread than they came from leave holes in all of them: resident memory then creeps up for hours.
    MALLOC_ARENA_MAX in the environment has precedence.

    Returns:
        Whether the allocator took it: False with another C library, or where the environment has a number.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count))
    except (AttributeError, OSError):
        return False
