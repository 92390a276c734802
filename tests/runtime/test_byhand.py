"""andon calibrate --set: a threshold that somebody has chosen, in the bundle, and what is said of it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.commands import byhand, calibrate
from andon.runtime.manifest import Crop

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import golden, held

MakeBundle = Callable[..., Path]
STEPS = [{"run": "encode"}, {"run": "score"}]


@pytest.fixture
def calibrated(make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Two products, two programs, each with a threshold of 19 images."""
    npz = {"golden/golden.npz": golden([10, 40])}
    root = make_bundle(report={"holdout": held()}, alternatives={"short": STEPS}, npz=npz)
    code, _, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    assert code == 0, text
    return root


def test_a_chosen_threshold_is_written_without_images_and_calibrating_again_replaces_it(
    calibrated: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bundle.load(calibrated)
    code, result, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", "a=0.3")
    assert code == 0 and result["origin"] == "set by hand" and list(result["thresholds"]) == ["a"], text
    assert "a, program default: threshold 0.3, pixel 0.189" in text
    assert "before: 0.19 (calibrated: at most 5.0% false alarms)" in text and "no false-alarm rate is promised" in text
    after = Bundle.load(calibrated)
    chosen, old = after.threshold("a"), before.threshold("a")
    assert chosen is not None and old is not None and chosen.source.startswith("set by hand")
    assert (chosen.value, chosen.samples, chosen.false_alarm_rate, chosen.promises) == (0.3, 0, 1.0, False)
    assert (chosen.pixel, chosen.images) == (old.pixel, old.images) and old.images and old.promises
    assert (chosen.variant, chosen.backend) == (None, ""), "of whatever engines somebody has looked at"
    assert chosen.set_at > old.set_at and after.id == result["bundle"] and after.model_id == before.model_id
    assert after.threshold("a", "short") == before.threshold("a", "short"), "whose scores may have another scale"
    assert after.threshold("b") == before.threshold("b")
    code, result, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", 0.4)
    assert code == 0 and "before: 0.3 (set by hand in the bundle: it promises no false-alarm rate)" in text
    code, result, text = run(
        capsys, "calibrate", "--bundle", calibrated, "--data", data, "--false-alarm-rate", 0.05, *ENGINE
    )
    replaced = Bundle.load(calibrated).threshold("a")
    assert code == 0 and replaced is not None and replaced.promises and replaced.value == old.value, text


def test_each_product_and_program_may_have_its_own(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--set", "0.4", "--set", "b=0.5", "--pixel", "b=0.6", "--programs", "default", "short")
    code, _, text = run(capsys, "calibrate", "--bundle", calibrated, *own)
    bundle = Bundle.load(calibrated)
    found = {(p, n): bundle.threshold(p, n) for p in "ab" for n in ("default", "short")}
    assert code == 0 and {k: t and t.value for k, t in found.items()} == {
        ("a", "default"): 0.4,
        ("a", "short"): 0.4,
        ("b", "default"): 0.5,
        ("b", "short"): 0.5,
    }, text
    assert {n: t and t.pixel for (p, n), t in found.items() if p == "b"} == {"default": 0.6, "short": 0.6}
    assert {n: t and t.program for (p, n), t in found.items() if p == "b"} == {"default": "default", "short": "short"}
    code, result, _ = run(capsys, "calibrate", "--bundle", calibrated, "--set", 0.7, "--products", "b")
    assert code == 0 and list(result["thresholds"]) == ["b"]


def test_what_was_cut_out_stays_and_a_bundle_that_was_never_calibrated_takes_one(
    calibrated: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    crop = Crop(roi=(1, 1, 4, 4), picture=(8, 8))
    with Bundle.load(calibrated) as bundle:
        entry = bundle.manifest.thresholds["a"]["default"].model_copy(update={"crop": crop})
        bundle.save_thresholds({"a": {"default": entry}})
    code, _, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", "a=0.3")
    kept = Bundle.load(calibrated).threshold("a")
    assert code == 0 and kept is not None and kept.crop == crop, text
    root = make_bundle()
    code, _, text = run(capsys, "calibrate", "--bundle", root, "--set", 0.3)
    first = Bundle.load(root).threshold("b")
    assert code == 0 and first is not None and (first.pixel, first.crop, first.images) == (None, None, ""), text
    assert "b, program default: threshold 0.3, before: none" in text


@pytest.mark.parametrize(
    ("options", "error", "step"),
    [
        (("--set", "c=1"), "--set of an unknown product 'c'", "--set PRODUCT=VALUE"),
        (("--set", "1", "--set", "2"), "--set says twice", "once for each product"),
        (("--set", "a=1", "--products", "b"), "--set of an unknown product 'a'", "name one of these"),
        (("--set", "1", "--products", "c"), "unknown product 'c'", "one of these products"),
        (("--set", "1", "--programs", "long"), "no program long", "--programs"),
        (("--set", "a=1", "--pixel", "b=1"), "--pixel of an unknown product 'b'", "--pixel PRODUCT=VALUE"),
        (("--set", "1", "--roi", "0,0,4,4"), "--roi goes with --data", "leave --roi out"),
        (
            ("--set", "1", "--false-alarm-rate", "0.1"),
            "--false-alarm-rate goes with --data",
            "leave --false-alarm-rate",
        ),
        (("--set", "1", "--confidence", "0.9"), "--confidence goes with --data", "leave --confidence out"),
        (("--set", "1", "--group-by", "x"), "--group-by goes with --data", "leave --group-by out"),
        (("--data", "x", "--pixel", "1"), "--pixel goes with --set", "leave --pixel out"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    calibrated: Path, capsys: pytest.CaptureFixture[str], options: Any, error: str, step: str
) -> None:
    before = Bundle.load(calibrated).id
    code, result, _ = run(capsys, "calibrate", "--bundle", calibrated, *options)
    assert code == 1 and error in result["error"] and step in result["next"] and result["expected"]
    assert Bundle.load(calibrated).id == before


@pytest.mark.parametrize("value", ["x", "a=", "nan", "a=inf"])
def test_what_is_no_number_is_wrong_usage(calibrated: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    code, _, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", value)
    assert code == 2 and "is not a number as 36.9 or PRODUCT=36.9" in text


def test_a_packed_bundle_is_refused_with_the_command_that_unpacks_it(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(packed := tmp_path / "it.tar", "w") as archive:
        archive.add(calibrated, "it")
    code, result, _ = run(capsys, "calibrate", "--bundle", packed, "--set", "a=1")
    assert code == 1 and "it.tar is packed" in result["error"]
    assert "tar -xf" in result["next"] and "andon calibrate --set PRODUCT=VALUE --bundle" in result["next"]


def test_eval_and_verify_say_that_it_promises_nothing(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "set by hand in the bundle: it promises no false-alarm rate"
    for command in ("eval", "verify"):
        arguments = [*("--data", data, "--report", tmp_path / "r.html") * (command == "eval")]
        _, result, text = run(capsys, command, "--bundle", calibrated, *arguments, *ENGINE)
        assert not result["by_hand"] and "by hand" not in text
        run(capsys, "calibrate", "--bundle", calibrated, "--set", "b=0.3")
        code, result, text = run(capsys, command, "--bundle", calibrated, *arguments, *ENGINE)
        assert code == 0, text
        if command == "eval":
            assert result["by_hand"] == ["b"] and f"b: its threshold was {told}" in text
            assert list(result["promises"]) == ["a"] and told in (tmp_path / "r.html").read_text()
            run(capsys, "calibrate", "--bundle", calibrated, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
        else:
            assert result["by_hand"] == {"default": ["b"]} and f"threshold of b, program default: 0.3, {told}" in text
            run(capsys, "calibrate", "--bundle", calibrated, "--set", "a=0.4", "--camera", "lane2")
            code, result, text = run(capsys, command, "--bundle", calibrated, *ENGINE)
            assert code == 0 and result["by_hand"] == {"default": ["b", "a at lane2"]}
            assert f"threshold of a at lane2, program default: 0.4, {told}" in text


def test_the_defaults_that_say_nothing_are_those_of_the_options() -> None:
    from argparse import ArgumentParser

    parser = ArgumentParser()
    calibrate.configure(parser)
    assert {name: parser.get_default(name) for name in byhand.ABOUT_IMAGES} == byhand.ABOUT_IMAGES


def test_one_camera_may_have_its_own(calibrated: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.load(calibrated)
    code, _, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", "a=0.3", "--camera", "lane2")
    assert code == 0 and "a at camera lane2, program default: threshold 0.3, pixel 0.189" in text
    assert "before: 0.19 (calibrated" in text and "--data GOOD-IMAGES --camera lane2 replaces them" in text
    after = Bundle.load(calibrated)
    assert after.manifest.thresholds == before.manifest.thresholds
    assert [of[:3] for of in after.manifest.calibrated() if of[0]] == [("lane2", "a", "default")]
    stays = "thresholds of their own, which stay as they are: lane2 (--camera)"
    assert stays not in text
    for product in "ba":
        _, _, text = run(capsys, "calibrate", "--bundle", calibrated, "--set", f"{product}=0.19")
        assert (stays in text) is (product == "a")
    run(capsys, "calibrate", "--bundle", calibrated, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    evaluate = ("eval", "--bundle", calibrated, "--data", data, *ENGINE)
    code, result, text = run(capsys, *evaluate, "--camera", "lane2")
    assert code == 0 and result["by_hand"] == ["a"] and result["products"]["a"]["threshold"] == 0.3, text
    code, result, _ = run(capsys, *evaluate)
    assert code == 0 and not result["by_hand"] and result["products"]["a"]["threshold"] == pytest.approx(0.19)
