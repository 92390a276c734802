"""A region of interest on files: the sizes it belongs to, masks, the manifest, and calibrate and eval with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.runtime.bundle import MANIFEST, Bundle
from andon.runtime.commands.numbers import product_roi, roi
from andon.runtime.commands.options import progress
from andon.runtime.crop import as_bundle, box_in, crop_for, cropped, measured, read_image, read_pair, rois_by_product
from andon.runtime.dataset import open_dataset
from andon.runtime.errors import AndonError, BundleError, ConfigError, ProductError, SourceError
from andon.runtime.manifest import Crop

from .bundles import rewrite  # type: ignore[import-not-found]
from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import contents, level, write  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
#: In frames of 20 x 16 the part (level(), 8 x 8) lies at x 9, y 5; what is around it is brighter than any part.
CROP = Crop(roi=(9, 5, 8, 8), picture=(20, 16))
ROI = "9,5,8,8"
RECORD = {"roi": [9, 5, 8, 8], "picture": [20, 16]}


def framed(part: Any) -> Any:
    """A camera's frame with this part, or mask, in it."""
    frame = np.full((16, 20, *part.shape[2:]), 255, np.uint8)
    frame[5:13, 9:17] = part
    return frame


@pytest.fixture
def frames(data: Path, tmp_path: Path) -> Path:
    """The set of conftest.py as a camera's whole pictures."""
    root = tmp_path / "frames"
    for image in data.rglob("*.png"):
        write(root / image.relative_to(data), framed(cv2.imread(str(image), cv2.IMREAD_UNCHANGED)[..., ::-1]))
    for image in (root / "a/ground_truth").rglob("*.png"):
        write(image, framed(cv2.imread(str(data / image.relative_to(root)), cv2.IMREAD_GRAYSCALE)))
    return root


def test_what_is_taken_of_a_picture_by_its_size() -> None:
    assert box_in(None, 7, 3) == (0, 0, 7, 3)
    assert box_in(CROP, 20, 16) == (9, 5, 8, 8)
    assert box_in(CROP, 8, 8) == (0, 0, 8, 8), "cut out already"
    assert box_in(CROP, 16, 20) is None and box_in(CROP, 40, 32) is None and box_in(CROP, 9, 8) is None
    leaving = Crop(roi=(10, 5, 12, 8), picture=(20, 16))
    assert box_in(leaving, 20, 16) == (10, 5, 10, 8) == (10, 5, *box_in(leaving, 10, 8)[2:]), "as the line cuts it off"


def test_the_pictures_that_a_region_belongs_to() -> None:
    where = Path("x.png")
    assert crop_for((9, 5, 8, 8), {(20, 16): where}, "a") == CROP
    assert crop_for((9, 5, 8, 8), {(8, 8): where, (20, 16): where}, "a") == CROP
    corner = crop_for((0, 0, 8, 8), {(8, 8): where, (20, 16): where}, "a")
    assert corner.picture == (20, 16), "it lies in both; the smaller ones were cut out"
    for sizes, told in (
        ({(8, 8): where}, ("does not lie in the pictures of a", "8 x 8 (x.png)", "at least 17 x 13")),
        ({(20, 16): where, (30, 16): where}, ("of several sizes", "20 x 16 (x.png), 30 x 16 (x.png)")),
        ({(20, 16): where, (10, 4): where}, ("x.png is neither", "10 x 4 pixels", "20 x 16, of which", "or 8 x 8")),
    ):
        with pytest.raises(SourceError) as error:
            crop_for((9, 5, 8, 8), sizes, "a")
        assert [text for text in told if text not in str(error.value)] == []


def test_the_option_and_what_it_may_say() -> None:
    assert roi("9,5,8,8") == roi("[9, 5, 8, 8]") == (9, 5, 8, 8), "as in a line's configuration, too"
    assert product_roi("9,5,8,8") == ("", (9, 5, 8, 8)) and product_roi("a=b=1,2,3,4") == ("a=b", (1, 2, 3, 4))
    for text in ("9,5,8", "9,5,8,0", "-1,5,8,8", "9,5,8,8.5", ""):
        with pytest.raises(Exception, match="no region of interest X,Y,WIDTH,HEIGHT"):
            roi(text)
    given = [("", (9, 5, 8, 8)), ("b", (1, 1, 2, 2))]
    assert rois_by_product(given, ["a", "b"]) == {"a": (9, 5, 8, 8), "b": (1, 1, 2, 2)}
    assert rois_by_product(given[1:], ["a", "b"]) == {"b": (1, 1, 2, 2)} and rois_by_product([], ["a"]) == {}
    with pytest.raises(ProductError, match="unknown product 'c'"):
        rois_by_product([("c", (9, 5, 8, 8))], ["a", "b"])
    with pytest.raises(ConfigError, match="says twice what is meant"):
        rois_by_product([*given, *given], ["a", "b"])


