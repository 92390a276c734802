"""What a line cuts out of its frames, as its camera says or its bundle does: the pixels that training saw."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.cli import main
from andon.runtime.commands.options import progress
from andon.runtime.crop import measured, read_image
from andon.runtime.dataset import Sample
from andon.runtime.errors import ConfigError
from andon.runtime.judge import Judge
from andon.runtime.lineconfig import CameraConfig, JudgeConfig
from andon.runtime.startup import Options, effective, open_bundle
from andon.train.features import load_frame
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ..runtime.bundles import rewrite  # type: ignore[import-not-found]
from ..runtime.conftest import ENCODE, SCORE  # type: ignore[import-not-found]
from ..runtime.conftest import build as build_bundle
from .judging import frame, picture  # type: ignore[import-not-found]

RECORD = {"roi": [32, 0, 32, 32], "picture": [64, 64]}
MONO = {"source": {"kind": "test", "width": 64, "height": 64}, "product": "mono"}


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int]]:
    """Width and height of a picture, and a region in it that may leave it by as much as the line takes for rounding."""
    width, height = draw(st.integers(3, 90)), draw(st.integers(3, 90))
    x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, down = draw(st.integers(1, width - x + 2)), draw(st.integers(1, height - y + 2))
    return width, height, (x, y, right, down)


@pytest.fixture
def judge(make_judge: Callable[..., Judge]) -> Judge:
    return make_judge()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pictures(), st.integers(0, 2**32 - 1))
@example((64, 64, (40, 30, 26, 36)), 0)
@example((9, 9, (0, 0, 9, 9)), 0)
def test_training_sees_the_pixels_that_the_line_sees(judge: Judge, shape: Any, seed: int) -> None:
    """The line by its camera's roi, the line by the bundle's crop, and a file as training, calibrate and eval read it:
    what goes into the network is the same to the last bit.
    """
    (width, height, roi), plain = shape, judge.detector.bundle.manifest
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.png"
        assert cv2.imwrite(str(path), image[..., ::-1])
        sample = Sample(path, "frame.png", "mono", "good", "train")
        crop = measured([sample], {"mono": roi}, progress)["mono"]
        sample = Sample(path, "frame.png", "mono", "good", "train", crop=crop)
        expected, cut = load_frame(sample, judge.detector.bundle.manifest.preprocess), read_image(sample)
    for own, crops in ((None, {"mono": crop}), (roi, {})):
        judge.detector.bundle.manifest = plain.model_copy(update={"crops": crops})
        camera = CameraConfig.model_validate({"source": {"kind": "test"}, "roi": own})
        judge.configure({"cam": camera}, JudgeConfig())
        judge.detector.program.frame.fill(0)
        assert judge.judge(frame(image)).box == (*roi[:2], cut.shape[1], cut.shape[0])
        np.testing.assert_array_equal(judge.detector.program.frame.reshape(expected.shape), expected)


def test_a_camera_without_a_roi_is_judged_as_the_bundle_says(
    make_bundle: Callable[..., Path], make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    root = make_bundle(tmp_path / "cropped", crops={"mono": RECORD})
    judge = make_judge(root)
    outside = judge.judge(frame(picture(10, (0, 40, 8, 8))))
    assert outside.verdict.label == "OK" and outside.box == (32, 0, 32, 32)
    inside = judge.judge(frame(picture(10, (40, 8, 4, 6)))).verdict
    assert inside.label == "NG" and inside.regions[0].bbox == (40, 8, 4, 6), "in pixels of the whole picture"
    already = judge.judge(frame(picture(10, (8, 8, 4, 6), size=(32, 32))))
    assert already.verdict.label == "NG" and already.box == (0, 0, 32, 32), "a camera that cuts it out itself"
    other = judge.judge(frame(picture(10, size=(48, 48))))
    assert (other.verdict.label, other.verdict.reason) == ("UNKNOWN", "bad_frame")
    assert "[32, 0, 32, 32] of pictures of 64 x 64" in other.detail and "48 x 48" in other.detail
    assert judge.judge(frame(picture(10), product="poly")).box == (0, 0, 64, 64), "of which nothing is said"
    assert make_judge(root, roi=(0, 32, 16, 16)).judge(frame(picture(10))).box == (0, 32, 16, 16), (
        "its own stands first"
    )


def test_auto_needs_one_answer(make_line: Any, tmp_path: Path) -> None:
    stages = {"encode": (ENCODE, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})}
    parts = {"stages": stages, "program": [{"run": "encode"}, {"run": "score"}], "classes": ("mono", "poly")}
    root = build_bundle(tmp_path / "cropped", crops={"mono": RECORD}, **parts)
    auto = {**MONO, "product": "auto"}
    with pytest.raises(ConfigError, match="camera a: product: auto without a roi") as error:
        open_bundle(effective(Options(make_line({"a": auto}, bundle=str(root)))))
    assert "mono: [32, 0, 32, 32] of pictures of 64 x 64; poly: the whole picture" in str(error.value.found)
    assert "cameras.a.roi" in str(error.value.next_step)
    for camera in ({**auto, "roi": [32, 0, 32, 32]}, MONO):
        open_bundle(effective(Options(make_line({"a": camera}, bundle=str(root))))).close()
    same = build_bundle(tmp_path / "same", crops={"mono": RECORD, "poly": RECORD}, **parts)
    open_bundle(effective(Options(make_line({"a": auto}, bundle=str(same))))).close()


def test_check_says_what_is_cut_out_and_warns_of_what_does_not_agree(
    make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(line: Path) -> dict[str, Any]:
        assert main(["check", "--config", str(line), "--json"]) in (0, 1)
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        return {finding["what"]: finding for finding in answer["findings"]}

    threshold = {"value": 0.5, "false_alarm_rate": 0.05, "samples": 20, "pixel": 0.5}
    own = {"default": {**threshold, "crop": {"roi": [0, 32, 16, 16], "picture": [64, 64]}}}
    crops = {"crops": {"mono": RECORD, "poly": RECORD}}
    root = make_bundle(tmp_path / "cropped")
    rewrite(root, lambda m: m.update({**crops, "thresholds": {"mono": {"default": threshold}, "poly": own}}))
    named = {
        "bundles": MONO,
        "same": {**MONO, "roi": [32, 0, 32, 32]},
        "rounded": {**MONO, "roi": [32, 0, 33, 32]},
        "other": {**MONO, "roi": [0, 32, 16, 16]},
        "calibrated": {**MONO, "product": "poly", "roi": [0, 32, 16, 16]},
    }
    row = check(make_line(named, bundle=str(root)))["region of interest"]
    assert row["ok"] and row["found"].count("warning: ") == 1
    first, *_ = row["found"].splitlines()
    assert first == (
        "bundles: mono: [32, 0, 32, 32] is cut out of pictures of 64 x 64, as the bundle says; those of 32 x 32 are "
        "cut out already"
    )
    warning = row["found"].partition("warning: ")[2]
    assert warning.startswith("cameras.other.roi is not what the bundle judges of mono")
    assert "[0, 32, 16, 16]" in warning and "[32, 0, 32, 32] of pictures of 64 x 64" in warning
    assert f"andon calibrate --bundle {root} --data FOLDER --products mono --camera other --roi 0,32,16,16" in warning
    row = check(make_line({"other": named["other"]}, bundle=str(root)))["region of interest"]
    assert f"andon calibrate --bundle {root} --data FOLDER --products mono --roi 0,32,16,16" in row["found"], "alone"


def test_a_line_that_cuts_out_and_a_model_of_whole_pictures(
    start_line: Any, make_bundle: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the bundle says nothing of, and training saw: pictures larger than the roi. Of others nothing is known."""
    root = make_bundle(tmp_path / "whole", report={"pictures": {"mono": [64, 64], "poly": [32, 32]}})
    cameras = {
        "a": {**MONO, "roi": [0, 0, 32, 32]},
        "b": {**MONO, "roi": [0, 0, 32, 32], "product": "poly"},
        "c": MONO,
    }
    with caplog.at_level(logging.INFO):
        start_line(cameras, bundle=str(root))
    told = [r for r in caplog.records if "cuts something out" in r.getMessage()]
    assert [r.levelname for r in told] == ["WARNING"] and "camera a: cameras.a.roi" in told[0].getMessage()
    assert "pictures of 64 x 64" in told[0].getMessage() and "andon train --roi 0,0,32,32" in told[0].getMessage()


