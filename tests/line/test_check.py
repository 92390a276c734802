"""`andon check`: every row of the table, good and bad, with a real broker and bundle."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from andon.cli import main
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.bundle import Bundle
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import CalibrationError
from andon.runtime.overrides import Overrides
from andon.runtime.startup import Options, effective, open_bundle

from ..runtime.bundles import rewrite
from ..runtime.conftest import ENCODE, SCORE  # type: ignore[import-not-found]
from ..runtime.conftest import build as build_bundle
from ..runtime.memorystation import memory_parts  # type: ignore[import-not-found]
from .conftest import BRIGHTNESS  # type: ignore[import-not-found]

PATTERN = {"source": {"kind": "test"}, "product": "mono"}


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, dict[str, Any]]]]:
    def run(line: Path) -> tuple[int, dict[str, dict[str, Any]]]:
        code = main(["check", "--config", str(line), "--json"])
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert answer["ok"] == (code == 0)
        return code, {finding["what"]: finding for finding in answer["findings"]}

    return run


def test_a_line_that_works(
    check: Any, make_line: Any, bundle: Path, broker: EmbeddedBroker, tmp_path: Path, make_images: Any
) -> None:
    folder = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [1, 2, 3])), "player": "gstreamer"}
    cameras = {"a": PATTERN, "b": {"source": folder, "product": "poly"}}
    sections = {"broker": {"host": broker.host, "port": broker.port}, "evidence": {}}
    line = make_line(cameras, bundle=str(bundle), outbox={"path": "disk/outbox.db"}, **sections)
    code, found = check(line)
    assert code == 0, found
    assert found["camera b"]["found"].startswith("3 images through")
    assert found["broker"]["found"].endswith("lets us in")
    assert found["thresholds"]["found"] == "mono 0.5, poly 0.5"
    assert found["evidence folder"]["found"] == str(tmp_path / "state" / "evidence")
    assert found["outbox"]["found"] == str(tmp_path / "disk" / "outbox.db")
    assert not (tmp_path / "state").exists() and not (tmp_path / "disk").exists(), "nothing is made by looking"


def test_what_is_passed_over_or_nearly_black_is_said(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path, make_images: Any
) -> None:
    for part in ("set/mono/good", "set/mono/bad/scratch", "dark"):
        make_images(tmp_path / part, [1, 2, 3])
    for image in (tmp_path / "dark").iterdir():
        cv2.imwrite(str(image), np.full((8, 8), 4000, np.uint16))
    cameras = {
        "a": {"source": {"kind": "dataset", "data": str(tmp_path / "set")}},
        "b": {"source": {"kind": "folder", "path": str(tmp_path / "dark")}, "product": "mono"},
    }
    _, found = check(make_line(cameras, bundle=str(bundle)))
    first, *more = found["camera a"]["found"].splitlines()
    assert found["camera a"]["ok"] and first == "1 images"
    assert more[0].startswith("warning: 3 images of ") and "(mono/bad/scratch: 3)" in more[0]
    assert "3 images\nwarning: nearly black" in found["camera b"]["found"] and found["camera b"]["ok"]


def test_a_test_picture_in_a_pipeline_is_warned_of(check: Any, make_line: Any, bundle: Path) -> None:
    """A line that was copied with it would judge colour bars."""
    sources = {"a": "videotestsrc is-live=true ! video/x-raw,width=64", "b": "fakesrc ! video/x-raw,width=64"}
    cameras = {
        name: {"source": {"kind": "gstreamer", "pipeline": text}, "product": "mono"} for name, text in sources.items()
    }
    code, found = check(make_line(cameras, bundle=str(bundle), broker=None))
    assert code == 0 and "warning: videotestsrc is GStreamer's test picture" in found["camera a"]["found"]
    assert "warning" not in found["camera b"]["found"]


@pytest.mark.parametrize(
    ("camera", "sections", "row", "told"),
    [
        (PATTERN, {"broker": {"port": 1}}, "broker", "nothing listens there"),
        (PATTERN, {"bundle": "none"}, "bundle", "there is no bundle"),
        (PATTERN, {"program": "nosuch"}, "engine", "nosuch"),
        (PATTERN, {"variant": "int8"}, "engine", "int8"),
        ({**PATTERN, "product": "nut"}, {}, "products", "nut"),
        ({**PATTERN, "product": "auto"}, {}, "products", "no classifier"),
        (PATTERN, {"judge": {"check_product": True}}, "products", "judge.check_product: the bundle has no classifier"),
        ({**PATTERN, "source": {"kind": "gstreamer", "pipeline": "nosuch"}}, {}, "camera cam0", "GStreamer refuses"),
        ({**PATTERN, "source": {"kind": "csi"}}, {}, "camera cam0", "nvarguscamerasrc"),
        ({**PATTERN, "source": {"kind": "usb", "device": "/dev/none"}}, {}, "camera cam0", "/dev/none is not there"),
        (
            {**PATTERN, "source": {"kind": "rtsp", "url": "rtsp://127.0.0.1:1/x"}},
            {},
            "camera cam0",
            "cannot be reached",
        ),
        (PATTERN, {"state": "bundle/manifest.json/state"}, "state folder", "manifest.json is not a folder"),
        (PATTERN, {"evidence": {"path": "bundle/manifest.json"}}, "evidence folder", "manifest.json is not a folder"),
        (PATTERN, {"outbox": {"path": "bundle/manifest.json/o.db"}}, "outbox", "manifest.json is not a folder"),
        (PATTERN, {"outbox": {"path": "bundle"}}, "outbox", "bundle is not a file"),
        (PATTERN, {"web": {"port": 0, "token_env": "ANDON_NO_SUCH_VARIABLE"}}, "live page", "is not set"),
    ],
)
def test_each_fault_is_found_in_its_row(
    check: Any, make_line: Any, bundle: Path, camera: Any, sections: Any, row: str, told: str
) -> None:
    code, found = check(make_line({"cam0": camera}, **{"bundle": str(bundle), "broker": None, **sections}))
    assert code == 1 and told in found[row]["found"]
    assert [what for what, finding in found.items() if not finding["ok"]][:1] == [row]


TOLD = {"a": [20, 20], "b": [38, 40]}


@pytest.mark.parametrize(
    ("products", "checked", "told", "warned"),
    [
        ({"cam0": "auto", "cam1": "a"}, False, TOLD, ["auto of cam0"]),
        ({"cam0": "a", "cam1": "b"}, False, TOLD, []),
        ({"cam0": "a", "cam1": "b"}, True, TOLD, ["check_product: the bundle's classifier is unsure of b"]),
        ({"cam0": "a"}, True, TOLD, []),
        ({"cam0": "auto"}, True, {"a": [20, 20], "b": [40, 40]}, []),
        ({"cam0": "auto"}, True, None, []),  # of before it was measured
    ],
)
def test_a_line_that_rests_on_an_unsure_classifier_is_warned(
    check: Any, make_line: Any, make_images: Any, tmp_path: Path, products: Any, checked: bool, told: Any, warned: Any
) -> None:
    extra = {} if told is None else {"verification": {"right_product": told}}
    stages = {"encode": (ENCODE, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})}
    path = build_bundle(tmp_path / "told", stages=stages, program=[{"run": "encode"}, {"run": "score"}], **extra)
    folder = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [1, 2]))}
    cameras = {name: {"source": folder, "product": product} for name, product in products.items()}
    judge = {"thresholds": {"a": 1.0, "b": 1.0}, "check_product": checked}
    line = make_line(cameras, bundle=str(path), broker=None, judge=judge)
    code, found = check(line)
    assert code == 0, found
    said = found["products"]["found"]
    assert said.count("warning: ") == len(warned), said
    for text in warned:
        assert text in said and "b 38 of 40 held-out good frames" in said


def test_a_video_that_cannot_be_decoded_is_found_before_the_line_runs(
    check: Any, make_line: Any, bundle: Path, video: Path, no_decoder: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    names = {"a": "video.avi", "b": "text.mp4"}
    cameras = {name: {**PATTERN, "source": {"kind": "file", "path": file}} for name, file in names.items()}
    line = make_line(cameras, bundle=str(bundle), broker=None)
    _, found = check(line)
    assert found["camera a"]["ok"] and not found["camera b"]["ok"]
    no_decoder("image/jpeg")
    code, found = check(line)
    assert code == 1 and not found["camera a"]["ok"]
    assert "Missing decoder: " in found["camera a"]["found"] and "gstreamer1.0-libav" in found["camera a"]["found"]


@pytest.mark.parametrize("what", ["live page", "broker"])
def test_a_port_that_is_taken_is_found(check: Any, make_line: Any, bundle: Path, what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sections = {"web": {"port": port}} if what == "live page" else {"broker": {"embedded": True, "port": port}}
        line = make_line({"cam0": PATTERN}, bundle=str(bundle), **{"broker": None, **sections})
        code, found = check(line)
        assert code == 1 and f"127.0.0.1:{port} cannot be used now" in found[what]["found"]
    code, found = check(line)
    assert code == 0, found


def test_a_bundle_without_thresholds_is_found(
    check: Any, make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_bundle(tmp_path / "not calibrated", thresholds=None)
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(path), broker=None))
    assert code == 1 and f"andon calibrate --bundle '{path}' --data" in found["thresholds"]["found"]
    with tarfile.open(packed := tmp_path / "it.tar", "w") as archive:
        archive.add(path, path.name)
    _, found = check(make_line({"cam0": PATTERN}, bundle=str(packed), broker=None))
    step = f"andon calibrate --data GOOD-IMAGES --bundle '{path}'"
    assert step in found["thresholds"]["found"] and str(packed) not in found["thresholds"]["found"], "it is refused"
    code, _ = check(make_line({"cam0": PATTERN}, bundle=str(path), broker=None, judge={"thresholds": {"mono": 1.0}}))
    assert code == 0


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"capacity": 6}, ""),
        ({"capacity": 7}, "memory capacity is larger than the bundle's episodic rows"),
        ({"selection": "transport"}, "memory.selection: transport: the bundle gives no transport probabilities"),
    ],
)
def test_a_memory_that_could_not_learn_is_found_and_refused_at_the_start(
    check: Any, make_line: Any, tmp_path: Path, section: dict[str, Any], told: str
) -> None:
    path = build_bundle(tmp_path / "memory", **memory_parts())
    sections = {"memory": {"enabled": True, **section}, "judge": {"thresholds": {"a": 1.0}}}
    line = make_line({"cam0": {**PATTERN, "product": "a"}}, bundle=str(path), broker=None, **sections)
    code, found = check(line)
    assert (code, found["memory"]["ok"]) == ((1, False) if told else (0, True)) and told in found["memory"]["found"]
    if told:
        with pytest.raises(CalibrationError, match=told):
            open_bundle(effective(Options(config=line)))
    else:
        open_bundle(effective(Options(config=line))).close()


@pytest.mark.parametrize("left", ["audit.jsonl", "memory/audit.jsonl", "memory"])
def test_what_an_earlier_run_left_and_this_user_cannot_write_is_found(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """As after a run by root. Tests may run as root, who may write everything."""
    line = make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None)
    (tmp_path / "state" / "memory").mkdir(parents=True)
    for name in ("audit.jsonl", "memory/audit.jsonl"):
        (tmp_path / "state" / name).touch()
    assert check(line)[0] == 0
    real, obstacle = os.access, tmp_path / "state" / left
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != obstacle and real(path, mode))
    code, found = check(line)
    assert code == 1 and not found["state folder"]["ok"] and str(obstacle) in found["state folder"]["found"]


#: Not a number for any frame.
NAN = BRIGHTNESS.replace(
    "score = ReduceMax<axes=[1,2,3], keepdims=0>(map)",
    """m1 = ReduceMax<axes=[1,2,3], keepdims=0>(map)
    zero = Sub(m1, m1)
    score = Div(zero, zero)""",
)


def test_a_bundle_whose_stages_give_no_number_is_found(
    check: Any, make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_bundle(tmp_path / "no number", NAN)
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(path), broker=None))
    assert code == 1 and [what for what, finding in found.items() if not finding["ok"]] == ["golden set"]
    assert "frames without a number 2" in found["golden set"]["found"]
    assert f"next:     andon verify --bundle '{path}'" in found["golden set"]["found"]


@pytest.mark.parametrize("factor", [1.0, 1.1], ids=["as exported", "another score"])
def test_a_few_golden_frames_are_replayed(
    check: Any, make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path, factor: float
) -> None:
    frames = np.stack([np.full((32, 32, 3), shade, np.uint8) for shade in (10, 60, 110, 160, 210)])
    maps = np.stack([np.full((1, 32, 32), frame[0, 0, 0] / 255, np.float32) for frame in frames])
    golden = {"frames": frames, "class_ids": np.zeros(5, np.int32), "map": maps, "score": maps[:, 0, 0, 0] * factor}
    path = make_bundle(tmp_path / "golden", golden=golden)
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(path), broker=None))
    row = found["golden set"]
    if factor == 1.0:
        assert code == 0 and row["found"] == (
            f"3 of 5 frames give what the export recorded; the rest, and decisions: andon verify --bundle {path}"
        )
    else:
        assert code == 1 and not row["ok"] and "score: largest relative difference 0.09" in row["found"]


def test_what_commands_have_set_stands_before_the_configuration(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path
) -> None:
    line = make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, state="state")
    overrides = Overrides(tmp_path / "state")
    with Bundle.load(bundle) as loaded:
        overrides.use(loaded, "default")
    overrides.set_product("cam0", "poly", "mono", None)
    overrides.set_threshold("poly", 0.6, 0.5, None)
    code, found = check(line)
    assert code == 0 and found["products"]["found"] == "cam0: poly (by command; configuration: mono)"
    assert found["thresholds"]["found"] == "poly 0.6 (by command; without it: 0.5)"
    fast = {"state": "state", "program": "fast", "judge": {"thresholds": {"poly": 0.5}}}
    _, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, **fast))
    assert "poly 0.5 (by the configuration) (0.6 by command is ignored" in found["thresholds"]["found"]


def test_thresholds_by_command_at_one_camera_are_shown_as_such(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path
) -> None:
    overrides = Overrides(tmp_path / "state")
    with Bundle.load(bundle) as loaded:
        overrides.use(loaded, "default")
    overrides.set_threshold("mono", 0.6, 0.5, None, "cam1")
    overrides.set_threshold("poly", 0.7, 0.5, None, "cam1")
    sections = {"bundle": str(bundle), "broker": None, "state": "state"}
    cameras = dict.fromkeys(("cam0", "cam1", "cam2"), PATTERN)
    _, found = check(make_line(cameras, **sections))
    assert found["thresholds"]["found"] == (
        "mono 0.5 at cam0, cam2, mono 0.6 at cam1 (by command; without it: 0.5), "
        "poly (0.7 by command at cam1 once it is judged)"
    )
    overrides.set_threshold("mono", 0.6, 0.5, None)
    _, found = check(make_line(cameras, **sections))
    assert found["thresholds"]["found"].startswith("mono 0.6 (by command; without it: 0.5), poly (")
    _, found = check(make_line(dict.fromkeys(["cam0"], PATTERN), **sections))
    assert found["thresholds"]["found"].endswith("(0.7 by command at cam1, which this line does not have, is not used)")
    resting = json.loads((tmp_path / "state/overrides.json").read_text())
    resting["camera_thresholds"] = {"cam1": {"mono": {"value": 0.9, "model": "0" * 12, "program": "default"}}}
    (tmp_path / "state/overrides.json").write_text(json.dumps(resting))
    _, found = check(make_line(cameras, **sections))
    ignored = " (0.9 by command is ignored: set for another model or program)"
    by = "(by command; without it: 0.5)"
    assert found["thresholds"]["found"] == f"mono 0.6 at cam0, cam2 {by}, mono 0.6 at cam1 {by}{ignored}"
    (tmp_path / "state/overrides.json").write_text(json.dumps({**resting, "camera_thresholds": {}}))
    _, found = check(make_line(cameras, **sections, program="fast", judge={"thresholds": {"mono": 0.5}}))
    assert "mono 0.5 (by the configuration) (0.6 by command is ignored" in found["thresholds"]["found"]


def test_thresholds_that_were_calibrated_for_a_camera_are_shown_and_those_of_another_lines_said(
    check: Any, make_line: Any, bundle: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path, make_images: Any
) -> None:
    with Bundle.load(bundle) as loaded:
        entry = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": 0.3})
        loaded.save_thresholds({"mono": {"default": entry}}, "cam1")
    sections = {"bundle": str(bundle), "broker": None}
    _, found = check(make_line(dict.fromkeys(("cam0", "cam1"), PATTERN), **sections))
    assert found["thresholds"]["found"] == "mono 0.5 at cam0, mono 0.3 at cam1 (its own)"
    alone = tmp_path / "alone"
    shutil.copytree(bundle, alone)
    rewrite(alone, lambda m: m.update(thresholds={}))
    code, found = check(make_line(dict.fromkeys(("cam0", "cam1"), PATTERN), bundle=str(alone), broker=None))
    assert code == 1 and found["thresholds"]["found"].startswith("no threshold for mono at cam0 under program default")
    parts = make_images(tmp_path / "parts", [1])
    line = make_line({"lane": {"source": {"kind": "folder", "path": str(parts)}, "product": "mono"}}, **sections)
    code, found = check(line)
    told = "the bundle has thresholds for cameras that this line does not have, and they are not used"
    assert code == 0 and f"warning: {told}" in found["thresholds"]["found"] and "cam1" in found["thresholds"]["found"]
    LineApp(Options(config=line, backend="onnxruntime", threads=1, until_end=True)).run()
    assert told in caplog.text


def test_thresholds_of_engines_that_may_decide_otherwise_are_said_by_check_and_at_the_start(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path, make_images: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibrated in FP32, run in FP16: export says whether that decides alike, unless its gate saw another memory."""

    def recorded(verification: dict[str, Any]) -> None:
        def change(manifest: dict[str, Any]) -> None:
            files = manifest["stages"]["judge"]["files"]
            manifest |= {"variants": ["fp32", "fp16"], "verification": verification}
            manifest["stages"]["judge"]["files"] = files | {"fp16": files["fp32"]}
            for entries in manifest["thresholds"].values():
                entries["default"] |= {"variant": "fp32", "backend": "onnxruntime"}

        rewrite(bundle, change)

    def looked(**sections: Any) -> tuple[str, list[str]]:
        cameras = {"cam0": {"source": {"kind": "folder", "path": str(parts)}, "product": "mono"}}
        line = make_line(cameras, bundle=str(bundle), broker=None, variant="fp16", **sections)
        code, found = check(line)
        assert code == 0, found
        caplog.clear()
        LineApp(Options(config=line, backend="onnxruntime", threads=1, until_end=True)).run()
        return found["thresholds"]["found"], [r.getMessage() for r in caplog.records if "other eng" in r.getMessage()]

    parts = make_images(tmp_path / "parts", [1])
    recorded({"gated": {"fp16": ["default"]}})
    assert looked() == ("mono 0.5", [])
    recorded({"enrolled_from": "0123456789ab", "gated": {"fp16": ["default"]}})
    said, (logged,) = looked()
    first, *more = said.splitlines()
    assert first == "mono 0.5" and more[0].startswith("warning: thresholds of mono (program default) were calibrated")
    assert [line.split(":")[0].strip() for line in more[1:]] == ["found", "expected", "next"]
    assert "thresholds of mono (program default)" in logged, "no camera is judged as poly"
    assert "to run in fp16 on onnxruntime" in logged and "andon calibrate --bundle" in logged and "\n" not in logged
    by_hand = {"mono": 0.4, "poly": 0.4}
    said, logged = looked(judge={"thresholds": by_hand})
    assert said.startswith("mono 0.4 (by the configuration; without it: 0.5)")
    assert "other engines" not in said and not logged, "set by who saw what runs: nothing was promised"


