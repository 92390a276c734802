"""TLS and access control against a real mosquitto: refused, said in clear, retried until it is mended."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import ConfigError
from andon.runtime.lineconfig import BrokerConfig, TlsConfig
from andon.runtime.mqtt import session
from andon.runtime.mqtt.client import tls_context
from andon.runtime.mqtt.delivery import Delivery
from andon.runtime.mqtt.hooks import Direct
from andon.runtime.outbox import Outbox
from andon.runtime.verdict import Ids
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .outboxes import message


@dataclass
class Authority:
    """A certificate authority that writes PEM files into a folder."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        self.path = self.folder / f"{self.name}.pem"
        builder = self._builder(self.subject, self.key, days=10)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._write(self.path, builder.sign(self.key, hashes.SHA256()))

    def issue(self, name: str, *, days: int = 10, host: str = "127.0.0.1") -> tuple[Path, Path]:
        """Paths of a new certificate and its key; negative days: expired."""
        import ipaddress

        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, days)
        address = x509.IPAddress(ipaddress.ip_address(host))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate, key_path = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        self._write(certificate, builder.sign(self.key, hashes.SHA256()))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key_path

    def _builder(self, subject: x509.Name, key: Any, days: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        end = now + datetime.timedelta(days=days)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, end) - datetime.timedelta(days=1))
            .not_valid_after(end)
        )

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "plant-ca")


def listener(authority: Authority, server: tuple[Path, Path], *more: str) -> list[str]:
    return [f"cafile {authority.path}", f"certfile {server[0]}", f"keyfile {server[1]}", *more]


class Station:
    """One camera's delivery with one verdict waiting."""

    def __init__(self, folder: Path, **broker: Any):
        self.outbox = Outbox(folder / "outbox.db")
        config = BrokerConfig(retry_max=0.5, **broker)
        self.delivery = Delivery("andon/v1/site/line/station", ["cam0"], config, self.outbox)

    def __enter__(self) -> Station:
        self.outbox.open()
        self.put()
        self.delivery.start()
        return self

    def put(self) -> None:
        identifier = Ids().next()
        self.outbox.put("cam0", "verdict", identifier, message(identifier))

    def __exit__(self, *_: object) -> None:
        self.delivery.stop(0.5)
        self.outbox.close()

    def says(self, text: str) -> bool:
        return text in self.delivery.health().reason

    def delivered(self) -> bool:
        return self.delivery.health().acknowledged > 0


Eventually = Callable[..., None]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_mutual_tls_delivers(tmp_path: Path, authority: Authority, eventually: Eventually, protocol: str) -> None:
    cert, key = authority.issue("station")
    settings = listener(authority, authority.issue("broker"), "require_certificate true")
    tls = TlsConfig(ca=authority.path, cert=cert, key=key)
    with (
        EmbeddedBroker(settings=settings) as broker,
        Station(tmp_path, port=broker.port, tls=tls, protocol=protocol) as station,
    ):
        for _ in range(300):
            station.put()
        eventually(lambda: station.delivery.health().acknowledged == 301)


