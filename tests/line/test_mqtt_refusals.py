"""What a broker refuses or is never given: the rest goes on, and nothing turns for nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt import session, stream
from andon.runtime.mqtt.hooks import Hooks
from andon.runtime.outbox import Outbox
from andon.runtime.verdict import Ids
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from .outboxes import fill, message, waiting


def test_a_refused_verdict_that_the_caps_have_dropped_keeps_no_thread_busy(
    tmp_path: Path, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to try again with when the hold is over; a processor that turns for nothing is the judge's."""
    monkeypatch.setattr(stream, "_FIRST_HOLD", 0.0)
    (tmp_path / "acl").write_text("topic read #\n")
    refusals: list[str] = []
    hooks = Hooks(lambda state: b"{}", lambda: None, *[lambda *_: None] * 4)
    hooks = replace(hooks, refused=lambda topic, reason: refusals.append(topic.rsplit("/", 1)[1]))
    wake, other = os.pipe()
    with (
        EmbeddedBroker(settings=[f"acl_file {tmp_path / 'acl'}"]) as broker,
        Outbox(tmp_path / "outbox.db") as outbox,
    ):
        connection = session.Session(
            BrokerConfig(port=broker.port), "a", "andon/v1/a/b/c", ["cam0"], outbox, 8, hooks, wake
        )
        connection.open(lambda: False)
        fill(outbox, 1)
        (refused,) = waiting(outbox)

        def turn() -> None:
            connection.step(1.0, deque(), deque())

        eventually(lambda: (turn(), "verdict" in refusals)[1])
        outbox.done([refused])
        eventually(lambda: (turn(), not waiting(outbox) and not connection.inflight)[1])
        select, waits = connection._selector.select, []
        monkeypatch.setattr(connection._selector, "select", lambda wait: (waits.append(wait), select(wait))[1])
        for _ in range(3):
            turn()
        assert min(waits) > 0
        connection.close()
    os.close(wake)
    os.close(other)


@pytest.fixture
def connect(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., session.Session]]:
    """Connections without a thread, whose broker refuses the first stored message once."""
    monkeypatch.setattr(stream, "_FIRST_HOLD", 0.0)
    wake, other = os.pipe()
    opened: list[session.Session] = []

    def open_one(outbox: Outbox, alarm: Callable[[], bytes | None], **settings: Any) -> session.Session:
        hooks = Hooks(lambda state: b"{}", alarm, *[lambda *_: None] * 4)
        config = BrokerConfig(port=broker.port, **settings)
        connection = session.Session(config, "a", "andon/v1/a/b/c", ["cam0"], outbox, 8, hooks, wake)
        answered, refused = connection._client.on_publish, []

        def answers(client: Any, data: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
            if not refused and isinstance(connection._flying.get(mid), tuple):
                refused.append(mid)
                reason = ReasonCode(PacketTypes.PUBACK, "Not authorized")
            answered(client, data, mid, reason, properties)

        connection._client.on_publish = answers
        connection.open(lambda: False)
        opened.append(connection)
        return connection

    yield open_one
    for connection in opened:
        connection.close()
    os.close(wake)
    os.close(other)


@pytest.mark.parametrize("given_up", ["damaged", "too large"])
def test_what_is_given_up_keeps_nothing_behind_it_from_being_tried_again(
    tmp_path: Path, connect: Callable[..., session.Session], eventually: Any, given_up: str
) -> None:
    with Outbox(tmp_path / "outbox.db") as outbox:
        if given_up == "damaged":
            outbox.wait(outbox.put("cam0", "verdict", Ids().next(), b"{}"), 10)
        else:
            fill(outbox, 1, size=5000)
        fill(outbox, 1)
        connection = connect(outbox, lambda: None, max_packet=4000)
        eventually(lambda: (connection.step(0.1, deque(), deque()), not waiting(outbox))[1])
        assert outbox.stats().dropped == 1


def test_alarms_that_were_refused_leave_the_board_as_it_is_on_the_topic(
    tmp_path: Path, connect: Callable[..., session.Session], eventually: Any
) -> None:
    """They come again as replayed ones, which are not retained."""
    asked: list[bool] = []
    with Outbox(tmp_path / "outbox.db") as outbox:
        connection = connect(outbox, lambda: asked.append(True))
        identifier = Ids().next()
        key = outbox.put("cam0", "alarm", identifier, message(identifier).replace(b"verdict", b"alarm"))
        assert outbox.wait(key, 10) and len(asked) == 1
        eventually(lambda: (connection.step(0.1, deque(), deque()), not outbox.fetch(["cam0"], "alarm", 0, 1))[1])
        connection.step(0.1, deque(), deque())
        assert outbox.stats().dropped == 0 and len(asked) == 2
