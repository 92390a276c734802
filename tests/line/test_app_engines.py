"""A whole line on TensorRT, of which there is a double here (tests/runtime/trtdouble.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.app import LineApp
from andon.runtime.startup import Options

from ..runtime import trtdouble  # type: ignore[import-not-found]
from .running import LIVE


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("ANDON_CACHE", str(tmp_path / "cache"))
    return trtdouble.install(monkeypatch)


@pytest.fixture
def start(bundle: Path, make_line: Any) -> Iterator[Callable[..., LineApp]]:
    """Starts a line on TensorRT and waits until it judges; it is stopped at the end."""
    running: list[tuple[LineApp, threading.Thread]] = []

    def start(cameras: dict[str, Any]) -> LineApp:
        ready = threading.Event()
        options = Options(config=make_line(cameras, bundle=str(bundle)), backend="tensorrt")
        app = LineApp(options, on_ready=lambda app: ready.set())
        running.append((app, threading.Thread(target=app.run)))
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
