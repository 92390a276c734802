"""The connection in one process: messages against their schemas, retained state, client ids, outages."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from andon.runtime.alarm import AlarmBoard, AlarmRule
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt.delivery import Delivery
from andon.runtime.mqtt.identity import joined
from andon.runtime.mqtt.publisher import Publisher
from andon.runtime.outbox import Outbox
from andon.runtime.stored import OutboxStats
from jsonschema import Draft202012Validator

from .connection import SCHEMAS, Line, validate


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_fit_their_schemas(line: Any, consumer: Any, broker: EmbeddedBroker, protocol: str) -> None:
    with line(
        broker.port, ("cam0", "cam1"), protocol=protocol, rebuild=lambda camera, arguments: {"done": True}
    ) as running:
        assert running.delivery.wait_connected(10)
        running.send(5)
        running.alarm("cam1", "NG")
        running.delivery.metrics("cam0", {"frames": 5})
        consumer.client.publish("andon/v1/site/line/station/cam0/cmd/rebuild", b'{"id":"1"}', 1)
        consumer.wait_for("verdict", 5)
        consumer.until(lambda: consumer.of("result") and consumer.of("metrics") and len(consumer.of("alarm")) > 2)
    consumer.until(lambda: [s["state"] for s in consumer.of("status")].count("stopped") == 2)
    kinds = set()
    for message in consumer.messages:
        if "/cmd/" in message.topic and not message.topic.endswith("result"):
            continue
        validate(message.document)
        kinds.add(message.document["schema"])
        assert b"base64" not in message.raw
    assert len(kinds) == 5


def test_alarm_is_retained_and_replayed_ones_do_not_overwrite_it(
    line: Any, broker: EmbeddedBroker, make_consumer: Any, eventually: Any
) -> None:
    port = broker.port
    broker.stop()
    with line(port) as running:
        running.alarm("cam0", "NG")
        running.alarm("cam0", "OK")  # raised, then latched, both while the broker is away
        with EmbeddedBroker(port):
            assert running.delivery.wait_connected(10)
            eventually(lambda: running.outbox.stats().messages == 0)
            with make_consumer(port) as consumer:
                consumer.until(lambda: consumer.of("alarm"))
                (board,) = consumer.of("alarm")
                assert (board["state"], board["event"], board["replayed"]) == ("latched", None, False)
                running.alarm("cam0", "NG")
                consumer.until(lambda: consumer.of("alarm")[-1]["state"] == "raised")
            with make_consumer(port) as later:
                later.until(lambda: later.of("alarm"))
                (message,) = [m for m in later.messages if m.topic.endswith("/alarm")]
                assert message.retain and message.document["state"] == "raised"
                assert not message.document["replayed"]


def test_state_of_alarms_survives_a_restart(line: Any, broker: EmbeddedBroker) -> None:
    with line(broker.port) as running:
        running.alarm("cam0", "NG")
    with line(broker.port) as running:
        board = AlarmBoard("cam0", AlarmRule(k=1, n=1))
        board.restore(json.loads(running.outbox.load_state("alarm/cam0")))
        assert [(a.kind, a.state) for a in board.active] == [("defect", "raised")]


def test_broker_that_is_not_there_is_said_and_does_not_stop_the_line(
    line: Any, broker: EmbeddedBroker, eventually: Any
) -> None:
    broker.stop()
    with line(broker.port) as running:
        running.send(3)
        eventually(lambda: "nothing listens there" in running.delivery.health().reason)
        assert running.delivery.health().outbox.messages == 3 and not running.delivery.health().connected


def test_unanswered_port_is_said(line: Any, eventually: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        threading.Thread(target=lambda: deaf.accept()[0].close(), daemon=True).start()
        with line(deaf.getsockname()[1]) as running:
            eventually(lambda: "without an answer" in running.delivery.health().reason)


def test_a_stop_waits_for_the_first_answer_and_the_delivery_together(
    line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    stop = Publisher.stop
    monkeypatch.setattr(Publisher, "stop", lambda self, drain: (given.append(drain), stop(self, drain)))
    with socket.create_server(("127.0.0.1", 0)) as deaf, line(deaf.getsockname()[1]) as running:
        running.send(2)
        running.delivery.stop(0.5)
        assert given == [0.0], "the half second went by in waiting for an answer"
        assert running.outbox.stats().messages == 2, "nothing is lost by it"


def test_a_camera_may_announce_while_connections_are_made(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Camera threads run before delivery starts; a connection that is added must not break their way through."""
    second, going, third = (threading.Event() for _ in range(3))
    failures: list[RuntimeError] = []

    class Slow:
        """Makes the second connection while a camera is on its way through those there are."""

        def __init__(self, _broker: Any, _client_id: str, _base: str, cameras: list[str], *_: Any):
            if cameras[0] == "cam1":
                second.set()
                going.wait(20)
            elif cameras[0] == "cam2":
                third.set()

        def start(self) -> None:
            third.set()

        def announce(self) -> None:
            going.set()
            third.wait(20)

    def announce() -> None:
        second.wait(20)
        try:
            delivery.announce()
        except RuntimeError as error:
            failures.append(error)
        going.set()

    monkeypatch.setattr("andon.runtime.mqtt.delivery.Publisher", Slow)
    with Outbox(tmp_path / "outbox.db") as outbox:
        delivery = Delivery(base, ["cam0", "cam1", "cam2"], BrokerConfig(), outbox)
        camera = threading.Thread(target=announce)
        camera.start()
        delivery.start()
        camera.join(20)
    assert failures == []


