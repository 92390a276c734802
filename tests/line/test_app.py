"""The whole line in a process of its own: real pipelines, a real broker, what it judges and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.overrides import Overrides
from andon.runtime.summary import _NEXT
from andon.runtime.types import UNKNOWN_REASONS

from ..runtime.conftest import ENCODE, SCORE, build  # type: ignore[import-not-found]
from .mqttpage import examples  # type: ignore[import-not-found]
from .running import LIVE, andon_run, at, finish


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
    statuses = consumer.of("status", "cam0")
    assert statuses[0]["state"] == "online"
    shown = next(message for topic, message in examples() if topic.endswith("/status"))
    assert set(shown) == set(statuses[-1]), "docs/mqtt.md: the schema takes further fields"


def test_a_line_that_rests_on_an_unsure_classifier_says_so_at_its_start(
    tmp_path: Path, make_images: Any, make_line: Any
) -> None:
    stages = {"encode": (ENCODE, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})}
    told = {"right_product": {"a": [20, 20], "b": [38, 40]}}
    path = build(tmp_path / "told", stages=stages, program=[{"run": "encode"}, {"run": "score"}], verification=told)
    source = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [1, 2]))}
    judge = {"thresholds": {"a": 1.0, "b": 1.0}}
    line = make_line({"cam0": {"source": source, "product": "auto"}}, bundle=str(path), broker=None, judge=judge)
    _, log = finish(andon_run(line, "--until-end"))
    said = [text for text in log.splitlines() if "the bundle's classifier is unsure" in text]
    assert len(said) == 1 and " WARNING " in said[0] and "b 38 of 40 held-out good frames" in said[0]


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