def test_wrong_ca_is_said_and_mended_without_a_restart(
    tmp_path: Path, authority: Authority, eventually: Eventually
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(Authority(tmp_path, "other-ca").path.read_bytes())
    settings = listener(authority, authority.issue("broker"))
    with (
        EmbeddedBroker(settings=settings) as broker,
        Station(tmp_path, port=broker.port, tls=TlsConfig(ca=trusted)) as station,
    ):
        eventually(lambda: station.says("wrong CA") and station.says("trusted.pem"))
        assert not station.delivered()
        trusted.write_bytes(authority.path.read_bytes())
        eventually(station.delivered)


def test_expired_certificate_is_said(tmp_path: Path, authority: Authority, eventually: Eventually) -> None:
    settings = listener(authority, authority.issue("broker", days=-1))
    tls = TlsConfig(ca=authority.path)
    with EmbeddedBroker(settings=settings) as broker, Station(tmp_path, port=broker.port, tls=tls) as station:
        eventually(lambda: station.says("expired"))
        assert not station.delivered()


def test_certificate_of_another_host_is_said(tmp_path: Path, authority: Authority, eventually: Eventually) -> None:
    settings = listener(authority, authority.issue("broker", host="10.1.2.3"))
    tls = TlsConfig(ca=authority.path)
    with EmbeddedBroker(settings=settings) as broker, Station(tmp_path, port=broker.port, tls=tls) as station:
        eventually(lambda: station.says("another name"))
        assert not station.delivered()


def test_missing_client_certificate_is_said(tmp_path: Path, authority: Authority, eventually: Eventually) -> None:
    settings = listener(authority, authority.issue("broker"), "require_certificate true")
    tls = TlsConfig(ca=authority.path)
    with EmbeddedBroker(settings=settings) as broker, Station(tmp_path, port=broker.port, tls=tls) as station:
        eventually(lambda: station.says("wants a client certificate"))
        assert not station.delivered()


def test_client_certificate_of_another_ca_is_said(tmp_path: Path, authority: Authority, eventually: Eventually) -> None:
    settings = listener(authority, authority.issue("broker"), "require_certificate true")
    cert, key = Authority(tmp_path, "other-ca").issue("stranger")
    tls = TlsConfig(ca=authority.path, cert=cert, key=key)
    with EmbeddedBroker(settings=settings) as broker, Station(tmp_path, port=broker.port, tls=tls) as station:
        eventually(lambda: station.says("does not trust this client"))
        assert not station.delivered()


def test_tls_to_a_plain_port_and_plain_to_a_tls_port_are_said(
    tmp_path: Path, authority: Authority, eventually: Eventually
) -> None:
    tls = TlsConfig(ca=authority.path)
    with EmbeddedBroker() as broker, Station(tmp_path, port=broker.port, tls=tls) as station:
        eventually(lambda: station.says("plain MQTT port"))
    settings = listener(authority, authority.issue("broker"))
    with EmbeddedBroker(settings=settings) as broker, Station(tmp_path, port=broker.port) as station:
        eventually(lambda: station.says("TLS port"))


def test_certificate_files_are_checked(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        tls_context(TlsConfig(ca=tmp_path / "none.pem"))
    (tmp_path / "bad.pem").write_text("not a certificate")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tls_context(TlsConfig(ca=tmp_path / "bad.pem"))
    cert, _ = authority.issue("one")
    _, other = authority.issue("two")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tls_context(TlsConfig(ca=authority.path, cert=cert, key=other))


# -- passwords and access control --------------------------------------------------------------------------------------


@pytest.fixture
def passwords(tmp_path: Path) -> Path:
    file = tmp_path / "passwords"
    file.write_text("")
    subprocess.run(["mosquitto_passwd", "-b", str(file), "station", "right"], check=True, capture_output=True)
    return file


@pytest.fixture
def guarded(tmp_path: Path, passwords: Path) -> Iterator[tuple[EmbeddedBroker, Path]]:
    acl = tmp_path / "acl"
    acl.write_text("user station\ntopic readwrite andon/v1/site/line/station/cam0/status\n")
    settings = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {acl}"]
    with EmbeddedBroker(settings=settings) as broker:
        yield broker, acl


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_wrong_password_is_said_and_mended(
    tmp_path: Path, guarded: tuple[EmbeddedBroker, Path], eventually: Eventually, protocol: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    login = {"username": "station", "password_file": secret, "protocol": protocol}
    with Station(tmp_path, port=guarded[0].port, **login) as station:
        eventually(lambda: station.says("not authorised") or station.says("password refused"))
        secret.write_text("right\n")
        eventually(lambda: station.delivery.health().connected)


def test_anonymous_is_said(tmp_path: Path, guarded: tuple[EmbeddedBroker, Path], eventually: Eventually) -> None:
    with Station(tmp_path, port=guarded[0].port) as station:
        eventually(lambda: station.says("anonymous"))


def test_forbidden_topic_is_kept_said_and_retried(
    tmp_path: Path, guarded: tuple[EmbeddedBroker, Path], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, acl = guarded
    monkeypatch.setenv("ANDON_TEST_PASSWORD", "right")
    with Station(tmp_path, port=broker.port, username="station", password_env="ANDON_TEST_PASSWORD") as station:
        eventually(lambda: station.says("Not authorized") and station.says("cam0/verdict"))
        for _ in range(100):
            station.put()
        health = station.delivery.health()
        assert health.connected and health.acknowledged == 0
        acl.write_text("user station\ntopic readwrite andon/v1/#\n")
        os.kill(broker.pid or 0, signal.SIGHUP)
        eventually(lambda: station.delivery.health().acknowledged == 101, 20)
        eventually(lambda: station.delivery.health().reason == "" and station.outbox.stats().messages == 0)


def test_a_forbidden_topic_of_what_is_not_stored_is_said(
    tmp_path: Path,
    passwords: Path,
    line: Any,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(session, "_AGAIN", 0.2)
    acl, secret = tmp_path / "acl", tmp_path / "secret"
    acl.write_text("user station\ntopic readwrite andon/v1/+/+/+/+/verdict\n")
    secret.write_text("right\n")
    settings = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {acl}"]
    login = {"username": "station", "password_file": secret, "home_assistant": "homeassistant"}
    with EmbeddedBroker(settings=settings) as broker, line(broker.port, **login) as running:

        def refused() -> set[str]:
            return {topic.rsplit("/", 1)[1] for topic, _ in running.delivery.health().links["cam0"].refused}

        def answer() -> None:
            running.delivery._publishers["cam0"].send(Direct("cmd/acknowledge/result", b"{}"))

        assert running.delivery.wait_connected(10)
        running.send(3)
        answer()
        eventually(lambda: refused() == {"status", "alarm", "result"})
        eventually(lambda: "/config: Not authorized" in caplog.text)  # discovery: said, and no trouble of the delivery
        assert "Not authorized" in running.delivery.health().trouble()
        eventually(lambda: running.outbox.stats().messages == 0)
        acl.write_text("user station\ntopic readwrite #\n")
        os.kill(broker.pid or 0, signal.SIGHUP)
        eventually(lambda: refused() == {"result"})
        eventually(lambda: "/config: the broker takes it again" in caplog.text)
        answer()
        eventually(lambda: running.delivery.health().trouble() == "")
        acl.write_text("user station\ntopic readwrite andon/v1/+/+/+/+/+\n")
        monkeypatch.setattr(session, "_SHOWN", 0.5)
        os.kill(broker.pid or 0, signal.SIGHUP)
        eventually(lambda: answer() or refused() == {"result"})
        eventually(lambda: running.delivery.health().trouble() == "")  # no further command, and nothing to send again
