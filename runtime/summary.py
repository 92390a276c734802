"""What a run says at its end, as one JSON object."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import LineApp


def closing_summary(app: LineApp) -> dict[str, Any]:
    """The closing summary: what was judged, how fast, what was lost, what it took."""
    snapshot = app.state.snapshot()
    failed = [name for name, camera in app.cameras.items() if camera.state.state == "failed"]
    return {
        "ok": not failed,
        "frames": snapshot["frames"],
        "fps": snapshot["fps"],
        "first_verdict_s": _age_at(app.state.first_judged),
        "verdicts": app.state.counts(),
        "unknown": app.state.reasons(),
        "latency_ms": snapshot["latency_ms"],
        "cameras": {
            name: {
                "state": camera.state.state,
                "restarts": camera.state.restarts,
                "skipped": camera.state.skipped,
                "verdicts": sum(snapshot["cameras"][name]["labels"].values()),
            }
            for name, camera in app.cameras.items()
        },
        "slots": snapshot["slots"],
        "delivery": snapshot["delivery"],
        "thresholds": snapshot.get("thresholds", {}),
        "bundle": snapshot.get("bundle"),
        "backend": snapshot.get("backend"),
        "variant": snapshot.get("variant"),
        "memory_mb": _peak_memory(),
        "uptime_s": snapshot["uptime_s"],
    }


def _age_at(moment: float | None) -> float | None:
    """How old this process was at that time of time.monotonic(), in seconds: interpreter and imports included."""
    if moment is None:
        return None
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(age - (time.monotonic() - moment), 2)


def _peak_memory() -> dict[str, float]:
    """Resident memory now and at its peak, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": round(pages * resource.getpagesize() / 1e6, 1),
        "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
