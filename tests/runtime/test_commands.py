"""calibrate, eval, verify and bench as commands, on a small synthetic bundle and real image files."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tarfile
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from andon.cli import main
from andon.runtime.bundle import Bundle
from andon.runtime.commands import bench, verify
from andon.runtime.dataset import open_dataset
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.fingerprint import image_hash, pack
from andon.runtime.program import Program
from andon.runtime.replay import replay_gate

from .conftest import ENCODE, SCORE  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
#: The same score, twice as large: an alternative program with thresholds of its own.
DOUBLE = """double (float[1,3] u) => (float[1,3] twice) {
    twice = Add(u, u)
}"""


def level(brightness: int, product: str) -> np.ndarray:
    """Red for product a, green for b: the synthetic classifier reads that, the score is the brightness / 100."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :, "ab".index(product)] = brightness
    return image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Good parts 1..40 of brightness, defects 61..64, in MVTec layout; masks cover the whole image."""
    root = tmp_path / "data"
    for product in "ab":
        for i in range(40):
            write(root / product / "train" / "good" / f"{i:03}.png", level(i + 1, product))
        for i in range(8):
            write(root / product / "test" / "good" / f"{i:03}.png", level(5 * i + 3, product))
        for i in range(4):
            write(root / product / "test" / "bright" / f"{i:03}.png", level(i + 61, product))
            mask = np.zeros((8, 8), np.uint8)
            mask[:, :4] = 255
            write(root / product / "ground_truth" / "bright" / f"{i:03}_mask.png", mask)
    return root


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[:, :, ::-1] if image.ndim == 3 else image)


def golden(brightness: list[int]) -> dict[str, np.ndarray]:
    frames = np.stack([cv2.resize(level(x, "a"), (4, 4)) for x in brightness])
    u = np.stack([np.array([[x, 0, 0]], np.float32) / 100 for x in brightness])
    return {
        "frames": frames,
        "class_ids": np.zeros(len(brightness), np.int32),
        "score": u.max(axis=(1, 2)),
        "map": u[:, None, None, 0],
        "encode.u": u,
    }


def gate(brightness: list[int], threshold: float) -> dict[str, np.ndarray]:
    data = golden(brightness)
    labels = np.array([0, 0, 1, 1], np.int32)
    limits = np.full(2, threshold, np.float32)
    return {k: data[k] for k in ("frames", "class_ids", "score")} | {"labels": labels, "threshold": limits}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main([str(a) for a in arguments] + ["--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.out + captured.err


ENGINE = ("--backend", "onnxruntime", "--threads", 1)


def held(products: str = "ab", count: int = 19) -> list[str]:
    return [f"{p}/train/good/{i:03}.png" for p in products for i in range(count)]


def test_calibrate_uses_the_held_out_images_and_eval_reports_what_that_does(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": held()})
    code, result, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    assert code == 0 and result["origin"] == "held out by training" and "<= 0.05" in text
    threshold = Bundle.load(root).threshold("a")
    assert threshold is not None and threshold.samples == 19
    assert threshold.value == pytest.approx(0.19)  # the 19th of 19: what 5 % takes
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, *ENGINE)
    assert code == 0 and result["images"] == 24 and result["unknown"] == 0
    metrics = result["products"]["a"]
    assert metrics["image_AUROC"] == 1 and metrics["miss_rate"] == 0
    assert metrics["false_alarm_rate"] == 0.5  # brightness 23, 28, 33, 38 of 3, 8, ..., 38
    assert metrics["threshold"] == pytest.approx(0.19) and metrics["pixel_AUROC"] is not None
    assert result["right_product"] == {"a": 1.0, "b": 1.0}
    assert set(result["latency_ms"]) == {"preprocess", "encode", "score", "total"}


def test_eval_says_when_good_images_are_unlike_those_of_the_calibration(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another lamp over the test's good parts: their alarms are no chance, and the promise was not for them."""
    root = make_bundle(report={"holdout": held()})
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)[0] == 0
    arguments = ("eval", "--bundle", root, "--data", data, "--report", tmp_path / "r.html", *ENGINE)
    code, result, text = run(capsys, *arguments)
    assert code == 0 and result["unlike"] == [] and "unlike them" not in text  # 4 of 8 may happen: once in 250
    for image in (data / "a/test/good").iterdir():
        write(image, level(41, "a"))
    code, result, text = run(capsys, *arguments)
    assert code == 0 and result["unlike"] == ["a"] and "andon calibrate --bundle" in text
    assert "a: 8 of 8 good images are called NG where 5.0% were promised" in text and "b: 8 of 8" not in text
    assert "8 of 8 good images are called NG" in (tmp_path / "r.html").read_text()
    # What a line recorded was judged with that line's thresholds, so the bundle's promise has no say in it.
    recorded = [
        {
            "id": s.key,
            "part_id": s.key.removesuffix(".png"),
            "product": s.product,
            "label": "NG",
            "score": 1.0,
            "threshold": 0.1,
            "ts_judged": "2026-01-01T00:00:00.000Z",
            "latency_ms": {"total": 1.0},
        }
        for s in open_dataset(str(data)).samples
        if s.split == "test"
    ]
    (tmp_path / "line.jsonl").write_text("".join(json.dumps(v) + "\n" for v in recorded))
    code, result, text = run(capsys, *arguments, "--verdicts", tmp_path / "line.jsonl")
    assert code == 0 and result["products"]["a"]["false_alarm_rate"] == 1
    assert result["unlike"] == [] and "would do that" not in text + (tmp_path / "r.html").read_text()