def test_same_client_id_twice_is_said(tmp_path: Path, base: str, broker: EmbeddedBroker, eventually: Any) -> None:
    config = BrokerConfig(port=broker.port, retry_max=0.5)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        Line(tmp_path / "a", base, config, ("cam0",), {}) as first,
        Line(tmp_path / "b", base, config, ("cam0",), {}) as second,
    ):
        eventually(lambda: any("another client" in r.delivery.health().reason for r in (first, second)), 20)


def client_ids(folder: Path, base: str, cameras: tuple[str, ...], **broker: Any) -> list[str]:
    """Of a line's connections; nothing listens where they go."""
    with Line(folder, base, BrokerConfig(port=1, **broker), cameras, {}) as running:
        return [publisher._client_id for publisher in running.delivery._publishers.values()]


def test_client_ids_of_two_stations_are_not_the_same(tmp_path: Path) -> None:
    """The broker would throw each out when the other connects, for ever."""
    plain = client_ids(tmp_path, "andon/v1/plant1/line3/press-2", ("cam0", "cam_1.b"))
    assert plain == ["andon-plant1-line3-press-2-cam0", "andon-plant1-line3-press-2-cam_1.b"]
    (first,) = client_ids(tmp_path, "andon/v1/plant1/line3/press", ("left-top",))
    (second,) = client_ids(tmp_path, "andon/v1/plant1/line3/press-left", ("top",))
    assert first.startswith("andon-plant1-line3-press-left-top-") and second == "andon-plant1-line3-press-left-top"
    assert client_ids(tmp_path, "andon/v1/a/b/c", ("top",), client_id="press-left") == ["press-left-top"]
    (named,) = client_ids(tmp_path, "andon/v1/a/b/c", ("left-top",), client_id="press")
    assert named.startswith("press-left-top-")


def test_no_two_cameras_share_a_name() -> None:
    cameras = list(itertools.product(("a", "-", "_", "a.a", "a-a", "a_a", "a-a-a", "a_a_a"), repeat=4))
    for separator, illegal in (("-", ""), ("_", "[^A-Za-z0-9_-]")):
        assert len({joined(parts, separator, illegal) for parts in cameras}) == len(cameras)


def test_messages_of_a_removed_camera_are_delivered(line: Any, consumer: Any, broker: EmbeddedBroker) -> None:
    port = broker.port
    gone = line(1, ("old",))
    with gone as running:
        expected = running.send(4, "old")
    with line(port, ("cam0",)):
        consumer.wait_for("verdict", 4)
    assert [d["id"] for d in consumer.of("verdict", "old")] == expected
    assert all(d["replayed"] for d in consumer.of("verdict"))


DEVICE = "andon_site_line_station"


