"""A line whose engines are being built, for the first time or by a rebuild: what a stop, a SIGHUP and a failure do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.engine.select import open_backend
from andon.runtime.errors import EngineError
from andon.runtime.overrides import Overrides
from andon.runtime.startup import Options

from .connection import validate
from .running import LIVE, RunningLine, at

CAMERA = {"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 60_000}}}


@dataclass
class Build:
    """Opening engines, which lasts until it is released."""

    entered: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    fails: bool = False

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self.entered.set()
        self.release.wait(60)
        if self.fails:
            raise EngineError("no engine can be built")
        return open_backend(*arguments, **settings)


@pytest.fixture
def build() -> Iterator[Build]:
    building = Build()
    yield building
    building.release.set()


@pytest.fixture
def hold(build: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def hold() -> None:
        monkeypatch.setattr("andon.runtime.app.open_backend", build)
        monkeypatch.setattr("andon.runtime.app.JOIN", 0.5)

    return hold


@pytest.fixture
def rebuilding(start_line: Callable[..., RunningLine], hold: Callable[[], None], build: Build) -> RunningLine:
    """A line in the middle of a rebuild."""
    line = start_line(CAMERA)
    hold()
    assert line.command("cam0", "rebuild")["ok"]
    assert build.entered.wait(20)
    return line


def verdicts(consumer: Any, count: int) -> dict[str, tuple[str, str]]:
    found = consumer.wait_for("verdict", count)
    for verdict in found:
        validate(verdict)
    assert len(found) == count, "each once"
    return {verdict["part_id"]: (verdict["label"], verdict["reason"]) for verdict in found}


def end(line: RunningLine) -> None:
    line.thread.join(20)
    assert not line.thread.is_alive()


def test_the_first_status_has_the_product_that_a_command_set(
    bundle: Path, make_line: Any, broker: EmbeddedBroker, consumer: Any, hold: Callable[[], None], build: Build
) -> None:
    """For the minutes of the first build it was the configuration's."""
    hold()
    path = make_line(CAMERA, bundle=str(bundle), broker=at(broker))
    overrides = Overrides(path.parent / "state")
    for camera in ("cam0", "gone"):
        overrides.set_product(camera, "poly", "mono", None)
    overrides.close()
    line = RunningLine(LineApp(Options(config=path, backend="onnxruntime", threads=1)), broker.port, consumer)
    line.thread.start()
    assert build.entered.wait(20)
    consumer.until(lambda: bool(consumer.of("status")))
    line.app.stop()
    end(line)
    line.client.loop_stop()
    assert {status["product"] for status in consumer.of("status")} == {"poly"}


def test_parts_announced_during_the_first_build_have_verdicts_when_it_is_stopped(
    bundle: Path,
    make_line: Any,
    broker: EmbeddedBroker,
    consumer: Any,
    hold: Callable[[], None],
    build: Build,
    eventually: Callable[..., None],
) -> None:
    hold()
    path = make_line(CAMERA, bundle=str(bundle), broker=at(broker))
    line = RunningLine(LineApp(Options(config=path, backend="onnxruntime", threads=1)), broker.port, consumer)
    line.thread.start()
    assert build.entered.wait(20)
    consumer.until(lambda: any(status["state"] == "online" for status in consumer.of("status")))
    for part in ("S-1", "S-2"):
        assert line.command("cam0", "trigger", part_id=part)["ok"]
    eventually(lambda: line.app.slots.waiting("cam0") == 2)
    line.app.stop()
    end(line)
    line.client.loop_stop()
    assert verdicts(consumer, 2) == {part: ("UNKNOWN", "engine_error") for part in ("S-1", "S-2")}
    assert consumer.of("verdict")[0]["method"] == "brightness" and consumer.of("verdict")[0]["product"] == "mono"
    consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
    build.release.set()
    assert line.app.worker.join(20) and line.app.worker.failure is None
    assert len(consumer.of("verdict")) == 2, "who has been given up judges nothing"


def test_a_stop_does_not_wait_for_a_rebuild(
    rebuilding: RunningLine, consumer: Any, build: Build, eventually: Callable[..., None]
) -> None:
    line = rebuilding
    assert line.command("cam0", "trigger", part_id="A-1")["ok"]
    topic = f"{line.app.config.topic}/cam0/cmd/acknowledge"
    line.client.publish(topic, json.dumps({"id": "ack"}), qos=1).wait_for_publish(20)
    eventually(lambda: len(line.app.worker._calls) > 0)
    line.app.stop()
    end(line)
    assert verdicts(consumer, 1) == {"A-1": ("UNKNOWN", "engine_error")}
    (answer,) = [each for each in consumer.of("result") if each["id"] == "ack"]
    assert not answer["ok"] and answer["error"] == "the line is stopping"
    consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
    build.release.set()
    assert line.app.worker.join(20)


def test_a_reload_during_a_rebuild_comes_after_it(
    rebuilding: RunningLine, build: Build, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    app = rebuilding.app
    caplog.set_level("INFO", "andon.line")
    path = app.options.config
    path.write_text(path.read_text() + "judge: {thresholds: {mono: -1.0}}\n")
    app.reload()
    eventually(lambda: "read again when the engines are open" in caplog.text)
    assert app.config.judge.thresholds == {}
    build.release.set()
    eventually(lambda: app.config.judge.thresholds == {"mono": -1.0}, 20)


def test_a_stop_after_a_reload_during_a_rebuild_does_not_wait_either(
    rebuilding: RunningLine, eventually: Callable[..., None]
) -> None:
    rebuilding.app.reload()
    eventually(rebuilding.app._events.empty)
    rebuilding.app.stop()
    end(rebuilding)


def test_parts_that_wait_for_engines_that_fail_have_verdicts(
    rebuilding: RunningLine, consumer: Any, build: Build, eventually: Callable[..., None]
) -> None:
    assert rebuilding.command("cam0", "trigger", part_id="A-1")["ok"]
    eventually(lambda: rebuilding.app.slots.waiting("cam0") == 1)
    build.fails = True
    build.release.set()
    end(rebuilding)
    assert "no engine can be built" in str(rebuilding.failure)
    assert verdicts(consumer, 1) == {"A-1": ("UNKNOWN", "engine_error")}
