"""Real brokers and a consumer for the tests of the line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from andon.runtime.broker import EmbeddedBroker
from paho.mqtt.enums import CallbackAPIVersion

BASE = "andon/v1/site/line/station"


@dataclass
class Received:
    topic: str
    document: dict[str, Any]
    retain: bool
    raw: bytes


@dataclass
class Consumer:
    """A subscriber that keeps everything; it reconnects by itself when the broker comes back."""

    port: int
    topic: str = "andon/v1/#"
    messages: list[Received] = field(default_factory=list)
    configure: Callable[[paho.Client], None] = lambda client: None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda c, *_: c.subscribe(self.topic, qos=1)
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = self._take
        self.configure(self.client)

    def _take(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        with self._changed:
            document = json.loads(message.payload)
            self.messages.append(Received(message.topic, document, message.retain, bytes(message.payload)))
            self._changed.notify_all()

    def __enter__(self) -> Consumer:
        self.client.connect("127.0.0.1", self.port)
        self.client.loop_start()
        assert self._subscribed.wait(10), "the consumer could not subscribe"
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def of(self, leaf: str, camera: str | None = None) -> list[dict[str, Any]]:
        """Documents of one topic leaf, in order of arrival."""
        with self._changed:
            return [
                m.document
                for m in self.messages
                if m.topic.endswith(f"/{leaf}") and (camera is None or f"/{camera}/" in m.topic)
            ]

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until the condition holds."""
        with self._changed:
            if not self._changed.wait_for(condition, seconds):
                raise AssertionError(f"not within {seconds} s; {len(self.messages)} messages have come")

    def wait_for(self, leaf: str, count: int, seconds: float = 20.0) -> list[dict[str, Any]]:
        """The documents of a leaf once there are `count` different ids."""
        with self._changed:
            enough = self._changed.wait_for(lambda: len({d.get("id") for d in self.of(leaf)}) >= count, seconds)
            assert enough, f"{len({d.get('id') for d in self.of(leaf)})} of {count} within {seconds} s"
        return self.of(leaf)

    def forget(self) -> None:
        with self._changed:
            self.messages.clear()


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


@pytest.fixture
def consumer(broker: EmbeddedBroker) -> Iterator[Consumer]:
    with Consumer(broker.port) as running:
        yield running


@pytest.fixture
def make_consumer() -> type[Consumer]:
    return Consumer


@pytest.fixture
def base() -> str:
    """Topic of the station."""
    return BASE


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., None]:
    return eventually


@pytest.fixture
def producer_script() -> Path:
    return Path(__file__).with_name("producer.py")
