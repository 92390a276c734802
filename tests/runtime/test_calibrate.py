"""andon calibrate: which images set the thresholds, whatever they are called, and what is refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.dataset import open_dataset
from andon.runtime.fingerprint import image_hash, pack

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import contents, held, level, renamed, write

MakeBundle = Callable[..., Path]


def test_calibrate_uses_the_held_out_images_and_eval_reports_what_that_does(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": held()})
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    assert code == 0 and result["origin"] == "held out by training" and "<= 0.05" in text
    threshold = Bundle.load(root).threshold("a")
    assert threshold is not None and threshold.samples == 19 and threshold.set_at.endswith("Z")
    assert threshold.value == pytest.approx(0.19)  # the 19th of 19: what 5 % takes
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, *ENGINE)
    assert code == 0 and result["images"] == 24 and result["unknown"] == 0
    metrics = result["products"]["a"]
    assert metrics["image_AUROC"] == 1 and metrics["miss_rate"] == 0
    assert metrics["false_alarm_rate"] == 0.5  # brightness 23, 28, 33, 38 of 3, 8, ..., 38
    assert metrics["threshold"] == pytest.approx(0.19) and metrics["pixel_AUROC"] is not None
    assert result["right_product"] == {"a": 1.0, "b": 1.0}
    assert set(result["latency_ms"]) == {"preprocess", "encode", "score", "total"}


def test_calibrate_refuses_before_it_works_and_says_how_many_images_it_takes(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": held()})
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", data, *ENGINE)
    assert code == 1 and "too few good images for a false-alarm rate of 0.01" in text and "at least 99" in text
    assert result == {
        "ok": False,
        "error": result["error"],
        "found": "19 images",
        "expected": "at least 99",
        "next": result["next"],
    }
    assert Bundle.load(root).threshold("a") is None
    (data / "a/train/good/000.png").unlink()
    code, _, text = run(capsys, "calibrate", "--bundle", root, "--data", data, *ENGINE)
    assert code == 1 and "only some of the images that training held out" in text


def test_calibrate_takes_products_one_by_one_each_with_a_rate_of_its_own(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(24, 40):
        (data / f"b/train/good/{i:03}.png").unlink()
    root = make_bundle(report={"fingerprints": {"fitted": "0" * 16}})
    calibrate = ("calibrate", "--bundle", root, "--data", data, *ENGINE)
    code, result, _ = run(capsys, *calibrate, "--false-alarm-rate", 0.03)
    assert code == 1 and "product b: too few good images" in result["error"] and "0.04" in result["next"]
    assert "--products a calibrates those that have enough" in result["next"] and "--products b gives" in result["next"]
    code, result, text = run(capsys, *calibrate, "--false-alarm-rate", 0.03, "--products", "a")
    assert code == 0 and result["images"] == 40 and list(result["thresholds"]) == ["a"], text
    bundle = Bundle.load(root)
    assert bundle.threshold("b") is None and (first := bundle.threshold("a")) is not None
    code, result, text = run(capsys, *calibrate, "--false-alarm-rate", 0.04, "--products", "b")
    assert code == 0 and result["images"] == 24, text
    bundle = Bundle.load(root)
    assert bundle.threshold("a") == first and (second := bundle.threshold("b")) is not None
    assert (first.false_alarm_rate, second.false_alarm_rate) == (0.03, 0.04)
    code, result, _ = run(capsys, *calibrate, "--products", "c")
    assert code == 1 and "unknown product 'c'" in result["error"]


def test_calibrate_of_one_product_needs_images_of_no_other(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a record of contents, and with one of names alone."""
    arguments = ("--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    root = make_bundle(report={"holdout": held()})
    code, result, text = run(capsys, "calibrate", "--bundle", root, *arguments, "--products", "a")
    assert code == 0 and result["images"] == 19 and result["origin"] == "held out by training", text
    shutil.rmtree(data / "b")
    root = make_bundle(report={"fingerprints": {"fitted": contents(data, 1, 5, "a")}})
    code, result, _ = run(capsys, "calibrate", "--bundle", root, *arguments)
    assert code == 1 and "has no images of b" in result["error"] and "--products" in result["next"]
    code, result, text = run(capsys, "calibrate", "--bundle", root, *arguments, "--products", "a")
    assert code == 0 and result["images"] == 35 and result["left_out"] == {"fitted": 5}, text
    (data / "a").rename(data / "parts")
    code, result, _ = run(capsys, "calibrate", "--bundle", root, *arguments, "--products", "a")
    assert code == 1 and "--products" not in result["next"], "there is none that the set has"
    assert "call their folder so" in result["next"] and "FOLDER/a" in result["next"]


@pytest.mark.parametrize("top", ["bundle", ""], ids=["in a folder", "bare"])
def test_calibrate_refuses_a_packed_bundle_at_once_with_commands_that_work(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], top: str
) -> None:
    packed = tmp_path / "packed bundles" / "small.tar"
    packed.parent.mkdir()
    with tarfile.open(packed, "w") as archive:
        archive.add(make_bundle(), arcname=top or ".")
    code, result, text = run(capsys, "calibrate", "--bundle", packed, "--data", "nosuch", *ENGINE)
    assert code == 1 and "small.tar is packed" in result["error"], "before the data are looked at"
    unpack, command = result["next"].replace("nosuch", str(data)).rsplit(" && ", 1)
    subprocess.run(["bash", "-c", unpack], check=True)
    code, result, text = run(capsys, *shlex.split(command)[1:], "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 0, text
    code, result, _ = run(capsys, "calibrate", "--bundle", packed, "--data", data, *ENGINE)
    assert code == 1 and result["next"] == command, "nothing needs to be unpacked twice"


def test_calibrate_takes_new_good_images_but_never_the_test_split(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": ["elsewhere/1.png"]})
    code, result, _ = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 0 and result["images"] == 80 and "new good images" in result["origin"]
    threshold = Bundle.load(root).threshold("b")
    assert threshold is not None and 0.3 < threshold.value <= 0.40  # of brightness 1..40; the test split goes to 64


def test_calibrate_says_where_its_images_make_a_threshold_stricter_than_asked_and_what_is_less_so(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images 1 to 25 of a: their largest score is the threshold of 5 %; 39 would promise it with the second."""
    prints = {"fitted": contents(data, 26, 40), "thresholds": contents(data, 1, 25)}
    root = make_bundle(report={"fingerprints": prints})
    calibrate = ("calibrate", "--bundle", root, "--data", data, "--products", "a", *ENGINE)
    code, _, text = run(capsys, *calibrate, "--false-alarm-rate", 0.05)
    assert code == 0 and "a: 25 images keep 0.05 with a threshold that promises 0.0385" in text
    assert "--false-alarm-rate 0.077" in text
    code, _, text = run(capsys, *calibrate, "--false-alarm-rate", 0.077)
    assert code == 0 and "less strict" not in text
    threshold = Bundle.load(root).threshold("a")
    assert threshold is not None and threshold.value == pytest.approx(0.24), "the second largest"


def test_calibrate_refuses_images_that_set_the_constants(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": [], "constants": held(count=2)})
    code, _, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 1 and "the set was too small" in text and "4 images that set the model's constants" in text


def test_calibrate_knows_images_by_content_wherever_they_lie_and_whatever_they_are_called(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 good images 19 were held out; a promise set on the others would be about images the model knows."""
    seen = {"fitted": contents(data, 20, 38), "constants": contents(data, 39, 40), "thresholds": contents(data, 1, 19)}
    root = make_bundle(report={"holdout": held(), "fingerprints": seen})
    arguments = ("calibrate", "--bundle", root, "--false-alarm-rate", 0.05, *ENGINE)
    other = renamed(data, tmp_path / "other")
    for where in (data, other):  # in `other` some of the held-out images fall into the test split
        code, result, text = run(capsys, *arguments, "--data", where)
        assert code == 0 and result["origin"] == "held out by training" and result["images"] == 38, text
        assert set(result["left_out"]) == {"fitted", "constants"} and "left out: " in text
        assert where is other or "left out: 38 trained on, 4 that set constants" in text
        threshold = Bundle.load(root).threshold("a")
        assert threshold is not None and threshold.value == pytest.approx(0.19)
    for product in "ab":
        for i in range(10):
            write(other / product / "good" / f"new{i}.png", level(100 + i, product))
    code, result, _ = run(capsys, *arguments, "--data", other)
    assert code == 0 and 38 < result["images"] < 58 and result["origin"].startswith("38 held out by training and ")


def test_images_that_thresholds_were_set_on_are_no_test_images_and_may_set_them_again(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The promise looks better on the images that it was set on; a growing good/bad folder moves them to the test."""
    root = make_bundle(report={"holdout": [], "fingerprints": {"fitted": contents(data, 1, 20)}})
    model, folder = Bundle.load(root).model_id, tmp_path / "line"
    for product in "ab":
        for i in range(20):
            write(folder / product / "good" / f"{i:03}.png", level(100 + i, product))
        write(folder / product / "bad" / "0.png", level(200, product))
    calibrate = ("calibrate", "--bundle", root, "--data", folder, "--false-alarm-rate", 0.1, *ENGINE)
    used = {s.key for s in open_dataset(str(folder)).select(split="train", good=True).samples}
    code, first, text = run(capsys, *calibrate)
    assert code == 0 and first["images"] == len(used) and "images" not in first["thresholds"]["a"]["default"], text
    code, again, text = run(capsys, *calibrate)
    assert code == 0 and again["images"] == len(used) and not again["left_out"], text
    assert again["thresholds"]["a"]["default"]["value"] == first["thresholds"]["a"]["default"]["value"]
    assert Bundle.load(root).model_id == model
    for product in "ab":
        for i in range(20):  # before the others by name
            write(folder / product / "good" / f"-{i:03}.png", level(60 + i, product))
    moved = used & {s.key for s in open_dataset(str(folder)).select(split="test", good=True).samples}
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", folder, *ENGINE)
    assert moved and code == 0 and result["seen"] == {"calibrated": len(moved)}, text
    assert f"left out of the figures: {len(moved)} that thresholds were set on" in text
    code, result, text = run(capsys, *calibrate)
    train = {s.key for s in open_dataset(str(folder)).select(split="train", good=True).samples}
    assert code == 0 and result["images"] == len(used | train), "what it was set on before may be used again"


def test_a_folder_of_new_good_images_alone_is_used_whole_and_else_what_is_kept_is_said(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody split it and it tests nothing; who brings 19 good images has brought 19."""
    root = make_bundle(report={"holdout": [], "fingerprints": {"fitted": contents(data, 1, 20)}})
    folder = tmp_path / "new"
    for product in "ab":
        for i in range(19):
            write(folder / product / "good" / f"{i:03}.png", level(100 + i, product))
    arguments = ("--bundle", root, "--data", folder)
    calibrate = ("calibrate", *arguments, "--false-alarm-rate", 0.05, *ENGINE)
    code, result, text = run(capsys, *calibrate)
    assert code == 0 and result["images"] == 38 and result["kept"] == 0 and "kept for" not in text, text
    code, result, _ = run(capsys, "eval", *arguments, *ENGINE)
    assert code == 1 and result["found"] == "8 that thresholds were set on", "none of them is a test image now"
    write(folder / "a/bad/0.png", level(200, "a"))
    code, result, text = run(capsys, *calibrate)
    assert code == 0 and result["images"] == 38, "what thresholds were set on sets them again"
    code, result, text = run(capsys, "eval", *arguments, *ENGINE)
    assert code == 0 and result["images"] == 1 and result["seen"] == {"calibrated": 8}, text
    root = make_bundle(report={"holdout": [], "fingerprints": {"fitted": contents(data, 1, 20)}})
    code, result, text = run(capsys, *calibrate[:2], root, *calibrate[3:])
    assert code == 1 and result["found"] == "15 images" and "kept for `andon eval`: 4 further good images" in text
    (folder / "a/bad/0.png").unlink()
    (data / "a/train/good/000.png").rename(folder / "a/good/020.png")
    code, result, text = run(capsys, *calibrate[:2], root, *calibrate[3:])
    assert code == 1 and "kept for `andon eval`: 4" in text, "a folder that training knows has test images of its own"


def test_calibrate_takes_new_images_that_are_named_like_the_held_out_ones_and_says_so(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {"fitted": "0" * 16, "constants": "", "thresholds": "1" * 16}
    root = make_bundle(report={"holdout": held(), "fingerprints": seen})
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 0 and result["images"] == 80 and "new good images" in result["origin"]
    assert "named like those of training" in text


def test_calibrate_refuses_when_the_model_has_seen_all_there_is(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(
        report={"holdout": [], "fingerprints": {"fitted": contents(data, 1, 36), "support": contents(data, 37, 40)}}
    )
    other = renamed(data, tmp_path / "other")
    code, result, _ = run(capsys, "calibrate", "--bundle", root, "--data", other, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 1 and "the model has seen every good image of a" in result["error"]
    assert result["found"] == "36 trained on, 4 enrolled from" and "collect some" in result["next"]


def test_two_products_may_share_images(make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_bundle(report={"fingerprints": {"fitted": "0" * 16}})
    shutil.rmtree(data / "b")
    shutil.copytree(data / "a", data / "b")
    arguments = ("--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    code, result, text = run(capsys, "calibrate", *arguments)
    assert code == 0 and result["images"] == 80, text
    assert [t["default"]["samples"] for t in result["thresholds"].values()] == [40, 40]


def test_an_undecodable_image_is_left_out_on_request_and_at_once_where_training_did(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for broken in (data / "a/train/good/030.png", data / "a/test/good/003.png"):
        broken.write_bytes(broken.read_bytes()[:40] + str(broken).encode())
    told = pack(image_hash(p) for p in (data / "a/train/good/030.png", data / "a/test/good/003.png"))
    record = {"fitted": contents(data, 20, 30), "thresholds": contents(data, 1, 19)}
    knows, does_not = (make_bundle(report={"fingerprints": record | more}) for more in ({"skipped": told}, {}))
    for name, rest in (("calibrate", ("--false-alarm-rate", 0.05)), ("eval", ())):
        arguments = (name, "--data", data, *rest, *ENGINE)
        code, result, text = run(capsys, *arguments, "--bundle", does_not)
        assert code == 1 and "cannot decode" in text and "--on-corrupt skip" in result["next"]
        code, result, text = run(capsys, *arguments, "--bundle", does_not, "--on-corrupt", "skip")
        assert code == 0 and result["skipped"] and "skipped 1 undecodable images: a/t" in text
        code, result, text = run(capsys, *arguments, "--bundle", knows)
        assert code == 0 and not result["skipped"] and "1 that training could not decode" in text


def test_the_parts_that_training_held_out_are_what_counts(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images 1 to 20 of each product: four of each of five parts. 5 % would take 19 parts."""
    held_parts = [contents(data, 4 * i + 1, 4 * i + 4, p) for p in "ab" for i in range(5)]
    seen = {"fitted": contents(data, 25, 40), "thresholds": contents(data, 1, 20)}
    root = make_bundle(report={"fingerprints": seen, "parts": held_parts})
    for image in [p for product in "ab" for p in sorted((data / product / "train/good").iterdir())[20:24]]:
        image.unlink()
    calibrate = ("calibrate", "--bundle", root, "--data", data, *ENGINE)
    code, result, text = run(capsys, *calibrate, "--false-alarm-rate", 0.05)
    assert code == 1 and result["found"] == "20 images of 5 parts" and result["expected"] == "at least 19 parts"
    assert "--false-alarm-rate 0.167" in result["next"]
    code, result, text = run(capsys, *calibrate, "--false-alarm-rate", 0.334)
    assert code == 0 and (result["images"], result["parts"]) == (40, 10), text
    assert "40 good images of 10 parts: held out by training" in text
    threshold = Bundle.load(root).threshold("a")
    assert threshold is not None and threshold.samples == 5
    assert (threshold.variant, threshold.backend) == ("fp32", "onnxruntime")
    assert threshold.value == pytest.approx(0.16), "four of five parts lie at or below it"


def test_pictures_of_parts_that_were_trained_on_promise_nothing(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who names the parts only now is told what became of them: here each ten names, 000 to 009, are a part."""
    seen = {"fitted": contents(data, 1, 15), "thresholds": contents(data, 16, 40)}
    root = make_bundle(report={"fingerprints": seen})
    calibrate = ("calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.34, *ENGINE)
    code, result, text = run(capsys, *calibrate, "--group-by", r"/0(\d)\d\.png")
    assert code == 0 and (result["images"], result["parts"]) == (40, 4), text
    assert "left out: 10 images of parts of which the model has seen other pictures" in text
    code, result, text = run(capsys, *calibrate, "--group-by", "good")
    assert code == 1 and "has seen every part of a" in result["error"] and "--group-by good" in result["next"]
    code, result, text = run(capsys, *calibrate)
    assert code == 0 and (result["images"], result["parts"]) == (50, 50), "nothing is known of parts"


def test_an_unknown_program_is_refused_before_images_are_read_and_the_next_step_is_named(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = make_bundle(report={"holdout": held()}), tmp_path / "set"
    (data / "a/good").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        (data / "a/good" / name).write_bytes(b"no picture")
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--programs", "nope", *ENGINE)
    assert code == 1 and "no program nope" in result["error"], result
    assert "next:" in text and "--programs" in text.split("next:")[1]
