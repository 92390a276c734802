"""The embedded broker: it starts or says why not, and ends with its process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import DeliveryError


def test_port_in_use_is_said(broker: EmbeddedBroker) -> None:
    with pytest.raises(DeliveryError, match=r"(?s)did not start.*in use"):
        EmbeddedBroker(broker.port).start()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="THE END OF AN ORPHANED BROKER IS NOT TESTED: no setpriv")
def test_broker_ends_with_a_process_that_is_killed(eventually: Any) -> None:
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


def test_missing_mosquitto_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(DeliveryError, match="apt-get install -y mosquitto"):
        EmbeddedBroker().start()
