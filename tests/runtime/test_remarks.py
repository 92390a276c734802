"""runtime/remarks.py: what of an image set is passed over or nearly black, and who says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from andon.runtime.dataset import open_dataset
from andon.runtime.remarks import remarks

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import level, write


def bright(path: Path) -> None:
    write(path, level(100, "a"))


def test_a_set_as_documented_has_none(data: Path, tmp_path: Path) -> None:
    """Masks, notes, hidden files and links to product folders are no reason."""
    (data / "a/notes.txt").write_text("of the line")
    (data / "a/train/good/.DS_Store.png").write_text("")
    assert remarks(open_dataset(data)) == remarks(open_dataset(data / "a")) == []
    for product in "ab":
        bright(tmp_path / "parts" / product / "good" / "0.png")
        bright(tmp_path / "parts" / product / "bad" / "0.png")
        bright(tmp_path / "parts" / product / "ground_truth" / "bad" / "0_mask.png")
    (tmp_path / "parts/c").symlink_to(data / "a")
    assert remarks(open_dataset(tmp_path / "parts")) == []


def test_what_lies_elsewhere_is_counted_by_place(data: Path, tmp_path: Path) -> None:
    for where in ("train/bad", "test", "validation/good", "test/bright/2024-05"):
        bright(data / "a" / where / "7.png")
    bright(data / "7.png")
    (told,) = remarks(open_dataset(data))
    places = ".: 1, a/test: 1, a/test/bright/2024-05: 1, a/train/bad: 1, a/validation/good: 1"
    assert told.startswith(f"5 images of {data} are not used ({places}): only those count")
    folder = tmp_path / "p"
    for i in range(3):
        bright(folder / "good" / f"{i}.png")
        bright(folder / "good/2024-05" / f"{i}.png")
        bright(folder / "bad/scratch" / f"{i}.png")
    (folder / "good" / "3.HEIC").write_bytes(b"a telephone's")
    told, kind = remarks(open_dataset(folder))
    assert told.startswith(f"6 images of {folder} are not used (bad/scratch: 3, good/2024-05: 3): ")
    assert kind.startswith(f"1 pictures of {folder} are not used (.heic: 1): images are read from .png, .jpg")


@pytest.mark.parametrize(("bits", "shift"), [(12, 4), (10, 6), (16, 0), (8, 0)])
def test_a_cameras_12_bits_in_16_are_said(tmp_path: Path, bits: int, shift: int) -> None:
    values = np.linspace(0, 2**bits - 1, 64).reshape(8, 8)
    for i in range(20):
        (tmp_path / "bolt/good").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"bolt/good/{i}.png"), values.astype(np.uint8 if bits == 8 else np.uint16))
    told = remarks(open_dataset(tmp_path))
    if not shift:
        assert told == []
        return
    assert len(told) == 1 and told[0].startswith("bolt: nearly black: 16-bit images")
    assert f"value above {2**bits - 1}, as where a camera's {bits} bits" in told[0]
    assert f"shifted up by {shift} bits (times {2**shift})" in told[0]
    (tmp_path / "bolt/bad").mkdir()
    cv2.imwrite(str(tmp_path / "bolt/bad/0.png"), np.full((8, 8), 4096, np.uint16))
    assert remarks(open_dataset(tmp_path)) == told, "one of 21 is not looked at"
    for i in range(20):
        cv2.imwrite(str(tmp_path / f"bolt/bad/{i}.png"), np.full((8, 8), 4096, np.uint16))
    assert remarks(open_dataset(tmp_path)) == []


def test_the_commands_say_it(make_bundle: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bright(data / "a/train/good/more/7.png")
    root = make_bundle()
    for name, rest in (("eval", ()), ("calibrate", ("--false-alarm-rate", 0.1))):
        code, _, text = run(capsys, name, "--bundle", root, "--data", data, *rest, *ENGINE)
        assert code == 0 and f"warning: 1 images of {data} are not used (a/train/good/more: 1)" in text, text
