"""The whole line in a process of its own: real pipelines, a real broker, real signals."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import andon
import numpy as np
import paho.mqtt.client as paho
import pytest
from andon.runtime.alarm import AlarmBoard, Kind
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.bundle import Bundle
from andon.runtime.engine.select import open_backend
from andon.runtime.errors import AndonError, ConfigError, EngineError
from andon.runtime.lineconfig import CameraConfig
from andon.runtime.linestate import LineState
from andon.runtime.outbox import Outbox
from andon.runtime.overrides import Overrides
from andon.runtime.source import Shot, make_source
from andon.runtime.source.camera import Camera
from andon.runtime.startup import Options
from andon.runtime.summary import _NEXT
from andon.runtime.types import UNKNOWN_REASONS, Frame, Verdict
from andon.runtime.verdict import dumps
from jsonschema import Draft202012Validator
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


def test_parts_of_a_folder_become_verdicts_on_mqtt(
    tmp_path: Path, bundle: Path, broker: EmbeddedBroker, consumer: Any, make_images: Any, make_line: Any
) -> None:
    shades = [(53 * index) % 256 for index in range(60)]
    folder = make_images(tmp_path / "parts", shades)
    (folder / "part007.png").write_bytes(b"not a picture")
    source = {"kind": "folder", "path": str(folder), "player": "gstreamer"}
    line = make_line(
        {"cam0": {"source": source, "product": "mono", "drop": "block"}},
        bundle=str(bundle),
        broker=at(broker),
        evidence={},
    )
    summary, log = finish(andon_run(line, "--until-end"))
    verdicts = consumer.wait_for("verdict", 60)
    assert [verdict["part_id"] for verdict in verdicts] == [f"part{index:03d}" for index in range(60)]
    assert [verdict["seq"] for verdict in verdicts] == list(range(1, 61))
    expected = ["NG" if shade / 255 > 0.5 else "OK" for shade in shades]
    expected[7] = "UNKNOWN"
    assert [verdict["label"] for verdict in verdicts] == expected
    assert verdicts[7]["reason"] == "bad_frame" and "part007.png" in log
    assert "andon run: 1 of 60 verdicts UNKNOWN bad_frame 1" in log
    pictures = [Path(verdict["evidence"]) for verdict in verdicts if verdict["evidence"]]
    assert pictures and all(path.is_file() for path in pictures)
    # A disk that is slower than the line costs pictures, never verdicts; on a busy machine that happens.
    assert len(pictures) + summary["evidence"]["skipped"] == expected.count("NG")
    assert summary["verdicts"]["mono"] == {label: expected.count(label) for label in ("NG", "OK", "UNKNOWN")}
    assert summary["frames"] == 59 and summary["delivery"]["outbox"]["messages"] == 0
    consumer.until(lambda: [s["state"] for s in consumer.of("status", "cam0")][-1:] == ["stopped"])
    assert consumer.of("status", "cam0")[0]["state"] == "online"


def test_a_file_name_in_latin_1_costs_the_line_nothing(
    tmp_path: Path, bundle: Path, broker: EmbeddedBroker, consumer: Any, make_images: Any, make_line: Any
) -> None:
    folder = make_images(tmp_path / "parts", [10, 200, 30])
    (folder / "part001.png").rename(folder / os.fsdecode(b"part001-Geh\xe4use.png"))
    cameras = {"cam0": {"source": {"kind": "folder", "path": str(folder)}, "product": "mono", "drop": "block"}}
    line = make_line(cameras, bundle=str(bundle), broker=at(broker), evidence={}, alarm={"k": 1, "n": 1})
    finish(andon_run(line, "--until-end"))
    verdicts = consumer.wait_for("verdict", 3)
    assert [each["part_id"] for each in verdicts] == ["part000", r"part001-Geh\xe4use", "part002"]
    assert [each["label"] for each in verdicts] == ["OK", "NG", "OK"]

    def details() -> list[str]:
        return [alarm["event"]["detail"] for alarm in consumer.of("alarm") if alarm["event"]]

    consumer.until(lambda: any(r"last part part001-Geh\xe4use" in detail for detail in details()))


@pytest.mark.parametrize(
    ("shades", "thresholds", "found", "following"),
    [
        ([10, 200, 30], None, "UNKNOWN no_threshold 3", "andon calibrate --bundle {bundle} --data GOOD-IMAGES"),
        ([0, 0], 0.5, "UNKNOWN not_a_number 2", "andon verify --bundle {bundle}"),
    ],
)
def test_a_run_without_a_single_decision_fails_and_says_why(
    tmp_path: Path,
    make_bundle: Any,
    nan_when_black: str,
    make_images: Any,
    make_line: Any,
    shades: list[int],
    thresholds: float | None,
    found: str,
    following: str,
) -> None:
    """Silence never means OK: neither does a run in which nothing could be judged."""
    bundle = make_bundle(tmp_path / "b 1", nan_when_black, thresholds=thresholds)
    folder = make_images(tmp_path / "parts", shades)
    cameras = {"cam0": {"source": {"kind": "folder", "path": str(folder)}, "product": "mono", "drop": "block"}}
    summary, log = finish(andon_run(make_line(cameras, bundle=str(bundle), broker=None), "--until-end"), code=1)
    told = following.format(bundle=f"'{bundle}'")
    assert summary["ok"] is False and summary["error"] == f"not one of {len(shades)} verdicts is OK or NG"
    assert (summary["found"], summary["next"]) == (found, told) and found in log and told in log
    assert sum(summary["unknown"].values()) == len(shades)
    assert set(_NEXT) == set(UNKNOWN_REASONS), "every reason has something to do about it"


def test_a_run_that_a_product_by_command_made_undecided_names_the_command(
    tmp_path: Path, bundle: Path, make_images: Any, make_line: Any
) -> None:
    """The configuration has the right product already; to name it there again would change nothing."""
    Overrides(tmp_path / "state").set_product("cam0", "nut", "mono", None)
    source = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [10]))}
    line = make_line({"cam0": {"source": source, "product": "mono"}}, bundle=str(bundle), broker=None)
    summary, _ = finish(andon_run(line, "--until-end"), code=1)
    assert summary["unknown"] == {"wrong_product": 1}
    assert summary["next"].startswith("send the command product") and "nut of cam0" in summary["next"]


def test_the_line_needs_no_torch_and_little_memory(bundle: Path, make_line: Any) -> None:
    line = make_line({"cam0": {"source": {**LIVE, "frames": 20}, "product": "mono"}}, bundle=str(bundle))
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'timm', 'matplotlib', 'sklearn', 'pandas'): sys.modules[name] = None\n"
        "from andon.cli import main\n"
        f"sys.exit(main(['run', '--config', {str(line)!r}, '--until-end', '--json', '--backend', 'onnxruntime']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["frames"] > 0
    assert summary["memory_mb"]["peak"] < 400


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


def test_without_a_broker_the_run_goes_on_and_the_verdicts_come_later(
    tmp_path: Path, bundle: Path, broker: EmbeddedBroker, consumer: Any, make_images: Any, make_line: Any
) -> None:
    folder = make_images(tmp_path / "parts", [10, 200, 30])
    cameras = {"cam0": {"source": {"kind": "folder", "path": str(folder)}, "product": "mono", "drop": "block"}}
    line = make_line(cameras, bundle=str(bundle), broker={"host": "127.0.0.1", "port": 1})
    summary, log = finish(andon_run(line, "--until-end"))
    assert summary["delivery"]["outbox"]["messages"] >= 3 and "nothing listens there" in log
    assert summary["delivery"]["connected"] is False and "messages wait in the outbox; they are delivered" in log
    finish(andon_run(line, "--until-end", "--broker", f"127.0.0.1:{broker.port}"))
    verdicts = consumer.wait_for("verdict", 6)
    assert [verdict["replayed"] for verdict in verdicts[:3]] == [True] * 3
    assert [verdict["part_id"] for verdict in verdicts] == ["part000", "part001", "part002"] * 2


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


@pytest.mark.parametrize(
    ("camera", "sections", "told"),
    [
        ({"source": LIVE, "product": "nut"}, {}, "unknown product 'nut'"),
        ({"source": {"kind": "gstreamer", "pipeline": "videotestsrc ! nosuch"}}, {}, "GStreamer refuses"),
        ({"source": LIVE}, {"bundle": "none"}, "there is no bundle at"),
        ({"source": LIVE}, {"bundle": "none-*"}, "no bundle matches"),
        ({"source": LIVE, "max_fsp": 3}, {}, "did you mean 'max_fps'?"),
        ({"source": LIVE}, {"program": "nosuch"}, "nosuch"),
        ({"source": LIVE, "product": "mono"}, {"variant": "int8"}, "no int8 variant"),
        ({"source": LIVE, "product": "auto"}, {}, "no classifier"),
        (
            {"source": LIVE, "product": "mono"},
            {"judge": {"check_product": True}},
            "judge.check_product: the bundle has",
        ),
        ({"source": LIVE, "product": "mono"}, {"judge": {"thresholds": {"nut": 1.0}}}, "judge.thresholds.nut: unknown"),
        ({"source": LIVE, "product": "mono"}, {"state": "bundle/manifest.json/state"}, "state folder"),
    ],
)
def test_what_cannot_run_is_refused_with_a_reason(
    bundle: Path, make_line: Any, camera: dict[str, Any], sections: dict[str, Any], told: str
) -> None:
    line = make_line({"cam0": camera}, **{"bundle": str(bundle), **sections})
    answer, err = finish(andon_run(line, "--max-frames", "5"), code=1)
    assert told in err and answer["ok"] is False
    assert "Traceback" not in err
    assert "broker" not in err and not (line.parent / "state").exists(), "nothing was started"


def test_until_end_refuses_endless_sources(bundle: Path, make_line: Any) -> None:
    _, err = finish(andon_run(make_line({"cam0": {"source": LIVE}}, bundle=str(bundle)), "--until-end"), code=1)
    assert "endless: cam0" in err


def test_max_frames_and_a_camera_that_never_delivers(
    bundle: Path, broker: EmbeddedBroker, consumer: Any, make_line: Any
) -> None:
    dead = {"kind": "gstreamer", "pipeline": "videotestsrc is-live=true ! valve drop=true"}
    cameras = {
        "dead": {"source": dead, "product": "mono", "stale_after": 0.5, "stale_verdict_every": 0.5},
        "good": {"source": LIVE, "product": "mono"},
    }
    line = make_line(cameras, bundle=str(bundle), broker=at(broker))
    summary, log = finish(andon_run(line, "--max-frames", "60"))
    assert sum(sum(row.values()) for row in summary["verdicts"].values()) == 60
    assert summary["unknown"]["camera_stale"] >= 2
    assert summary["cameras"]["dead"]["restarts"] >= 1 and summary["cameras"]["good"]["restarts"] == 0
    assert "camera dead: down (no frame for 0.5 s)" in log
    consumer.until(lambda: any(status["source"] == "down" for status in consumer.of("status", "dead")))
    kinds = {entry["kind"] for alarm in consumer.of("alarm", "dead") for entry in alarm["alarms"]}
    assert "camera" in kinds and not any(alarm["alarms"] for alarm in consumer.of("alarm", "good"))
    assert summary["slots"]["good"]["dropped"] < summary["slots"]["good"]["taken"], "the other camera is not held up"


def test_hangup_takes_over_what_can_change(bundle: Path, broker: EmbeddedBroker, consumer: Any, make_line: Any) -> None:
    cameras = {"cam0": {"source": LIVE, "product": "mono", "queue": 64}}
    line = make_line(cameras, bundle=str(bundle), broker=at(broker))
    process = andon_run(line)
    consumer.wait_for("verdict", 3)
    text = line.read_text()
    line.write_text(text + "judge: {thresholds: {mono: -1.0}}\noutbox: {inflight: 9}\n")
    process.send_signal(signal.SIGHUP)
    consumer.until(lambda: consumer.of("verdict")[-1]["label"] == "NG")
    for wrong in ("site: 3", text + "judge: {thresholds: {mono: 9.0}, check_product: true}\n"):
        line.write_text(wrong)
        process.send_signal(signal.SIGHUP)
        seen = len(consumer.of("verdict"))
        consumer.wait_for("verdict", seen + 5)
        assert consumer.of("verdict")[-1]["label"] == "NG", "what was in force is"
    line.write_text(text.replace("pattern: black", "pattern: white"))
    process.send_signal(signal.SIGHUP)
    consumer.until(lambda: consumer.of("verdict")[-1]["score"] == pytest.approx(1.0, abs=0.1))
    process.send_signal(signal.SIGTERM)
    summary, log = finish(process)
    assert "reloaded: judge" in log and "only taken over by a restart: outbox" in log
    assert log.count("the configuration is not reloaded") == 2 and "reloaded: cameras.cam0.source" in log
    assert "judge.check_product: the bundle has no classifier" in log
    seqs = [verdict["seq"] for verdict in consumer.of("verdict")]
    assert seqs == list(range(1, len(seqs) + 1)), "no gap"
    assert summary["slots"]["cam0"]["dropped"] == 0


# -- commands, within this process -------------------------------------------------------------------------------------


class Line:
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


@pytest.fixture
def start_line(broker: EmbeddedBroker, consumer: Any, bundle: Path, make_line: Any) -> Iterator[Callable[..., Line]]:
    lines: list[Line] = []

    def start(cameras: dict[str, Any], **sections: Any) -> Line:
        ready = threading.Event()
        path = make_line(cameras, **{"bundle": str(bundle), "broker": at(broker), **sections})
        app = LineApp(Options(config=path, backend="onnxruntime", threads=1), on_ready=lambda app: ready.set())
        line = Line(app, broker.port, consumer)
        lines.append(line)
        line.thread.start()
        assert ready.wait(20)
        assert app.delivery.wait_connected(10)
        return line

    yield start
    for line in lines:
        line.app.stop()
        line.thread.join(20)
        assert not line.thread.is_alive()
        line.client.loop_stop()


def test_a_reload_to_a_source_that_waits_for_the_judge_loses_no_part(
    start_line: Callable[..., Line], consumer: Any, bundle: Path, make_line: Any, make_images: Any, tmp_path: Path
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})  # drop: null means latest here, below block
    folder = make_images(tmp_path / "parts", [10] * 60)
    make_line(
        {"cam0": {"source": {"kind": "folder", "path": str(folder)}, "product": "mono"}},
        bundle=str(bundle),
        broker={"host": line.app.broker.host, "port": line.app.broker.port},
    )
    line.app.reload()
    parts: list[dict[str, Any]] = []

    def judged() -> bool:
        parts[:] = [verdict for verdict in consumer.of("verdict") if verdict["part_id"] is not None]
        return len(parts) == 60

    consumer.until(judged)
    assert {(verdict["label"], verdict["reason"]) for verdict in parts} == {("OK", parts[0]["reason"])}


class Clinging:
    """A source that is live and lets go only when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def check(self) -> str:
        return "clinging"

    def open(self) -> None:
        pass

    def read(self, timeout: float) -> Shot | None:
        time.sleep(timeout)
        return Shot(load=lambda: np.zeros((8, 8, 3), np.uint8))

    def close(self) -> None:
        assert self.may.wait(20)


