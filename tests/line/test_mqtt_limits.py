"""What a broker does not take: too large a message, pictures on a slow connection, more at once than it allows."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt import publisher, session
from andon.runtime.mqtt.hooks import Direct, Hooks
from andon.runtime.mqtt.packets import packet_size
from andon.runtime.outbox import Outbox
from andon.runtime.types import Region, Verdict
from andon.runtime.verdict import Ids

from .connection import verdict


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


@pytest.mark.parametrize(("rest", "whole"), [(127, 129), (128, 131), (16383, 16386), (16384, 16388)])
def test_a_packets_size_is_known_to_the_byte(rest: int, whole: int) -> None:
    """A verdict of one byte more than the broker takes would end each connection anew."""
    topic = "é/b"
    for qos, protocol, header in ((1, "5", 9), (1, "3.1.1", 8), (0, "5", 7), (0, "3.1.1", 6)):
        assert packet_size(topic, bytes(rest - header), qos, protocol) == whole


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
            assert running.delivery.health().trouble() == "messages were lost: larger than the broker takes"
            assert running.delivery.health().links["cam0"].connects == 1
        consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
    assert consumer.of("status")[-1]["outbox"]["dropped"] == 1


def test_pictures_that_wait_when_the_connection_is_lost_are_not_sent_after_the_outage(
    line: Any, broker: EmbeddedBroker, eventually: Any
) -> None:
    dam = Dam(broker.port)
    with line(dam.port) as running:
        assert running.delivery.wait_connected(10)
        dam.open.clear()
        sent = 0
        while running.delivery.health().pictures_skipped == 0:
            running.delivery.picture("cam0", str(sent), bytes(300_000))
            sent += 1
            assert sent < 200, "they pile up"
        broker.stop()
        eventually(lambda: not running.delivery.health().connected)
        # One or two had been handed to the connection.
        eventually(lambda: running.delivery.health().pictures_skipped >= sent - 2)
        dam.open.set()
        broker.start()


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


def test_what_a_broker_has_taken_is_not_suspected(tmp_path: Path, broker: EmbeddedBroker, eventually: Any) -> None:
    """Nor any as large on the same connection. A picture is not acknowledged; a ping that is answered says as much."""
    config = BrokerConfig(port=broker.port).model_copy(update={"keepalive": 1})
    hooks = Hooks(lambda state: b"{}", lambda: None, *[lambda *_: None] * 4)
    wake, other = os.pipe()
    with Outbox(tmp_path / "outbox.db") as outbox:
        connection = session.Session(config, "a", "andon/v1/a/b/c", ["cam0"], outbox, 8, hooks, wake)
        connection.open(lambda: False)
        direct: deque[Direct] = deque()
        pictures = deque([Direct("evidence", bytes(60_000), qos=0)])

        def sent() -> bool:
            connection.step(0.1, direct, pictures)
            return not pictures

        eventually(sent)
        assert connection.unproved and connection.unproved.size > 60_000
        eventually(lambda: sent() and connection.unproved is None)
        for size, suspect in ((60_000, False), (60_001, True)):
            pictures.append(Direct("evidence", bytes(size), qos=0))
            eventually(sent)
            assert (connection.unproved is not None) is suspect
        connection.close()
    os.close(wake)
    os.close(other)


class Reluctant:
    """A broker of MQTT 5 that takes one unacknowledged message at a time (Receive Maximum 1).

    It answers only when the client falls silent, so the client has every occasion to send too much or too early.
    While it is mute it acknowledges nothing.
    """

    def __init__(self, subscriptions: bool = True) -> None:
        self.mute = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._subscriptions = subscriptions
        self.most = 0
        self.early = 0
        self.topics: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._attend(self._listener.accept()[0])

    def _attend(self, connection: socket.socket) -> None:
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
                    if self.mute:
                        continue
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


def test_answers_to_commands_keep_to_the_brokers_receive_maximum(line: Any, eventually: Any) -> None:
    """Above it a broker ends the connection."""
    broker = Reluctant()
    with line(broker.port) as running:
        assert running.delivery.wait_connected(10)
        for _ in range(3):
            running.delivery._publishers["cam0"].send(Direct("cmd/acknowledge/result", b"{}"))
        running.send(1)
        eventually(lambda: broker.topics.count("result") == 3 and "verdict" in broker.topics)
    assert broker.most == 1


def test_a_broker_that_acknowledges_nothing_is_said_and_tried_anew(
    line: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publisher, "_QUIET", 0.5)
    monkeypatch.setattr(publisher, "_HOPELESS", 1.5)
    broker = Reluctant()
    with line(broker.port) as running:
        running.send(2)
        eventually(lambda: broker.topics.count("verdict") == 2)
        broker.mute = True
        running.send(2)
        eventually(lambda: "no acknowledgement for" in running.delivery.health().trouble())
        health = running.delivery.health()
        assert health.connected and health.links["cam0"].connects == 1 and "no acknowledgement" in health.reason
        eventually(lambda: running.delivery.health().links["cam0"].connects == 2, 20)
        assert running.delivery.health().trouble(), "a new connection alone is no acknowledgement"
        broker.mute = False
        eventually(lambda: running.delivery.health().trouble() == "" and running.outbox.stats().messages == 0, 20)
        assert running.delivery.health().acknowledged == 4
    assert sum("the broker acknowledges nothing" in text for text in caplog.messages) == 1


def test_verdicts_reach_a_broker_that_answers_no_subscription(
    line: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 0.5)
    broker = Reluctant(subscriptions=False)
    with line(broker.port) as running:
        running.send(2)
        eventually(lambda: broker.topics.count("verdict") == 2)
    assert "no answer in 0.5 s; no command will arrive" in caplog.text