def test_images_and_masks_are_cut_alike(frames: Path, data: Path) -> None:
    whole, parts = open_dataset(frames), open_dataset(data)
    crops = measured(whole.samples, {"a": (9, 5, 8, 8)}, progress)
    assert crops == {"a": CROP}
    masks = 0
    for sample, part in zip(cropped(whole.samples, crops), parts.samples, strict=True):
        if sample.product == "a":
            (image, mask), (expected, there) = read_pair(sample), read_pair(part)
            np.testing.assert_array_equal(image, expected)
            np.testing.assert_array_equal(read_image(sample), expected)
            masks += mask is not None and mask.shape == (8, 8) and bool((mask == there).all() and 0 < mask.mean() < 1)
        else:
            assert read_image(sample).shape == (16, 20, 3)
    assert masks == 4


def test_reading_all_pictures_for_their_size_shows_progress_and_is_done_only_where_it_has_to_be(frames: Path) -> None:
    samples, opened = open_dataset(frames).samples, []

    def bar(total: int, what: str) -> Any:
        opened.append(progress(total, what))
        return opened[-1]

    assert measured(samples, {}, bar) == {} and not opened
    assert measured(samples, {"a": (9, 5, 8, 8)}, bar) == {"a": CROP}
    (shown,) = opened
    assert shown.n == shown.total == sum(s.product == "a" for s in samples)


def test_a_manifest_says_it_only_where_there_is_something_to_say(make_bundle: MakeBundle) -> None:
    """Stations of before refuse one that has the field."""
    plain, with_crop = make_bundle(), make_bundle(crops={"a": RECORD})
    assert "crops" not in json.loads((plain / MANIFEST).read_text())
    assert json.loads((with_crop / MANIFEST).read_text())["crops"] == {"a": RECORD}
    assert Bundle.load(plain).model_id != Bundle.load(with_crop).model_id, "it is part of the model"
    for change, match in (
        ({"c": RECORD}, "unknown product"),
        ({"a": {**RECORD, "picture": [12, 12]}}, "does not lie in its pictures"),
        ({"a": {**RECORD, "roi": [0, 0, 0, 8]}}, "is not a valid manifest"),
    ):
        rewrite(with_crop, lambda m, c=change: m.update(crops=c))
        with pytest.raises(BundleError, match=match):
            Bundle.load(with_crop)


