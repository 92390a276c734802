"""`andon train` as a user calls it: what it refuses, skips and says."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from andon.cli import main
from andon.export.frames import gather
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.fingerprint import image_hash, pack
from andon.runtime.manifest import Preprocess
from andon.train import run
from andon.train.checkpoint import load_checkpoint, read_provenance
from PIL import Image

from .conftest import SETS, refusal


def test_refusals_name_what_is_wrong(
    synthetic_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(synthetic_data)
    assert "--method and --data are needed" in refusal(capsys, "--method", "hvq")
    assert "no data set at" in refusal(capsys, "--method", "hvq", "--data", str(tmp_path / "none"))
    error = refusal(capsys, "--method", "hvq", "--data", data, "--products", "bolt", "--out", str(tmp_path / "x"))
    assert "no product bolt" in error and "grain, grid, stripes" in error
    assert not (tmp_path / "x").exists(), "a refusal leaves no folder"
    assert "is not empty" in refusal(capsys, "--method", "hvq", "--data", data, "--out", str(checkpoint))
    assert "nothing to resume" in refusal(capsys, "--resume", str(checkpoint))
    assert f"andon export --method hvq --checkpoint {checkpoint}" in refusal(capsys, "--resume", str(checkpoint))
    if not torch.cuda.is_available():
        error = refusal(capsys, "--method", "hvq", "--data", data, "--out", str(tmp_path / "y"), "--device", "cuda")
        assert "cannot train on device cuda" in error


def test_corrupt_image_stops_or_is_skipped_and_recorded(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    broken = data / "grid" / "train" / "good" / "004.png"
    broken.write_bytes(broken.read_bytes()[:300])
    common = ["--method", "hvq", "--data", str(data), "--no-eval", *SETS]
    assert str(broken) in refusal(capsys, *common, "--out", str(tmp_path / "a"))
    assert main(["train", *common, "--out", str(tmp_path / "b"), "--on-corrupt", "skip", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any("skipped 1 undecodable" in line for line in out)
    provenance = read_provenance(tmp_path / "b")
    assert provenance.skipped == ("grid/train/good/004.png",)
    assert provenance.fingerprints["skipped"] == pack([image_hash(broken)])
    assert json.loads(out[-1])["ok"] is True and f"next: andon export --method hvq --checkpoint {tmp_path / 'b'}" in out


def test_names_that_are_no_utf8_do_not_cost_the_training(synthetic_data: Path, tmp_path: Path) -> None:
    """As a PLC or an old Windows share writes them: of the set, the product, the defect and the images."""
    part, scratch = (os.fsdecode(name) for name in (b"Geh\xe4use", b"Kratzer-\xfc"))
    data = tmp_path / part
    shutil.copytree(synthetic_data / "grid", data / part)
    for folder in ("test", "ground_truth"):
        (data / part / folder / "patch").rename(data / part / folder / scratch)
    for image in (*(data / part / "train/good").iterdir(), *(data / part / "test" / scratch).iterdir()):
        image.rename(image.with_name(part + image.name))
    for mask in (data / part / "ground_truth" / scratch).iterdir():
        mask.rename(mask.with_name(part + mask.name))
    views = ["--set", "augment.images=14", "--products", part]
    assert main(["train", "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS, *views]) == 0
    origin = read_provenance(tmp_path / "run")
    assert origin.classes == (r"Geh\xe4use",) and origin.data.endswith(r"Geh\xe4use") and origin.views
    assert len(open_dataset(data).select(keys=origin.holdout, products=origin.classes)) == len(origin.holdout) > 0
    assert {s.label for s in open_dataset(data).samples} == {"good", r"Kratzer-\xfc"}


def test_mask_of_another_size_is_refused_before_the_training(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    mask = data / "grid" / "ground_truth" / "patch" / "002_mask.png"
    assert cv2.imwrite(str(mask), np.zeros((48, 40), np.uint8))
    monkeypatch.setattr(run, "fit", lambda *a, **k: pytest.fail("it has trained"))
    said = refusal(capsys, "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    assert str(mask) in said and "40x48" in said and "96x96" in said


@pytest.mark.parametrize("left", [20, 100])
def test_a_mask_that_is_cut_off_is_refused_before_the_training(
    left: int, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind its head; --on-corrupt skip is about images and is not what it is told to do."""
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    mask = data / "grid" / "ground_truth" / "patch" / "002_mask.png"
    mask.write_bytes(mask.read_bytes()[:left])
    monkeypatch.setattr(run, "fit", lambda *a, **k: pytest.fail("it has trained"))
    arguments = ("--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), "--on-corrupt", "skip")
    said = refusal(capsys, *arguments, *SETS)
    assert f"cannot decode {mask}" in said and "--on-corrupt" not in said


def test_masks_are_held_against_the_image_as_it_is_read(tmp_path: Path) -> None:
    """A camera's note that a picture is to be turned is followed by the reader; its size is the turned one."""
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    Image.new("RGB", (18, 12)).save(tmp_path / "0.jpg", exif=turned)
    Image.new("L", (18, 12)).save(tmp_path / "lying.png")
    Image.new("L", (12, 18)).save(tmp_path / "standing.png")
    sample = Sample(tmp_path / "0.jpg", "0.jpg", "bolt", "bad", "test")
    run._check_masks([dataclasses.replace(sample, mask_path=tmp_path / "standing.png")])
    with pytest.raises(SourceError, match=r"lying\.png is not of its image's size"):
        run._check_masks([dataclasses.replace(sample, mask_path=tmp_path / "lying.png")])


def test_masks_may_be_of_images_that_pillow_takes_for_a_bomb_or_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert cv2.imwrite(str(tmp_path / "0.tif"), np.zeros((12, 18, 3), np.uint16))
    assert cv2.imwrite(str(tmp_path / "0.png"), np.zeros((12, 18), np.uint8))
    run._check_masks([Sample(tmp_path / "0.tif", "0.tif", "bolt", "bad", "test", tmp_path / "0.png")])


def test_unreadable_test_image_does_not_cost_the_training(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    broken = data / "grid" / "test" / "good" / "003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    assert str(broken) in refusal(capsys, "--method", "hvq", "--data", str(data), "--out", str(out), *SETS)
    assert load_checkpoint(out).config.method == "hvq"


def test_a_fault_before_there_is_anything_to_keep_leaves_no_folder(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **settings: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(run, "extract", broken)
    arguments = ["--method", "hvq", "--data", str(synthetic_data), "--out", str(tmp_path / "run"), *SETS]
    assert "a fault" in refusal(capsys, *arguments) and not (tmp_path / "run").exists()


def test_copies_of_training_images_are_no_test_images(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would count as good parts that the model has never seen."""
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    train, test = data / "grid/train/good", data / "grid/test/good"
    for i in range(14):  # all: fitted ones and held-out ones
        shutil.copy(train / f"{i:03}.png", test / f"IMG_{i}.png")
    arguments = ["train", "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS, "--json"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "test images left out of the figures: 14 that are copies of good training images" in out
    figures = json.loads(out.splitlines()[-1])["products"]["grid"]
    assert (figures["good"], figures["defective"]) == (8, 8)


def test_images_that_are_not_used_are_said_before_the_training(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    shutil.copytree(data / "grid/test/patch", data / "grid/train/bad")
    monkeypatch.setattr(run, "extract", lambda *a, **k: (_ for _ in ()).throw(ValueError("far enough")))
    assert main(["train", "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS]) == 1
    said = capsys.readouterr()
    assert "far enough" in said.err and f"warning: 8 images of {data} are not used (grid/train/bad: 8)" in said.out


def test_nothing_held_out(synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid", "--no-eval"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--set", "holdout=0", *SETS]) == 0
    said = capsys.readouterr().out
    assert read_provenance(tmp_path / "run").holdout == () and "no image held out" in said
    assert "next: andon export" not in said and "holdout 0.1 or more" in said.splitlines()[-1]


@pytest.mark.parametrize("method", ["hgad", "vpdm"])
def test_a_product_without_an_image_for_its_constants_is_refused_before_the_training(
    method: str, synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in sorted((data / "grid/train/good").iterdir())[3:]:
        image.unlink()
    arguments = ("--method", method, "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    told = refusal(capsys, *arguments)
    assert "no held-out good image of product 'grid'" in told and "3 good training images" in told
    assert not (tmp_path / "run").exists(), "a refusal leaves no folder, so the command may be given again"
    if method == "vpdm":
        assert "score.by_position=false" in told
        assert main(["train", *arguments, "--set", "score.by_position=false", "--no-eval"]) == 0


def test_a_product_that_nothing_would_be_learned_of_is_refused(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in (data / "grid/train/good").iterdir():
        image.write_bytes(b"")
    arguments = ("--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    told = refusal(capsys, *arguments, "--on-corrupt", "skip")
    assert "no good image of product grid to train on" in told and "--products grain,stripes" in told
    assert not (tmp_path / "run").exists()


def test_a_product_of_which_nothing_is_held_out_is_named(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be trained, and refused by the export minutes later."""
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in sorted((data / "grid/train/good").iterdir())[3:]:
        image.unlink()
    arguments = ["--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), "--no-eval", *SETS]
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().out
    assert "no good image of grid (3 good training images) is held out: `andon export` will not" in said
    last = said.splitlines()[-1]
    assert last.startswith("next, as nothing of grid (3 good") and "without train/ and test/" in last
    with pytest.raises(ConfigError, match="no held-out good image of grid") as refused:
        gather(open_dataset(data), (), ("grid",), Preprocess(height=32, width=32))
    assert "grid: 3 good training images" in str(refused.value.found), "what export says if it is run all the same"
    assert str(refused.value.next_step) in last
