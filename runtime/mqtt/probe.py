"""Is the broker there, and does it let us in? For `andon check`."""

from __future__ import annotations

import ssl
import time
from typing import Any

from paho.mqtt.reasoncodes import ReasonCode

from ..errors import DeliveryError
from ..lineconfig import BrokerConfig
from .client import CONNECT_TIMEOUT, explain, explain_connack, make_client, tls_context


def probe(broker: BrokerConfig, client_id: str) -> None:
    """Connect with the configured credentials and leave again; nothing is published.

    Raises:
        DeliveryError: with the reason. ConfigError: a certificate or password file is missing.
    """
    answers: list[ReasonCode] = []

    def on_connect(_client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        answers.append(reason)

    client = make_client(broker, client_id, None, tls_context(broker.tls))
    client.on_connect = on_connect
    try:
        client.connect(broker.host, broker.port, broker.keepalive)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while not answers and time.monotonic() < deadline and client.loop(0.2) == 0:
            pass
    except (OSError, ssl.SSLError, ValueError) as error:
        raise _refused(explain(error, broker)) from error
    finally:
        client.disconnect()
        client.loop(0.1)
    if not answers:
        raise _refused(f"{broker.host}:{broker.port}: connected, but no answer to CONNECT (a TLS port, or no broker?)")
    if answers[0].is_failure:
        raise _refused(explain_connack(answers[0], broker))


def _refused(reason: str) -> DeliveryError:
    return DeliveryError(reason, next_step="start the broker or mend the 'broker' section; verdicts wait meanwhile")