def test_calibrate_and_eval_cut_out_what_the_model_was_trained_with(
    make_bundle: MakeBundle, frames: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole pictures give what pictures that were cut out before give, to the last bit; they may be mixed."""
    rate = ("--false-alarm-rate", 0.05)
    expected, found = make_bundle(), make_bundle(crops={"a": RECORD, "b": RECORD})
    code, _, text = run(capsys, "calibrate", "--bundle", expected, "--data", data, *rate, *ENGINE)
    assert code == 0 and "cut out" not in text
    shutil.copy(data / "a/train/good/003.png", frames / "a/train/good/003.png")
    code, _, text = run(capsys, "calibrate", "--bundle", found, "--data", frames, *rate, *ENGINE)
    assert code == 0 and "a, b: [9, 5, 8, 8] is cut out of pictures of 20 x 16, as the bundle says" in text
    assert "from now on" not in text, "as it was trained"
    assert text.count("cut out of pictures") == 1 and "8 x 8 are cut out already" in text
    for product in "ab":
        wanted, there = Bundle.load(expected).threshold(product), Bundle.load(found).threshold(product)
        assert wanted is not None and there is not None
        assert (there.value, there.pixel, there.samples) == (wanted.value, wanted.pixel, wanted.samples)
        assert there.crop is None, "the model's"
    figures = []
    for bundle, images in ((expected, data), (found, frames)):
        code, result, _ = run(capsys, "eval", "--bundle", bundle, "--data", images, *ENGINE)
        assert code == 0 and result["images"] == 24
        figures.append((result["products"], result["unknown"]))
    assert figures[0] == figures[1] and figures[0][0]["a"]["pixel_AUROC"] is not None


def test_a_picture_of_another_size_is_refused(
    make_bundle: MakeBundle, frames: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(crops={"a": RECORD, "b": RECORD})
    odd = frames / "b/train/good/007.png"
    write(odd, np.zeros((6, 6, 3), np.uint8))
    calibrate = ("calibrate", "--bundle", root, "--false-alarm-rate", 0.05, *ENGINE)
    code, result, _ = run(capsys, *calibrate, "--data", frames)
    assert code == 1 and f"{odd} is neither a whole picture nor what is cut out" in result["error"]
    assert (
        "6 x 6" in result["found"]
        and "20 x 16" in result["expected"]
        and "train, calibrate, eval or enroll" in result["next"]
    )
    assert Bundle.load(root).threshold("a") is None, "nothing is written"
    code, result, _ = run(capsys, *calibrate, "--data", data, "--roi", "b=2,2,40,40")
    assert code == 1 and "does not lie in the pictures of b" in result["error"]
    code, result, _ = run(capsys, *calibrate, "--data", frames, "--roi", ROI)
    assert code == 1 and str(odd) in result["error"]
    code, result, _ = run(capsys, *calibrate, "--data", frames, "--roi", ROI, "--products", "a")
    assert code == 0 and list(result["thresholds"]) == ["a"], "b's pictures are nothing to it"


def test_thresholds_of_a_camera_that_sees_the_part_elsewhere(
    make_bundle: MakeBundle, frames: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`calibrate --roi` is recorded with the thresholds, and stands before the model's crop from then on."""
    other = {"roi": [0, 0, 8, 8], "picture": [30, 30]}
    root = make_bundle(crops={"a": other})
    calibrate = ("calibrate", "--bundle", root, "--data", frames, "--false-alarm-rate", 0.05, *ENGINE)
    code, result, _ = run(capsys, *calibrate)
    assert code == 1 and "neither a whole picture" in result["error"]
    code, _, text = run(capsys, *calibrate, "--roi", ROI)
    assert code == 0 and "a, b: [9, 5, 8, 8] is cut out of pictures of 20 x 16, as --roi says" in text
    assert (
        "from now on a line judges this part of the pictures of a, b at every camera without a roi of its own" in text
    )
    for product in "ab":
        threshold = Bundle.load(root).threshold(product)
        assert threshold is not None and threshold.crop == CROP
    assert Bundle.load(root).manifest.crops == {"a": Crop.model_validate(other)}, "the model is what it was"
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", frames, *ENGINE)
    assert code == 0 and result["products"]["a"]["image_AUROC"] == 1
    assert run(capsys, *calibrate)[0] == 0, "once more, without saying it again"
    code, result, _ = run(
        capsys, "eval", "--bundle", root, "--data", frames, "--products", "b", "--roi", "0,0,20,16", *ENGINE
    )
    assert code == 0 and result["products"]["b"]["false_alarm_rate"] == 1, "whole, where that is asked for"


def test_a_program_that_is_calibrated_again_keeps_its_own_crop(
    make_bundle: MakeBundle, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(alternatives={"short": [{"run": "encode"}, {"run": "score"}]})
    calibrate = ("calibrate", "--bundle", root, "--data", frames, "--false-alarm-rate", 0.05, *ENGINE)
    assert run(capsys, *calibrate, "--roi", "0,0,20,16")[0] == 0
    for given in (("--roi", ROI), ()):
        assert run(capsys, *calibrate, "--programs", "short", *given)[0] == 0
        short, default = (Bundle.load(root).threshold("a", name) for name in ("short", "default"))
        assert short is not None and default is not None
        assert short.crop == CROP and default.crop == Crop(roi=(0, 0, 20, 16), picture=(20, 16))
    evaluate = ("eval", "--bundle", root, "--data", frames, *ENGINE)
    alone, both = (run(capsys, *evaluate, *given)[1] for given in (("--program", "short"), ("--samplers",)))
    assert both["samplers"]["short"]["products"] == alone["products"] != both["products"], "each by its own"


def test_pictures_are_read_as_ever_where_nobody_says_anything(make_bundle: MakeBundle, frames: Path) -> None:
    bundle = Bundle.load(make_bundle(report={"fingerprints": {"fitted": contents(frames, 1, 2, "a")}}))
    found = as_bundle(open_dataset(frames), bundle, None, progress)
    assert found == open_dataset(frames)
    with pytest.raises(AndonError):
        as_bundle(open_dataset(frames), bundle, [("z", (1, 1, 1, 1))], progress)
    assert level(9, "a").shape == (8, 8, 3), "what CROP means"