def test_eval_of_a_line_that_was_overloaded_by_defects_says_so_everywhere(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": held()})
    judged = {"label": "OK", "score": 0.1, "threshold": 0.2, "latency_ms": {"total": 1.0}}
    dropped = {"label": "UNKNOWN", "score": None, "threshold": None, "latency_ms": {}}
    lines = [
        {"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product, "ts_judged": "2026-01-01T00:00:00Z"}
        | (judged if s.good else dropped)
        for s in open_dataset(str(data)).select(split="test").samples
    ]
    recorded, report = tmp_path / "line.jsonl", tmp_path / "r.html"
    recorded.write_text("".join(json.dumps(v) + "\n" for v in lines))
    arguments = ("--bundle", root, "--data", data, "--verdicts", recorded, "--report", report, *ENGINE)
    code, result, text = run(capsys, "eval", *arguments)
    assert code == 0 and result["unknown"] == 8
    figures = result["products"]["a"]
    assert (figures["image_AUROC"], figures["miss_rate"], figures["false_alarm_rate"]) == (None, None, 0)
    assert (figures["unknown_rate_good"], figures["unknown_rate_defective"]) == (0, 1)
    said = "4 of 12 images are UNKNOWN (0.0% of the good and 100.0% of the defective)"
    assert f"warning: a: {said}" in text and "UNKNOWN 0.3333" in text
    page = report.read_text()
    assert said in page and "unknown rate defective" in page
    recorded.write_text("".join(json.dumps(v | dropped) + "\n" for v in lines))
    assert run(capsys, "eval", *arguments)[0] == 0, "nothing judged at all: no gallery, no latency, no figure"


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


def test_calibrate_refuses_images_that_set_the_constants(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(report={"holdout": [], "constants": held(count=2)})
    code, _, text = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.1, *ENGINE)
    assert code == 1 and "the set was too small" in text and "4 images that set the model's constants" in text


def contents(root: Path, first: int, last: int) -> str:
    """Fingerprints of the training images of brightness `first` to `last` of both products."""
    paths = [root / p / "train" / "good" / f"{i - 1:03}.png" for p in "ab" for i in range(first, last + 1)]
    return pack(image_hash(p) for p in paths)


def renamed(data: Path, root: Path) -> Path:
    """The good training images under other names, as a set of good/bad folders: other keys, another split."""
    for product in "ab":
        (root / product / "good").mkdir(parents=True)
        for i, image in enumerate(sorted((data / product / "train" / "good").iterdir())):
            shutil.copy(image, root / product / "good" / f"cam0_{i:03}.png")
    return root


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


def test_eval_leaves_out_test_images_that_the_model_has_seen(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test's good parts are of brightness 3, 8, ..., 38: the same files as some of the training's."""
    seen = {"fitted": contents(data, 20, 40), "constants": contents(data, 10, 19), "thresholds": contents(data, 5, 9)}
    root, page = make_bundle(report={"fingerprints": seen}), tmp_path / "r.html"
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, "--report", page, *ENGINE)
    assert code == 0 and result["images"] == 24 - 14 and result["products"]["a"]["good"] == 1
    assert result["seen"] == {"fitted": 8, "constants": 4, "thresholds": 2}
    said = "test images left out of the figures: 8 trained on, 4 that set constants, 2 held out for thresholds"
    assert said in text and said in page.read_text()
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", data, "--split", "train", *ENGINE)
    assert code == 0 and result["images"] == 80, "who asks for the training images gets them"
    code, result, text = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, *ENGINE)
    assert code == 0 and result["images"] == 24 and result["seen"] is None, "a bundle without a record"
    everything = pack(image_hash(s.path) for s in open_dataset(data).samples)
    root = make_bundle(report={"fingerprints": {"fitted": everything}})
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", data, *ENGINE)
    assert code == 1 and result["found"] == "24 trained on"


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


def test_auto_product_and_every_program(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(
        stages={
            "encode": (ENCODE, {"image": "frame"}),
            "double": (DOUBLE, {"u": "encode.u"}),
            "score": (SCORE, {"u": "encode.u"}),
        },
        program=[{"run": "encode"}, {"run": "double"}, {"run": "score"}],
        alternatives={"short": [{"run": "encode"}, {"run": "score"}]},
        report={"holdout": held()},
    )
    code, result, _ = run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)
    assert code == 0 and set(result["thresholds"]["a"]) == {"default", "short"}
    # A dark part of product b that looks like a: the classifier is asked, and is right for all others.
    write(data / "b/test/good/000.png", level(3, "a"))
    arguments = ("--product", "auto", "--samplers", "--limit", 6)
    code, result, text = run(capsys, "eval", "--bundle", root, "--data", data, *arguments, *ENGINE)
    assert code == 0 and result["images"] == 12 and set(result["samplers"]) == {"default", "short"}
    assert result["right_product"] == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert "double" not in result["samplers"]["short"]["latency_ms"] and "program  image_AUROC" in text


def test_eval_refuses_a_product_it_does_not_know(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "b").rename(data / "c")
    code, _, text = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, *ENGINE)
    assert code == 1 and "unknown product 'c'" in text and "Traceback" not in text


def test_eval_puts_the_figures_of_its_own_checkpoint_beside_and_refuses_another_models(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"weights_sha256": "1" * 64}))
    (tmp_path / "metrics.json").write_text(json.dumps({"products": {"a": {"image_AUROC": 0.5}}}))
    arguments = ("eval", "--data", data, "--checkpoint", tmp_path, *ENGINE)
    code, result, text = run(capsys, *arguments, "--bundle", make_bundle(checkpoint_sha256="1" * 64))
    assert code == 0 and result["torch"] == {"a": 0.5, "b": None} and "torch 0.5000, engines 1.0000" in text
    for sha256, expected in (("2" * 64, "2" * 12), ("", "no checkpoint: the bundle was enrolled")):
        code, result, text = run(capsys, *arguments, "--bundle", make_bundle(checkpoint_sha256=sha256))
        assert code == 1 and "is not the checkpoint the bundle was made from" in result["error"]
        assert (result["found"], result["expected"]) == ("1" * 12, expected) and "image AUROC" not in text


def test_eval_writes_a_report(
    make_bundle: MakeBundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "report.html"
    code, result, _ = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, "--report", page, *ENGINE)
    assert code == 0 and result["report"] == str(page)
    assert "image AUROC" in page.read_text() and "http://" not in page.read_text().replace("http://www.w3.org", "")


@pytest.mark.parametrize("report", ["folder", "file/report.html"])
def test_eval_refuses_a_report_that_cannot_be_written_before_the_work(
    report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    arguments = ("--bundle", "nosuch", "--data", "nosuch", "--report", tmp_path / report)
    for more in ((), ("--few-shot", "1")):
        code, result, text = run(capsys, "eval", *arguments, *more, "--threads", 1)
        assert code == 1 and f"--report {tmp_path / report} cannot be written" in result["error"], text
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "file"}
    assert run(capsys, "eval", *arguments[:-1], tmp_path / "r.html")[1]["error"] == "there is no bundle at nosuch"
    assert not (tmp_path / "r.html").exists(), "what was refused later leaves no empty report"


def test_the_help_of_verify_says_what_auto_does_there() -> None:
    """verify runs every variant; only the others pick one."""
    shown = {}
    for command in (verify, bench):
        parser = ArgumentParser()
        command.configure(parser)
        shown[command] = " ".join(parser.format_help().split())
    assert "auto: every one that the bundle has" in shown[verify] and "else fp32" not in shown[verify]
    assert "auto: fp16 on tensorrt, else fp32" in shown[bench]


def test_verify_replays_golden_set_and_gate(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"golden/golden.npz": golden([10, 40]), "golden/gate.npz": gate([10, 20, 60, 70], 0.5)}
    code, result, text = run(capsys, "verify", "--bundle", make_bundle(npz=good), *ENGINE)
    assert code == 0 and result["ok"] and "verified" in text
    subjects = {check["subject"] for check in result["checks"]["fp32"]}
    assert subjects == {"encode.u", "score", "map", "decisions", "a"}
    other = golden([10, 40])
    other["encode.u"] = other["encode.u"] * np.float32(1.01)
    flipped = gate([10, 20, 60, 70], 0.5)
    flipped["score"][1] = 0.6  # what export saw was NG
    for npz, subject in (
        ({**good, "golden/golden.npz": other}, "encode.u"),
        ({**good, "golden/gate.npz": flipped}, "decisions"),
    ):
        code, result, text = run(capsys, "verify", "--bundle", make_bundle(npz=npz), *ENGINE)
        assert code == 1 and not result["ok"] and "NOT verified" in text
        assert [check["subject"] for check in result["checks"]["fp32"] if not check["ok"]] == [subject]


@pytest.mark.parametrize("worse", [False, True], ids=["a near tie", "a worse engine"])
def test_a_pair_that_rounding_swaps_is_no_lost_auroc(make_bundle: MakeBundle, worse: bool) -> None:
    """One pair of 400 weighs 0.0025, more than FP16's limit of 0.002: that alone must not fail a device."""
    good, bad = [*range(10, 29), 60], [61, *range(80, 99)]
    npz = gate([*good, *bad], 0.5) | {"labels": np.repeat(np.array([0, 1], np.int32), 20)}
    order = np.arange(40)
    order[[19, 20]] = 20, 19
    npz["frames"] = npz["frames"][order[::-1] if worse else order]  # beside the scores of the export
    path = make_bundle(npz={"golden/gate.npz": npz})
    with Bundle.load(path) as bundle, OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        program.variant = "fp16"
        found = {check.subject: check for check in replay_gate(program)}["a"]
    assert found.ok is not worse, found
    assert worse or found.value == pytest.approx(1 / 400)


def test_a_score_that_is_not_a_number_is_a_flip(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is above no threshold, so a comparison alone would call it a good part."""
    log = ENCODE.replace("u = Mul(m, k)", "zero = Sub(m, m)\n    nan = Div(zero, zero)\n    u = Mul(nan, k)")
    stages = {"encode": (log, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})}
    npz = {"golden/golden.npz": golden([10]), "golden/gate.npz": gate([10, 20, 30, 40], 0.5)}
    _, result, _ = run(capsys, "verify", "--bundle", make_bundle(stages=stages, npz=npz), *ENGINE)
    found = {check["subject"]: check for check in result["checks"]["fp32"]}
    assert not found["decisions"]["ok"] and found["decisions"]["value"] == 1.0
    assert not found["score"]["ok"] and found["score"]["value"] is None


def test_verify_without_a_golden_set_is_refused(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = run(capsys, "verify", "--bundle", make_bundle(), *ENGINE)
    assert code == 1 and "has no golden/golden.npz" in text


def test_bench_reports_stages_overhead_and_why_there_is_no_torch(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(npz={"golden/golden.npz": golden([10, 40])})
    code, result, text = run(capsys, "bench", "--bundle", root, "--frames", 5, "--warmup", 2, *ENGINE)
    assert code == 0 and set(result["latency_ms"]) == {"encode", "score", "total"}
    assert result["threads"] == 1 and result["executor_overhead"] > 0 and result["peak_rss_mb"] > 10
    assert result["torch_ms"] is None and "enrolled without a checkpoint" in text


def test_bench_compares_no_other_program_with_torch(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch model computes the default program: of a shorter one the engines' speed-up would be the sampler's."""
    torch_side = SimpleNamespace(load=lambda: lambda *_: nullcontext(lambda frame, product: 0.0))
    monkeypatch.setattr(bench, "entry_points", lambda group: [torch_side])
    root = make_bundle(
        alternatives={"short": [{"run": "encode"}, {"run": "score"}]},
        checkpoint_sha256="0" * 64,
        npz={"golden/golden.npz": golden([10, 40])},
    )
    for program, compared in (("default", True), ("short", False)):
        arguments = ("--program", program, "--frames", 3, "--warmup", 0)
        code, result, text = run(capsys, "bench", "--bundle", root, *arguments, *ENGINE)
        assert code == 0 and (result["speedup_over_torch"] is not None) == compared
        assert compared or "computes the default program, not short" in text
