"""The page of `make bench` says what was measured, and where a promise was not kept."""

from __future__ import annotations

from typing import Any

from measure.bench import LINE, _page, _targets


def engines(speedup: float, overhead: float) -> dict[str, Any]:
    stage = {"p50": 10.0, "p95": 12.0}
    return {
        "method": "hvq",
        "backend": "onnxruntime",
        "variant": "fp32",
        "frames": 5,
        "speedup_over_torch": speedup,
        "executor_overhead": overhead,
        "latency_ms": {"encode": stage, "total": stage},
        "others": 0.25,
    }


def test_a_promise_that_is_not_kept_is_said() -> None:
    delivery = {"verdicts_per_second": 900.0, "latency_ms": {"p95": 4.0}}
    line = {"first_verdict_s": 1.5, "memory_mb": {"peak": 180.0}, "fps": 40.0, "others": 0.25}
    runs = {
        "engines-1": [engines(speedup, 0.06) for speedup in (1.0, 2.4, 2.6)],
        "delivery": [{"delivery": delivery, "others": 0.25}] * 3,
        "line": [line] * 3,
    }
    rows = [row.split(" | ") for row in _page(runs, [*_targets(1), *LINE]).splitlines() if row.startswith("| ")]
    kept = {row[0].removeprefix("| "): (row[2], row[-1].removesuffix(" |").strip()) for row in rows if len(row) == 5}
    assert kept["engines against torch, 1 thread(s)"] == ("2.40x", "yes"), "the median counts"
    assert kept["executor and binding, share of the stages, 1 thread(s)"] == ("6.00 %", "**no**")
    assert kept["delivery, judge to PUBACK"] == ("900/s", "**no**")
    assert kept["first verdict after the start of `andon run`"] == ("1.50 s", "yes")
    assert kept["frames per second of the demo line"] == ("40.0", ""), "nothing was promised"