@pytest.mark.parametrize("new", ["live", "down"])
def test_a_source_that_lets_go_late_says_nothing_of_the_one_that_replaced_it(
    start_line: Callable[..., Line], eventually: Any, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    monkeypatch.setattr("andon.runtime.app.JOIN", 0.01)
    app = start_line({"cam0": {"source": LIVE, "product": "mono"}}).app
    source = Clinging()
    app.replace_source("cam0", source)
    eventually(lambda: app.cameras["cam0"].state.state == "live")
    old = app.cameras["cam0"]
    broken = {"kind": "gstreamer", "pipeline": "filesrc location=nothing.png ! pngdec"}
    settings = CameraConfig.model_validate({"source": LIVE if new == "live" else broken, "product": "mono"})
    app.replace_source("cam0", make_source("cam0", settings))
    eventually(lambda: app.cameras["cam0"].state.state == new)
    eventually(lambda: app.state.snapshot()["cameras"]["cam0"]["source"]["state"] == new)
    source.may.set()
    assert old.join(20) and old.state.state == "stopped"
    assert app.state.snapshot()["cameras"]["cam0"]["source"]["state"] == new
    alarms = app.worker.call(lambda: [(alarm.kind, alarm.state) for alarm in app.boards["cam0"].active])
    assert alarms == ([] if new == "live" else [("camera", "raised")])


def test_two_lines_do_not_share_a_state_folder(start_line: Callable[..., Line], bundle: Path, make_line: Any) -> None:
    """Each would overwrite the other's overrides and memory, whatever outbox it has."""
    camera = {"cam0": {"source": LIVE, "product": "mono"}}
    line = start_line(camera, outbox={"path": "one.db"})
    other = make_line(camera, bundle=str(bundle), outbox={"path": "two.db"})
    with pytest.raises(ConfigError, match="state is in use"):
        LineApp(Options(config=other, backend="onnxruntime", max_frames=1)).run()
    line.app.stop()
    line.thread.join(20)
    assert LineApp(Options(config=other, backend="onnxruntime", max_frames=1)).run()["frames"] == 1


def test_a_reload_to_another_product_forgets_the_verdicts_of_the_one_before(
    start_line: Callable[..., Line], consumer: Any, bundle: Path, make_line: Any
) -> None:
    sections = {"judge": {"thresholds": {"mono": -1.0, "poly": -1.0}}, "alarm": {"k": 3, "n": 5}}
    cam = {"source": LIVE, "product": "mono", "trigger": {"timeout_ms": 5000}}
    line = start_line({"cam0": cam}, **sections)

    def judge(*parts: str) -> None:
        for part in parts:
            assert line.command("cam0", "trigger", part_id=part)["ok"]
            consumer.until(lambda part=part: any(v["part_id"] == part for v in consumer.of("verdict")))
        assert consumer.of("verdict")[-1]["label"] == "NG"

    judge("1", "2")
    broker = {"host": line.app.broker.host, "port": line.app.broker.port}
    sections["judge"] = {"thresholds": {"poly": -2.0}}
    make_line({"cam0": {**cam, "product": "poly"}}, bundle=str(bundle), broker=broker, **sections)
    line.app.reload()
    consumer.until(lambda: consumer.of("status", "cam0")[-1]["product"] == "poly")
    assert line.app.state.snapshot()["thresholds"] == {"mono": 0.5, "poly": -2.0}
    judge("3")
    assert not line.app.worker.call(lambda: line.app.boards["cam0"].active), "one NG of this product is no series"


def test_a_trigger_names_the_next_frame(start_line: Callable[..., Line], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 2000}}})
    for index in range(5):
        assert line.command("cam0", "trigger", part_id=f"A-{index}")["ok"]
    verdicts = consumer.wait_for("verdict", 5)
    assert [(verdict["part_id"], verdict["label"]) for verdict in verdicts] == [(f"A-{i}", "OK") for i in range(5)]
    assert line.app.slots.counts()["cam0"].untriggered > 0, "frames without a trigger were not judged"


