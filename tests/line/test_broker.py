"""The embedded broker: it starts or says why not, and ends with its process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from andon.runtime import broker as module
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import DeliveryError
from andon.runtime.startup import Options

from .running import LIVE


def test_port_in_use_is_said(broker: EmbeddedBroker) -> None:
    with pytest.raises(DeliveryError, match=r"(?s)did not start.*in use"):
        EmbeddedBroker(broker.port).start()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="THE END OF AN ORPHANED BROKER IS NOT TESTED: no setpriv")
def test_broker_ends_with_a_process_that_is_killed(
    eventually: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = (
        "import os, signal\n"
        "from andon.runtime.broker import EmbeddedBroker\n"
        "broker = EmbeddedBroker().start()\n"
        "print(broker.port, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    port = int(killed.stdout)

    def gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    assert killed.returncode == -9
    eventually(gone)
    (left,) = tmp_path.iterdir()
    with EmbeddedBroker():
        assert not left.exists() and len(list(tmp_path.iterdir())) == 1, "nor does its folder stay"
    assert list(tmp_path.iterdir()) == []


def test_missing_mosquitto_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(DeliveryError, match="apt-get install -y mosquitto"):
        EmbeddedBroker().start()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_broker_that_dies_is_started_again_on_its_port_but_not_at_every_look(
    monkeypatch: pytest.MonkeyPatch, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_STEADY", 0.0)
    with EmbeddedBroker() as broker:
        first = broker.pid
        broker.attend()
        assert broker.pid == first, "it runs"
        broker.kill()
        broker.attend()
        assert broker.pid != first
        eventually(lambda: answers(broker.port))
        monkeypatch.setattr(module, "_STEADY", 3600.0)
        monkeypatch.setattr(module, "_PAUSES", (3600.0, 3600.0))
        second = broker.pid
        broker.kill()
        for _ in range(20):
            broker.attend()
        assert broker.pid == second and not answers(broker.port)
    said = [text for text in caplog.messages if "has ended" in text]
    assert len(said) == 2 and "signal 9" in said[0] and "at once" in said[0] and "in 3600 s" in said[1]


def test_line_with_its_own_broker_outlives_it(
    bundle: Path, make_line: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEADY", 0.0)
    ready = threading.Event()
    path = make_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(bundle))
    app = LineApp(Options(config=path, backend="onnxruntime", threads=1), on_ready=lambda app: ready.set())
    thread = threading.Thread(target=app.run)
    thread.start()
    try:
        assert ready.wait(20) and app.delivery.wait_connected(10)
        app._keep_broker.__self__.kill()
        eventually(lambda: app.delivery.health().links["cam0"].connects == 2, 20)
        before = app.delivery.health().acknowledged
        eventually(lambda: app.delivery.health().acknowledged > before)
    finally:
        app.stop()
        thread.join(20)
    assert not thread.is_alive()
