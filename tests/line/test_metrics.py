"""Prometheus names and numbers, health, and systemd's protocol."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from andon.runtime.health import Check, Progress, readiness
from andon.runtime.metrics import Metrics
from andon.runtime.notify import Notifier
from andon.runtime.operation import Operation
from andon.runtime.slot import Slots
from andon.runtime.types import Verdict
from andon.runtime.verdict import Ids
from prometheus_client.parser import text_string_to_metric_families

SNAPSHOT: dict[str, Any] = {
    "ready": True,
    "method": "hvq",
    "bundle": "9f2c",
    "backend": "onnxruntime",
    "variant": "fp32",
    "cameras": {
        "cam0": {
            "source": {"state": "live", "restarts": 2, "detail": ""},
            "alarms": [{"kind": "defect", "state": "raised"}],
            "verdict": {"score": 1.5, "threshold": 2.0},
        },
        "cam1": {"source": {"state": "down", "restarts": 0, "detail": "no frame\nmore"}, "alarms": [], "verdict": None},
    },
    "slots": {"cam0": {"dropped": 3, "untriggered": 4}},
    "delivery": {
        "broker": "127.0.0.1:1883",
        "connected": False,
        "reason": "nothing listens there",
        "acknowledged": 9,
        "too_large": 5,
        "pictures_skipped": 6,
        "outbox": {"messages": 7, "bytes": 700, "oldest_age_s": 1.5, "degraded": None, "dropped": 1},
    },
    "memory": {"rows": {"mono": 12}, "drift": ["cam0/mono"], "drift_score": {"cam0/mono": 0.4}, "version": 3},
}


def verdict(label: str, reason: str, camera: str = "cam0", **latency: float) -> Verdict:
    now = datetime.now(timezone.utc)
    return Verdict(Ids().next(), camera, 1, now, now, label, reason, latency_ms=latency)  # type: ignore[arg-type]


def samples(page: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_names_and_numbers() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    metrics.observe(verdict("OK", "score_below_threshold", encode=6.0, total=12.0))
    metrics.observe(verdict("NG", "score_above_threshold", encode=6.0, total=120.0))
    metrics.observe(verdict("UNKNOWN", "not_a_number"))
    metrics.observe(verdict("UNKNOWN", "camera_stale", "cam1"))
    found = samples(metrics.page())
    expected = {
        "andon_frames_total{camera=cam0,result=judged}": 2,
        "andon_frames_total{camera=cam0,result=not_judged}": 1,
        "andon_verdicts_total{camera=cam0,label=NG}": 1,
        "andon_verdicts_total{camera=cam1,label=UNKNOWN}": 1,
        "andon_unknown_verdicts_total{camera=cam1,reason=camera_stale}": 1,
        "andon_stage_duration_seconds_count{stage=total}": 2,
        "andon_stage_duration_seconds_bucket{le=0.025,stage=total}": 1,
        "andon_frames_dropped_total{camera=cam0,reason=newer_frame}": 3,
        "andon_frames_dropped_total{camera=cam0,reason=no_trigger}": 4,
        "andon_mqtt_spool_messages": 7,
        "andon_mqtt_spool_dropped_total": 1,
        "andon_mqtt_too_large_total": 5,
        "andon_mqtt_pictures_skipped_total": 6,
        "andon_mqtt_connected": 0,
        "andon_memory_rows{product=mono}": 12,
        "andon_drift_warning{camera=cam0}": 1,
        "andon_drift_warning{camera=cam1}": 0,
        "andon_drift_score{monitor=cam0/mono}": 0.4,
        "andon_camera_up{camera=cam0}": 1,
        "andon_camera_up{camera=cam1}": 0,
        "andon_alarm_active{camera=cam0,kind=defect,state=raised}": 1,
        "andon_score{camera=cam0}": 1.5,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "andon_frames_total{camera=cam1,result=not_judged}" not in found, "a stale camera gave no frame"
    assert abs(found["andon_stage_duration_seconds_sum{stage=total}"] - 0.132) < 1e-9
    (build,) = [name for name in found if name.startswith("andon_build_info")]
    assert "method=hvq" in build and "bundle=9f2c" in build


def test_a_camera_that_has_come_to_its_end_is_no_fault_for_metrics_and_readiness() -> None:
    """A folder that was played to its end: an alert on 0 would fire for ever."""
    source = {"state": "ended", "restarts": 0, "detail": ""}
    line = {"ready": True, "cameras": {"cam0": {"source": source, "alarms": [], "verdict": None}}}
    assert samples(Metrics(lambda: line).page())["andon_camera_up{camera=cam0}"] == 1
    assert all(check.ok for check in readiness(line))


def test_metrics_of_a_line_that_is_still_starting() -> None:
    found = samples(Metrics(lambda: {"ready": False}).page())
    assert found["andon_engines_open"] == 0 and "andon_ready" not in found, (
        "/readyz asks for camera, disk and broker, too"
    )
    assert samples(Metrics(lambda: {"ready": True}).page())["andon_engines_open"] == 1


def test_two_lines_in_one_process_count_apart() -> None:
    first, second = Metrics(dict), Metrics(dict)
    first.observe(verdict("OK", "score_below_threshold"))
    assert b'label="OK"' in first.page() and b'label="OK"' not in second.page()


def test_readiness() -> None:
    failed = {check.name: check.detail for check in readiness(SNAPSHOT) if not check.ok}
    assert failed == {"camera cam1": "down: no frame", "broker": "nothing listens there"}
    full = {**SNAPSHOT["delivery"]["outbox"], "degraded": "database or disk is full"}
    delivery = {**SNAPSHOT["delivery"], "reason": "", "outbox": full}
    failed = {
        check.name: check.detail
        for check in readiness({"ready": False, "cameras": {}, "delivery": delivery})
        if not check.ok
    }
    assert failed == {"engines": "not open yet", "outbox": "database or disk is full"}


def test_stuck_is_waiting_without_judging() -> None:
    now, counts = [0.0], [0, 0]
    progress = Progress(lambda: (counts[0], counts[1]), limit=10, first=60, clock=lambda: now[0])

    def at(moment: float, judged: int, waiting: int) -> bool:
        now[0], counts[:] = moment, [judged, waiting]
        return progress.check().ok

    assert at(100, 0, 0), "nothing waits: a line without parts is alive"
    assert at(150, 0, 3) and not at(160, 0, 3), "the first frame may take long, but not for ever"
    assert at(161, 1, 2) and at(162, 1, 0), "one was judged"
    fresh = Progress(lambda: (counts[0], counts[1]), limit=10, first=60, clock=lambda: now[0])
    progress = fresh
    assert at(163, 2, 1) and at(172, 2, 1)
    assert not at(173, 2, 1) and "1 frames wait" in progress.check().detail
    assert at(174, 3, 1), "it got on"
    assert progress.check().detail == "3 verdicts, 1 waiting", "what is UNKNOWN without a frame is counted, too"


def test_slow_frames_are_not_stuck() -> None:
    now, counts = [0.0], [0, 1]
    progress = Progress(lambda: (counts[0], counts[1]), limit=10, first=60, clock=lambda: now[0])
    for frame in range(1, 5):
        now[0], counts[0] = frame * 20.0, frame
        assert progress.check().ok
    now[0] = 80 + 99.0
    assert progress.check().ok, "frames take 20 s here"
    now[0] = 80 + 101.0
    assert not progress.check().ok


def test_engines_that_are_opened_again_take_the_time_they_take() -> None:
    """Then the first frame has as long as at the start, and the pause says nothing about how long frames take."""
    now, counts = [0.0], [0, 1]
    progress = Progress(lambda: (counts[0], counts[1]), limit=10, first=60, clock=lambda: now[0])
    now[0], counts[0] = 1.0, 1
    assert progress.check().ok
    counts[0] = 2  # judged just before the rebuild began
    for now[0] in range(2, 600):
        assert progress.opening() == Check("judging", True, "opening engines")
    now[0] = 599.0 + 59
    assert progress.check().ok
    now[0] += 1.0
    assert not progress.check().ok, "the first frame may take long, but not for ever"
    counts[0] = 3
    assert progress.check().ok
    now[0] += 5 * 60 - 1
    assert progress.check().ok
    now[0] += 1.0
    assert not progress.check().ok, "its 60 s count, the 600 s before do not"


class Told:
    """In the place of Notifier: what systemd would hear."""

    watchdog_interval = 0.01

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def __getattr__(self, kind: str) -> Callable[..., None]:
        return lambda *arguments: self.said.put((kind, *arguments[:1]))

    def wait(self, kind: str, times: int = 1) -> str:
        """The text of the last of so many messages of a kind."""
        while times:
            found, *text = self.said.get(timeout=10)
            times -= found == kind
        return "".join(text)


def operated(describe: Callable[[], Any], state: Callable[[], Any], look: Callable[[], Any]) -> Any:
    """A line for Operation that judges and has a memory and a camera."""

    def post(function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            future.set_exception(error)
        return future

    worker = SimpleNamespace(judge=object(), memory=SimpleNamespace(describe=describe), post=post)
    line_state = SimpleNamespace(snapshot=state, section=lambda *_: None)
    parts = {"config": SimpleNamespace(web=None), "cameras": {"cam": SimpleNamespace(look=look)}}
    return SimpleNamespace(worker=worker, state=line_state, slots=Slots({}), **parts)


@pytest.mark.parametrize("broken", ["memory", "state", "cameras"])
def test_a_look_that_fails_does_not_starve_the_watchdog(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    failing = threading.Event()

    def gone(answer: dict[str, Any]) -> dict[str, Any]:
        if failing.is_set():
            raise FileNotFoundError(2, "No such file or directory")
        return answer

    describe = (lambda: gone({"rows": {}})) if broken == "memory" else dict
    snapshot = (lambda: gone({"ready": True})) if broken == "state" else lambda: {"ready": True}
    look = (lambda: gone({})) if broken == "cameras" else dict
    told = Told()
    with Operation(operated(describe, snapshot, look), told):  # type: ignore[arg-type]
        assert told.wait("feed") == "judging"
        failing.set()
        told.wait("feed", 20)
        failing.clear()
        told.wait("feed", 20)
    said = [record for record in caplog.records if "cannot be looked at" in record.message]
    assert [record.message for record in said] == [f"its {broken} cannot be looked at"], "once"


# -- systemd -----------------------------------------------------------------------------------------------------------


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path):
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(0.2)
        self.heard: list[tuple[float, dict[str, str]]] = []

    def listen(self, seconds: float, until: str = "") -> list[dict[str, str]]:
        end = time.monotonic() + seconds
        start = len(self.heard)
        while time.monotonic() < end and not any(until in message for _, message in self.heard[start:] if until):
            try:
                text = self.socket.recv(4096).decode()
            except TimeoutError:
                continue
            self.heard.append((time.monotonic(), dict(line.partition("=")[::2] for line in text.splitlines())))
        return [message for _, message in self.heard[start:]]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    service = Systemd(tmp_path / "notify")
    yield service
    service.socket.close()


def test_without_systemd_nothing_is_sent() -> None:
    notifier = Notifier({})
    assert notifier.watchdog_interval is None
    notifier.ready("up")


def test_a_status_that_names_a_file_in_latin_1_is_sent(systemd: Systemd) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(systemd.path)})
    notifier.status("cam0: no folder Geh\udce4use")
    assert systemd.listen(5, "STATUS") == [{"STATUS": r"cam0: no folder Geh\xe4use"}]


def test_a_socket_that_is_gone_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.ready("up")
    notifier.stopping()
    assert len(caplog.records) == 1 and str(tmp_path / "gone") in caplog.text


def test_a_run_ends_well_although_systemd_does_not_hear(
    tmp_path: Path, bundle: Path, make_images: Any, make_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from andon.runtime.app import LineApp
    from andon.runtime.startup import Options

    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    source = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [10, 20]))}
    line = make_line({"cam0": {"source": source, "product": "mono"}}, bundle=str(bundle), broker=None)
    app = LineApp(Options(config=line, backend="onnxruntime", until_end=True))
    assert app.run()["frames"] > 0
    assert not app.operation._thread.is_alive()


def test_watchdog_is_for_this_process_only(systemd: Systemd) -> None:
    environment = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "4000000"}
    assert Notifier({**environment, "WATCHDOG_PID": str(os.getpid())}).watchdog_interval == 2.0
    assert Notifier({**environment, "WATCHDOG_PID": "1"}).watchdog_interval is None


def test_service_is_ready_feeds_the_watchdog_and_stops(systemd: Systemd, bundle: Path, make_line: Any) -> None:
    camera = {"source": {"kind": "test", "width": 64, "height": 48, "fps": 10}, "product": "mono"}
    config = make_line({"cam0": camera}, bundle=str(bundle), broker=None)
    environment = {**os.environ, "NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "1000000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "andon.cli", "run", "--config", str(config), "--backend", "onnxruntime", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert any("READY" in message for message in systemd.listen(30, "READY"))
        assert len([m for m in systemd.listen(3) if "WATCHDOG" in m]) >= 3
        process.send_signal(signal.SIGTERM)
        assert any("STOPPING" in message for message in systemd.listen(30, "STOPPING"))
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and json.loads(out.splitlines()[-1])["frames"] > 0
    finally:
        process.kill()
        process.wait()


def test_watchdog_is_not_fed_while_frames_wait_unjudged(
    systemd: Systemd, bundle: Path, make_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from andon.runtime import health
    from andon.runtime.app import LineApp
    from andon.runtime.startup import Options

    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setattr(health.Progress.__init__, "__defaults__", (1.0, 1.0, time.monotonic))
    camera = {"source": {"kind": "test", "width": 64, "height": 48, "fps": 10}, "product": "mono"}
    app = LineApp(Options(config=make_line({"cam0": camera}, bundle=str(bundle), broker=None), backend="onnxruntime"))
    thread = threading.Thread(target=app.run)
    thread.start()
    try:
        assert any("READY" in message for message in systemd.listen(30, "READY"))
        systemd.listen(1.0)
        hang = threading.Event()
        stuck = app.worker.post(lambda: hang.wait(30))
        systemd.listen(4.0)
        assert not [m for m in systemd.listen(1.5) if "WATCHDOG" in m], "fed although nothing is judged"
        hang.set()
        assert stuck.result(5) and any("WATCHDOG" in message for message in systemd.listen(5, "WATCHDOG"))
    finally:
        app.stop()
        thread.join(30)


def test_watchdog_is_fed_during_a_rebuild(
    systemd: Systemd, bundle: Path, make_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from andon.runtime import app as module
    from andon.runtime.startup import Options

    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    building, finish, opened = threading.Event(), threading.Event(), module.open_backend

    def build(*arguments: Any, rebuild: bool, **options: Any) -> Any:
        if rebuild:
            building.set()
            finish.wait(60)
        return opened(*arguments, rebuild=rebuild, **options)

    monkeypatch.setattr(module, "open_backend", build)
    camera = {"source": {"kind": "test", "width": 64, "height": 48, "fps": 10}, "product": "mono"}
    line = make_line({"cam0": camera}, bundle=str(bundle), broker=None)
    app = module.LineApp(Options(config=line, backend="onnxruntime"))

    def fed(status: str) -> bool:
        looks = (message for _ in range(40) for message in systemd.listen(1, "WATCHDOG"))
        return any("WATCHDOG" in message and message["STATUS"] == status for message in looks)

    thread = threading.Thread(target=app.run)
    thread.start()
    try:
        assert any("READY" in message for message in systemd.listen(30, "READY"))
        app.rebuild()
        assert building.wait(10)
        progress = app.operation._progress
        progress._limit = progress._first = progress._longest = 0.0  # whoever asks finds it stuck
        assert app.operation.alive()[0].ok, "/healthz"
        assert fed("opening engines")
        progress._limit = progress._first = 60.0
        finish.set()
        assert fed("judging")
    finally:
        finish.set()
        app.stop()
        thread.join(30)