def test_a_threshold_by_command_of_a_product_that_no_camera_expects_now_is_shown(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path
) -> None:
    """It waits for the next command `product`, or for an image of a data set that names it."""
    overrides = Overrides(tmp_path / "state")
    with Bundle.load(bundle) as loaded:
        overrides.use(loaded, "default")
    overrides.set_threshold("poly", 99.0, 0.5, None)
    _, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, state="state"))
    assert found["thresholds"]["found"] == "mono 0.5, poly (99 by command once it is judged)"
    fast = {"state": "state", "program": "fast", "judge": {"thresholds": {"mono": 0.5}}}
    _, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, **fast))
    told = "mono 0.5 (by the configuration), poly (99 by command is ignored: set for another model or program)"
    assert found["thresholds"]["found"] == told


def test_it_is_said_that_a_service_may_keep_its_state_elsewhere(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd tells it to the service alone, so what its commands have set would be missed in silence."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    line = make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None)
    _, found = check(line)
    command = f"STATE_DIRECTORY=/var/lib/andon/{line.stem} andon check --config {line}"
    assert found["state folder"]["found"].endswith(command) and found["state folder"]["ok"]
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "var"))
    Overrides(tmp_path / "var").set_product("cam0", "poly", "mono", None)
    _, found = check(line)
    assert found["state folder"]["found"] == str(tmp_path / "var")
    assert found["products"]["found"] == "cam0: poly (by command; configuration: mono)"