def test_a_trigger_is_taken_while_a_command_waits_for_the_judge(start_line: Callable[..., Line], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 60_000}}})
    gate = threading.Event()
    held = line.app.worker.post(lambda: gate.wait(20))
    line.client.publish(f"{line.app.config.topic}/cam0/cmd/acknowledge", b'{"id": "ack"}', qos=1)
    assert line.command("cam0", "trigger", part_id="A-1")["ok"]
    assert line.app.slots.counts()["cam0"].triggers == 1 and not held.done()
    assert not any(answer["id"] == "ack" for answer in consumer.of("result"))
    gate.set()
    (verdict,) = consumer.wait_for("verdict", 1)
    assert (verdict["part_id"], verdict["label"]) == ("A-1", "OK")


def test_a_trigger_without_a_frame_is_unknown(start_line: Callable[..., Line], consumer: Any) -> None:
    dead = {"kind": "gstreamer", "pipeline": "videotestsrc is-live=true ! valve drop=true"}
    cameras = {"cam0": {"source": dead, "product": "mono", "stale_after": None, "trigger": {"timeout_ms": 300}}}
    start_line(cameras).command("cam0", "trigger", part_id="A-1")
    (verdict,) = consumer.wait_for("verdict", 1)
    assert (verdict["part_id"], verdict["label"], verdict["reason"]) == ("A-1", "UNKNOWN", "no_frame")


