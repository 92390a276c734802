"""Everything between the judge and the broker, as the runtime uses it.

    outbox = Outbox(path, event=...)
    commands = Commands({"acknowledge": ..., "trigger": ...})
    delivery = Delivery(line.topic, list(line.cameras), line.broker, outbox, status=..., alarms=..., commands=commands)
    with outbox, delivery:
        delivery.verdict(verdict)

A run without a broker (``broker=None``) only fills the outbox.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ... import __version__
from ..alarm import AlarmBoard, AlarmEvent
from ..alarm import payload as alarm_payload
from ..lineconfig import BrokerConfig
from ..outbox import Outbox
from ..stored import MEMORY_VERSION, OutboxStats, Stored
from ..types import Verdict
from ..verdict import Ids, dumps, timestamp
from ..verdict import payload as verdict_payload
from .commands import Commands
from .homeassistant import discovery
from .hooks import Direct, Hooks
from .identity import joined
from .publisher import NOT_YET, LinkState, Publisher

STATUS_SCHEMA = "andon.status/1"
METRICS_SCHEMA = "andon.metrics/1"


#: Seconds that a loss stays a trouble; the alarm it raises is latched or not as the line is configured.
_LOSS_SHOWN = 60.0


@dataclass(frozen=True)
class DeliveryHealth:
    """How delivery stands.

    links: connection by camera. acknowledged: messages the broker took in this run. loss: what was lost, or set aside
    as damaged, within the last minute.
    """

    links: Mapping[str, LinkState]
    outbox: OutboxStats
    acknowledged: int
    loss: str = ""

    @property
    def connected(self) -> bool:
        """Whether every camera's connection is up; True without a broker to connect to."""
        return all(link.connected for link in self.links.values())

    @property
    def too_large(self) -> int:
        """Messages of this run, pictures too, that were not sent because they are larger than the broker takes."""
        return sum(link.too_large for link in self.links.values())

    @property
    def pictures_skipped(self) -> int:
        """Pictures of this run that were not sent because the connection was too slow or was lost."""
        return sum(link.pictures_skipped for link in self.links.values())

    @property
    def reason(self) -> str:
        """Why not, which topics are refused, or how long nothing was acknowledged; empty when all is well."""
        for link in self.links.values():
            if not link.connected:
                return link.reason
            if why := link.trouble:
                return why
        return ""

    def trouble(self, grace: float = 0.0) -> str:
        """The texts of :meth:`troubles`; empty when all is well."""
        return "; ".join(self.troubles(grace).values())

    def troubles(self, grace: float = 0.0) -> dict[str, str]:
        """What an operator should know and do something about: cause to text, the worst first.

        Causes: loss, disk, away, refused, silent. A connection that is down counts after ``grace`` seconds.
        """
        found = {"loss": self.loss, "disk": self.outbox.degraded or ""}
        since = time.monotonic() - grace
        for link in self.links.values():
            if not link.connected and link.since <= since:
                found.setdefault("away", link.reason)
            elif link.connected and (why := link.trouble):
                found.setdefault("refused" if link.refused else "silent", why)
        return {cause: text for cause, text in found.items() if text}


def published_version(outbox: Outbox) -> int:
    """The newest version of the memory that any verdict of this outbox was given with, delivered or not; else 0."""
    return int(outbox.load_state(MEMORY_VERSION) or 0)


