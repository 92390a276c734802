"""Triggers that come late: a part that has gone on gets no picture of the next one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import ConfigError
from andon.runtime.handlers import Handlers
from andon.runtime.lineconfig import BrokerConfig, TriggerConfig
from andon.runtime.mqtt import session
from andon.runtime.mqtt.backlog import LOOK, Backlog
from andon.runtime.mqtt.hooks import Hooks
from andon.runtime.outbox import Outbox
from andon.runtime.slot import LanePolicy, Slots, Trigger
from andon.runtime.types import Frame
from andon.runtime.unjudged import Unjudged

from .running import LIVE, RunningLine


def ago(seconds: float) -> str:
    moment = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def announced(age: float | None = None, **arguments: Any) -> Trigger:
    """What the slots are told by a camera with delay_ms 20 s and timeout_ms 100 s, in seconds from now.

    age: seconds since its ts.
    """
    if age is not None:
        arguments["ts"] = ago(age)
    camera = SimpleNamespace(trigger=TriggerConfig(delay_ms=20_000, timeout_ms=100_000))
    slots, before = Mock(), time.monotonic()
    worker = SimpleNamespace(judge=None)
    app: Any = SimpleNamespace(config=SimpleNamespace(cameras={"a": camera}), slots=slots, worker=worker)
    Handlers(app).trigger("a", {"part_id": "p", **arguments})
    trigger = slots.trigger.call_args.args[1]
    assert isinstance(trigger, Trigger)
    assert trigger.at >= before, "never a frame of before it came"
    return replace(trigger, at=trigger.at - before, deadline=trigger.deadline - before)


def test_a_part_of_before_a_product_command_is_told_by_the_classifier_where_that_told_them() -> None:
    slots, camera = Slots({"a": LanePolicy()}), SimpleNamespace(trigger=None)
    worker = SimpleNamespace(judge=SimpleNamespace(product_of=lambda camera: "auto"))
    app: Any = SimpleNamespace(config=SimpleNamespace(cameras={"a": camera}), slots=slots, worker=worker)
    Handlers(app).trigger("a", {"part_id": "p"})
    now = datetime.now(timezone.utc)
    slots.put(Frame("a", 0, now, time.monotonic(), np.zeros((2, 2, 3), np.uint8)))
    item = slots.take(0)
    assert item is not None and (item.part_id, item.product) == ("p", "auto"), "not as commanded later"
    assert Unjudged("m", "b").verdict(item, "stopped", "1", "mono").verdict.product is None
    long_ago = replace(item, monotonic=time.monotonic() - 1000)
    latency = Unjudged("m", "b").verdict(long_ago, "stopped", "1", "mono").verdict.latency_ms
    assert latency == {"total": pytest.approx(1e6, rel=0.1)}


@pytest.mark.parametrize(
    ("arguments", "deadline"),
    [
        ({}, 120),
        ({"late": 40.0}, 80),
        ({"age": 0}, 120),
        ({"age": 40}, 80),
        ({"age": 20, "late": 40.0}, 80),
        ({"age": 40, "late": 20.0}, 80),
        ({"age": -40}, 120),
    ],
)
def test_the_time_for_a_frame_counts_from_when_the_trigger_was_sent(arguments: Any, deadline: float) -> None:
    trigger = announced(**arguments)
    assert (trigger.at, trigger.deadline) == pytest.approx((20, deadline), abs=5)


@pytest.mark.parametrize("arguments", [{"age": 200}, {"late": 200.0}, {"age": -200}])
def test_a_trigger_that_came_too_late_has_no_time_left(arguments: Any) -> None:
    trigger = announced(**arguments)
    assert trigger.deadline < -50
    assert ("ahead of this station's clock" in trigger.detail) is (arguments.get("age", 0) < 0)


@pytest.mark.parametrize("fraction", ["", ".1", ".1234", ".123456789"])
@pytest.mark.parametrize("zone", ["Z", "+02:00"])
def test_times_are_read_as_rfc_3339_writes_them(fraction: str, zone: str) -> None:
    moment = datetime.now(timezone.utc) + (timedelta(hours=2) if zone != "Z" else timedelta())
    trigger = announced(ts=moment.strftime("%Y-%m-%dT%H:%M:%S") + fraction + zone)
    assert trigger.deadline == pytest.approx(120, abs=5)


@pytest.mark.parametrize("ts", ["2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01T00:00:00+99:00"])
def test_a_time_that_cannot_be_is_refused(ts: str) -> None:
    with pytest.raises(ConfigError, match="no time"):
        announced(ts=ts)


def test_what_lay_there_while_nobody_looked_is_late_until_all_is_read() -> None:
    backlog = Backlog(100.0)
    for look in range(1, 9):  # in good time, however much there is to read
        backlog.looked(100 + look * LOOK, empty=False)
        assert backlog.late(100 + look * LOOK) == 0
    backlog.looked(125.0, empty=True)  # the wait was over before anybody looked: it says nothing
    assert backlog.late(125.0) == 23
    backlog.looked(125.01, empty=False)
    assert backlog.late(125.01) == pytest.approx(23.01), "the next of those that waited"
    backlog.looked(125.02, empty=True)
    assert backlog.late(125.02) == 0
    backlog.looked(127.0, empty=False)
    for look in range(1, 100):  # acknowledgements without a pause
        backlog.looked(127 + look * LOOK, empty=False)
    assert backlog.late(127 + 99 * LOOK) == 0


def test_what_comes_on_a_new_connection_is_not_late_because_connecting_took_long(
    tmp_path: Path, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = [0.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0]))
    hooks = Hooks(lambda state: b"{}", lambda: None, *[lambda *_: None] * 4)
    wake, other = os.pipe()
    with Outbox(tmp_path / "outbox.db") as outbox:
        config = BrokerConfig(port=broker.port)
        connection = session.Session(config, "a", "andon/v1/a/b/c", ["cam0"], outbox, 8, hooks, wake)
        connect = connection._client.connect

        def slowly(*arguments: Any, **more: Any) -> Any:
            skipped[0] = 100.0  # a name that is looked up, TLS on a CPU that builds engines
            return connect(*arguments, **more)

        monkeypatch.setattr(connection._client, "connect", slowly)
        connection.open(lambda: False)
        assert connection._backlog.late(session.time.monotonic()) < 50
        connection.close()
    os.close(wake)
    os.close(other)


def test_parts_announced_while_the_station_was_held_up_get_no_later_picture(
    start_line: Callable[..., RunningLine], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = {"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 1500}}}
    line = start_line(cameras)
    reached, gate, status = threading.Event(), threading.Event(), line.app.state.status

    def held_up(camera: str) -> Any:
        reached.set()
        assert gate.wait(30)
        return status(camera)

    monkeypatch.setattr(line.app.delivery, "_status", held_up)
    line.app.delivery.announce()
    assert reached.wait(20)
    topic = f"{line.app.config.topic}/cam0/cmd/trigger"
    for part in ("A-1", "A-2", "A-3"):
        line.client.publish(topic, f'{{"part_id": "{part}"}}', qos=1).wait_for_publish(20)
    time.sleep(1.6)
    gate.set()
    verdicts = consumer.wait_for("verdict", 3)
    assert [(each["part_id"], each["label"], each["reason"]) for each in verdicts] == [
        (part, "UNKNOWN", "no_frame") for part in ("A-1", "A-2", "A-3")
    ]
    for number in range(10):  # this machine may hold the line up by itself, but not for ever
        assert line.command("cam0", "trigger", part_id=f"B-{number}")["ok"]
        verdict = consumer.wait_for("verdict", 4 + number)[-1]
        assert verdict["part_id"] == f"B-{number}"
        if verdict["label"] == "OK":
            break
    assert verdict["label"] == "OK", "what comes in time is judged again"


def test_a_trigger_that_somebody_else_held_up_says_so(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "trigger": {"timeout_ms": 20_000}}})
    for part, ts, label in (("A", ago(60), "UNKNOWN"), ("B", ago(0), "OK")):
        assert line.command("cam0", "trigger", part_id=part, ts=ts)["ok"]
        consumer.until(
            lambda part=part, label=label: (
                (part, label) in [(each["part_id"], each["label"]) for each in consumer.of("verdict")]
            )
        )
    assert not line.command("cam0", "trigger", part_id="C", ts="yesterday")["ok"]