def test_commands_change_the_line_and_are_answered(start_line: Callable[..., Line], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}}, alarm={"k": 2, "n": 3})
    answer = line.command("cam0", "threshold", threshold=-1.0, by="me")
    assert answer["result"] == {"product": "mono", "before": 0.5, "now": -1.0}
    shown = line.app.state.snapshot()["overrides"]["thresholds"]["mono"]
    assert (shown["value"], shown["in_force"]) == (-1.0, True)
    consumer.until(lambda: any(alarm["state"] == "raised" for alarm in consumer.of("alarm")))
    assert line.command("cam0", "threshold", threshold=None)["result"]["now"] == 0.5
    consumer.until(lambda: consumer.of("alarm")[-1]["state"] == "latched")
    assert line.command("cam0", "acknowledge", by="me")["result"] == {"acknowledged": ["defect"]}
    consumer.until(lambda: consumer.of("alarm")[-1]["state"] == "cleared")
    assert line.command("cam0", "product", product="poly")["result"] == {"before": "mono", "now": "poly"}
    consumer.until(lambda: consumer.of("verdict")[-1]["product"] == "poly")
    consumer.until(lambda: consumer.of("status")[-1]["product"] == "poly")
    for name, arguments in [
        ("product", {"product": "nut"}),
        ("memory", {"action": "snapshot"}),
        ("threshold", {"threshold": 1, "product": "nut"}),
    ]:
        refused = line.command("cam0", name, **arguments)
        assert not refused["ok"] and refused["error"], name
    assert consumer.of("verdict")[-1]["product"] == "poly"