class Delivery:
    """See the module. The outbox is opened and closed by its owner.

    Args:
        base: the station's topic, ``andon/v1/<site>/<line>/<station>``.
        status: camera -> further fields of its status message (bundle, method, product, source state, ...).
        alarms: camera -> its alarm message as it stands, or None; called in the publisher's thread.
        acknowledged: told of messages the broker took, in the publisher's thread.
    """

    def __init__(
        self,
        base: str,
        cameras: Sequence[str],
        broker: BrokerConfig | None,
        outbox: Outbox,
        *,
        inflight: int = 64,
        status: Callable[[str], Mapping[str, Any]] = lambda camera: {},
        alarms: Callable[[str], bytes | None] = lambda camera: None,
        commands: Commands | None = None,
        acknowledged: Callable[[list[Stored]], None] = lambda messages: None,
    ):
        self._base = base
        self._cameras = tuple(cameras)
        self._broker = broker
        self._outbox = outbox
        self._inflight = inflight
        self._status = status
        self._alarms = alarms
        self._commands = commands
        self._on_acknowledged = acknowledged
        self._since = timestamp()
        self._count = 0
        self._count_lock = threading.Lock()
        # Replaced, never changed: camera threads and the judging thread go through it while the line starts and stops.
        self._publishers: Mapping[str, Publisher] = {}
        self._last: dict[str, LinkState] = {}
        self._dropped = self._too_large = self._damaged = 0
        self._set_aside: str | None = None
        self._loss = (-_LOSS_SHOWN, "")

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start one connection per camera; the first also delivers what is stored of cameras that are gone."""
        stats = self._outbox.stats()
        self._dropped, self._too_large, self._damaged = stats.dropped, stats.too_large, stats.damaged
        if self._broker is None:
            return
        if self._commands is not None:
            self._commands.start()
        gone = [camera for camera in self._outbox.cameras() if camera not in self._cameras]
        prefix = [self._broker.client_id] if self._broker.client_id else ["andon", *self._base.split("/")[2:]]
        self._publishers = {
            camera: Publisher(
                self._broker,
                joined([*prefix, camera], "-"),
                self._base,
                [camera, *(gone if index == 0 else [])],
                self._outbox,
                self._inflight,
                self._hooks(camera),
            )
            for index, camera in enumerate(self._cameras)
        }
        for publisher in self._publishers.values():
            publisher.start()

    def stop(self, drain: float = 2.0) -> None:
        """Commit, deliver what can be delivered within ``drain`` seconds, say `stopped`, disconnect.

        In that time too a connection is waited for whose first attempt has not been answered.
        """
        if self._commands is not None:
            self._commands.stop()
        deadline = time.monotonic() + drain
        self._outbox.wait(self._outbox.next_key - 1, drain)
        self._await_first_answers(deadline)
        self._last = {camera: publisher.state for camera, publisher in self._publishers.items()}
        left = max(0.0, deadline - time.monotonic())
        stoppers = [threading.Thread(target=each.stop, args=(left,)) for each in self._publishers.values()]
        for thread in stoppers:
            thread.start()
        for thread in stoppers:
            thread.join()
        self._publishers = {}

    def _await_first_answers(self, deadline: float) -> None:
        """A short run may end before its connections are up: wait until each has been answered or refused once."""
        while any(each.state.reason == NOT_YET for each in self._publishers.values()) and time.monotonic() < deadline:
            time.sleep(0.02)

    def __enter__(self) -> Delivery:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what the runtime sends --------------------------------------------------------------------------------------

    def verdict(self, verdict: Verdict) -> int:
        """Store a verdict for delivery; returns its key in the outbox without waiting for the disk."""
        version = verdict.memory_version
        state = None if version is None else (MEMORY_VERSION, str(version).encode())
        return self._outbox.put(verdict.camera, "verdict", verdict.id, verdict_payload(verdict), state)

    def alarm(self, board: AlarmBoard, events: Sequence[AlarmEvent], ids: Ids) -> None:
        """Store the transitions of a board, and the board itself, so that a restart finds it as it was."""
        state = _board_state(board)
        for event in events:
            identifier = ids.next()
            message = alarm_payload(identifier, board.camera, board.alarms, event)
            self._outbox.put(board.camera, "alarm", identifier, message, state)

    def keep(self, board: AlarmBoard) -> None:
        """Store a board that made no transition: the window it counts in has moved on."""
        self._outbox.save_state(*_board_state(board))

    def metrics(self, camera: str, fields: Mapping[str, Any]) -> None:
        """Publish the periodic summary (QoS 0): sent if the connection is up, else dropped."""
        publisher = self._publishers.get(camera)
        if publisher is not None:
            document = {"schema": METRICS_SCHEMA, "ts": timestamp(), "camera": camera, **fields}
            publisher.send(Direct("metrics", dumps(document), qos=0))

    def picture(self, camera: str, identifier: str, jpeg: bytes) -> None:
        """Publish the picture of a verdict on ``<camera>/evidence/<id>`` (QoS 0), from one thread.

        Sent if the connection is up and takes pictures as fast as they come; verdicts do not wait for them.
        """
        publisher = self._publishers.get(camera)
        if publisher is not None:
            publisher.picture(Direct(f"evidence/{identifier}", jpeg, qos=0))

    def announce(self, camera: str | None = None) -> None:
        """Publish status and alarms again, because something in them has changed."""
        for name, publisher in self._publishers.items():
            if camera in (None, name):
                publisher.announce()

    def health(self) -> DeliveryHealth:
        """How delivery stands; after the end, how the connections were when it came."""
        links = {camera: publisher.state for camera, publisher in self._publishers.items()} or self._last
        stats = self._outbox.stats()
        now = time.monotonic()
        if stats.dropped > self._dropped:
            too_large = stats.too_large - self._too_large
            damaged = stats.damaged - self._damaged
            capped = stats.dropped - self._dropped - too_large - damaged
            # No numbers: what an alarm says stays, and they go on. outbox.dropped in the status has them.
            why = ["messages were lost: the outbox's caps dropped the oldest"] if capped else []
            why += ["messages were lost: larger than the broker takes"] if too_large else []
            why += ["messages were lost: damaged on the disk"] if damaged else []
            self._loss = (now, ", ".join(why))
            self._dropped, self._too_large, self._damaged = stats.dropped, stats.too_large, stats.damaged
        if stats.set_aside != self._set_aside:
            self._set_aside = stats.set_aside
            self._loss = (now, f"the outbox file was damaged: {stats.set_aside}")
        loss = self._loss[1] if now - self._loss[0] < _LOSS_SHOWN else ""
        return DeliveryHealth(links, stats, self._count, loss)

    def wait_connected(self, timeout: float) -> bool:
        """Whether all connections are up, waiting up to ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not all(publisher.state.connected for publisher in self._publishers.values()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    # -- what the connections ask ------------------------------------------------------------------------------------

    def _hooks(self, camera: str) -> Hooks:
        return Hooks(
            status=lambda state: self._status_payload(camera, state),
            alarm=lambda: self._alarms(camera),
            command=lambda name, payload, retained, late: self._on_command(camera, name, payload, retained, late),
            acknowledged=self._acknowledged,
            refused=lambda topic, reason: None,
            too_large=lambda kind, size, limit: None,
            discovery=lambda: self._discovery(camera),
        )

    def _discovery(self, camera: str) -> tuple[str, bytes] | None:
        prefix = self._broker.home_assistant if self._broker is not None else None
        return None if prefix is None else discovery(prefix, self._base, camera)

    def _status_payload(self, camera: str, state: str) -> bytes:
        stats = self._outbox.stats()
        return dumps(
            {
                "schema": STATUS_SCHEMA,
                "state": state,
                "ts": timestamp(),
                "since": self._since,
                "camera": camera,
                "version": __version__,
                "outbox": {
                    "messages": stats.messages,
                    "dropped": stats.dropped,
                    "degraded": stats.degraded,
                    "set_aside": stats.set_aside,
                },
                # The will is made at the connect and told when the station has died: what changes would be old news.
                **({} if state == "offline" else self._status(camera)),
            }
        )

    def _on_command(self, camera: str, name: str, payload: bytes, retained: bool, late: float) -> None:
        if self._commands is None:
            return
        publisher = self._publishers[camera]

        def reply(leaf: str, result: bytes) -> None:
            publisher.send(Direct(f"cmd/{leaf}/result", result))

        self._commands.receive(camera, name, payload, retained, reply, late)

    def _acknowledged(self, messages: list[Stored]) -> None:
        with self._count_lock:
            self._count += len(messages)
        self._on_acknowledged(messages)


def _board_state(board: AlarmBoard) -> tuple[str, bytes]:
    return f"alarm/{board.camera}", dumps(board.dump())
