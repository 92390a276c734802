"""The connection of one camera to the broker: kept up for ever by one thread, fed from the outbox.

Each camera has a connection of its own because MQTT gives a connection one will: when a station dies, every camera's
status topic says offline, none stays at a stale online.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import AndonError, DeliveryError
from ..lineconfig import BrokerConfig
from ..outbox import Outbox
from .hooks import Direct, Hooks
from .packets import Heavy
from .session import KINDS, Lost, Session

log = logging.getLogger("andon.mqtt")

_FIRST_PAUSE = 0.5
#: A connection that lasted this many seconds was a good one: the next outage starts with short pauses again.
_STEADY = 5.0
#: So many short connections in a row are no accident.
_SUSPICIOUS = 3
#: Seconds without any acknowledgement of what is in flight until that is said, and until a new connection is tried, on
#: which everything is sent again: a broker may have forgotten, or throttled away, what it should acknowledge.
_QUIET, _HOPELESS = 30.0, 120.0
_DIRECT = 256
#: Pictures that wait for the connection; more do where it is slower than they come, and would only grow old.
_PICTURES = 8
#: Why a connection is down while its first attempt has not been answered.
NOT_YET = "not connected yet"


@dataclass(frozen=True)
class LinkState:
    """How the connection stands. reason: why it is down, empty while it is up. since: monotonic seconds.

    refused: topic and reason, for topics whose messages the broker does not take at the moment.
    too_large: messages of this run that were not sent because they exceed what the broker takes.
    pictures_skipped: pictures of this run that were not sent because the connection was slower than they came, or was
        lost while they waited.
    silent_since: monotonic seconds since which the broker acknowledges nothing; None while it does. It outlasts a new
        connection until one is acknowledged there.
    """

    connected: bool = False
    reason: str = NOT_YET
    since: float = 0.0
    connects: int = 0
    attempts: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    too_large: int = 0
    pictures_skipped: int = 0
    silent_since: float | None = None

    @property
    def trouble(self) -> str:
        """What is wrong although it is connected; empty when nothing is."""
        for topic, why in self.refused:
            return f"{topic}: {why}"
        if self.silent_since is None:
            return ""
        return f"connected, but no acknowledgement for {time.monotonic() - self.silent_since:.0f} s"


class Publisher:
    """See the module. Owns one thread between :meth:`start` and :meth:`stop`.

    Args:
        client_id: unique at the broker.
        base: the station's topic.
        cameras: the camera of this connection first, then others whose stored messages it delivers too.
        inflight: messages offered and not yet acknowledged; the broker's Receive Maximum may lower it.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        base: str,
        cameras: Sequence[str],
        outbox: Outbox,
        inflight: int,
        hooks: Hooks,
    ):
        self._broker = broker
        self._client_id = client_id
        self._base = base
        self._cameras = tuple(cameras)
        self._outbox = outbox
        self._inflight = inflight
        self._hooks = replace(hooks, refused=self._on_refused, too_large=self._on_too_large)
        self._outer_refused = hooks.refused
        self._refused: dict[str, str] = {}
        self._said_too_large: set[tuple[str, int]] = set()
        self._direct: deque[Direct] = deque(maxlen=_DIRECT)
        self._pictures: deque[Direct] = deque()
        self._pictures_skipped = 0
        self._pictures_lost = 0
        self._state = LinkState(since=time.monotonic())
        self._announce = False
        self._up_at = 0.0
        self._short = 0
        self._heavy: Heavy | None = None
        self._after_heavy = 0
        self._stop = threading.Event()
        self._drain = 0.0
        self._wake_read, self._wake_write = -1, -1
        self._awake = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> LinkState:
        """A snapshot."""
        return replace(self._state, pictures_skipped=self._pictures_skipped + self._pictures_lost)

    def start(self) -> None:
        """Start the thread; it connects by itself and never gives up."""
        if self._thread is not None:
            raise DeliveryError("the publisher is already running", found=self._client_id)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._outbox.listen(self.wake, self._cameras)
        self._thread = threading.Thread(target=self._run, name=f"andon-mqtt-{self._cameras[0]}", daemon=True)
        self._thread.start()

    def stop(self, drain: float = 2.0) -> None:
        """Deliver what is stored for up to ``drain`` seconds if connected, say `stopped`, disconnect, join."""
        self._drain = drain
        self._stop.set()
        self.wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._awake:
            for descriptor in (self._wake_read, self._wake_write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._wake_read = self._wake_write = -1

    def wake(self) -> None:
        """There is something to send; from any thread."""
        with self._awake:
            if self._wake_write >= 0:
                try:
                    os.write(self._wake_write, b"\0")
                except BlockingIOError:
                    return  # the pipe is full of wake-ups already

    def send(self, message: Direct) -> None:
        """Queue a message that is not stored: dropped while the broker is away, unless it answers a command."""
        if self._state.connected or (message.qos and not message.retain):
            self._direct.append(message)
            self.wake()

    def picture(self, message: Direct) -> None:
        """Queue a picture, from one thread: dropped while the broker is away, skipped and counted while many wait."""
        if not self._state.connected:
            return
        if len(self._pictures) < _PICTURES:
            self._pictures.append(message)
            self.wake()
            return
        if not self._pictures_skipped:
            log.warning(
                "%s: the connection is slower than the pictures come; those that are skipped are counted",
                self._client_id,
            )
        self._pictures_skipped += 1

    def announce(self) -> None:
        """Publish status and alarms again; while disconnected the next connect does it anyway."""
        self._announce = True
        self.wake()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            connects = self._state.connects
            try:
                self._serve()
            except Lost as lost:
                self._down(str(lost))
            except AndonError as error:  # a certificate or password file that is gone: mended by hand, then retried
                self._down(error.what + (f" ({error.found})" if error.found is not None else ""))
            except Exception as error:  # what a broker sends may be anything; the next connection starts afresh
                log.exception("%s", self._client_id)
                self._down(f"internal error: {type(error).__name__}: {error}")
            if self._state.connects > connects and not self._short:
                pause = _FIRST_PAUSE
            # Full jitter keeps a plant's stations from returning all at once.
            self._stop.wait(random.uniform(_FIRST_PAUSE / 2, pause))
            pause = min(pause * 2, self._broker.retry_max)

    def _serve(self) -> None:
        session = Session(
            self._broker,
            self._client_id,
            self._base,
            self._cameras,
            self._outbox,
            self._inflight,
            self._hooks,
            self._wake_read,
        )
        self._state = replace(self._state, attempts=self._state.attempts + 1)
        try:
            session.open(self._stop.is_set)
            self._up()
            while not self._stop.is_set():
                self._turn(session)
                self._watch_acknowledgements(session)
            deadline = time.monotonic() + self._drain
            while time.monotonic() < deadline and not (session.idle and not self._direct and not self._pictures):
                session.step(0.05, self._direct, self._pictures)
            session.farewell(1.0)
            self._state = replace(self._state, connected=False, reason="stopped", since=time.monotonic())
        finally:
            self._heavy = session.unproved
            session.close()

    def _turn(self, session: Session) -> None:
        if self._announce:
            self._announce = False
            session.announce()
        session.step(1.0, self._direct, self._pictures)
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return  # nobody woke us

    def _watch_acknowledgements(self, session: Session) -> None:
        """A connection that stands and acknowledges nothing is no delivery.

        Raises:
            Lost: it has been so for too long.
        """
        quiet, since = session.unanswered, self._state.silent_since
        if since is not None and session.answered_at > since:
            log.info("%s: the broker acknowledges again", self._client_id)
            self._state = replace(self._state, silent_since=None)
        elif since is None and quiet >= _QUIET:
            log.warning(
                "%s: connected, but the broker acknowledges nothing; verdicts wait in the outbox", self._client_id
            )
            self._state = replace(self._state, silent_since=time.monotonic() - quiet)
        if quiet >= _HOPELESS:
            raise Lost(f"nothing acknowledged for {quiet:.0f} s, connecting anew")

    def _up(self) -> None:
        log.info("%s: connected to %s:%d", self._client_id, self._broker.host, self._broker.port)
        self._refused.clear()
        self._up_at = time.monotonic()
        self._state = replace(
            self._state, connected=True, reason="", since=self._up_at, connects=self._state.connects + 1, refused=()
        )

    def _down(self, reason: str) -> None:
        if self._stop.is_set():
            return
        was = self._state
        if was.connected:
            self._short = self._short + 1 if time.monotonic() - self._up_at < _STEADY else 0
            self._after_heavy = self._after_heavy + 1 if self._heavy else 0
        if self._heavy and self._after_heavy >= _SUSPICIOUS:
            reason += (
                f", time and again after a message ({self._heavy.kind}, now {self._heavy.size} bytes): does the broker "
                "take none so large? Then set broker.max_packet"
            )
        elif self._short >= _SUSPICIOUS:
            # mosquitto closes the older connection of a client id without telling it why.
            reason += f", time and again soon after connecting: does another client use the id {self._client_id}?"
        if reason != was.reason:
            log.warning("%s: %s; verdicts wait in the outbox, retrying", self._client_id, reason)
        since = time.monotonic() if was.connected else was.since
        self._state = replace(was, connected=False, reason=reason, since=since)
        self._pictures_lost += len(self._pictures)
        self._pictures.clear()  # nobody wants them after the outage, ahead of what is new then

    def _on_refused(self, topic: str, reason: str | None) -> None:
        # Home Assistant's discovery is the only topic outside the station's: without it the line still tells all it has
        # to tell, so it is said here and is no trouble of the delivery.
        if not topic.startswith(f"{self._base}/"):
            log.warning("%s: %s: %s", self._client_id, topic, reason or "the broker takes it again")
        elif reason is None:
            self._refused.pop(topic, None)
            if topic.endswith("/result"):  # nothing is sent there until the next command
                log.info("%s: no more answers are refused on %s", self._client_id, topic)
            else:
                log.info("%s: the broker takes %s again", self._client_id, topic)
        else:
            self._refused[topic] = reason
            what = "kept and retried" if topic.rsplit("/", 1)[1] in KINDS else "what is sent there does not arrive"
            log.warning("%s: the broker refuses %s: %s; %s", self._client_id, topic, reason, what)
        self._state = replace(self._state, refused=tuple(self._refused.items()))
        self._outer_refused(topic, reason)

    def _on_too_large(self, kind: str, size: int, limit: int) -> None:
        if (kind, limit) not in self._said_too_large:  # said once: pictures may come several a second
            self._said_too_large.add((kind, limit))
            log.error(
                "%s: a message (%s) of %d bytes is not sent: the broker takes at most %d (its Maximum Packet Size, "
                "or broker.max_packet); from here on they are only counted, as too_large",
                self._client_id, kind, size, limit,
            )  # fmt: skip
        self._state = replace(self._state, too_large=self._state.too_large + 1)
