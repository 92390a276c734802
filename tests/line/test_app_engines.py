"""A whole line on TensorRT, of which there is a double here (tests/runtime/trtdouble.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.app import LineApp
from andon.runtime.errors import AndonError
from andon.runtime.startup import Options

from ..runtime import trtdouble  # type: ignore[import-not-found]
from .running import LIVE


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("ANDON_CACHE", str(tmp_path / "cache"))
    return trtdouble.install(monkeypatch)


def suppressed(run: Callable[[], object]) -> None:
    with suppress(AndonError):
        run()


@pytest.fixture
def start(bundle: Path, make_line: Any) -> Iterator[Callable[..., LineApp]]:
    """Starts a line on TensorRT and waits until it judges; it is stopped at the end."""
    running: list[tuple[LineApp, threading.Thread]] = []

    def start(cameras: dict[str, Any]) -> LineApp:
        ready = threading.Event()
        options = Options(config=make_line(cameras, bundle=str(bundle)), backend="tensorrt")
        app = LineApp(options, on_ready=lambda app: ready.set())
        running.append((app, threading.Thread(target=lambda: suppressed(app.run))))
        running[-1][1].start()
        assert ready.wait(60)
        return app

    yield start
    for app, thread in running:
        app.stop()
        thread.join(60)
        assert not thread.is_alive()


def test_no_part_waits_for_what_the_engines_do_on_their_first_frames(
    world: Any, start: Callable[..., LineApp], eventually: Callable[..., None]
) -> None:
    """The first two parts after a start met contexts that were still to be made, and a graph to be captured."""
    camera = {"source": LIVE, "product": "mono", "trigger": {"only": True, "timeout_ms": 60_000}}
    app = start({"cam0": camera})
    prepared, judged = (world.contexts, world.enqueues), app.slots.served
    assert judged == 0 and world.graph_launches > 0
    app.handlers.trigger("cam0", {"part_id": "A-1"})
    eventually(lambda: app.slots.served == 1 and app.state.snapshot()["frames"] == 1, 60)
    assert app.state.snapshot()["cameras"]["cam0"]["labels"]["OK"] == 1
    assert (world.contexts, world.enqueues) == prepared


def test_a_line_whose_gpu_is_lost_ends_with_that_after_every_part_has_its_verdict(
    world: Any, start: Callable[..., LineApp], eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It judged nothing for ever; systemd saw a line that gets on."""
    monkeypatch.setattr("andon.runtime.enginewatch.EngineWatch.__init__.__defaults__", (3, 0.0, time.monotonic))
    camera = {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 60_000}}
    app = start({"cam0": camera})
    gate = threading.Event()
    app.worker.post(lambda: gate.wait(60))
    for part in range(6):
        app.handlers.trigger("cam0", {"part_id": f"A-{part}"})
    eventually(lambda: app.slots.waiting("cam0") >= 6, 60)
    world.fault = True
    gate.set()
    eventually(lambda: not app.worker._thread.is_alive(), 60)
    labels = app.state.snapshot()["cameras"]["cam0"]["labels"]
    assert labels["UNKNOWN"] == 6 and "on the last 3 frames" in str(app.worker.failure)
    assert "illegal memory access" in str(app.worker.failure) and world.pushed == 0
