"""What everybody else sees of a line: its state, its pictures, its evidence, its rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
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
    import cv2

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
