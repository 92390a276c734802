"""The page of a soak run."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import machine, software, table
from .trend import trend

#: Rows of the course table.
ROWS = 12
#: The slope is shown once more for what comes after this share of the run, when the outage is over as well.
LATE = 0.6


def page(measured: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    minutes, outage = measured["minutes"], measured["outage"]
    parts = [
        "# Soak",
        f"Four cameras at 5 frames per second (test picture, folder, data set through a pipeline, RTSP) for "
        f"{minutes:g} minutes, a bundle of `{measured['method']}` on onnxruntime with {measured['threads']} thread(s), "
        f"a mosquitto that is stopped for {outage:g} s in the middle, a consumer that dedupes by id. Repeat it with",
        f"    make soak MINUTES={minutes:g}",
        f"{machine()}; {software()}. {_others(measured)}",
        "## Does it grow, does it slow down",
        table(["", "found", "how"], _growth(measured)),
        "## Is anything lost",
        "Judged is the count of the line's judging thread, arrived the consumer's, by different ids.",
        table(
            ["camera", "judged", "arrived", "lost", "twice", "replayed", "out of order", *_LABELS], _cameras(measured)
        ),
        _dropped(measured),
        "## Course",
        "Latencies of the verdicts of that stretch; `through` is capture to consumer, replayed ones left out.",
        table(_COURSE, _course(measured)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_ACCOUNT = ["camera", "judged", "arrived", "lost", "twice", "replayed", "out of order"]
_LABELS = ["OK", "NG", "UNKNOWN"]
_COURSE = ["minute", "MB", "descriptors", "threads", "outbox", "verdicts", "judging p50, p99 ms", "through p50, p99 ms"]


def _after(measured: dict[str, Any], share: float) -> list[dict[str, Any]]:
    """Samples after that share of the run."""
    samples: list[dict[str, Any]] = measured["samples"]
    return [sample for sample in samples if sample["at"] >= share * measured["minutes"] * 60]


def _others(measured: dict[str, Any]) -> str:
    first, last = measured["samples"][0], measured["samples"][-1]
    available = (last["at"] - first["at"]) * measured["cpus"]
    own = (last["cpu"] - first["cpu"]) / available
    rest = (last["system"] - first["system"]) / available - own
    shared = "The machine was shared with other jobs: they" if rest > 0.1 else "Everything else on the machine"
    return (
        f"The line took {own:.0%} of the machine's CPU time. {shared} took {rest:.0%} (broker, consumer and RTSP "
        "server included)."
    )


def _growth(measured: dict[str, Any]) -> list[list[str]]:
    warm = measured["warm_up"]
    steady = _after(measured, warm)
    rss = [sample["rss"] for sample in steady]
    rows = []
    for part, when in (
        (steady, f"after a warm-up of {warm:.0%}"),
        (_after(measured, LATE), f"in the last {1 - LATE:.0%}"),
    ):
        memory = trend([sample["at"] / 3600 for sample in part], [sample["rss"] for sample in part])
        how = f"least squares, {len(part)} samples; standard error widened for autocorrelation"
        rows.append([f"slope of resident memory {when}", f"{memory.slope:+.1f} ± {memory.error:.1f} MB/h", how])
    rows.append(["resident memory", f"{min(rss):.1f} to {max(rss):.1f} MB", "lowest and highest after the warm-up"])
    for name in ("descriptors", "threads"):
        first, last = (np.median([s[name] for s in part]) for part in (steady[:12], steady[-12:]))
        top = max(sample[name] for sample in steady)
        rows.append([name, f"{first:g} → {last:g}, at most {top:g}", "median of first and last 12 samples after it"])
    for name, what in (("judging", "judging"), ("through", "capture to consumer")):
        for quantile in ("p50", "p99"):
            ends = [measured["quarters"][k].get(f"{name}_{quantile}") for k in (0, 3)]
            found = " → ".join("-" if value is None else f"{value:.1f}" for value in ends) + " ms"
            rows.append([f"{what}, {quantile}", found, "first → last quarter of the run"])
    rows.append(
        [
            "outbox",
            f"at most {max(s['outbox'] for s in measured['samples']):.0f} messages",
            f"empty at the end: {measured['summary']['delivery']['outbox']['messages']} left",
        ]
    )
    return rows


def _cameras(measured: dict[str, Any]) -> list[list[str]]:
    names = ("judged", "arrived", "lost", "duplicates", "replayed", "out_of_order")
    rows = []
    for camera, row in measured["cameras"].items():
        labels = [str(row["labels"].get(label, 0)) for label in _LABELS]
        rows.append([camera, *(str(row[name]) for name in names), *labels])
    return rows


def _dropped(measured: dict[str, Any]) -> str:
    dropped = ", ".join(f"{name} {row['dropped']}" for name, row in measured["cameras"].items())
    restarts = sum(row["restarts"] for row in measured["cameras"].values())
    return (
        f"Frames replaced by newer ones before they were judged: {dropped}; where the frame was a named part, that is "
        f"an UNKNOWN verdict (overload), counted above. Camera restarts: {restarts}."
    )


def _course(measured: dict[str, Any]) -> list[list[str]]:
    samples = measured["samples"]
    rows = []
    for k in np.linspace(0, len(samples) - 1, min(ROWS + 1, len(samples))).round().astype(int):
        sample = samples[k]
        pairs = [
            f"{sample['latency'][f'{name}_p50']:.1f}, {sample['latency'][f'{name}_p99']:.1f}"
            if f"{name}_p50" in sample["latency"]
            else "-"
            for name in ("judging", "through")
        ]
        counts = [f"{sample[name]:.0f}" for name in ("descriptors", "threads", "outbox", "verdicts")]
        rows.append([f"{sample['at'] / 60:.1f}", f"{sample['rss']:.1f}", *counts, *pairs])
    return rows
