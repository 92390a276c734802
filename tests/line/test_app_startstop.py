"""How a line starts and stops: signals, engines still being built, sources that hang, what the last run left."""

from __future__ import annotations

import json
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.alarm import AlarmBoard, Kind
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.engine.select import open_backend
from andon.runtime.errors import ConfigError, EngineError
from andon.runtime.outbox import Outbox
from andon.runtime.source.camera import Camera
from andon.runtime.startup import Options
from andon.runtime.verdict import Ids, dumps

from .running import LIVE, RunningLine, andon_run, at, finish


def test_sigterm_ends_in_good_order(
    bundle: Path, broker: EmbeddedBroker, consumer: Any, make_line: Any, tmp_path: Path
) -> None:
    cameras = {name: {"source": LIVE, "product": "mono", "queue": 4} for name in ("a", "b")}
    process = andon_run(make_line(cameras, bundle=str(bundle), broker=at(broker)))
    consumer.wait_for("verdict", 20)
    process.send_signal(signal.SIGTERM)
    summary, log = finish(process)
    assert "stopping: SIGTERM" in log and summary["delivery"]["outbox"]["messages"] == 0
    judged = sum(sum(row.values()) for row in summary["verdicts"].values())
    consumer.until(lambda: all(consumer.of("status", camera)[-1]["state"] == "stopped" for camera in cameras))
    assert len({verdict["id"] for verdict in consumer.of("verdict")}) == judged
    for camera in cameras:
        seqs = [verdict["seq"] for verdict in consumer.of("verdict", camera)]
        assert seqs == sorted(seqs)


def test_a_short_run_waits_for_its_first_connection(
    tmp_path: Path, bundle: Path, broker: EmbeddedBroker, consumer: Any, make_images: Any, make_line: Any
) -> None:
    """The broker answers when everything has been judged, as on a busy machine or over TLS: that is no outage."""
    judged = threading.Event()

    def late(listener: socket.socket) -> None:
        client, _ = listener.accept()
        judged.wait(20)
        time.sleep(0.3)  # the run is on its way to its end
        server = socket.create_connection((broker.host, broker.port))
        with client, server:
            while ready := select.select([client, server], [], [], 20)[0]:
                for end in ready:
                    if not (data := end.recv(65536)):
                        return
                    (server if end is client else client).sendall(data)

    folder = make_images(tmp_path / "parts", [10, 200, 30])
    cameras = {"cam0": {"source": {"kind": "folder", "path": str(folder)}, "product": "mono", "drop": "block"}}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = threading.Thread(target=late, args=(listener,), daemon=True)
        proxy.start()
        at_proxy = {"host": "127.0.0.1", "port": listener.getsockname()[1]}
        line = make_line(cameras, bundle=str(bundle), broker=at_proxy)
        app = LineApp(Options(config=line, backend="onnxruntime", threads=1, until_end=True))
        app.state.on_verdict.append(lambda verdict: judged.set())
        summary = app.run()
        proxy.join(20)
    assert summary["delivery"]["outbox"]["messages"] == summary["delivery"]["outbox"]["bytes"] == 0
    assert len(consumer.wait_for("verdict", 3)) == 3


def test_two_lines_do_not_share_a_state_folder(
    start_line: Callable[..., RunningLine], bundle: Path, make_line: Any
) -> None:
    """Each would overwrite the other's overrides and memory, whatever outbox it has."""
    camera = {"cam0": {"source": LIVE, "product": "mono"}}
    line = start_line(camera, outbox={"path": "one.db"})
    other = make_line(camera, bundle=str(bundle), outbox={"path": "two.db"})
    with pytest.raises(ConfigError, match="state is in use"):
        LineApp(Options(config=other, backend="onnxruntime", max_frames=1)).run()
    line.app.stop()
    line.thread.join(20)
    assert LineApp(Options(config=other, backend="onnxruntime", max_frames=1)).run()["frames"] == 1


@pytest.mark.parametrize("kind", ["delivery", "drift"])
def test_an_alarm_of_the_last_run_clears_when_its_reason_is_gone(
    start_line: Callable[..., RunningLine], consumer: Any, tmp_path: Path, kind: Kind
) -> None:
    """The broker is there again; drift is not watched any more."""
    board = AlarmBoard("cam0")
    board.condition(kind, True, "as it was")
    board.acknowledge(by="me")
    (tmp_path / "state").mkdir()
    with Outbox(tmp_path / "state" / "outbox.db") as outbox:
        outbox.save_state("alarm/cam0", dumps(board.dump()))
    start_line({"cam0": {"source": LIVE, "product": "mono"}}, memory={"drift": {"enabled": False}})
    consumer.until(lambda: any(alarm["event"] for alarm in consumer.of("alarm")))
    (event,) = [alarm["event"] for alarm in consumer.of("alarm") if alarm["event"]]
    assert (event["kind"], event["from"], event["to"]) == (kind, "acknowledged", "cleared")


