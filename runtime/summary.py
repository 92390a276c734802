"""What a run says at its end, as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import AndonError, quoted
from .process import age_at, resident_memory

if TYPE_CHECKING:
    from .app import LineApp

#: What mends each reason of UNKNOWN; see types.UNKNOWN_REASONS.
_NEXT = {
    "engine_error": "andon verify --bundle {bundle}",
    "not_a_number": "andon verify --bundle {bundle}",
    "no_threshold": "andon calibrate --bundle {bundle} --data GOOD-IMAGES",
    "wrong_product": "andon check --config {config}, and name each camera's product",
    "memory_unusable": "send the command memory with action reset (docs/memory.md)",
    "deadline_missed": "andon bench --bundle {bundle}, then raise deadline_ms or choose a faster program",
    "overload": "andon bench --bundle {bundle}, then lower max_fps or set drop: block",
    "camera_stale": "andon check --config {config}",
    "no_frame": "andon check --config {config}",
    "bad_frame": "look at the images that the log names",
}


def refusal(app: LineApp) -> AndonError | None:
    """Why this run cannot count as done: a source failed, or there is no decision at all. Silence never means OK."""
    for name, camera in app.cameras.items():
        if camera.state.state == "failed":
            step = f"andon check --config {quoted(app.options.config)}"
            return AndonError(f"camera {name}: its source failed", found=camera.state.detail, next_step=step)
    labels = [label for row in app.state.counts().values() for label in row.items()]
    total = sum(count for _, count in labels)
    if any(label in ("OK", "NG") for label, _ in labels):
        return None
    expected = "verdicts OK or NG"
    if total:
        reasons = app.state.reasons()
        reason = max(reasons, key=lambda reason: reasons[reason])
        bundle, config = (quoted(path) for path in (app.bundle_path, app.options.config))
        step = _NEXT[reason].format(bundle=bundle, config=config)
        if reason == "wrong_product" and app.overrides.products:  # then the configuration's product changes nothing
            commanded = ", ".join(f"{product} of {name}" for name, product in app.overrides.products.items())
            step = f"send the command product, which stands before the configuration (now by command: {commanded})"
        what = f"not one of {total} verdicts is OK or NG"
        return AndonError(what, found=counted(reasons), expected=expected, next_step=step)
    if app.options.until_end and all(camera.finished for camera in app.cameras.values()):
        step = f"andon check --config {quoted(app.options.config)}"
        return AndonError("every source ended without a frame", found="0 verdicts", expected=expected, next_step=step)
    return None


def counted(reasons: Mapping[str, int]) -> str:
    """Reasons of UNKNOWN with their counts, most frequent first, in one line."""
    rows = sorted(reasons.items(), key=lambda row: -row[1])
    return "UNKNOWN " + ", ".join(f"{reason} {count}" for reason, count in rows)


def closing_summary(app: LineApp) -> dict[str, Any]:
    """The closing summary: what was judged, how fast, what was lost, what it took."""
    snapshot = app.state.snapshot()
    error = refusal(app)
    return {
        "ok": error is None,
        **(
            {"error": error.what, "found": error.found, "expected": error.expected, "next": error.next_step}
            if error
            else {}
        ),
        "frames": snapshot["frames"],
        "fps": app.state.pace,
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
                "thresholds": snapshot["cameras"][name]["thresholds"],
            }
            for name, camera in app.cameras.items()
        },
        "slots": snapshot["slots"],
        "delivery": snapshot["delivery"],
        "evidence": snapshot.get("evidence"),
        "thresholds": snapshot.get("thresholds", {}),
        "overrides": snapshot["overrides"],
        "configured": snapshot.get("configured"),
        "bundle": snapshot.get("bundle"),
        "backend": snapshot.get("backend"),
        "variant": snapshot.get("variant"),
        "memory_mb": resident_memory(),
        "uptime_s": snapshot["uptime_s"],
    }
