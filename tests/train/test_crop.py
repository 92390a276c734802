"""`andon train --roi`: the model is the one that pictures cut out beforehand give, and the bundle says what was cut."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from andon.cli import main
from andon.runtime.bundle import Bundle
from andon.runtime.crop import cropped as cropped_to
from andon.runtime.dataset import open_dataset
from andon.runtime.fingerprint import read_report
from andon.runtime.images import read_rgb
from andon.runtime.manifest import Crop
from andon.runtime.preprocess import resize
from andon.runtime.regions import cut_out
from andon.train.checkpoint import read_provenance
from andon.train.features import extract, load_frame
from andon.train.run import Request

from .conftest import SETS, refusal  # type: ignore[import-not-found]

#: Where the parts of tests/conftest.py (96 x 96) lie in their cameras' pictures.
CROPS = {
    "grid": Crop(roi=(31, 10, 96, 96), picture=(150, 110)),
    "stripes": Crop(roi=(5, 20, 96, 96), picture=(130, 120)),
}
ROIS = ["--roi", "grid=31,10,96,96", "--roi", "stripes=[5, 20, 96, 96]"]


@pytest.fixture(scope="module")
def frames(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products as whole pictures, with what is none of the part's business around them; masks of their size."""
    root = tmp_path_factory.mktemp("frames") / synthetic_data.name
    rng = np.random.default_rng(0)
    for product, crop in CROPS.items():
        for path in (synthetic_data / product).rglob("*.png"):
            part = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            (width, height), (x, y, w, h) = crop.picture, crop.roi
            frame = rng.integers(0, 256, (height, width, *part.shape[2:])).astype(np.uint8)
            frame[y : y + h, x : x + w] = part
            target = root / path.relative_to(synthetic_data)
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), frame)
    return root


@pytest.fixture(scope="module")
def cropped(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As conftest.py's checkpoint, trained on the whole pictures."""
    folder = tmp_path_factory.mktemp("cropped") / "run"
    arguments = ["train", "--method", "hvq", "--data", str(frames), "--out", str(folder), "--seed", "3", *ROIS]
    assert main([*arguments, *SETS]) == 0
    return folder


def test_the_model_is_that_of_pictures_that_were_cut_out_beforehand(checkpoint: Path, cropped: Path) -> None:
    """To the last bit, and so are the figures, those of pixels too: the masks are cut out as the pictures are."""
    expected, found = read_provenance(checkpoint), read_provenance(cropped)
    assert found.weights_sha256 == expected.weights_sha256
    figures = [json.loads((folder / "metrics.json").read_text())["products"] for folder in (checkpoint, cropped)]
    assert figures[0] == figures[1] and figures[0]["grid"]["pixel_AUROC"] is not None
    assert (expected.crops, found.crops) == ({}, CROPS)
    assert expected.pictures == {"grid": (96, 96), "stripes": (96, 96)} and found.pictures == {}


@pytest.mark.slow
def test_the_bundle_brings_it_to_calibrate_and_eval(
    frames: Path, cropped: Path, synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bundle"
    export = ["export", "--method", "hvq", "--checkpoint", str(cropped), "--out", str(root), "--threads", "1"]
    assert main(export) == 0, "held against torch on the set's pictures, which have to be cut out for that"
    bundle = Bundle.load(root)
    assert bundle.manifest.crops == CROPS and "pictures" not in read_report(bundle)
    parts = (resize(read_rgb(p), bundle.manifest.preprocess) for p in synthetic_data.glob("*/t*/*/*.png"))
    known = {part.tobytes() for part in parts}
    with np.load(root / "golden/golden.npz") as golden:
        assert len(golden["frames"]) and all(frame.tobytes() in known for frame in golden["frames"])
    common = ["--bundle", str(root), "--backend", "onnxruntime", "--threads", "1", "--json"]
    capsys.readouterr()
    assert main(["calibrate", *common, "--data", str(frames), "--false-alarm-rate", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "grid: [31, 10, 96, 96] is cut out of pictures of 150 x 110, as the bundle says" in text
    assert "held out by training" in text, "known by content: it is the file that counts, whatever is cut out of it"
    figures = []
    for data in (frames, synthetic_data):
        assert main(["eval", *common, "--data", str(data), "--products", *CROPS]) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1])["products"])
    assert figures[0] == figures[1]


def test_an_interrupted_run_goes_on_with_its_regions(tmp_path: Path) -> None:
    rois = {"grid": (31, 10, 96, 96)}
    request = Request("hvq", "data", str(tmp_path), rois=rois)
    request.save()
    with ExitStack() as held:
        assert Request.resumed(tmp_path, held).rois == rois
    saved = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "rois"}))
    with ExitStack() as held:
        assert Request.resumed(tmp_path, held).rois == {}, "of a version that had none"


def test_what_does_not_fit_the_pictures_is_refused_before_the_training(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = ["--method", "hvq", "--data", str(frames), "--out", str(out), *SETS]
    said = refusal(capsys, *common, "--roi", "31,10,96,103")
    assert "[31, 10, 96, 103] does not lie in the pictures of grid" in said and "at least 127 x 113" in said
    assert not out.exists(), "a refusal leaves no folder"
    said = refusal(capsys, *common, "--roi", "bolt=31,10,96,96")
    assert "--roi of an unknown product 'bolt'" in said and "grid, stripes" in said and not out.exists()
    assert main(["train", *common, "--roi", "31,10,96"]) == 2
    assert "'31,10,96' is no region of interest X,Y,WIDTH,HEIGHT" in capsys.readouterr().err


def test_another_region_of_the_same_pictures_is_not_taken_from_the_cache(
    frames: Path, toy: ModuleType, tmp_path: Path
) -> None:
    model, made = toy.build(), []
    samples = open_dataset(frames).select(split="train", products=["grid"]).samples
    for x in (31, 32, 31):
        crop = Crop(roi=(x, 10, 96, 96), picture=(150, 110))
        made.append(extract(model, cropped_to(samples, {"grid": crop}), root=tmp_path, progress=False))
    first, other, again = (data.features["patches"] for data in made)
    assert (first == again).all() and (first != other).any()
    frame = load_frame(made[0].samples[0], model.preprocess)
    part = cut_out(read_rgb(samples[0].path), (31, 10, 96, 96))
    assert (frame == resize(np.ascontiguousarray(part), model.preprocess)).all()