def test_the_window_of_an_alarm_goes_on_over_a_restart(bundle: Path, make_line: Any, tmp_path: Path) -> None:
    """Parts that raised nothing count too: three NG before a restart and two after it are five."""
    source = {**LIVE, "pattern": "white"}
    path = make_line({"cam0": {"source": source, "product": "mono"}}, bundle=str(bundle), alarm={"k": 5, "n": 10})
    windows = []
    for frames in (3, 2):
        LineApp(Options(config=path, backend="onnxruntime", threads=1, max_frames=frames)).run()
        with Outbox(tmp_path / "state" / "outbox.db") as outbox:
            windows.append(json.loads(outbox.load_state("alarm/cam0") or b"{}"))
    assert [window.get("window") for window in windows] == [[True] * 3, [True] * 5]
    raised = [[alarm["kind"] for alarm in window["alarms"] if alarm["kind"] == "defect"] for window in windows]
    assert raised == [[], ["defect"]]


def test_the_window_is_stored_while_the_line_runs(
    start_line: Callable[..., RunningLine], eventually: Callable[..., None]
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}}, memory={"drift": {"enabled": False}})
    eventually(lambda: b'"window":[false' in (line.app.outbox.load_state("alarm/cam0") or b""))


def test_a_stop_while_engines_are_built_does_not_wait_for_them(
    bundle: Path, make_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, entered = threading.Event(), threading.Event()

    def build(*_: Any, **__: Any) -> Any:
        entered.set()
        release.wait(30)
        raise EngineError("too late")

    monkeypatch.setattr("andon.runtime.app.open_backend", build)
    monkeypatch.setattr("andon.runtime.app.JOIN", 0.3)
    app = LineApp(Options(config=make_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(bundle))))
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(app.run()))
    thread.start()
    assert entered.wait(10)
    app.stop()
    thread.join(10)
    assert not thread.is_alive() and answers[0]["frames"] == 0
    release.set()
    assert app.worker.join(10)


def test_sources_that_do_not_let_go_hold_up_the_stop_together_not_each(
    bundle: Path, make_line: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many hang: systemd kills the line after TimeoutStopSec, with verdicts that were not delivered."""
    free, waits, join = threading.Event(), [], Camera.join

    class Hung:
        check = staticmethod(lambda: "")
        open = close = staticmethod(lambda: None)
        read = staticmethod(lambda timeout: free.wait(60) and None)

    def waited(camera: Camera, timeout: float) -> bool:
        waits.append(timeout)
        return join(camera, timeout)

    monkeypatch.setattr("andon.runtime.app.JOIN", 0.3)
    monkeypatch.setattr("andon.runtime.app.make_source", lambda name, camera: Hung())
    monkeypatch.setattr(Camera, "join", waited)
    cameras = {f"cam{index}": {"source": LIVE, "product": "mono"} for index in range(4)}
    line = make_line(cameras, bundle=str(bundle), broker=None)
    LineApp(Options(config=line, backend="onnxruntime", threads=1), on_ready=LineApp.stop).run()
    free.set()
    assert len(waits) == 4 and sum(waits) < 2 * 0.3
    assert caplog.text.count("does not let go") == 4, "said once of each"


def test_what_happens_while_engines_are_built_is_attended_to_afterwards(
    bundle: Path, make_line: Any, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    release, entered = threading.Event(), threading.Event()

    def build(*arguments: Any, **settings: Any) -> Any:
        entered.set()
        release.wait(30)
        return open_backend(*arguments, **settings)

    monkeypatch.setattr("andon.runtime.app.open_backend", build)
    line = make_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(bundle), broker=None)
    app = LineApp(Options(config=line, backend="onnxruntime", threads=1))
    thread = threading.Thread(target=app.run)
    thread.start()
    try:
        assert entered.wait(10)
        line.write_text(line.read_text() + "judge: {thresholds: {mono: -1.0}}\n")
        app.reload()
        app._events.put("finished")  # as the judging thread says it after --max-frames
        eventually(app._events.empty)
        release.set()
        thread.join(20)
        assert not thread.is_alive(), "the end was not forgotten"
        assert app.config.judge.thresholds == {"mono": -1.0}, "nor was the new configuration"
    finally:
        release.set()
        app.stop()
        thread.join(20)


def test_no_identifier_is_given_twice_where_the_clock_stands(
    start_line: Callable[..., RunningLine], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A station without a clock of its own. That a board is announced is in no outbox."""
    monkeypatch.setitem(Ids.__init__.__kwdefaults__, "clock_ns", lambda: 0)
    camera = {"source": LIVE, "product": "mono", "trigger": {"only": True}}
    for start in (1, 2):
        line = start_line({"cam0": camera})
        consumer.until(lambda start=start: len(consumer.of("alarm")) >= start)
        line.app.stop()
        line.thread.join(60)
    given = [message["id"] for message in consumer.of("alarm")]
    assert len(given) == len(set(given)) >= 2 and given == sorted(given)
