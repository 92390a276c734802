"""Triggers over MQTT for whoever takes pictures without being the line: ``<camera>/cmd/trigger`` and its answers.

Nothing else is subscribed to, and no status is published: a recording is not the line.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.subscribeoptions import SubscribeOptions

from ..errors import AndonError, DeliveryError
from ..lineconfig import BrokerConfig
from .client import CONNECT_TIMEOUT, explain, explain_connack, make_client, tls_context
from .commands import Commands

log = logging.getLogger("andon.record")
_RETRY_MIN = 0.5


class TriggerListener:
    """A connection that takes triggers of some cameras, taken up again when it is lost. A context manager.

    Entering it waits for the broker's first answer.

    Raises:
        DeliveryError: the broker cannot be reached or refuses, or a certificate or password is missing.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        base: str,
        cameras: Sequence[str],
        handler: Callable[[str, dict[str, Any]], Mapping[str, Any]],
    ):
        """base: the station's topic. handler: see :data:`andon.runtime.mqtt.commands.Handler`; it must not block."""
        self._broker = broker
        self._topics = {f"{base}/{camera}/cmd/trigger": camera for camera in cameras}
        self._commands = Commands({"trigger": handler})
        self._stop = threading.Event()
        self._answered = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="triggers", daemon=True)

    def __enter__(self) -> TriggerListener:
        self._thread.start()
        if not self._answered.wait(2 * CONNECT_TIMEOUT):
            self._failure = f"{self._broker.host}:{self._broker.port}: no answer"
        if self._failure:
            self.__exit__()
            raise DeliveryError(
                "triggers come over MQTT, and the broker cannot be used",
                found=self._failure,
                next_step="start it or mend the 'broker' section; or give --every S, which waits for no trigger",
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _make(self) -> paho.Client:
        """A client for one connection: see client.py."""
        client = make_client(self._broker, f"andon-record-{os.getpid()}", None, tls_context(self._broker.tls))
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    def _run(self) -> None:
        retry, said = _RETRY_MIN, ""
        while not self._stop.is_set():
            failure = self._connection()
            if not self._answered.is_set():  # whoever has started us waits for it
                self._failure = failure
                self._answered.set()
                return
            if self._stop.is_set():
                return
            if failure != said:
                log.warning("no triggers come: %s", failure)
                said = failure
            self._stop.wait(retry)
            retry = min(2 * retry, self._broker.retry_max)

    def _connection(self) -> str:
        """One connection until its end; why it ended. A client serves one connection only: see client.py."""
        self._failure = ""
        try:
            client = self._make()
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive)
            while not self._stop.is_set() and not self._failure:
                if client.loop(0.2) != paho.MQTT_ERR_SUCCESS:
                    break
        except AndonError as error:
            return str(error).replace("\n", ";")
        except (OSError, ssl.SSLError, ValueError) as error:
            return explain(error, self._broker)
        client.disconnect()
        client.loop(0.1)
        return self._failure or f"{self._broker.host}:{self._broker.port}: connection lost"

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._failure = explain_connack(reason, self._broker)
        elif self._broker.protocol == "5":  # the flag of a retained trigger, which is refused, stays as published
            options = SubscribeOptions(qos=1, retainAsPublished=True)
            client.subscribe([(topic, options) for topic in self._topics])
        else:
            client.subscribe([(topic, 1) for topic in self._topics])

    def _on_subscribe(self, _client: Any, _data: Any, _mid: int, reasons: Sequence[Any], _properties: Any) -> None:
        refused = [topic for topic, reason in zip(self._topics, reasons, strict=True) if reason.is_failure]
        if refused:
            self._failure = f"the broker refuses the subscription to {', '.join(refused)}: its ACL (docs/mosquitto/acl)"
            return
        if self._answered.is_set():
            log.warning("triggers come again")
        self._answered.set()

    def _on_message(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        camera = self._topics.get(message.topic)
        if camera is None:
            return

        def reply(name: str, answer: bytes) -> None:
            client.publish(f"{message.topic}/result", answer, qos=1)

        self._commands.receive(camera, "trigger", bytes(message.payload), message.retain, reply)
