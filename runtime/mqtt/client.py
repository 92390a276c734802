"""One paho-mqtt 2 client per connection, and connection failures in plain words.

A client object serves one connection only. paho resends unacknowledged messages of its own accord when the same object
reconnects, byte for byte; ours must come again marked as replayed, and the outbox already holds them.
"""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from ..configfile import secret
from ..errors import ConfigError
from ..lineconfig import BrokerConfig, TlsConfig

CONNECT_TIMEOUT = 5.0
#: OpenSSL's X509_V_ERR_* codes (https://docs.openssl.org/3.0/man1/openssl-verification-options/).
_EXPIRED, _NOT_YET_VALID, _HOSTNAME, _IP_ADDRESS = 10, 9, 62, 64
_UNTRUSTED = (2, 18, 19, 20, 21)


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when the connection is lost without a farewell."""

    topic: str
    payload: bytes


def make_client(broker: BrokerConfig, client_id: str, will: Will | None, context: ssl.SSLContext | None) -> paho.Client:
    """A client for one connection, not yet connected.

    Raises:
        ConfigError: the password is named but not there.
    """
    version5 = broker.protocol == "5"
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if version5 else True,
        protocol=paho.MQTTv5 if version5 else paho.MQTTv311,
        reconnect_on_failure=False,
    )
    client.connect_timeout = CONNECT_TIMEOUT
    client.max_inflight_messages_set(0)  # the publisher keeps the window itself
    if broker.username is not None:
        client.username_pw_set(broker.username, secret("broker.password", broker.password_env, broker.password_file))
    if context is not None:
        client.tls_set_context(context)
    if will is not None:
        client.will_set(will.topic, will.payload, qos=1, retain=True)
    return client


def tls_context(tls: TlsConfig | None) -> ssl.SSLContext | None:
    """The context of a TLS section; made anew for each connection, so that renewed certificates are taken up.

    Raises:
        ConfigError: a file is missing, not PEM, or the key does not fit the certificate.
    """
    if tls is None:
        return None
    for name, path in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"broker.tls.{name}: no such file", found=path, expected="a PEM file")
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
        if tls.cert is not None and tls.key is not None:
            password = os.environ.get(tls.key_password_env or "", None)
            # A function instead of None: OpenSSL would ask for the password on the terminal.
            context.load_cert_chain(str(tls.cert), str(tls.key), password=lambda: password or "")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            "broker.tls: a certificate or key cannot be loaded", found=error, expected="PEM files"
        ) from error
    return context


def explain(error: BaseException, broker: BrokerConfig) -> str:
    """Why the broker could not be reached, and what to look at."""
    where = f"{broker.host}:{broker.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{where}: {_certificate(error, broker)}"
    if broker.tls is not None and isinstance(error, ConnectionResetError | ssl.SSLEOFError):
        return f"{where}: connection closed during the TLS handshake (the plain MQTT port?)"
    if isinstance(error, ssl.SSLError):
        return f"{where}: {_alert(str(error.reason or error))}"
    if isinstance(error, socket.gaierror):
        return f"{where}: the name cannot be resolved ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return f"{where}: nothing listens there (connection refused)"
    if isinstance(error, TimeoutError):
        return f"{where}: no answer within {CONNECT_TIMEOUT:g} s (host down, or a firewall)"
    return f"{where}: {error}"


def _certificate(error: ssl.SSLCertVerificationError, broker: BrokerConfig) -> str:
    if error.verify_code == _EXPIRED:
        return "the broker's certificate has expired"
    if error.verify_code == _NOT_YET_VALID:
        return "the broker's certificate is not valid yet (is this device's clock right?)"
    if error.verify_code in (_HOSTNAME, _IP_ADDRESS):
        return f"the broker's certificate is for another name ({error.verify_message})"
    if error.verify_code in _UNTRUSTED:
        ca = broker.tls.ca if broker.tls and broker.tls.ca else "the system's CA certificates"
        return f"the broker's certificate is not signed by {ca} (wrong CA)"
    return f"the broker's certificate is refused: {error.verify_message}"


def _alert(reason: str) -> str:
    text = reason.upper().replace(" ", "_")
    if "CERTIFICATE_REQUIRED" in text or "HANDSHAKE_FAILURE" in text:
        return "the broker wants a client certificate (broker.tls.cert and key)"
    if "UNKNOWN_CA" in text or "BAD_CERTIFICATE" in text or "ALERT_CERTIFICATE_UNKNOWN" in text:
        return "the broker does not trust this client's certificate"
    if "ALERT_CERTIFICATE_EXPIRED" in text:
        return "this client's certificate has expired"
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return "no TLS on that port (the plain MQTT port?)"
    return f"TLS failed: {reason}"


def explain_connack(reason: ReasonCode, broker: BrokerConfig) -> str:
    """Why the broker answered CONNECT with a refusal."""
    where = f"{broker.host}:{broker.port}"
    name = str(reason)
    if reason.value in (4, 134):
        return f"{where}: user name or password refused for '{broker.username}'"
    if reason.value in (5, 135):
        who = f"'{broker.username}' is not allowed" if broker.username else "anonymous clients are not allowed"
        return f"{where}: not authorised, {who}"
    if reason.value in (1, 132):
        return f"{where}: the broker does not speak MQTT {broker.protocol} (broker.protocol)"
    return f"{where}: connection refused by the broker: {name}"


def explain_lost(log_line: str, answered: bool, broker: BrokerConfig) -> str:
    """Why an open connection ended, from paho's last error line."""
    where = f"{broker.host}:{broker.port}"
    if "SSL" in log_line or "ssl" in log_line:
        return f"{where}: {_alert(log_line)}"
    if not answered:
        return f"{where}: connection closed without an answer to CONNECT (a TLS port, or not an MQTT broker?)"
    return f"{where}: connection lost" + (f" ({log_line})" if log_line else "")