THRESHOLD = {"value": 0.5, "false_alarm_rate": 0.05, "samples": 20, "pixel": 0.5}
ELSEWHERE = {"roi": [0, 32, 16, 16], "picture": [64, 64]}


@pytest.fixture
def narrowed(make_bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Bundles whose thresholds of mono, and of nothing else, were set on a part of the picture."""

    def make(name: str, crop: dict[str, Any] = ELSEWHERE, **said: Any) -> Path:
        root = make_bundle(tmp_path / name, **said)
        entries = {"mono": {"default": {**THRESHOLD, "crop": crop}}, "poly": {"default": THRESHOLD}}
        rewrite(root, lambda m: m.update(thresholds=entries))
        return root

    return make


def _row(line: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["check", "--config", str(line), "--json"])
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    return {f["what"]: f for f in findings}.get("region of interest", {"ok": True, "found": ""})


def test_what_thresholds_alone_cut_out_is_judged_as_ever_and_said_until_the_configuration_says_it_too(
    narrowed: Callable[..., Path],
    make_line: Any,
    make_judge: Callable[..., Judge],
    start_line: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = {"report": {"pictures": {"mono": [64, 64], "poly": [64, 64]}}}
    root = narrowed("whole", **whole)
    assert make_judge(root).judge(frame(picture(10), product="mono")).box == (0, 32, 16, 16), "scores and thresholds"
    row = _row(make_line({"a": MONO, "b": {**MONO, "product": "poly"}}, bundle=str(root)), capsys)
    assert row["ok"] and row["found"].count("warning: ") == 1
    assert "cameras.a.roi is not set: it judges what the thresholds of mono were set on" in row["found"]
    assert "[0, 32, 16, 16] of pictures of 64 x 64" in row["found"] and "the whole picture" in row["found"]
    assert "cameras.a.roi: [0, 32, 16, 16]" in row["found"] and "--products mono --roi 0,0,64,64" in row["found"]
    with caplog.at_level(logging.INFO):
        start_line({"a": MONO}, bundle=str(root))
    told = [r for r in caplog.records if "what the thresholds of mono were" in r.getMessage()]
    assert [r.levelname for r in told] == ["WARNING"]
    for path, camera in (
        (root, {**MONO, "roi": [0, 32, 16, 16]}),
        (narrowed("again", {"roi": [0, 0, 64, 64], "picture": [64, 64]}, **whole), MONO),
        (narrowed("cut before", report={"pictures": {"mono": [16, 16]}}), MONO),
    ):
        row = _row(make_line({"a": camera}, bundle=str(path)), capsys)
        assert row["ok"] and "warning" not in row["found"]
    row = _row(make_line({"a": MONO}, bundle=str(narrowed("trained", crops={"mono": RECORD}))), capsys)
    assert "[32, 0, 32, 32] of pictures" in row["found"] and "--roi 32,0,32,32" in row["found"]


def test_thresholds_of_another_cameras_part_of_the_picture_are_an_error(
    narrowed: Callable[..., Path],
    make_line: Any,
    start_line: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`calibrate --roi` for the second camera has the first one judge a corner of its pictures."""
    root = str(narrowed("whole", report={"pictures": {"mono": [64, 64]}}))
    cameras = {"a": MONO, "b": {**MONO, "roi": [0, 32, 16, 16]}}
    row = _row(make_line(cameras, bundle=root), capsys)
    assert not row["ok"] and row["found"].startswith("error: cameras.a.roi is not set")
    assert "b has a roi and the same thresholds" in row["found"]
    assert "--products mono --camera b --roi 0,32,16,16; thresholds of all cameras" in row["found"]
    with caplog.at_level(logging.INFO):
        start_line(cameras, bundle=root)
    told = [r for r in caplog.records if "b has a roi and the same thresholds" in r.getMessage()]
    assert [r.levelname for r in told] == ["WARNING"] and told[0].getMessage().startswith("camera a: cameras.a.roi")
    assert main(["calibrate", "--bundle", root, "--set", "mono=0.4", "--camera", "a"]) == 0
    assert _row(make_line(cameras, bundle=root), capsys)["found"] == row["found"], "it looked at no picture of a"
    for own in ({"roi": [0, 0, 64, 64]}, {"roi": [0, 32, 16, 16]}, {"product": "poly"}):
        assert _row(make_line({**cameras, "a": {**MONO, **own}}, bundle=root), capsys)["ok"]


def test_a_part_of_the_picture_that_one_cameras_thresholds_were_set_on_is_that_cameras(
    make_bundle: Callable[..., Path],
    make_line: Any,
    make_judge: Callable[..., Judge],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With or without a `roi` in the configuration; the others are judged as before."""
    root = make_bundle(tmp_path / "whole", report={"pictures": {"mono": [64, 64]}})
    own = {"mono": {"default": {**THRESHOLD, "value": 0.2, "pixel": 0.3, "crop": ELSEWHERE}}}
    rewrite(root, lambda m: m.update(camera_thresholds={"b": own}))
    judge = make_judge(root, cameras=("a", "b"))
    found = [judge.judge(frame(picture(80), camera=name)) for name in ("a", "b")]
    assert [(j.box, j.verdict.label, j.verdict.threshold) for j in found] == [
        ((0, 0, 64, 64), "OK", 0.5),
        ((0, 32, 16, 16), "NG", 0.2),
    ]
    assert [j.scored and j.scored.pixel_threshold for j in found] == [0.5, 0.3]
    assert judge.judge(frame(picture(80), camera="b", product="poly")).box == (0, 0, 64, 64)
    for roi in (None, [0, 32, 16, 16]):
        row = _row(make_line({"a": MONO, "b": {**MONO, "roi": roi}}, bundle=str(root)), capsys)
        assert row["ok"] and "warning" not in row["found"]
    assert "b: mono: [0, 32, 16, 16] is cut out" not in row["found"]
    row = _row(make_line({"a": MONO, "b": {**MONO, "roi": [0, 0, 16, 16]}}, bundle=str(root)), capsys)
    assert "warning: cameras.b.roi is not what the bundle judges of mono" in row["found"]
    rewrite(root, lambda m: m["thresholds"]["mono"]["default"].update(crop=RECORD))
    row = _row(make_line({"a": MONO, "b": {**MONO, "roi": [0, 32, 16, 16]}}, bundle=str(root)), capsys)
    assert row["ok"] and "warning: cameras.a.roi is not set" in row["found"], "b's roi has thresholds of its own"
