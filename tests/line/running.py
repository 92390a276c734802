"""A whole line for the tests: in a process of its own, or on a thread of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import AndonError
from paho.mqtt.enums import CallbackAPIVersion

RUN = [sys.executable, "-m", "andon.cli", "run", "--backend", "onnxruntime", "--threads", "1", "--json"]
LIVE = {"kind": "test", "width": 64, "height": 48, "fps": 20, "pattern": "black"}


def andon_run(config: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*RUN, "--config", str(config), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return json.loads(out.splitlines()[-1]), err


def at(broker: EmbeddedBroker) -> dict[str, Any]:
    return {"host": broker.host, "port": broker.port}


class RunningLine:
    """A line on a thread of this process, and a client that commands it."""

    def __init__(self, app: LineApp, port: int, consumer: Any):
        self.app, self.consumer = app, consumer
        self.summary: dict[str, Any] = {}
        self.failure: AndonError | None = None
        self.thread = threading.Thread(target=self._run)
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _run(self) -> None:
        try:
            self.summary = self.app.run()
        except AndonError as error:
            self.failure = error

    def command(self, camera: str, name: str, **arguments: Any) -> dict[str, Any]:
        identifier = f"{name}-{time.monotonic_ns()}"
        topic = f"{self.app.config.topic}/{camera}/cmd/{name}"
        self.client.publish(topic, json.dumps({"id": identifier, **arguments}), qos=1)

        def answers() -> list[dict[str, Any]]:
            return [answer for answer in self.consumer.of("result", camera) if answer["id"] == identifier]

        self.consumer.until(lambda: bool(answers()))
        return answers()[0]