def test_the_retained_status_says_which_thresholds_commands_have_set(
    start_line: Callable[..., Line], broker: EmbeddedBroker, consumer: Any, make_consumer: Any
) -> None:
    schema = json.loads((Path(andon.__file__).parent / "configs/schema/status.json").read_text())

    def said(watcher: Any, camera: str) -> Any:
        return [status.get("threshold_overrides") for status in watcher.of("status", camera)][-1:]

    cameras = {name: {"source": LIVE, "product": "mono"} for name in ("cam0", "cam1")}
    line = start_line(cameras)
    consumer.until(lambda: said(consumer, "cam1") == [{}])
    assert line.command("cam0", "threshold", threshold=0.6)["ok"]
    consumer.until(lambda: said(consumer, "cam0") == said(consumer, "cam1") == [{"mono": 0.6}])
    with make_consumer(broker.port) as later:
        later.until(lambda: said(later, "cam0") == said(later, "cam1") == [{"mono": 0.6}])
    line.app.stop()
    line.thread.join(20)
    consumer.forget()
    line = start_line(cameras)
    consumer.until(lambda: said(consumer, "cam0") == said(consumer, "cam1") == [{"mono": 0.6}])
    assert line.command("cam1", "threshold", threshold=None)["ok"]
    consumer.until(lambda: said(consumer, "cam0") == said(consumer, "cam1") == [{}])
    for status in consumer.of("status"):
        Draft202012Validator(schema).validate(status)


