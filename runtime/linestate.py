"""What the line is doing, for whoever wants to look: the live page, metrics, health, the closing summary.

The judging thread records a few references per frame. Pictures are drawn only when asked for, on the asker's thread,
and maps are copied only while somebody has asked within the last seconds.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .alarm import Alarm
from .evidence import overlay
from .judgement import Judgement
from .regions import Box
from .source.camera import CameraState
from .types import Frame, Verdict
from .verdict import timestamp

#: Scores per camera that the chart shows.
HISTORY = 300
#: Samples behind a percentile.
WINDOW = 4096
#: Seconds behind the rate that is shown.
RATE = 10.0
#: Maps are copied while somebody has looked within so many seconds.
LOOKING = 10.0


class Timings:
    """The last WINDOW durations of one thing, in milliseconds. Not thread-safe."""

    def __init__(self) -> None:
        self._ring = np.zeros(WINDOW, np.float32)
        self.count = 0

    def add(self, milliseconds: float) -> None:
        """Record one."""
        self._ring[self.count % WINDOW] = milliseconds
        self.count += 1

    def percentiles(self) -> dict[str, float]:
        """p50, p95 and p99 of the samples held; empty without any."""
        if self.count == 0:
            return {}
        values = np.percentile(self._ring[: min(self.count, WINDOW)], (50, 95, 99))
        return {name: round(float(value), 3) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


@dataclass
class _Camera:
    product: str
    source: CameraState
    image: NDArray[Any] | None = None
    map: NDArray[Any] | None = None
    box: Box = (0, 0, 0, 0)
    pixel: float | None = None
    pictured: Verdict | None = None
    verdict: Verdict | None = None
    detail: str = ""
    alarms: tuple[Alarm, ...] = ()
    thresholds: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    history: deque[tuple[str, float | None, float | None, str]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    looked: float = -LOOKING


class LineState:
    """Thread-safe. Written by the judging thread and the camera threads, read by anyone.

    Attributes:
        on_verdict: called on the judging thread after each verdict; must be quick and must not raise (counters).
    """

    def __init__(self, products: Mapping[str, str]):
        """products: camera -> product it expects."""
        self._lock = threading.Lock()
        self._cameras = {name: _Camera(product, CameraState(name)) for name, product in products.items()}
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._timings: dict[str, Timings] = {}
        self._started = timestamp()
        self._began = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._frames = 0
        self._recent: deque[float] = deque()
        self._facts: dict[str, Any] = {"ready": False}
        self._sections: dict[str, Callable[[], Any]] = {}
        self.on_verdict: list[Callable[[Verdict], None]] = []

    # -- written by the line -----------------------------------------------------------------------------------------

    def fact(self, **facts: Any) -> None:
        """State something about the whole line: ready, bundle, method, backend, ..."""
        with self._lock:
            self._facts.update(facts)

    def section(self, name: str, ask: Callable[[], Any]) -> None:
        """Let snapshots carry what `ask` returns (outbox, slots, memory); it is called on the reader's thread."""
        with self._lock:
            self._sections[name] = ask

    def camera(self, state: CameraState) -> None:
        """A camera's source changed."""
        with self._lock:
            self._cameras[state.camera].source = state

    def expects(self, camera: str, product: str) -> None:
        """The product that a camera expects has changed."""
        with self._lock:
            self._cameras[camera].product = product

    def thresholds(
        self,
        camera: str,
        in_force: Mapping[str, float | None],
        overrides: Mapping[str, float],
        configured: Mapping[str, float],
    ) -> None:
        """The thresholds in force at a camera, by product, and those that commands and the configuration have set."""
        said = {"thresholds": in_force, "threshold_overrides": overrides, "configured_thresholds": configured}
        with self._lock:
            self._cameras[camera].thresholds = {name: dict(each) for name, each in said.items()}

    def alarms(self, camera: str, alarms: tuple[Alarm, ...]) -> None:
        """A camera's alarms changed."""
        with self._lock:
            self._cameras[camera].alarms = alarms

    def record(self, judgement: Judgement, frame: Frame | None, deliver_ms: float) -> None:
        """One verdict, with the frame it rests on, if there is one; deliver_ms: time it took to hand it over."""
        verdict, now = judgement.verdict, time.monotonic()
        with self._lock:
            camera = self._cameras[verdict.camera]
            camera.verdict, camera.detail = verdict, judgement.detail
            camera.labels[verdict.label] += 1
            camera.history.append((timestamp(verdict.ts_judged), verdict.score, verdict.threshold, verdict.label))
            self._counts[verdict.product or "", verdict.label, verdict.reason] += 1
            if frame is not None:
                self._frames += 1
                if self._first is None:
                    self._first = now  # the rate counts from it
                else:
                    self._recent.append(now)
                while self._recent and self._recent[0] < now - RATE:
                    self._recent.popleft()
                self._last = now
                camera.image, camera.box, camera.map, camera.pictured = frame.image, judgement.box, None, verdict
                if judgement.scored is not None:
                    camera.pixel = judgement.scored.pixel_threshold
                    if judgement.scored.map is not None and now - camera.looked < LOOKING:
                        camera.map = judgement.scored.map.copy()
                for stage, value in (*verdict.latency_ms.items(), ("deliver", deliver_ms)):
                    self._timings.setdefault(stage, Timings()).add(value)
        for observer in self.on_verdict:
            observer(verdict)

    # -- read by anyone ----------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything but pictures, as plain JSON values. fps: frames judged a second over the last RATE seconds."""
        with self._lock:
            sections = dict(self._sections)
            now = time.monotonic()
            document = {
                **self._facts,
                "started": self._started,
                "uptime_s": round(now - self._began, 1),
                "frames": self._frames,
                "fps": self._fps(now),
                "latency_ms": {stage: timings.percentiles() for stage, timings in self._timings.items()},
                "cameras": {name: self._camera_snapshot(camera) for name, camera in self._cameras.items()},
            }
        document.update({name: ask() for name, ask in sections.items()})
        return document

    def counts(self) -> dict[str, dict[str, int]]:
        """Product -> label -> verdicts; product '' where it was not known."""
        with self._lock:
            table: dict[str, dict[str, int]] = {}
            for (product, label, _), number in sorted(self._counts.items()):
                row = table.setdefault(product, {})
                row[label] = row.get(label, 0) + number
            return table

    def reasons(self) -> dict[str, int]:
        """Reason of UNKNOWN -> verdicts."""
        with self._lock:
            reasons: Counter[str] = Counter()
            for (_, label, reason), number in self._counts.items():
                if label == "UNKNOWN":
                    reasons[reason] += number
            return dict(reasons)

    def status(self, camera: str) -> dict[str, Any]:
        """What a camera's status message says about it."""
        with self._lock:
            held = self._cameras[camera]
            names = ("method", "bundle", "backend", "variant", "ready")
            facts = {name: self._facts[name] for name in names if name in self._facts}
            return {
                **facts,
                **held.thresholds,
                "product": held.product,
                "source": held.source.state,
                "detail": held.source.detail,
            }

    @property
    def first_judged(self) -> float | None:
        """When the first frame was judged, in seconds of time.monotonic()."""
        with self._lock:
            return self._first

    @property
    def pace(self) -> float:
        """Frames judged a second from the first to the last of the run; 0 where that says nothing."""
        with self._lock:
            if self._first is None or self._last is None or self._last == self._first:
                return 0.0
            return round((self._frames - 1) / (self._last - self._first), 2)

    def picture(self, camera: str, *, width: int = 480, heat: bool = True, quality: int = 80) -> bytes | None:
        """The camera's last judged picture as JPEG, at most `width` pixels wide, with its heat map if there is one.

        The snapshot says whether it is the last verdict's. None before the first frame. The first look shows no heat
        map: maps are kept from then on.
        """
        with self._lock:
            held = self._cameras[camera]
            held.looked = time.monotonic()
            image, anomaly_map, box, pixel = held.image, held.map, held.box, held.pixel
        if image is None:
            return None
        anomaly_map = anomaly_map if heat else None
        shown = _fit(image.shape, box, width)
        if anomaly_map is not None and (shown[3] < anomaly_map.shape[0] or shown[2] < anomaly_map.shape[1]):
            # Drawn that small a map would lose cells, and with them a hot one.
            image, anomaly_map = overlay(image, anomaly_map, box, pixel), None
        image = _shrink(image, width)
        if anomaly_map is not None:  # drawing costs by the pixel: those that are shown, not those of the camera
            image = overlay(image, anomaly_map, shown, pixel)
        encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        return bytes(encoded[1].tobytes())

    def _fps(self, now: float) -> float:
        elapsed = 0.0 if self._first is None else min(RATE, now - self._first)
        return round(sum(at > now - elapsed for at in self._recent) / elapsed, 2) if elapsed > 0 else 0.0

    @staticmethod
    def _camera_snapshot(camera: _Camera) -> dict[str, Any]:
        verdict = camera.verdict
        return {
            "product": camera.product,
            "thresholds": camera.thresholds.get("thresholds", {}),
            "source": asdict(camera.source),
            "verdict": None
            if verdict is None
            else {
                "label": verdict.label,
                "reason": verdict.reason,
                "detail": camera.detail,
                "score": verdict.score,
                "threshold": verdict.threshold,
                "product": verdict.product,
                "part_id": verdict.part_id,
                "seq": verdict.seq,
                "ts": timestamp(verdict.ts_judged),
            },
            # The picture that is shown need not be of the verdict: an image that cannot be read leaves the one before.
            "picture": None
            if camera.pictured is None
            else {"current": camera.pictured is verdict, "part_id": camera.pictured.part_id},
            "labels": dict(camera.labels),
            "alarms": [asdict(alarm) for alarm in camera.alarms if alarm.active],
            "history": list(camera.history),
        }


def _size(shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """Height and width of a picture of this shape that is at most `width` pixels wide, in its proportions."""
    rows, columns = shape[:2]
    return (rows, columns) if columns <= width else (max(1, round(rows * width / columns)), width)


def _shrink(image: NDArray[Any], width: int) -> NDArray[Any]:
    """The picture uint8 [h, w, 3] at most `width` pixels wide."""
    size = _size(image.shape, width)
    return image if size == image.shape[:2] else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def _fit(shape: tuple[int, ...], box: Box, width: int) -> Box:
    """Where a box of a picture of this shape lies once it is shrunk: whole pixels outwards, so never empty."""
    (rows, columns), (high, wide) = shape[:2], _size(shape, width)
    x, y = box[0] * wide // columns, box[1] * high // rows
    right, bottom = -(-(box[0] + box[2]) * wide // columns), -(-(box[1] + box[3]) * high // rows)
    return (x, y, right - x, bottom - y)
