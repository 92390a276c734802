"""What everybody else sees of a line: its state, its pictures, its evidence, its rate."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import paho.mqtt.client as paho
import pytest
from andon.runtime import evidence
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.linestate import LineState
from andon.runtime.types import Frame, Verdict
from paho.mqtt.enums import CallbackAPIVersion

from .connection import SCHEMAS, validate
from .running import LIVE, RunningLine


def test_evidence_can_be_published(
    start_line: Callable[..., RunningLine], broker: EmbeddedBroker, consumer: Any
) -> None:
    pictures: dict[str, bytes] = {}
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.on_message = lambda _client, _data, message: pictures.update({message.topic: message.payload})
    client.connect("127.0.0.1", broker.port)
    client.subscribe("andon/v1/+/+/+/+/evidence/+")
    client.loop_start()
    bright = {"cam0": {"source": {**LIVE, "pattern": "white"}, "product": "mono"}}
    line = start_line(bright, evidence={"publish": True})
    consumer.until(lambda: len(pictures) >= 2)
    topic, jpeg = next(iter(pictures.items()))
    assert topic.startswith(f"{line.app.config.topic}/cam0/evidence/")
    assert topic.rsplit("/", 1)[1] in {verdict["id"] for verdict in consumer.of("verdict")}
    assert jpeg[:2] == b"\xff\xd8"
    client.loop_stop()


def test_the_state_can_be_looked_at(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    line = start_line({"cam0": {"source": {**LIVE, "pattern": "ball"}, "product": "mono"}})
    consumer.wait_for("verdict", 2)
    state = line.app.state
    assert state.picture("cam0") is not None
    line.app._publish_metrics()
    consumer.until(lambda: bool(consumer.of("metrics")))
    metrics = consumer.of("metrics")[0]
    validate(metrics)
    described = json.loads((SCHEMAS / "metrics.json").read_text())["properties"]
    assert metrics["frames"] > 0 and set(metrics) <= described.keys()
    seen = len(consumer.of("verdict"))
    consumer.wait_for("verdict", seen + 2)
    shown = state.picture("cam0", width=32)
    assert shown is not None
    assert cv2.imdecode(np.frombuffer(shown, np.uint8), cv2.IMREAD_COLOR).shape == (24, 32, 3)
    snapshot = json.loads(json.dumps(state.snapshot()))
    assert snapshot["ready"] is True and snapshot["cameras"]["cam0"]["verdict"]["threshold"] == 0.5
    assert snapshot["delivery"]["connected"] and snapshot["slots"]["cam0"]["taken"] > 0
    assert len(snapshot["cameras"]["cam0"]["history"]) >= 2


def test_the_rate_is_that_of_now_and_the_summarys_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("andon.runtime.linestate.time", SimpleNamespace(monotonic=lambda: now))
    state, moment = LineState({"cam0": "mono"}), datetime.now(timezone.utc)
    frame = Frame("cam0", 1, moment, now, np.zeros((4, 4, 3), np.uint8))
    verdict = Verdict("id", "cam0", 1, moment, moment, "OK", "score_below_threshold")
    judgement: Any = SimpleNamespace(verdict=verdict, detail="", scored=None, box=(0, 0, 4, 4))

    def fps() -> float:
        return float(state.snapshot()["fps"])

    assert (fps(), state.pace) == (0, 0)
    state.record(judgement, frame, 0.0)
    assert (fps(), state.pace) == (0, 0)
    for _ in range(400):  # 20 s at 20 frames a second
        now += 0.05
        state.record(judgement, frame, 0.0)
    assert fps() == pytest.approx(20, abs=0.2) and len(state._recent) <= 202
    now += 5
    assert fps() == pytest.approx(10, abs=0.2), "half of the last ten seconds stood still"
    now += 3600
    assert fps() == 0 and state.pace == pytest.approx(20, abs=0.2)


def test_a_picture_of_an_earlier_part_is_known_as_one() -> None:
    """An image that cannot be read leaves the picture before it, which says nothing about the part."""
    state, moment = LineState({"cam0": "mono"}), datetime.now(timezone.utc)
    frame = Frame("cam0", 1, moment, 0.0, np.zeros((4, 4, 3), np.uint8), part_id="1")

    def picture(part: str, frame: Frame | None) -> Any:
        verdict = Verdict(part, "cam0", 1, moment, moment, "UNKNOWN", "bad_frame", part_id=part)
        judgement: Any = SimpleNamespace(verdict=verdict, detail="", scored=None, box=(0, 0, 4, 4))
        state.record(judgement, frame, 0.0)
        return state.snapshot()["cameras"]["cam0"]["picture"]

    assert picture("0", None) is None
    assert picture("1", frame) == {"current": True, "part_id": "1"}
    assert picture("2", None) == {"current": False, "part_id": "1"}
    assert picture("3", frame)["current"]


def looked_at(image: np.ndarray, anomaly_map: np.ndarray, box: tuple[int, int, int, int]) -> LineState:
    """A line whose one camera has judged this picture, with pixel threshold 0.5, while somebody looks."""
    state, moment = LineState({"cam0": "mono"}), datetime.now(timezone.utc)
    verdict = Verdict("id", "cam0", 1, moment, moment, "NG", "score_above_threshold")
    scored = SimpleNamespace(map=anomaly_map, pixel_threshold=0.5)
    judgement: Any = SimpleNamespace(verdict=verdict, detail="", scored=scored, box=box)
    state.picture("cam0")
    state.record(judgement, Frame("cam0", 1, moment, 0.0, image), 0.0)
    return state


def shown(state: LineState, width: int, *, heat: bool = True) -> np.ndarray:
    jpeg = state.picture("cam0", width=width, heat=heat, quality=100)
    assert jpeg is not None
    return np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1], np.int32)


@pytest.mark.parametrize("box", [(0, 0, 1000, 700), (130, 50, 601, 403), (0, 300, 1000, 320)])
@pytest.mark.parametrize("width", [2000, 1000, 333])
def test_heat_lies_where_it_would_on_the_cameras_picture(box: tuple[int, int, int, int], width: int) -> None:
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), (1000, 700))
    anomaly_map = np.zeros((40, 40), np.float32)
    anomaly_map[5:12, 8:14] = 1
    anomaly_map = cv2.GaussianBlur(anomaly_map, (0, 0), 2)
    small = shown(looked_at(image, anomaly_map, box), width)
    size = small.shape[1::-1]
    drawn = evidence.overlay(image, anomaly_map, box, 0.5)
    expected = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA).astype(np.int32)
    heat = np.abs(expected - cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    hot = heat.max(axis=2) > 20
    off = np.abs(small - expected)
    assert hot.any() and off[hot].mean() < heat[hot].mean() / 5, "whole pixels allowed for"
    assert off[~hot].mean() < 2, "JPEG allowed for"


def test_a_hot_cell_is_not_lost_in_a_box_that_is_shown_smaller_than_the_map() -> None:
    image = np.zeros((1000, 2000, 3), np.uint8)
    for cell in range(20, 25):
        anomaly_map = np.zeros((64, 64), np.float32)
        anomaly_map[cell, cell] = 1
        state = looked_at(image, anomaly_map, (500, 100, 640, 640))
        assert shown(state, 120, heat=False).max() == 0 and shown(state, 120).max() > 3


def test_a_look_at_a_large_picture_takes_memory_for_what_is_shown() -> None:
    """Of a 12 MP camera each look took 400 MB, and a page looks each second."""
    image = np.zeros((1500, 2000, 3), np.uint8)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[20:24, 30:34] = 1
    state = looked_at(image, anomaly_map, (0, 0, 2000, 1500))
    tracemalloc.start()
    try:
        state.picture("cam0", width=480)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < image.nbytes / 2