def test_a_command_that_cannot_be_kept_is_refused_and_changes_nothing(
    start_line: Callable[..., Line], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("andon.runtime.overrides.write_atomic", full)
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})
    for name, value in (("product", "poly"), ("threshold", 0.9)):
        refused = line.command("cam0", name, **{name: value})
        assert not refused["ok"] and "stays as it was" in refused["error"] and "No space" in refused["found"]
        assert refused["next"].startswith("make room in ")
    seen = len(consumer.of("verdict"))
    last = consumer.wait_for("verdict", seen + 2)[-1]
    assert (last["product"], last["threshold"]) == ("mono", 0.5)


@pytest.mark.parametrize("kind", ["delivery", "drift"])
def test_an_alarm_of_the_last_run_clears_when_its_reason_is_gone(
    start_line: Callable[..., Line], consumer: Any, tmp_path: Path, kind: Kind
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


def test_evidence_can_be_published(start_line: Callable[..., Line], broker: EmbeddedBroker, consumer: Any) -> None:
    pictures: dict[str, bytes] = {}
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.on_message = lambda _client, _data, message: pictures.update({message.topic: message.payload})
    client.connect("127.0.0.1", broker.port)
    client.subscribe("andon/v1/+/+/+/+/evidence/+")
    client.loop_start()
    bright = {"cam0": {"source": {**LIVE, "pattern": "white"}, "product": "mono"}}
    line = start_line(bright, evidence={"publish": True})
    consumer.until(lambda: len(pictures) >= 2)
    topic, jpeg = next(iter(pictures.items()))
    assert topic.startswith(f"{line.app.config.topic}/cam0/evidence/")
    assert topic.rsplit("/", 1)[1] in {verdict["id"] for verdict in consumer.of("verdict")}
    assert jpeg[:2] == b"\xff\xd8"
    client.loop_stop()


def test_rebuild_takes_over_a_new_calibration(start_line: Callable[..., Line], consumer: Any, bundle: Path) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})
    consumer.wait_for("verdict", 2)
    with Bundle.load(bundle) as loaded:
        lower = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": -1.0})
        loaded.save_thresholds({"mono": {"default": lower}})
    assert line.command("cam0", "rebuild")["ok"]
    consumer.until(lambda: consumer.of("verdict")[-1]["label"] == "NG")
    consumer.until(lambda: consumer.of("status")[-1]["ready"] is True)
    assert any(status["ready"] is False for status in consumer.of("status"))
    assert len({verdict["bundle"] for verdict in consumer.of("verdict")}) == 2


