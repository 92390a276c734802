"""What a run says at its end, as one JSON object."""

from __future__ import annotations

import resource
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
        "verdicts": app.state.counts(),
        "unknown": app.state.reasons(),
        "latency_ms": snapshot["latency_ms"],
        "cameras": {
            name: {"state": camera.state.state, "restarts": camera.state.restarts, "skipped": camera.state.skipped}
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


def _peak_memory() -> dict[str, float]:
    """Resident memory now and at its peak, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": round(pages * resource.getpagesize() / 1e6, 1),
        "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
