"""One connection from CONNECT to its end, driven by one thread through paho's external-loop API."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from ..lineconfig import BrokerConfig
from ..outbox import Outbox
from ..stored import Stored
from ..verdict import mark_replayed, whole
from .backlog import LOOK, Backlog
from .client import CONNECT_TIMEOUT, Will, explain, explain_connack, explain_lost, make_client, tls_context
from .hooks import Direct, Hooks
from .packets import HEAVY, Heavy, packet_size
from .stream import Stream

log = logging.getLogger(__name__)

#: Alarms first: an operator waits for them.
KINDS = ("alarm", "verdict")
#: Largest command we let a broker send us, in bytes.
MAX_COMMAND = 65536
#: Bytes that the kernel takes beyond what it can send, or a picture would be "sent" and in a verdict's way for seconds.
_UNSENT = 16384
#: Seconds until what is retained is published again on a topic that the broker has refused.
_AGAIN = 30.0
#: Seconds for which a refused answer to a command is trouble: it is not sent again, so nothing would end it.
_SHOWN = 60.0


class Lost(Exception):
    """The connection could not be made or has ended; the text says why."""


class Session:
    """See the module.

    Args:
        base: the station's topic. cameras: the camera that this connection speaks for, first, and others whose stored
            messages it delivers too. wake: a descriptor that becomes readable when there is something to send.
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
        wake: int,
    ):
        self._broker = broker
        self._base = base
        self._cameras = tuple(cameras)
        self._topic = f"{base}/{cameras[0]}"
        self._outbox = outbox
        self._window = inflight
        self._packet_limit = broker.max_packet
        self._heavy: Heavy | None = None
        self._pinged: Heavy | None = None  # the heavy one that was sent before the last ping
        self._proved = HEAVY  # the broker takes so many bytes
        self._hooks = hooks
        self._wake = wake
        self._connack: ReasonCode | None = None
        self._suback: ReasonCode | None = None
        self._last_error = ""
        self._acked: list[Stored] = []
        self._flying: dict[int, tuple[Stream, Stored] | str] = {}  # by packet id; topic of what is not stored
        self._refused: dict[str, str] = {}  # of the latter: topic -> reason
        self._again_at = 0.0
        self._answers: dict[str, float] = {}  # those of them that are answers -> until when they count
        self._flying_since = 0.0
        self.answered_at = 0.0  # monotonic seconds of the last acknowledgement; 0: none yet
        self._streams: dict[str, Stream] = {}
        self._state = "online"
        self._retained: dict[str, Callable[[], bytes | None]] = {
            f"{self._topic}/status": lambda: self._hooks.status(self._state),
            f"{self._topic}/alarm": hooks.alarm,
        }
        self._owed: dict[str, Callable[[], bytes | None]] = {}
        self._misc_at = 0.0
        self._backlog = Backlog(time.monotonic())
        self._selector = selectors.DefaultSelector()
        will = Will(f"{self._topic}/status", hooks.status("offline"))
        self._client = make_client(broker, client_id, will, tls_context(broker.tls))
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message
        self._client.on_disconnect = self._on_disconnect
        self._client.on_log = self._on_log

    # -- life ------------------------------------------------------------------------------------------------------

    def open(self, stop: Callable[[], bool]) -> None:
        """Connect, wait for the broker's answer, subscribe, announce.

        Raises:
            Lost: with the reason.
        """
        try:
            self._client.connect(
                self._broker.host, self._broker.port, self._broker.keepalive, properties=self._limits()
            )
        except (OSError, ssl.SSLError, ValueError) as error:
            raise Lost(explain(error, self._broker)) from error
        self._backlog = Backlog(time.monotonic())  # before there was a connection nothing could lie there
        if (option := getattr(socket, "TCP_NOTSENT_LOWAT", None)) is not None:
            self._socket().setsockopt(socket.IPPROTO_TCP, option, _UNSENT)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._wait_for(lambda: self._connack is not None, stop)
        if self._connack is None:
            raise Lost(f"{self._broker.host}:{self._broker.port}: no answer to CONNECT in {CONNECT_TIMEOUT:g} s")
        if self._connack.is_failure:
            raise Lost(explain_connack(self._connack, self._broker))
        # Before `online` is said: a command that comes before the broker has taken the subscription is lost.
        commands = f"{self._topic}/cmd/+"
        # The flag of a retained command, which is refused, stays only as published: else it is cleared for subscribers
        # that are there already.
        if self._broker.protocol == "5":
            self._client.subscribe(commands, options=SubscribeOptions(qos=1, retainAsPublished=True))
        else:
            self._client.subscribe(commands, qos=1)
        self._wait_for(lambda: self._suback is not None, stop)
        if self._suback is None or self._suback.is_failure:  # verdicts are delivered all the same
            why = self._suback or f"no answer in {CONNECT_TIMEOUT:g} s"
            log.warning("%s: the broker refuses the subscription: %s; no command will arrive", commands, why)
        boundary = self._outbox.next_key
        self._streams = {kind: Stream(kind, self._reader(kind), boundary) for kind in KINDS}
        self.announce()
        if (described := self._hooks.discovery()) is not None:
            topic, payload = described
            self._retained[topic] = self._owed[topic] = lambda: payload
        self._settle()

    def _wait_for(self, answered: Callable[[], bool], stop: Callable[[], bool]) -> None:
        """Turn until the broker has answered, CONNECT_TIMEOUT at most."""
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while not answered() and time.monotonic() <= deadline:
            if stop():
                raise Lost("stopped while connecting")
            self._turn(0.2)

    def announce(self) -> None:
        """Publish status and alarms, retained, as they are when the window has room for them."""
        for topic in (f"{self._topic}/status", f"{self._topic}/alarm"):
            self._owed[topic] = self._retained[topic]

    def step(self, timeout: float, direct: deque[Direct], pictures: deque[Direct]) -> None:
        """Send what may be sent, then wait up to ``timeout`` seconds for the broker or for something new.

        A picture is sent when nothing that was to be sent before is still here, so a verdict waits for one at most.

        Raises:
            Lost: the connection has ended.
        """
        self._settle()
        while direct and len(self._flying) < self._window:
            self.send(direct.popleft())
        self._offer()
        while pictures and not self._client.want_write():
            self.send(pictures.popleft())
        self._turn(timeout)
        if self._acked:
            acked, self._acked = self._acked, []
            self._outbox.done(acked)
            self._hooks.acknowledged(acked)

    @property
    def idle(self) -> bool:
        """Nothing in flight and nothing more to offer."""
        return not (self._flying or self._owed) and not any(
            self._outbox.fetch(self._cameras, kind, 0, 1) for kind in KINDS if not self._streams[kind].refusal
        )

    @property
    def unproved(self) -> Heavy | None:
        """The largest message that may have been too large, if the connection is lost now; None: there is none."""
        return self._heavy

    @property
    def inflight(self) -> int:
        """Messages offered and not yet acknowledged."""
        return len(self._flying)

    @property
    def unanswered(self) -> float:
        """Seconds for which messages were in flight and the broker has acknowledged none."""
        return time.monotonic() - max(self._flying_since, self.answered_at) if self._flying else 0.0

    def farewell(self, timeout: float) -> None:
        """Publish `stopped` and disconnect properly, so that the will stays unsaid.

        A broker that leaves no room for `stopped` in time says `offline` instead: better than a stale `online`.
        """
        self._state = "stopped"
        status = f"{self._topic}/status"
        self._owed = {status: self._retained[status]}
        with contextlib.suppress(Lost):
            deadline = time.monotonic() + timeout
            while (self._owed or self._flying) and time.monotonic() < deadline:
                self.step(0.1, deque(), deque())
            if status not in self._owed:
                self._client.disconnect()

    def close(self) -> None:
        """Let go of the descriptors."""
        self._selector.close()
        if (sock := self._client.socket()) is not None:
            sock.close()

    # -- sending ---------------------------------------------------------------------------------------------------

    def send(self, message: Direct) -> None:
        """Publish a message that is not stored.

        Raises:
            Lost: the connection has ended.
        """
        self._publish(f"{self._topic}/{message.leaf}", message.payload, message.qos, message.retain, None)

    def _settle(self) -> None:
        """Publish what is owed to the retained topics, as far as the window has room; before anything else."""
        if self._refused and time.monotonic() >= self._again_at:
            self._again_at = time.monotonic() + _AGAIN
            self._owed.update((topic, self._retained[topic]) for topic in self._refused if topic in self._retained)
        for topic in [topic for topic, until in self._answers.items() if time.monotonic() >= until]:
            self._answered(topic, None)
        while self._owed and len(self._flying) < self._window:
            topic = next(iter(self._owed))
            if (payload := self._owed.pop(topic)()) is not None:
                self._publish(topic, payload, 1, True, None)

    def _offer(self) -> None:
        for kind in KINDS:
            stream = self._streams[kind]
            while (message := stream.next(self._window - len(self._flying))) is not None:
                replayed = stream.replayed(message)
                # Of what was put just now there is no need to ask.
                if replayed and not whole(message.payload, message.camera, kind, message.id):
                    stream.given_up(message)
                    self._outbox.give_up(message, damaged=True)
                    continue
                # An old alarm must not overwrite the retained state that announce() has just published.
                retain = kind == "alarm" and not replayed
                payload = mark_replayed(message.payload) if replayed else message.payload
                if not self._publish(f"{self._base}/{message.camera}/{kind}", payload, 1, retain, (stream, message)):
                    stream.given_up(message)
                    self._outbox.give_up(message)

    def _publish(
        self, topic: str, payload: bytes, qos: int, retain: bool, origin: tuple[Stream, Stored] | None
    ) -> bool:
        """False where it is larger than the broker takes: sent all the same, it would end the connection."""
        size = packet_size(topic, payload, qos, self._broker.protocol)
        kind = topic.removeprefix(f"{self._base}/").split("/")[1]
        if self._packet_limit is not None and size > self._packet_limit:
            self._hooks.too_large(kind, size, self._packet_limit)
            return False
        if size > (self._heavy.size if self._heavy else self._proved):
            self._heavy = Heavy(kind, size, frozenset(self._flying))
        info = self._client.publish(topic, payload, qos, retain)
        if info.rc not in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_AGAIN):
            raise Lost(explain_lost(self._last_error, True, self._broker))
        if qos:
            self._flying_since = self._flying_since if self._flying else time.monotonic()
            self._flying[info.mid] = origin or topic
        return True

    def _reader(self, kind: str) -> Callable[[int, int], list[Stored]]:
        return lambda after, limit: self._outbox.fetch(self._cameras, kind, after, limit)

    def _limits(self) -> Properties | None:
        if self._broker.protocol != "5":
            return None
        properties = Properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = MAX_COMMAND + 1024
        return properties

    # -- the network -----------------------------------------------------------------------------------------------

    def _turn(self, timeout: float) -> None:
        sock = self._socket()
        interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
        try:
            self._selector.modify(sock, interest)
        except KeyError:
            self._selector.register(sock, interest)
        pending = getattr(sock, "pending", None)  # TLS may hold bytes that select() does not see
        if pending is not None and pending():
            timeout = 0
        ready = self._selector.select(min(timeout, LOOK))
        for key, events in ready:
            if key.fileobj is sock and events & selectors.EVENT_WRITE:
                self._client.loop_write()
        ours = any(key.fileobj is sock for key, _ in ready)
        self._backlog.looked(time.monotonic(), empty=not (ours or timeout == 0))
        if ours or timeout == 0:
            self._client.loop_read()
        if time.monotonic() >= self._misc_at:
            self._client.loop_misc()
            self._misc_at = time.monotonic() + 1.0
        if not self._refused_at_connect:
            self._socket()

    @property
    def _refused_at_connect(self) -> bool:
        return self._connack is not None and self._connack.is_failure

    def _socket(self) -> Any:
        sock = self._client.socket()
        if sock is None:
            raise Lost(explain_lost(self._last_error, self._connack is not None, self._broker))
        return sock

    # -- paho's callbacks, all within loop_read ----------------------------------------------------------------------

    def _on_connect(
        self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._connack = reason
        receive_maximum = getattr(properties, "ReceiveMaximum", None)
        if receive_maximum:
            self._window = min(self._window, int(receive_maximum))
        limits = (self._broker.max_packet, getattr(properties, "MaximumPacketSize", None))
        self._packet_limit = min((limit for limit in limits if limit is not None), default=None)

    def _on_subscribe(
        self, _client: Any, _data: Any, _mid: int, reasons: Sequence[ReasonCode], _properties: Properties | None
    ) -> None:
        self._suback = reasons[0]

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        if mid not in self._flying:
            return  # of QoS 0: paho has sent it, which says nothing of the broker
        origin = self._flying.pop(mid)
        self.answered_at = time.monotonic()
        if self._heavy is not None and mid not in self._heavy.before:
            self._taken(self._heavy)  # a broker reads in order
        if isinstance(origin, str):
            self._answered(origin, str(reason) if reason.is_failure else None)
            return
        stream, message = origin
        topic = f"{self._base}/{message.camera}/{stream.kind}"
        if reason.is_failure:
            if stream.refused(message, str(reason)):
                self._hooks.refused(topic, str(reason))
            return
        self._acked.append(message)
        if stream.acknowledged(message):
            self._hooks.refused(topic, None)
            if stream.kind == "alarm":
                self.announce()

    def _answered(self, topic: str, reason: str | None) -> None:
        """Of what is not stored: status, alarm board and discovery, which are retained, and answers to commands."""
        if reason is None:
            self._answers.pop(topic, None)
        elif topic not in self._retained:
            self._answers[topic] = time.monotonic() + _SHOWN
        if reason == self._refused.get(topic):
            return
        if reason is None:
            del self._refused[topic]
        else:
            self._refused[topic] = reason
            self._again_at = time.monotonic() + _AGAIN
        self._hooks.refused(topic, reason)

    def _taken(self, heavy: Heavy) -> None:
        self._heavy, self._proved = None, heavy.size

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        late = self._backlog.late(time.monotonic())
        self._hooks.command(message.topic.rsplit("/", 1)[1], bytes(message.payload), message.retain, late)

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            self._last_error = f"the broker said: {reason}"
            if reason.value == 142:
                self._last_error += "; another client uses this client id"

    def _on_log(self, _client: Any, _data: Any, level: int, text: str) -> None:
        if level == paho.MQTT_LOG_ERR:
            self._last_error = text
        elif text == "Sending PINGREQ":  # paho has no callback for pings
            self._pinged = self._heavy
        elif text == "Received PINGRESP" and self._heavy is not None and self._heavy is self._pinged:
            self._taken(self._heavy)  # else after a shift's last picture nothing would say so