def test_rebuild_takes_over_the_newest_export(
    start_line: Callable[..., Line], consumer: Any, make_bundle: Any, dim: str, tmp_path: Path
) -> None:
    def export(name: str, minutes: int, *arguments: Any, **extra: Any) -> Path:
        path: Path = make_bundle(tmp_path / "bundles" / name, *arguments, **extra)
        os.utime(path, (60 * minutes, 60 * minutes))
        return path

    export("hvq-1", 1)
    white = {"cam0": {"source": {**LIVE, "pattern": "white"}, "product": "mono"}}
    line = start_line(white, bundle=str(tmp_path / "bundles/hvq-*"))
    consumer.wait_for("verdict", 1)
    assert line.command("cam0", "threshold", threshold=0.6)["ok"]
    newest = export("hvq-2", 2, dim, 0.005)
    answer = line.command("cam0", "rebuild")
    with Bundle.load(newest) as loaded:
        assert answer["ok"] and answer["result"]["bundle"] == loaded.id
    consumer.until(lambda: consumer.of("verdict")[-1]["bundle"] == loaded.id)
    last = consumer.of("verdict")[-1]
    assert (last["threshold"], last["label"]) == (0.005, "NG"), "0.6 was about the scores of another model"
    assert line.app.state.snapshot()["overrides"]["thresholds"]["mono"]["in_force"] is False
    consumer.until(lambda: consumer.of("status")[-1]["threshold_overrides"] == {})
    damaged = export("hvq-3", 3)
    (damaged / "stages/judge.onnx").write_bytes(b"damaged")
    assert "judge.onnx" in line.command("cam0", "rebuild")["error"]
    export("hvq-4", 4, thresholds=None, classes=["poly"])
    assert "unknown product 'mono'" in line.command("cam0", "rebuild")["error"]
    consumer.until(lambda: consumer.of("status")[-1]["ready"] is True)
    seen = len(consumer.of("verdict"))
    assert consumer.wait_for("verdict", seen + 2)[-1]["bundle"] == loaded.id, "what is refused changes nothing"


