"""What a run says at its end, as one JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .process import age_at, resident_memory

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
        "first_verdict_s": age_at(app.state.first_judged),
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
        "memory_mb": resident_memory(),
        "uptime_s": snapshot["uptime_s"],
    }
