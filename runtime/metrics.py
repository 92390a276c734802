"""Prometheus metrics of a line: counters and histograms fed per verdict, everything else read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .. import __version__
from .types import Verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds; from a small stage on a Jetson to a slow model on a CPU.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: UNKNOWN for these reasons rests on no frame.
_NO_FRAME = ("camera_stale", "no_frame")


class Metrics:
    """The registry of one line; :meth:`observe` is made for LineState.on_verdict.

    Args:
        snapshot: LineState.snapshot, with sections delivery, slots and memory where there are such.
    """

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]):
        self._registry = CollectorRegistry()
        self._frames = Counter("andon_frames", "Frames judged", ["camera", "result"], registry=self._registry)
        self._verdicts = Counter("andon_verdicts", "Verdicts", ["camera", "label"], registry=self._registry)
        self._unknown = Counter(
            "andon_unknown_verdicts", "UNKNOWN verdicts by reason", ["camera", "reason"], registry=self._registry
        )
        self._stages = Histogram(
            "andon_stage_duration_seconds", "Time per stage", ["stage"], buckets=BUCKETS, registry=self._registry
        )
        self._registry.register(_State(snapshot))

    def observe(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self._verdicts.labels(verdict.camera, verdict.label).inc()
        if verdict.label == "UNKNOWN":
            self._unknown.labels(verdict.camera, verdict.reason).inc()
        if verdict.reason not in _NO_FRAME:
            result = "not_judged" if verdict.label == "UNKNOWN" else "judged"
            self._frames.labels(verdict.camera, result).inc()
        for stage, milliseconds in verdict.latency_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def page(self) -> bytes:
        """The text exposition of everything."""
        return generate_latest(self._registry)


class _State(Collector):
    """Metrics that are read off the line's state when Prometheus asks."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]):
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: names are checked at scrape time, the line need not be there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        line = self._snapshot()
        facts = {name: str(line.get(name, "")) for name in ("method", "bundle", "backend", "variant")}
        build = GaugeMetricFamily("andon_build_info", "What runs", labels=["version", *facts])
        build.add_metric([__version__, *facts.values()], 1)
        yield build
        yield _gauge("andon_engines_open", "1 while engines are open; /readyz asks for more", bool(line.get("ready")))
        yield from _cameras(line)
        yield from _slots(line.get("slots", {}))
        if (delivery := line.get("delivery")) is not None:
            yield from _delivery(delivery)
        if (memory := line.get("memory")) is not None:
            yield from _memory(memory, line)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _cameras(line: Mapping[str, Any]) -> Iterator[Metric]:
    # A source that has come to its end is no fault, here as in /readyz: an alert on it would never end.
    up_text = "1 while the camera delivers, and when its source has come to its end"
    up = GaugeMetricFamily("andon_camera_up", up_text, labels=["camera"])
    restarts = CounterMetricFamily("andon_camera_restarts", "Times the source was rebuilt", labels=["camera"])
    alarm = GaugeMetricFamily("andon_alarm_active", "1 for every alarm not cleared", labels=["camera", "kind", "state"])
    score = GaugeMetricFamily("andon_score", "Score of the last verdict", labels=["camera"])
    threshold = GaugeMetricFamily("andon_threshold", "Threshold of the last verdict", labels=["camera"])
    for name, camera in line.get("cameras", {}).items():
        up.add_metric([name], camera["source"]["state"] in ("live", "ended"))
        restarts.add_metric([name], camera["source"]["restarts"])
        for each in camera["alarms"]:
            alarm.add_metric([name, each["kind"], each["state"]], 1)
        verdict = camera["verdict"] or {}
        if verdict.get("score") is not None:
            score.add_metric([name], verdict["score"])
        if verdict.get("threshold") is not None:
            threshold.add_metric([name], verdict["threshold"])
    yield from (up, restarts, alarm, score, threshold)


def _slots(slots: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    dropped = CounterMetricFamily("andon_frames_dropped", "Frames not judged", labels=["camera", "reason"])
    for name, counts in slots.items():
        dropped.add_metric([name, "newer_frame"], counts["dropped"])
        dropped.add_metric([name, "no_trigger"], counts["untriggered"])
    yield dropped


def _delivery(delivery: Mapping[str, Any]) -> Iterator[Metric]:
    outbox = delivery["outbox"]
    yield _gauge("andon_mqtt_connected", "1 while every camera's connection is up", delivery["connected"])
    yield _gauge("andon_mqtt_spool_messages", "Messages the broker has not acknowledged", outbox["messages"])
    yield _gauge("andon_mqtt_spool_bytes", "Their payload bytes", outbox["bytes"])
    yield _gauge("andon_mqtt_spool_oldest_seconds", "Age of the oldest", outbox["oldest_age_s"])
    yield _gauge("andon_mqtt_spool_degraded", "1 while the disk refuses", outbox["degraded"] is not None)
    yield CounterMetricFamily(
        "andon_mqtt_spool_dropped",
        "Lost to the outbox's caps, damaged, or too large for the broker",
        value=outbox["dropped"],
    )
    yield CounterMetricFamily(
        "andon_mqtt_too_large", "Not sent, larger than the broker takes; pictures too", value=delivery["too_large"]
    )
    yield CounterMetricFamily(
        "andon_mqtt_pictures_skipped",
        "Not sent, the connection is slower than they come or was lost",
        value=delivery["pictures_skipped"],
    )
    yield CounterMetricFamily("andon_mqtt_acknowledged", "Taken by the broker", value=delivery["acknowledged"])


def _memory(memory: Mapping[str, Any], line: Mapping[str, Any]) -> Iterator[Metric]:
    rows = GaugeMetricFamily("andon_memory_rows", "Rows of the episodic memory", labels=["product"])
    for product, count in memory.get("rows", {}).items():
        rows.add_metric([product], count)
    yield rows
    drifting = set(memory.get("drift", ()))
    drift = GaugeMetricFamily("andon_drift_warning", "1 while scores have drifted", labels=["camera"])
    for name in line.get("cameras", {}):
        drift.add_metric([name], any(each.split("/", 1)[0] == name for each in drifting))
    yield drift
    scores = memory.get("drift_score", {})
    score = GaugeMetricFamily("andon_drift_score", "Distance of recent scores from the first ones", labels=["monitor"])
    for name, value in scores.items():
        score.add_metric([name], value)
    yield score
