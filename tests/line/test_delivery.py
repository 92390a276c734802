"""Every judged verdict arrives, in order, whatever dies: real mosquitto, real processes, kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker

#: Seconds that the broker is away in the outage test; the suite takes a short one, `ANDON_OUTAGE=30` the full one.
OUTAGE = float(os.environ.get("ANDON_OUTAGE", "3"))


@contextmanager
def producer(script: Path, folder: Path, port: int, count: int, rate: float) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, str(script), str(folder), str(port), str(count), str(rate)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def judged(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"cam0": [], "cam1": []}
    log = folder / "judged.log"
    for line in log.read_text().splitlines() if log.exists() else []:
        camera, _, identifier = line.partition(" ")
        if len(identifier) == 26:  # the last line of a killed process may be cut short
            found[camera].append(identifier)
    return found


def check(consumer: Any, folder: Path) -> None:
    """Nothing missing, and after dedupe by id the order is that of judging."""
    for camera, expected in judged(folder).items():
        arrived = list(dict.fromkeys(document["id"] for document in consumer.of("verdict", camera)))
        missing = set(expected) - set(arrived)
        assert not missing, f"{len(missing)} of {len(expected)} verdicts of {camera} never came"
        assert arrived == sorted(arrived), f"order of {camera} is not that of judging"


def test_broker_stopped_during_two_thousand_verdicts(
    tmp_path: Path, producer_script: Path, make_consumer: Any, eventually: Callable[..., None]
) -> None:
    rate = 2000 / (OUTAGE * 1.2 + 4)  # slow enough to be still judging when the broker returns
    with (
        EmbeddedBroker(persistence=tmp_path) as first,
        make_consumer(first.port) as consumer,
        producer(producer_script, tmp_path, first.port, 2000, rate) as process,
    ):
        consumer.wait_for("verdict", 300)
        first.stop()
        time.sleep(OUTAGE)
        with EmbeddedBroker(first.port, persistence=tmp_path):
            assert process.wait(60) == 0
            consumer.wait_for("verdict", 2000)
            check(consumer, tmp_path)
            replayed = [document["replayed"] for document in consumer.of("verdict")]
            assert not any(replayed[:250]) and sum(replayed) > 200 and not all(replayed[-20:])
            eventually(lambda: consumer.of("status", "cam0")[-1]["state"] == "stopped")


def test_broker_killed(tmp_path: Path, producer_script: Path, make_consumer: Any) -> None:
    with EmbeddedBroker(persistence=tmp_path) as first, make_consumer(first.port) as consumer:
        os.kill(first.pid or 0, signal.SIGUSR1)  # mosquitto saves the consumer's subscription, not what follows
        with producer(producer_script, tmp_path, first.port, 800, 400) as process:
            consumer.wait_for("verdict", 200)
            first.kill()
            with EmbeddedBroker(first.port, persistence=tmp_path):
                assert process.wait(60) == 0
                consumer.wait_for("verdict", 800)
                check(consumer, tmp_path)


def test_producer_killed_ten_times(
    tmp_path: Path, producer_script: Path, broker: EmbeddedBroker, consumer: Any
) -> None:
    chance = random.Random(20)
    for _ in range(10):
        with producer(producer_script, tmp_path, broker.port, 100_000, 400) as process:
            before = sum(map(len, judged(tmp_path).values()))
            deadline = time.monotonic() + 20
            while sum(map(len, judged(tmp_path).values())) <= before:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
    consumer.until(lambda: any(s["state"] == "offline" for s in consumer.of("status", "cam1")))
    with producer(producer_script, tmp_path, broker.port, 20, 400) as process:
        assert process.wait(30) == 0
    total = sum(map(len, judged(tmp_path).values()))
    consumer.wait_for("verdict", total)
    check(consumer, tmp_path)
    assert total > 100
    states = [status["state"] for status in consumer.of("status", "cam0")]
    assert states.count("offline") == 10 and states[-1] == "stopped"


def test_broker_that_comes_late(tmp_path: Path, producer_script: Path, make_consumer: Any) -> None:
    with EmbeddedBroker() as reserved:
        port = reserved.port
    with producer(producer_script, tmp_path, port, 200, 200) as process:
        deadline = time.monotonic() + 20
        while sum(map(len, judged(tmp_path).values())) < 100:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        with EmbeddedBroker(port), make_consumer(port) as consumer:
            assert process.wait(60) == 0
            # The consumer may have come after the producer; what the broker had acknowledged by then is not for it.
            documents = consumer.of("verdict")
            assert all(d["replayed"] for d in documents if d["id"] <= judged(tmp_path)[d["camera"]][40])
            assert documents


@pytest.mark.parametrize("camera", ["cam0", "cam1"])
def test_offline_is_said_for_every_camera(
    camera: str, tmp_path: Path, producer_script: Path, broker: EmbeddedBroker, consumer: Any, make_consumer: Any
) -> None:
    with producer(producer_script, tmp_path, broker.port, 1000, 100):
        consumer.until(lambda: any(s["state"] == "online" for s in consumer.of("status", camera)))
    consumer.until(lambda: consumer.of("status", camera)[-1]["state"] == "offline")
    online, offline = consumer.of("status", camera)[0], consumer.of("status", camera)[-1]
    assert set(online) - set(offline) == {"product", "ready"}, "what they were when it died, the will cannot know"
    with make_consumer(broker.port) as later:
        later.until(lambda: [m.retain for m in later.messages if m.topic.endswith(f"{camera}/status")] == [True])