def test_a_rebuild_whose_engines_fail_ends_the_line_with_the_reason(
    start_line: Callable[..., Line], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})
    monkeypatch.setattr("andon.runtime.app.open_backend", Mock(side_effect=EngineError("CUDA is gone")))
    assert line.command("cam0", "rebuild")["ok"]
    line.thread.join(20)
    assert not line.thread.is_alive() and "CUDA is gone" in str(line.failure)
    consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")


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


def test_the_state_can_be_looked_at(start_line: Callable[..., Line], consumer: Any) -> None:
    import cv2

    line = start_line({"cam0": {"source": {**LIVE, "pattern": "ball"}, "product": "mono"}})
    consumer.wait_for("verdict", 2)
    state = line.app.state
    assert state.picture("cam0") is not None
    seen = len(consumer.of("verdict"))
    consumer.wait_for("verdict", seen + 2)
    shown = state.picture("cam0", width=32)
    assert shown is not None
    assert cv2.imdecode(np.frombuffer(shown, np.uint8), cv2.IMREAD_COLOR).shape == (24, 32, 3)
    snapshot = json.loads(json.dumps(state.snapshot()))
    assert snapshot["ready"] is True and snapshot["cameras"]["cam0"]["verdict"]["threshold"] == 0.5
    assert snapshot["delivery"]["connected"] and snapshot["slots"]["cam0"]["taken"] > 0
    assert len(snapshot["cameras"]["cam0"]["history"]) >= 2


def test_the_rate_is_that_of_now_and_the_summarys_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("andon.runtime.linestate.time", SimpleNamespace(monotonic=lambda: now))
    state, moment = LineState({"cam0": "mono"}), datetime.now(timezone.utc)
    frame = Frame("cam0", 1, moment, now, np.zeros((4, 4, 3), np.uint8))
    verdict = Verdict("id", "cam0", 1, moment, moment, "OK", "score_below_threshold")
    judgement: Any = SimpleNamespace(verdict=verdict, detail="", scored=None, box=(0, 0, 4, 4))

    def fps() -> float:
        return float(state.snapshot()["fps"])

    assert (fps(), state.pace) == (0, 0)
    state.record(judgement, frame, 0.0)
    assert (fps(), state.pace) == (0, 0)
    for _ in range(400):  # 20 s at 20 frames a second
        now += 0.05
        state.record(judgement, frame, 0.0)
    assert fps() == pytest.approx(20, abs=0.2) and len(state._recent) <= 202
    now += 5
    assert fps() == pytest.approx(10, abs=0.2), "half of the last ten seconds stood still"
    now += 3600
    assert fps() == 0 and state.pace == pytest.approx(20, abs=0.2)
