"""What this process is: its age and its memory, from /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path


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