def test_home_assistant_is_told_of_every_camera(line: Any, broker: EmbeddedBroker, make_consumer: Any) -> None:
    with (
        line(broker.port, ("cam0", "a.b"), home_assistant="homeassistant") as running,
        make_consumer(broker.port, topic="homeassistant/#") as told,
    ):
        told.until(lambda: len(told.messages) == 2)
        running.delivery.stop()
    by_topic = {m.topic: m.document for m in told.messages}
    # The hash is because of a.b: there may be an a_b.
    assert set(by_topic) == {f"homeassistant/device/{DEVICE}_{camera}/config" for camera in ("cam0", "a_b_4fe13b22")}
    document = by_topic[f"homeassistant/device/{DEVICE}_a_b_4fe13b22/config"]
    parts = document["components"]
    assert parts["verdict"]["state_topic"] == "andon/v1/site/line/station/a.b/verdict"
    assert document["availability_topic"] == "andon/v1/site/line/station/a.b/status"
    assert len({part["unique_id"] for part in parts.values()}) == len(parts) == 4
    schema = json.loads((SCHEMAS / "command.json").read_text())
    press = json.loads(parts["acknowledge"]["payload_press"])
    Draft202012Validator({"$ref": "#/$defs/acknowledge", "$defs": schema["$defs"]}).validate(press)


def test_missing_password_variable_is_said(line: Any, broker: EmbeddedBroker, eventually: Any) -> None:
    with line(broker.port, username="u", password_env="ANDON_NO_SUCH_VARIABLE") as running:
        eventually(lambda: "ANDON_NO_SUCH_VARIABLE" in running.delivery.health().reason)


def test_losses_and_damage_are_told(line: Any, broker: EmbeddedBroker, tmp_path: Path, eventually: Any) -> None:
    with line(broker.port) as running:
        eventually(lambda: running.delivery.health().connected)
        assert running.delivery.health().trouble() == ""
        running.outbox._caps = (1000, 3600.0)
        broker.kill()
        running.send(20)
        eventually(lambda: "dropped the oldest" in running.delivery.health().trouble())
        assert running.outbox.stats().dropped > 10
    (tmp_path / "outbox.db").write_bytes(b"x" * 8192)
    with line(broker.port) as running:
        assert "damaged" in running.delivery.health().trouble()


def test_a_loss_is_told_by_its_own_cause_and_for_a_minute(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("andon.runtime.mqtt.delivery.time", SimpleNamespace(monotonic=lambda: now[0]))
    stats = OutboxStats(0, 0, 5, 0.0, None, None, 0, too_large=2, damaged=1)
    outbox = Mock(stats=lambda: stats)
    delivery = Delivery(base, ["cam0"], None, outbox)
    delivery.start()
    assert delivery.health().loss == "", "what was lost before was told before"
    causes = {"the outbox's caps dropped the oldest": {}, "larger than the broker takes": {"too_large": 1}}
    for _ in range(2):
        for cause, more in {**causes, "damaged on the disk": {"damaged": 1}}.items():
            counts = {name: getattr(stats, name) + number for name, number in {"dropped": 1, **more}.items()}
            stats = replace(stats, **counts)
            assert delivery.health().loss == f"messages were lost: {cause}"
            now[0] += 59
            assert delivery.health().loss
            now[0] += 1
            assert delivery.health().loss == ""


def test_a_connection_that_was_stopped_is_not_woken(line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox goes on for a moment, and its descriptors may be somebody else's by then."""
    with line(1) as running:
        running.delivery.stop(0.0)
        write, close = Mock(), Mock()
        with monkeypatch.context() as patch:
            patch.setattr("andon.runtime.mqtt.publisher.os", SimpleNamespace(write=write, close=close))
            running.send(1)
            assert running.outbox.wait(1, 10)
            running.outbox.finish()
        assert not write.called and not close.called


def test_an_outage_is_trouble_only_after_the_grace(line: Any, broker: EmbeddedBroker, eventually: Any) -> None:
    broker.stop()
    with line(broker.port) as running:
        eventually(lambda: "nothing listens" in running.delivery.health().trouble())
        assert running.delivery.health().trouble(60.0) == ""
