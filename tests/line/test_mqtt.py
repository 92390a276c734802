"""The connection in one process: messages against their schemas, retained state, commands, refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import andon
import pytest
from andon.runtime.alarm import AlarmBoard, AlarmRule
from andon.runtime.alarm import payload as alarm_payload
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import ConfigError, DeliveryError
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt import session
from andon.runtime.mqtt.commands import Commands, TokenBucket
from andon.runtime.mqtt.delivery import Delivery
from andon.runtime.mqtt.identity import joined
from andon.runtime.mqtt.publisher import Publisher
from andon.runtime.mqtt.session import packet_size
from andon.runtime.outbox import Outbox
from andon.runtime.process import resident_memory
from andon.runtime.types import Region, Verdict
from andon.runtime.verdict import Ids
from jsonschema import Draft202012Validator, FormatChecker

SCHEMAS = Path(andon.__file__).parent / "configs" / "schema"


def validate(document: dict[str, Any]) -> None:
    name = document["schema"].removeprefix("andon.").partition("/")[0]
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(document)


def verdict(ids: Ids, camera: str = "cam0", seq: int = 0) -> Verdict:
    now = datetime.now(timezone.utc)
    regions = (Region((1, 2, 3, 4), 12, 3.0),)
    return Verdict(ids.next(), camera, seq, now, now, "NG", "score_above_threshold", "mono", "A-1", 3.0, 2.0, regions)


class Line:
    """Outbox, delivery and one alarm board per camera, as the runtime has them."""

    def __init__(
        self, folder: Path, base: str, broker: BrokerConfig, cameras: tuple[str, ...], handlers: dict[str, Any]
    ):
        self.outbox = Outbox(folder / "outbox.db")
        self.boards = {camera: AlarmBoard(camera, AlarmRule(k=1, n=1)) for camera in cameras}
        self.commands = Commands(handlers)
        self.delivery = Delivery(
            base,
            cameras,
            broker,
            self.outbox,
            status=lambda camera: {"bundle": "9f2c", "method": "hvq"},
            alarms=lambda camera: alarm_payload(self.ids.next(), camera, self.boards[camera].alarms),
            commands=self.commands,
        )

    def __enter__(self) -> Line:
        self.outbox.open()
        self.ids = Ids(self.outbox.last_id)
        self.delivery.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.delivery.stop()
        self.outbox.close()

    def send(self, count: int = 1, camera: str = "cam0") -> list[str]:
        verdicts = [verdict(self.ids, camera, seq) for seq in range(count)]
        for each in verdicts:
            self.delivery.verdict(each)
        return [each.id for each in verdicts]

    def alarm(self, camera: str, label: str) -> None:
        self.delivery.alarm(self.boards[camera], self.boards[camera].verdict(label), self.ids)


@pytest.fixture
def line(tmp_path: Path, base: str) -> Callable[..., Line]:
    def make(port: int, cameras: tuple[str, ...] = ("cam0",), **handlers: Any) -> Line:
        settings = {"port": port, "retry_max": 0.5}
        names = [name for name in handlers if name in BrokerConfig.model_fields]
        settings |= {name: handlers.pop(name) for name in names}
        return Line(tmp_path, base, BrokerConfig(**settings), cameras, handlers)

    return make


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
    line: Any, broker: EmbeddedBroker, make_consumer: Any
) -> None:
    port = broker.port
    broker.stop()
    with line(port) as running:
        running.alarm("cam0", "NG")
        running.alarm("cam0", "OK")  # raised, then latched, both while the broker is away
        with EmbeddedBroker(port):
            assert running.delivery.wait_connected(10)
            with make_consumer(port) as consumer:
                consumer.until(lambda: consumer.of("alarm"))
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


# -- the broker's limits -----------------------------------------------------------------------------------------------


def wordy(ids: Ids) -> Verdict:
    """A verdict of about 18 kB."""
    return replace(verdict(ids), regions=(Region((1001, 1002, 103, 104), 12, 3.0),) * 300)


#: How mosquitto is told its limit, the protocol, whether the line is told, too: max_packet_size is announced in MQTT 5.
#: Above message_size_limit mosquitto ends the connection in MQTT 5; in 3.1.1 it acknowledges the message and drops it.
LIMITS = [
    ("max_packet_size", "5", False),
    ("max_packet_size", "3.1.1", True),
    ("message_size_limit", "5", True),
    ("message_size_limit", "3.1.1", True),
]


@pytest.mark.parametrize(("setting", "protocol", "told"), LIMITS)
def test_a_picture_larger_than_the_broker_takes_is_skipped_and_counted(
    line: Any,
    make_consumer: Any,
    eventually: Any,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    protocol: str,
    told: bool,
) -> None:
    pictures: list[int] = []

    def take(_client: Any, _data: Any, message: Any) -> None:
        pictures.append(len(message.payload))

    with EmbeddedBroker(settings=[f"{setting} 4000"]) as broker, make_consumer(broker.port) as consumer:
        consumer.client.message_callback_add("+/+/+/+/+/+/evidence/#", take)
        with line(broker.port, protocol=protocol, max_packet=4000 if told else None) as running:
            assert running.delivery.wait_connected(10)
            topic = "andon/v1/site/line/station/cam0/evidence/A"
            fits = 4000 - packet_size(topic, b"", 0, protocol) - 1  # the length of the rest takes two bytes, not one
            for size in (60_000, fits + 1, fits):
                running.delivery.picture("cam0", "A", bytes(size))
            running.send(3)
            assert [document["replayed"] for document in consumer.wait_for("verdict", 3)] == [False] * 3
            eventually(lambda: pictures == [fits])
            health = running.delivery.health()
            assert (health.too_large, health.links["cam0"].connects, health.trouble()) == (2, 1, "")
        consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
    assert [status["state"] for status in consumer.of("status")] == ["online", "stopped"], "never offline"
    assert sum("is not sent: the broker takes at most 4000" in text for text in caplog.messages) == 1


class Dam:
    """A way to the broker that lets nothing through to it while it is shut, and holds only some kB."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.open = threading.Event()
        self.open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        near = self._listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", self._port))
        threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()
        self._pump(near, far, self.open)

    def _pump(self, source: socket.socket, target: socket.socket, gate: threading.Event | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if gate is not None:
                    gate.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def test_pictures_on_a_slow_connection_are_skipped_and_do_not_hold_up_verdicts(
    line: Any, broker: EmbeddedBroker, make_consumer: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dam, size = Dam(broker.port), 300_000
    arrived: list[str] = []
    with make_consumer(broker.port) as consumer, line(dam.port) as running:
        for kind in ("evidence/#", "verdict"):
            consumer.client.message_callback_add(
                f"+/+/+/+/+/+/{kind}", lambda *got, kind=kind: arrived.append(kind.partition("/")[0])
            )
        assert running.delivery.wait_connected(10)
        eventually(lambda: running.outbox.stats().messages == 0 and bool(consumer.of("alarm")))
        dam.open.clear()
        sent = 0
        while running.delivery.health().pictures_skipped < 20:
            running.delivery.picture("cam0", str(sent), bytes(size))
            sent += 1
            assert sent < 200, "they pile up"
        running.send(3)
        assert running.outbox.wait(3, 10)
        dam.open.set()
        eventually(lambda: arrived.count("verdict") == 3)
        assert arrived.index("verdict") <= 2, "pictures before the first verdict"
        kept = sent - running.delivery.health().pictures_skipped
        eventually(lambda: arrived.count("evidence") == kept)
        assert kept <= 10
    assert sum("slower than the pictures come" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(("setting", "protocol", "told"), LIMITS)
def test_a_verdict_larger_than_the_broker_takes_is_dropped_and_said(
    line: Any, make_consumer: Any, eventually: Any, setting: str, protocol: str, told: bool
) -> None:
    with EmbeddedBroker(settings=[f"{setting} 10000"]) as broker, make_consumer(broker.port) as consumer:
        with line(broker.port, protocol=protocol, max_packet=10_000 if told else None) as running:
            assert running.delivery.wait_connected(10)
            before = running.send(1)
            running.delivery.verdict(wordy(running.ids))
            after = running.send(2)
            assert [document["id"] for document in consumer.wait_for("verdict", 3)] == before + after
            eventually(lambda: running.outbox.stats().messages == 0)
            assert running.outbox.stats().dropped == 1
            assert running.delivery.health().trouble() == "1 messages were dropped: larger than the broker takes"
            assert running.delivery.health().links["cam0"].connects == 1
        consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
    assert consumer.of("status")[-1]["outbox"]["dropped"] == 1


@pytest.mark.parametrize(("setting", "protocol"), [("max_packet_size", "3.1.1"), ("message_size_limit", "5")])
def test_a_limit_that_nobody_announces_is_suspected(
    line: Any, make_consumer: Any, eventually: Any, caplog: pytest.LogCaptureFixture, setting: str, protocol: str
) -> None:
    hint = "does the broker take none so large? Then set broker.max_packet"
    with EmbeddedBroker(settings=[f"{setting} 10000"]) as broker, make_consumer(broker.port) as consumer:
        with line(broker.port, protocol=protocol) as running:
            before = running.send(2)
            running.delivery.verdict(wordy(running.ids))
            after = running.send(2)
            eventually(lambda: any("(verdict, now " in text and hint in text for text in caplog.messages), 20)
            assert running.outbox.stats().messages >= 3, "a suspicion costs no verdict"
        with line(broker.port, protocol=protocol, max_packet=10_000):
            assert {document["id"] for document in consumer.wait_for("verdict", 4)} == {*before, *after}
    assert not any("another client" in text for text in caplog.messages)


def test_pictures_that_end_the_connection_time_and_again_are_suspected(
    line: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedBroker(settings=["max_packet_size 10000"]) as broker, line(broker.port, protocol="3.1.1") as running:
        for turn in range(3):
            eventually(lambda turn=turn: running.delivery.health().links["cam0"].connects == turn + 1)
            running.delivery.picture("cam0", "A", bytes(60_000))
        eventually(lambda: any("(evidence, now 600" in text and "max_packet" in text for text in caplog.messages))


def test_an_outage_after_a_large_message_that_was_taken_raises_no_suspicion(
    line: Any, broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    with line(broker.port) as running:
        assert running.delivery.wait_connected(10)
        (publisher,) = running.delivery._publishers.values()
        for turn in range(3):
            running.delivery.verdict(wordy(running.ids))
            running.send(1)
            eventually(lambda: running.outbox.stats().messages == 0)
            broker.stop()
            eventually(lambda: not running.delivery.health().connected)
            broker.start()
            eventually(lambda turn=turn: publisher.state.connects == turn + 2)
    assert not any("max_packet" in text for text in caplog.messages)


class Reluctant:
    """A broker of MQTT 5 that takes one unacknowledged message at a time (Receive Maximum 1).

    It answers only when the client falls silent, so the client has every occasion to send too much or too early.
    """

    def __init__(self, subscriptions: bool = True) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._subscriptions = subscriptions
        self.most = 0
        self.early = 0
        self.topics: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection = self._listener.accept()[0]
        answers: list[bytes] = []

        def read(count: int) -> bytes:
            data = b""
            while len(data) < count:
                while answers and not select.select([connection], [], [], 0.05)[0]:
                    connection.sendall(answers.pop(0))
                if not (more := connection.recv(count - len(data))):
                    raise ConnectionError
                data += more
            return data

        with contextlib.suppress(ConnectionError):
            while True:
                head = read(1)[0]
                length = shift = 0
                while (byte := read(1)[0]) & 128:
                    length, shift = length | (byte & 127) << shift, shift + 7
                body = read(length | byte << shift)
                if head >> 4 == 1:
                    answers.append(bytes([0x20, 6, 0, 0, 3, 0x21, 0, 1]))  # CONNACK with Receive Maximum 1
                elif head >> 4 == 8 and self._subscriptions:
                    answers.append(bytes([0x90, 4, *body[:2], 0, 1]))
                elif head >> 4 == 3 and head & 6:
                    end = 2 + int.from_bytes(body[:2], "big")
                    self.topics.append(body[2:end].decode().rsplit("/", 1)[1])
                    self.early += any(answer[0] == 0x90 for answer in answers)
                    answers.append(bytes([0x40, 2]) + body[end : end + 2])
                    self.most = max(self.most, sum(answer[0] == 0x40 for answer in answers))


def test_what_is_announced_keeps_to_the_brokers_receive_maximum(line: Any, eventually: Any) -> None:
    broker = Reluctant()
    with line(broker.port, home_assistant="homeassistant") as running:
        running.send(2)
        eventually(lambda: len(broker.topics) == 5)
        running.delivery.announce()
        eventually(lambda: len(broker.topics) == 7)
    assert broker.topics == ["status", "alarm", "config", "verdict", "verdict", "status", "alarm", "status"]
    assert broker.most == 1, "so many at once without an acknowledgement"
    assert broker.early == 0, "whoever reads `online` may command: the subscription has to stand by then"


def test_verdicts_reach_a_broker_that_answers_no_subscription(
    line: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.5)
    broker = Reluctant(subscriptions=False)
    with line(broker.port) as running:
        running.send(2)
        eventually(lambda: broker.topics.count("verdict") == 2)
    assert "no answer in 0.5 s; no command will arrive" in caplog.text


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def commanded(line: Any, broker: EmbeddedBroker, consumer: Any, base: str) -> Iterator[Any]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def handle(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append((camera, arguments))
        return {"was": 1}

    def refuse(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise DeliveryError(
            "no such product", found=arguments["product"], expected="mono, poly", next_step="andon check"
        )

    def crash(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("oh")

    with line(broker.port, ("cam0",), trigger=handle, acknowledge=handle, product=refuse, rebuild=crash) as running:
        assert running.delivery.wait_connected(10)

        def command(
            name: str, payload: bytes, *, retain: bool = False, answers: int | None = None
        ) -> list[dict[str, Any]]:
            before = len(consumer.of("result"))
            consumer.client.publish(f"{base}/cam0/cmd/{name}", payload, 1, retain)
            if answers is None:
                consumer.until(lambda: len(consumer.of("result")) > before)
            return consumer.of("result")[before:]

        command.calls = calls  # type: ignore[attr-defined]
        command.running = running  # type: ignore[attr-defined]
        yield command


# The consumer sees the commands too; they are JSON only where the test says so.
@pytest.fixture
def consumer(broker: EmbeddedBroker, make_consumer: Any) -> Iterator[Any]:
    topics = "andon/v1/+/+/+/+/"

    def subscribe(client: Any) -> None:
        leaves = ("verdict", "alarm", "status", "metrics", "cmd/+/result")
        client.on_connect = lambda c, *_: c.subscribe([(f"{topics}{leaf}", 1) for leaf in leaves])

    with make_consumer(broker.port, configure=subscribe) as running:
        yield running


def test_command_is_executed_and_answered(commanded: Any) -> None:
    (answer,) = commanded("trigger", b'{"schema":"andon.command/1","id":"t1","part_id":"A-7"}')
    validate(answer)
    assert answer["ok"] and answer["id"] == "t1" and answer["result"] == {"was": 1}
    assert commanded.calls == [("cam0", {"part_id": "A-7"})]


def test_command_repeated_by_id_is_answered_but_not_executed(commanded: Any) -> None:
    (first,) = commanded("acknowledge", b'{"id":"a1","by":"Ada"}')
    (second,) = commanded("acknowledge", b'{"id":"a1","by":"Ada"}')
    assert first == second and len(commanded.calls) == 1


def test_a_command_that_found_the_line_busy_is_executed_when_it_comes_again() -> None:
    free, answers, done = threading.Event(), queue.SimpleQueue[dict[str, Any]](), []

    def acknowledge(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        free.wait(20)
        done.append(camera)
        return {}

    def send(number: int) -> None:  # each for a camera of its own, or there were too many of one
        payload = f'{{"id":"{number}","by":"Ada"}}'.encode()
        camera = f"cam{number}"
        commands.receive(camera, "acknowledge", payload, False, lambda name, answer: answers.put(json.loads(answer)))

    commands = Commands({"acknowledge": acknowledge})
    commands.start()
    sent = 0
    while answers.empty():  # one is executed, the queue takes so many, and then it is full
        send(sent)
        sent += 1
    refused = answers.get()
    validate(refused)
    assert (refused["id"], refused["error"]) == (str(sent - 1), "busy")
    free.set()
    assert all(answers.get(timeout=20)["ok"] for _ in range(sent - 1))
    send(sent - 1)
    assert answers.get(timeout=20)["ok"]
    commands.stop()
    assert done == [f"cam{number}" for number in range(sent)]


@pytest.mark.parametrize(
    ("name", "payload", "says"),
    [
        ("trigger", b"{", "not JSON"),
        ("trigger", b"\xff\xfe", "not JSON"),
        ("trigger", b"[" * 50_000, "not JSON"),
        ("trigger", b'{"part":"A"}', "schema"),
        ("trigger", b"[]", "schema"),
        ("memory", b'{"action":"freeze"}', "does not take"),
        ("threshold", b'{"threshold":NaN}', "not JSON"),
        ("threshold", b'{"threshold":1e999}', "schema"),
        ("selfdestruct", b"{}", "unknown command"),
        ("product", b'{"product":"cat"}', "no such product"),
        ("rebuild", b"", "internal error"),
        ("trigger", rb'{"part_id":"A-\ud800"}', "text cannot be sent on"),
        ("acknowledge", rb'{"id":"\udc00"}', "text cannot be sent on"),
        ("acknowledge", b'{"by":"\xed\xa0\x80"}', "text cannot be sent on"),
        ("acknowledge", rb'{"\ud83d":1}', "schema"),
        ("trigger", rb'{"part_id":"\ud83d\ude00","part":1}', "schema"),
    ],
)
def test_command_that_fails_is_answered_with_the_reason(commanded: Any, name: str, payload: bytes, says: str) -> None:
    (answer,) = commanded(name, payload)
    validate(answer)
    assert not answer["ok"] and says in answer["error"] and commanded.calls == []


@pytest.mark.parametrize(
    ("name", "payload", "expected"),
    [
        ("product", b'{"id":"8","product":"cat"}', "mono, poly"),
        ("selfdestruct", b'{"id":"8"}', "one of acknowledge, product, threshold, trigger, memory, rebuild"),
    ],
)
def test_an_answer_says_what_would_have_been_accepted(commanded: Any, name: str, payload: bytes, expected: str) -> None:
    (answer,) = commanded(name, payload)
    validate(answer)
    assert (answer["ok"], answer["id"], answer["expected"]) == (False, "8", expected)


@pytest.mark.parametrize(
    ("payload", "identifier"),
    [
        (b'{"id":"8","threshold":"hoch"}', "8"),
        (b'{"id":"8","threshold":1e999}', "8"),
        (b'{"id":8,"threshold":"hoch"}', None),
        (b'{"id":"%b","threshold":"hoch"}' % (b"x" * 65), None),
        (b'{"id":"","threshold":"hoch"}', None),
        (rb'{"id":"\ud800","threshold":1}', None),
        (b'["id"]', None),
        (b'{"id":"8"', None),
    ],
)
def test_a_refused_command_keeps_an_id_that_fits_the_schema(
    commanded: Any, payload: bytes, identifier: str | None
) -> None:
    (answer,) = commanded("threshold", payload)
    validate(answer)
    assert not answer["ok"] and answer["id"] == identifier


def test_a_command_beyond_the_rate_keeps_its_id(commanded: Any, consumer: Any, base: str) -> None:
    for index in range(100):
        consumer.client.publish(f"{base}/cam0/cmd/acknowledge", b'{"id":"%d"}' % index, 1)
    consumer.until(lambda: any("too many" in (r["error"] or "") for r in consumer.of("result")))
    assert all(answer["id"] for answer in consumer.of("result"))


@pytest.mark.parametrize("result", [{"score": float("nan")}, {"engine": object()}])
def test_a_result_that_cannot_be_said_does_not_end_the_commands(
    line: Any, consumer: Any, broker: EmbeddedBroker, base: str, result: dict[str, Any]
) -> None:
    with line(broker.port, acknowledge=lambda camera, arguments: result, trigger=lambda *_: {"done": True}) as running:
        assert running.delivery.wait_connected(10)
        for name, payload in (("acknowledge", b'{"id":"1"}'), ("trigger", b'{"id":"2","part_id":"A"}')):
            consumer.client.publish(f"{base}/cam0/cmd/{name}", payload, 1)
        consumer.wait_for("result", 2)
    answers = {answer["id"]: (answer["ok"], answer["error"]) for answer in consumer.of("result")}
    assert answers == {"1": (False, "internal error"), "2": (True, None)}


def test_an_answer_that_cannot_be_sent_does_not_end_the_commands() -> None:
    answered = threading.Event()

    def away(name: str, answer: bytes) -> None:
        raise OSError("no connection")

    commands = Commands({"rebuild": lambda *_: {}})
    commands.start()
    commands.receive("cam0", "rebuild", b"", False, away)
    commands.receive("cam0", "rebuild", b"", False, lambda name, answer: answered.set())
    assert answered.wait(20)
    commands.stop()


def test_a_trigger_does_not_wait_behind_other_commands() -> None:
    """Its part would get a later picture. A product sent before it is its part's even so, also from behind."""
    calls: list[dict[str, Any]] = []
    answers: dict[str, threading.Event] = {name: threading.Event() for name in ("acknowledge", "product", "trigger")}
    reached, gate = threading.Event(), threading.Event()

    def hold(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        assert gate.wait(20)
        return {}

    def note(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append(arguments)
        return {}

    commands = Commands({"acknowledge": hold, "product": hold, "trigger": note})
    commands.start()

    def send(name: str, payload: bytes, camera: str = "cam0") -> None:
        commands.receive(camera, name, payload, False, lambda name, answer: answers[name].set())

    try:
        send("acknowledge", b"{}")
        assert reached.wait(20)
        send("trigger", b'{"part_id": "A"}')
        assert calls == [{"part_id": "A"}] and answers["trigger"].is_set() and not answers["acknowledge"].is_set()
        send("product", b'{"product": "poly"}')
        send("trigger", b'{"part_id": "B"}')
        send("trigger", b'{"part_id": "C"}', camera="cam1")
        gate.set()
        assert answers["product"].wait(20)
        send("trigger", b'{"part_id": "D"}')
    finally:
        gate.set()
        commands.stop()
    assert calls[1:] == [{"part_id": "B", "product": "poly"}, {"part_id": "C"}, {"part_id": "D"}]


def test_a_product_that_is_refused_as_busy_is_no_triggers() -> None:
    calls: list[dict[str, Any]] = []
    commands = Commands({"product": lambda *_: {}, "trigger": lambda camera, arguments: calls.append(arguments)})
    refused: list[bytes] = []
    for index in range(100):  # not started: none of them is done, and the queue fills
        product = b'{"product": "p%d"}' % index
        commands.receive(f"cam{index}", "product", product, False, lambda _, answer: refused.append(answer))
        commands.receive(f"cam{index}", "trigger", b'{"part_id": "A"}', False, lambda *_: None)
    waiting = 100 - len(refused)
    assert refused and waiting and all(b"busy" in answer for answer in refused)
    assert [each.get("product") for each in calls] == [f"p{i}" for i in range(waiting)] + [None] * len(refused)


def test_retained_command_is_refused(
    commanded: Any, line: Any, consumer: Any, broker: EmbeddedBroker, base: str
) -> None:
    commanded.running.delivery.stop()
    consumer.client.publish(f"{base}/cam0/cmd/trigger", b'{"part_id":"old"}', 1, True).wait_for_publish(5)
    commanded.running.delivery.start()
    consumer.until(lambda: any("retained" in (r["error"] or "") for r in consumer.of("result")))
    assert commanded.calls == []


def test_a_retained_command_is_refused_while_connected_and_may_be_cleared(
    commanded: Any, consumer: Any, base: str
) -> None:
    (answer,) = commanded("trigger", b'{"id":"old","part_id":"old"}', retain=True)
    assert answer["error"] == "a retained command is not executed" and answer["id"] == "old"
    for name in ("trigger", "acknowledge", "rebuild"):  # of these two, an empty message is a whole command
        consumer.client.publish(f"{base}/cam0/cmd/{name}", b"", 1, True)
    (answer,) = commanded("acknowledge", b'{"id":"after"}')
    assert answer["id"] == "after" and commanded.calls == [("cam0", {})], "clearing a topic is no command"


def test_ten_thousand_malformed_commands_leave_no_trace(
    commanded: Any, consumer: Any, base: str, eventually: Any
) -> None:
    counts = commanded.running.commands.counts
    for index in range(2000):
        consumer.client.publish(f"{base}/cam0/cmd/x{index}", b"{", 1)
    eventually(lambda: counts["limited"] + counts["refused"] == 2000, 30)
    before = resident_memory()["resident"]
    for index in range(8000):
        consumer.client.publish(f"{base}/cam0/cmd/y{index}", b'{"id":"%d"' % index + b"x" * 200, 1)
    eventually(lambda: counts["limited"] + counts["refused"] == 10_000, 60)
    grown = resident_memory()["resident"] - before
    assert grown < 20, f"{grown} MB more resident memory"
    assert len(consumer.of("result")) < 60 and len(commanded.running.commands._buckets) < 10
    (answer,) = commanded("acknowledge", b"{}")
    assert answer["ok"]


def test_oversized_command_is_not_taken(commanded: Any, consumer: Any, base: str) -> None:
    consumer.client.publish(f"{base}/cam0/cmd/trigger", b'{"part_id":"' + b"x" * 100_000 + b'"}', 1).wait_for_publish(5)
    (answer,) = commanded("acknowledge", b"{}")
    assert answer["command"] == "acknowledge" and commanded.calls == [("cam0", {})]


def test_rate_is_limited_and_said(commanded: Any, consumer: Any, base: str) -> None:
    for _ in range(100):
        consumer.client.publish(f"{base}/cam0/cmd/acknowledge", b"{}", 1)
    consumer.until(lambda: any("too many" in (r["error"] or "") for r in consumer.of("result")))
    consumer.until(lambda: sum(commanded.running.commands.counts.values()) == 100)
    assert 20 <= len(commanded.calls) <= 30


def test_token_bucket() -> None:
    clock = [0.0]
    bucket = TokenBucket(2.0, 3, lambda: clock[0])
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    clock[0] = 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


# -- the embedded broker ---------------------------------------------------------------------------------------------


def test_port_in_use_is_said(broker: EmbeddedBroker) -> None:
    with pytest.raises(DeliveryError, match=r"(?s)did not start.*in use"):
        EmbeddedBroker(broker.port).start()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="THE END OF AN ORPHANED BROKER IS NOT TESTED: no setpriv")
def test_broker_ends_with_a_process_that_is_killed(eventually: Any) -> None:
    script = (
        "import os, signal\n"
        "from andon.runtime.broker import EmbeddedBroker\n"
        "broker = EmbeddedBroker().start()\n"
        "print(broker.port, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    port = int(killed.stdout)

    def gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    assert killed.returncode == -9
    eventually(gone)


def test_missing_mosquitto_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(DeliveryError, match="apt-get install -y mosquitto"):
        EmbeddedBroker().start()


def test_missing_password_variable_is_said(line: Any, broker: EmbeddedBroker, eventually: Any) -> None:
    with line(broker.port, username="u", password_env="ANDON_NO_SUCH_VARIABLE") as running:
        eventually(lambda: "ANDON_NO_SUCH_VARIABLE" in running.delivery.health().reason)


def test_unknown_handler_is_refused() -> None:
    with pytest.raises(ValueError, match="not a command"):
        Commands({"dance": lambda camera, arguments: None})
    assert issubclass(ConfigError, Exception)


def test_losses_and_damage_are_told(line: Any, broker: EmbeddedBroker, tmp_path: Path, eventually: Any) -> None:
    with line(broker.port) as running:
        eventually(lambda: running.delivery.health().connected)
        assert running.delivery.health().trouble() == ""
        running.outbox._caps = (1000, 3600.0)
        broker.kill()
        running.send(20)
        eventually(lambda: "dropped" in running.delivery.health().trouble())
        assert running.outbox.stats().dropped > 10
    (tmp_path / "outbox.db").write_bytes(b"x" * 8192)
    with line(broker.port) as running:
        assert "damaged" in running.delivery.health().trouble()


def test_an_outage_is_trouble_only_after_the_grace(line: Any, broker: EmbeddedBroker, eventually: Any) -> None:
    broker.stop()
    with line(broker.port) as running:
        eventually(lambda: "nothing listens" in running.delivery.health().trouble())
        assert running.delivery.health().trouble(60.0) == ""