@pytest.mark.parametrize("product", ["auto", "nut"])
def test_a_product_by_command_that_cannot_be_judged_is_found(
    check: Any, make_line: Any, bundle: Path, tmp_path: Path, product: str
) -> None:
    Overrides(tmp_path / "state").set_product("cam0", product, "mono", None)
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, state="state"))
    told = found["products"]["found"]
    assert code == 1 and f"product {product} by an earlier command" in told and "send the command product" in told


def test_damaged_overrides_are_found(check: Any, make_line: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/overrides.json").write_text("{")
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, state="state"))
    assert code == 1 and "overrides.json is damaged" in found["overrides"]["found"]
    assert (tmp_path / "state/overrides.json").exists(), "nothing is moved by looking"


def test_what_was_not_checked_is_said(check: Any, make_line: Any, bundle: Path) -> None:
    _, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None))
    assert "NOT CHECKED whether they are the export's (the bundle has no golden set)" in found["golden set"]["found"]


def test_engines_that_are_not_built_are_not_built_by_looking(
    check: Any, make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "not built")

    class Unbuilt(OnnxRuntimeBackend):
        plans = SimpleNamespace(has=lambda stage, path, variant: False)

    monkeypatch.setattr("andon.runtime.engine.select.open_backend", lambda name: Unbuilt(1))
    code, found = check(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None))
    assert code == 0 and f"andon build --bundle '{bundle}', then andon verify" in found["golden set"]["found"]
