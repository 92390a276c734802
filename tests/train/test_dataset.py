"""runtime/dataset.py and runtime/images.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from andon.runtime.dataset import open_dataset, read_mask, read_rgb, split_readable
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.remarks import remarks

RealData = Callable[[str], str]


def write(path: Path, value: int = 128, size: tuple[int, int] = (8, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))
    return path


def counts(spec: str | Path) -> Counter[tuple[str, str, str]]:
    return Counter((s.product, s.split, s.label) for s in open_dataset(spec).samples)


def test_elpv_is_split_as_documented(real_data: RealData) -> None:
    found = counts(real_data("elpv"))
    assert found == {
        ("mono", "train", "good"): 470,
        ("mono", "test", "good"): 118,
        ("mono", "test", "defective"): 313,
        ("poly", "train", "good"): 736,
        ("poly", "test", "good"): 184,
        ("poly", "test", "defective"): 402,
    }


def test_elpv_split_equals_the_recorded_one(real_data: RealData) -> None:
    data = open_dataset(real_data("elpv"))
    recorded = json.loads(Path(real_data("elpv_split.json")).read_text())
    for product, kinds in recorded.items():
        for kind, names in kinds.items():
            split, label = kind.split("/")
            mine = {s.path.name for s in data.samples if (s.product, s.split, s.label) == (product, split, label)}
            assert mine == set(names), kind


@pytest.mark.parametrize(
    ("name", "product", "train", "defective"),
    [("magnetic_tile", "tile", 762, 392), ("cookie", "cookie", 31, 32), ("mvtec_screw", "screw", 320, 119)],
)
def test_real_folders_open_with_their_masks(
    real_data: RealData, name: str, product: str, train: int, defective: int
) -> None:
    data = open_dataset(real_data(name))
    assert data.products == (product,)
    assert len(data.select(split="train")) == train
    bad = data.select(good=False)
    assert len(bad) == defective and all(s.mask_path is not None for s in bad.samples)
    first = bad.samples[0]
    assert first.mask_path is not None
    assert read_mask(first.mask_path, read_rgb(first.path).shape[:2]).any()


def test_mvtec_root_and_single_product(synthetic_data: Path) -> None:
    data = open_dataset(synthetic_data)
    assert data.products == ("grain", "grid", "stripes") and data.has_masks
    one = open_dataset(synthetic_data / "grid")
    assert one.products == ("grid",)
    assert {s.path for s in one.samples} == {s.path for s in data.select(products=["grid"]).samples}
    assert len({s.key for s in data.samples}) == len(data)
    assert all(not Path(s.key).is_absolute() for s in data.samples)


def test_good_bad_folder_is_split_reproducibly(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / "good" / f"{i}.png")
    write(tmp_path / "bad" / "a.jpg")
    write(tmp_path / "scratch" / "b.bmp")
    data = open_dataset(tmp_path)
    assert Counter((s.split, s.label) for s in data.samples) == {
        ("train", "good"): 8,
        ("test", "good"): 2,
        ("test", "bad"): 1,
        ("test", "scratch"): 1,
    }
    assert data.samples == open_dataset(tmp_path).samples
    assert not data.has_masks


def test_folder_of_good_bad_products(tmp_path: Path) -> None:
    for product in ("left", "right"):
        write(tmp_path / product / "OK" / "1.png")
        write(tmp_path / product / "bad" / "1.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes").mkdir()
    assert open_dataset(tmp_path).products == ("left", "right")


def test_linked_product_folders_keep_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line, product in (("line1", "bolt"), ("line2", "nut")):
        write(tmp_path / "src" / line / "images" / "good" / "1.png")
        write(tmp_path / "src" / line / "images" / "bad" / "1.png")
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / product).symlink_to(tmp_path / "src" / line / "images")
    assert open_dataset(tmp_path / "links").products == ("bolt", "nut")
    assert open_dataset(tmp_path / "links/bolt").products == ("bolt",)
    monkeypatch.chdir(tmp_path / "src/line1/images/good")
    assert open_dataset("..").products == ("images",)
    monkeypatch.chdir(tmp_path / "src/line1/images")
    assert open_dataset(".").products == ("images",)


@pytest.mark.parametrize("inside", ["train", ""], ids=["MVTec", "good/bad"])
def test_two_folders_of_good_parts_are_refused(tmp_path: Path, inside: str) -> None:
    """One would be left out without a word, or be the defect `ok`."""
    for name in ("good", "ok"):
        write(tmp_path / "bolt" / inside / name / "1.png")
    with pytest.raises(SourceError, match="several folders of good parts") as caught:
        open_dataset(tmp_path)
    assert caught.value.found == "good, ok"


@pytest.mark.parametrize("place", ["masks", "test/ground-truth"])
def test_a_folder_of_masks_is_no_defect(tmp_path: Path, place: str) -> None:
    """White on black is found without fail: it would flatter every figure."""
    write(tmp_path / "bolt" / ("train/good" if "/" in place else "good") / "1.png")
    write(tmp_path / "bolt" / place / "1_mask.png")
    with pytest.raises(SourceError, match="named like a folder of masks") as caught:
        open_dataset(tmp_path)
    assert caught.value.found == Path(place).name and "ground_truth/<defect>" in str(caught.value)
    (tmp_path / "bolt" / place).rename(tmp_path / "bolt/ground_truth")
    assert len(open_dataset(tmp_path)) == 1


@pytest.mark.parametrize("place", ["masks/scratch", "test/ground-truth/scratch"])
def test_masks_in_a_folder_for_each_defect_are_passed_over_by_any_name(tmp_path: Path, place: str) -> None:
    """Nothing of them would be taken for a part: such a set opens, as it did before."""
    write(tmp_path / "bolt" / ("train/good" if "test" in place else "good") / "1.png")
    write(tmp_path / "bolt" / place / "1_mask.png")
    data = open_dataset(tmp_path)
    assert [s.key for s in data.samples] == [s.key for s in data.samples if s.good] and len(data) == 1
    assert f"(bolt/{place}: 1)" in remarks(data)[0]


def test_jfif_is_a_jpeg(tmp_path: Path) -> None:
    write(tmp_path / "good" / "1.jpg").rename(tmp_path / "good" / "1.JFIF")
    assert read_rgb(open_dataset(tmp_path).samples[0].path).shape == (8, 10, 3)


def test_select_refuses_what_is_not_there(synthetic_data: Path) -> None:
    data = open_dataset(synthetic_data)
    with pytest.raises(ConfigError, match="no product bolt") as caught:
        data.select(products=["bolt"])
    assert "grain, grid, stripes" in str(caught.value)
    with pytest.raises(SourceError, match="lacks 1 of 2") as missing:
        data.select(keys=[data.samples[0].key, "grid/train/good/none.png"])
    assert "none.png" in str(missing.value)
    keys = [s.key for s in data.samples[3:6]]
    assert [s.key for s in data.select(keys=keys).samples] == keys


@pytest.mark.parametrize(
    "how", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]], ids=["plain", "scans", "marks"]
)
def test_the_end_of_a_jpeg_is_that_of_its_picture(
    tmp_path: Path, how: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    whole = cv2.imencode(".jpg", noise, how)[1].tobytes()
    path = tmp_path / "photo.jpg"
    path.write_bytes(whole)
    expected = read_rgb(path)
    path.write_bytes(whole + bytes(8192))  # a phone's motion photo has a film there
    np.testing.assert_array_equal(read_rgb(path), expected)
    path.write_bytes(whole[:2] + b"\xff\x01" + whole[2:])  # TEM has no length behind it
    np.testing.assert_array_equal(read_rgb(path), expected)
    exif = b"Exif" + whole[:2000] + b"\xff\xd9"
    preview = whole[:2] + b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif + whole[2:]
    path.write_bytes(preview)
    np.testing.assert_array_equal(read_rgb(path), expected)
    # OpenCV 4 fills what is missing with grey; 5 refuses most of it.
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: np.full((96, 96, 3), 128, np.uint8))
    for data in (preview[:3000], preview[:-1], whole[: len(whole) // 2], whole[:-1], whole[:2], whole[:3], whole[:5]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match="cannot decode"):
            read_rgb(path)


@pytest.mark.parametrize("layout", ["nothing", "flat", "stranger", "no_good"])
def test_unclear_folder_names_what_was_found(tmp_path: Path, layout: str) -> None:
    expected = {"nothing": "empty folder", "flat": "one.png", "stranger": "pictures", "no_good": "no good image"}[
        layout
    ]
    if layout == "flat":
        write(tmp_path / "one.png")
    elif layout == "stranger":
        write(tmp_path / "part" / "good" / "1.png")
        write(tmp_path / "pictures" / "1.png")
    elif layout == "no_good":
        write(tmp_path / "part" / "test" / "good" / "1.png")
        (tmp_path / "part" / "train" / "good").mkdir(parents=True)
    with pytest.raises(SourceError) as caught:
        open_dataset(tmp_path)
    assert expected in str(caught.value) and "good" in str(caught.value.expected)


def test_a_flat_folder_of_good_images_leads_to_one_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "new parts" / "good" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "bolt").symlink_to(tmp_path / "new parts")
    folder = tmp_path / "new parts" / "good"
    monkeypatch.chdir(folder)
    for spec in (folder, Path()):
        with pytest.raises(SourceError, match="cannot tell the layout") as caught:
            open_dataset(spec)
        assert f"--data '{tmp_path}/new parts'," in str(caught.value.next_step)
    with pytest.raises(ConfigError) as missing:
        open_dataset(folder.parent).select(products=["bolt"])
    assert "a link FOLDER/bolt" in str(missing.value.next_step)
    assert open_dataset(tmp_path / "set").products == ("bolt",)


def test_missing_folder_and_missing_mask(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no data set at"):
        open_dataset(tmp_path / "none")
    write(tmp_path / "train" / "good" / "1.png")
    write(tmp_path / "test" / "cut" / "1.png")
    write(tmp_path / "test" / "cut" / "2.png")
    write(tmp_path / "ground_truth" / "cut" / "1_mask.png")
    with pytest.raises(SourceError, match=r"no mask for .*2\.png"):
        open_dataset(tmp_path)


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    mask = write(tmp_path / "m.png", 255, size=(4, 5))
    with pytest.raises(SourceError, match=r"m\.png") as caught:
        read_mask(mask, (8, 10))
    assert (caught.value.found, caught.value.expected) == ("5x4", "10x8")
    assert read_mask(mask, (4, 5)).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_mask_is_all_that_is_above_zero(tmp_path: Path, depth: type) -> None:
    """Many sets write 1 for the defect; of 16 bits that is next to nothing."""
    cv2.imwrite(str(tmp_path / "m.png"), np.array([[0, 1, 2, 0], [0, 200, 255, 0]], depth))
    assert read_mask(tmp_path / "m.png", (2, 4)).tolist() == [[False, True, True, False]] * 2
    with pytest.raises(SourceError, match=r"cannot read .*none\.png: No such file"):
        read_mask(tmp_path / "none.png", (2, 4))


def test_read_rgb_orders_channels_and_replicates_grey(tmp_path: Path) -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 2] = 200  # red in OpenCV's order
    cv2.imwrite(str(tmp_path / "red.png"), image)
    assert read_rgb(tmp_path / "red.png")[0, 0].tolist() == [200, 0, 0]
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 6), 77, np.uint8))
    grey = read_rgb(tmp_path / "grey.png")
    assert grey.shape == (4, 6, 3) and (grey == 77).all()
    alpha = np.full((4, 6, 4), 50, np.uint8)
    cv2.imwrite(str(tmp_path / "alpha.png"), alpha)
    assert read_rgb(tmp_path / "alpha.png").shape == (4, 6, 3)


def test_sixteen_bit_keeps_the_range(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)  # rounded, not cut off
    cv2.imwrite(str(tmp_path / "deep.png"), values)
    assert read_rgb(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    cv2.imwrite(str(tmp_path / "float.tiff"), np.ones((3, 3, 3), np.float32))
    with pytest.raises(SourceError, match="depth"):
        read_rgb(tmp_path / "float.tiff")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_corrupt_image_is_named_or_skipped(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for i in range(5):
        path = tmp_path / "good" / f"{i}{suffix}"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), noise)
    broken = tmp_path / "good" / f"3{suffix}"
    data = broken.read_bytes()
    enormous = b"P5\n100000 100000\n255\n" + bytes(1000)  # OpenCV goes by the head, whatever the name
    for content in (data[: len(data) // 2], b"", b"not an image", enormous):
        broken.write_bytes(content)
        with pytest.raises(SourceError, match=f"3{suffix}"):
            read_rgb(broken)
        samples = open_dataset(tmp_path).samples
        kept, skipped = split_readable(samples, "skip")
        assert [s.path for s in skipped] == [broken] and len(kept) == 4
        assert split_readable(samples, "error") == (list(samples), [])


def test_dataset_module_is_light() -> None:
    """The line device imports it at every start."""
    code = "import sys, andon.runtime.dataset; print({'torch', 'sklearn', 'scipy', 'onnx'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
