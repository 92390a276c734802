"""What changes while the line runs: its configuration on SIGHUP, its bundle by the command rebuild."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.bundle import Bundle
from andon.runtime.errors import EngineError
from andon.runtime.lineconfig import CameraConfig
from andon.runtime.source import Shot, make_source

from .running import LIVE, RunningLine, andon_run, at, finish


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


def test_a_reload_to_a_source_that_waits_for_the_judge_loses_no_part(
    start_line: Callable[..., RunningLine],
    consumer: Any,
    bundle: Path,
    make_line: Any,
    make_images: Any,
    tmp_path: Path,
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
    start_line: Callable[..., RunningLine], eventually: Any, monkeypatch: pytest.MonkeyPatch, new: str
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


def test_a_reload_to_another_product_forgets_the_verdicts_of_the_one_before(
    start_line: Callable[..., RunningLine], consumer: Any, bundle: Path, make_line: Any
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


def test_rebuild_takes_over_a_new_calibration(
    start_line: Callable[..., RunningLine], consumer: Any, bundle: Path
) -> None:
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


def test_rebuild_takes_over_what_was_calibrated_for_one_camera(
    start_line: Callable[..., RunningLine], consumer: Any, bundle: Path
) -> None:
    line = start_line({name: {"source": LIVE, "product": "mono"} for name in ("cam0", "cam1")})
    consumer.wait_for("verdict", 2)
    with Bundle.load(bundle) as loaded:
        lower = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": -1.0})
        loaded.save_thresholds({"mono": {"default": lower}}, "cam1")
    assert line.command("cam0", "rebuild")["ok"]
    consumer.until(lambda: [v["label"] for v in consumer.of("verdict", "cam1")][-1:] == ["NG"])
    seen = len(consumer.of("verdict", "cam0"))
    consumer.until(lambda: len(consumer.of("verdict", "cam0")) > seen)
    assert {v["threshold"] for v in consumer.of("verdict", "cam0")} == {0.5}
    assert consumer.of("status", "cam1")[-1]["thresholds"]["mono"] == -1.0
    assert consumer.of("status", "cam0")[-1]["thresholds"]["mono"] == 0.5


def test_rebuild_takes_over_the_newest_export(
    start_line: Callable[..., RunningLine], consumer: Any, make_bundle: Any, dim: str, tmp_path: Path
) -> None:
    def export(name: str, minutes: int, *arguments: Any, **extra: Any) -> Path:
        created = f"2026-01-01T00:0{minutes}:00Z"
        path: Path = make_bundle(tmp_path / "bundles" / name, *arguments, created=created, **extra)
        os.utime(path, (1e9, 1e9))
        return path

    export("hvq-1", 1)
    (export("hvq-1-half", 1) / "stages/judge.onnx").unlink()  # newer by its name; the start passes it over
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
    assert line.app.state.snapshot()["overrides"]["camera_thresholds"]["cam0"]["mono"]["in_force"] is False
    consumer.until(lambda: consumer.of("status")[-1]["threshold_overrides"] == {})
    damaged = export("hvq-3", 3)
    (damaged / "stages/judge.onnx").write_bytes(b"damaged")
    assert "judge.onnx" in line.command("cam0", "rebuild")["error"]
    export("hvq-4", 4, thresholds=None, classes=["poly"])
    assert "unknown product 'mono'" in line.command("cam0", "rebuild")["error"]
    consumer.until(lambda: consumer.of("status")[-1]["ready"] is True)
    seen = len(consumer.of("verdict"))
    assert consumer.wait_for("verdict", seen + 2)[-1]["bundle"] == loaded.id, "what is refused changes nothing"


@pytest.mark.parametrize("packed", [False, True])
def test_rebuild_refuses_a_bundle_that_would_judge_nothing(
    start_line: Callable[..., RunningLine], consumer: Any, make_bundle: Any, tmp_path: Path, packed: bool
) -> None:
    """It was taken, answered ok, and every verdict was UNKNOWN until somebody looked."""
    make_bundle(tmp_path / "bundles" / "hvq-1")
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(tmp_path / "bundles/hvq-*"))
    consumer.wait_for("verdict", 1)
    later = make_bundle(tmp_path / "bundles" / "hvq-2", thresholds=None, created="2026-02-01T00:00:00Z")
    if packed:
        with tarfile.open(tmp_path / "bundles" / "hvq-2.tar", "w") as archive:
            archive.add(later, later.name)
        shutil.rmtree(later)
    answer = line.command("cam0", "rebuild")
    assert not answer["ok"] and "no threshold for mono, which the line judges now" in answer["error"]
    assert (f"--data GOOD-IMAGES --bundle {later}" if packed else f"--bundle {later} --data") in answer["next"]
    assert ("tar -xf" in answer["next"]) == packed
    assert line.app.state.snapshot()["ready"] is True
    seen = len(consumer.of("verdict"))
    assert consumer.wait_for("verdict", seen + 2)[-1]["label"] == "OK"
    assert line.command("cam0", "product", product="poly")["ok"]
    line.app.config = line.app.config.model_copy(update={"bundle": tmp_path / "bundles/hvq-1"})
    assert line.command("cam0", "rebuild")["ok"], "nothing is lost here"


def test_rebuild_takes_an_uncalibrated_bundle_where_thresholds_come_from_elsewhere(
    start_line: Callable[..., RunningLine], consumer: Any, make_bundle: Any, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "bundles" / "hvq-1")
    later = make_bundle(tmp_path / "later", thresholds=None, created="2026-02-01T00:00:00Z")
    with Bundle.load(later) as loaded:
        own = {"value": 0.5, "model": loaded.model_id}
    sections = {"bundle": str(tmp_path / "bundles/hvq-*"), "judge": {"thresholds": {"mono": own}}}
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}}, **sections)
    later.rename(tmp_path / "bundles" / "hvq-2")
    consumer.wait_for("verdict", 1)
    answer = line.command("cam0", "rebuild")
    assert answer["ok"], answer
    consumer.until(lambda: consumer.of("verdict")[-1]["bundle"] == answer["result"]["bundle"])
    assert consumer.of("verdict")[-1]["label"] == "OK"


def test_a_rebuild_whose_engines_fail_ends_the_line_with_the_reason(
    start_line: Callable[..., RunningLine], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})
    monkeypatch.setattr("andon.runtime.app.open_backend", Mock(side_effect=EngineError("CUDA is gone")))
    assert line.command("cam0", "rebuild")["ok"]
    line.thread.join(20)
    assert not line.thread.is_alive() and "CUDA is gone" in str(line.failure)
    consumer.until(lambda: consumer.of("status")[-1]["state"] == "stopped")
