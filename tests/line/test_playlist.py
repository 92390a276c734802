"""Which files a folder or a data set gives: by pattern and product, once they are whole, and never twice."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.runtime.errors import SourceError
from andon.runtime.images import on_disk, read_rgb
from andon.runtime.source import make_source
from andon.runtime.source.playlist import Seen, watching

from .sources import camera, play


def test_a_data_set_brings_its_products(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    for product in ("bolt", "nut"):
        make_images(tmp_path / product / "train" / "good", [1])
        make_images(tmp_path / product / "test" / "good", [2, 3])
        make_images(tmp_path / product / "test" / "scratch", [4])
    shots = list(play(camera({"kind": "dataset", "data": str(tmp_path)})))
    assert [shot.product for shot in shots] == ["bolt"] * 3 + ["nut"] * 3
    assert shots[0].part_id == "bolt/test/good/part000"
    assert len({shot.part_id for shot in shots}) == 6
    assert len(list(play(camera({"kind": "dataset", "data": str(tmp_path), "limit": 4})))) == 4


def test_names_that_are_no_utf8_give_parts_of_their_own(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    """As a PLC or an old Windows share writes them."""
    folder = make_images(tmp_path / "nut" / "good", [10, 20, 30, 40, 50])
    for index, name in enumerate((b"Geh\xe4use.png", b"Geh\xe5use.png")):
        (folder / f"part{index:03d}.png").rename(folder / os.fsdecode(name))
    expected = {r"Geh\xe4use", r"Geh\xe5use", "part002", "part003", "part004"}
    assert {shot.part_id for shot in play(camera({"kind": "folder", "path": folder}))} == expected
    dataset = {"kind": "dataset", "data": str(tmp_path), "split": "train"}
    shots = list(play(camera(dataset))) + list(play(camera({**dataset, "split": "test"})))
    assert {shot.part_id for shot in shots} == {f"nut/good/{name}" for name in expected}


def test_a_watched_folder_takes_files_once_they_are_whole(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    source = make_source("cam", camera({"kind": "folder", "path": tmp_path, "watch": True}))
    assert source.check() == "0 images"
    source.open()
    assert source.read(0.01) is None
    make_images(tmp_path, [50, 60])
    assert source.read(0.01) is None, "a file that may still grow is not taken at first sight"
    taken = [source.read(0.01), source.read(0.01)]
    assert [shot.part_id for shot in taken if shot] == ["part000", "part001"]
    assert source.read(0.01) is None
    hidden = tmp_path.rename(tmp_path.with_name("away"))
    with pytest.raises(SourceError, match="no folder"):
        source.read(0.01)
    source.close()
    hidden.rename(tmp_path)
    source.open()
    assert [source.read(0.01) for _ in range(3)] == [None] * 3, "what was judged is not judged again"
    source.close()


def looks(source: Any, count: int) -> list[str]:
    """Part ids of a newly opened source, in so many looks."""
    source.open()
    shots = [source.read(0.001) for _ in range(count)]
    source.close()
    return [shot.part_id for shot in shots if shot is not None]


def test_a_share_that_leaves_an_empty_folder_is_not_judged_again(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    folder = make_images(tmp_path / "in", [10, 20])
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    assert looks(source, 5) == ["part000", "part001"]
    share = folder.rename(tmp_path / "share")
    folder.mkdir()  # the empty mount point
    assert looks(source, 5) == []
    (make_images(tmp_path / "new", [30]) / "part000.png").rename(share / "part002.png")
    folder.rmdir()
    share.rename(folder)
    assert looks(source, 5) == ["part002"], "the one that came meanwhile"


def test_a_file_under_the_name_of_one_that_was_consumed_is_new(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    folder = make_images(tmp_path / "in", [10])
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    path, done = folder / "part000.png", tmp_path / "done.png"
    assert looks(source, 4) == ["part000"]
    path.unlink()
    assert looks(source, 4) == []
    make_images(folder, [10], (80, 60))
    assert looks(source, 4) == ["part000"], "the next picture"
    taken = path.stat().st_ctime_ns
    path.rename(done)
    assert looks(source, 4) == []
    while done.stat().st_ctime_ns == taken:  # clocks of file systems are coarse
        done.rename(path)
        path.rename(done)
    done.rename(path)
    assert looks(source, 4) == ["part000"], "the same picture, put back to be judged again"


def test_a_file_whose_size_is_set_before_its_content_is_whole_when_nobody_writes(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    content = (make_images(tmp_path / "whole", [70]) / "part000.png").read_bytes()
    source = make_source("cam", camera({"kind": "folder", "path": tmp_path, "pattern": "*.png", "watch": True}))
    source.open()
    path = tmp_path / "part000.png"
    with path.open("wb") as file:
        file.truncate(len(content))
        for position in range(0, len(content), 40):
            before = path.stat().st_mtime_ns
            while path.stat().st_mtime_ns == before:  # clocks of file systems are coarse
                file.seek(position)
                file.write(content[position : position + 40])
                file.flush()
            assert source.read(0.001) is None
    shot = source.read(0.001)
    assert shot is not None and int(shot.load()[0, 0, 0]) == 70
    source.close()


@pytest.mark.parametrize(
    "pattern", ["**/*", "*", "*.png", "**/*.png", "part[01]*", "**/part00?.*", "*/*", "**/b/*", "a/**/*.png"]
)
def test_a_folder_gives_the_images_that_fit_the_pattern(
    pattern: str, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    for folder in ("", "a", "a/b", ".hidden", "a-b"):
        make_images(tmp_path / folder, [10, 20])
        (tmp_path / folder / "part001.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "part009.png").symlink_to(tmp_path / "a" / "part000.png")
    (tmp_path / "part008.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "part007.png").mkdir()
    played = [shot.path for shot in play(camera({"kind": "folder", "path": tmp_path, "pattern": pattern}))]
    assert played and played == [str(path) for path in sorted(tmp_path.glob(pattern)) if on_disk(path)]


def test_a_look_at_a_full_folder_looks_at_few_of_its_files(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number grows for ever where nobody clears them away, and the folder is listed several times a second."""
    folder = make_images(tmp_path, [10] * 9)
    for number in range(9):
        (folder / f"part{number:03}.json").write_text("{}")
    watch = watching(camera({"kind": "folder", "path": folder, "watch": True}).source, Seen())
    assert sum(part is not None for part in itertools.islice(watch, 11)) == 9
    assert next(watch) is None
    monkeypatch.setattr("andon.runtime.source.playlist._LATEST", 1)
    monkeypatch.setattr("andon.runtime.source.playlist._IN_TURN", 3)
    looked: list[Any] = []
    monkeypatch.setattr("andon.runtime.source.playlist.on_disk", looked.append)
    monkeypatch.setattr("andon.runtime.source.playlist._mark", looked.append)
    for _ in range(3):
        before = len(looked)
        assert next(watch) is None and 0 < len(looked) - before <= 4
    assert {path.name for path in looked} == {f"part{number:03}.png" for number in range(9)}, "all of them in turn"


def test_a_name_that_is_written_again_is_judged_again(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    """As by cameras that always write latest.png."""
    folder = make_images(tmp_path / "in", [10, 200])
    config = camera({"kind": "folder", "path": folder, "watch": True})
    source = make_source("cam", config)
    path = folder / "part000.png"
    assert looks(source, 5) == ["part000", "part001"]
    source.open()
    for shade in (20, 30, 40):
        new = make_images(tmp_path / str(shade), [shade]) / "part000.png"
        if shade == 40:
            os.utime(new, ns=(0, 0))  # an older picture, put there later
        new.replace(path)
        assert source.read(0.001) is None, "it may still grow"
        shot = source.read(0.001)
        assert shot is not None and shot.part_id == "part000" and int(shot.load()[0, 0, 0]) == shade
        assert [source.read(0.001) for _ in range(3)] == [None] * 3, "once"
    path.chmod(0o600)
    os.link(path, tmp_path / "backup.png")
    assert [source.read(0.001) for _ in range(3)] == [None] * 3, "the same picture still"
    with path.open("ab") as file:
        for _ in range(3):
            file.write(bytes(8))
            file.flush()
            assert source.read(0.001) is None, "while somebody writes"
    shot = source.read(0.001)
    assert shot is not None and shot.part_id == "part000"
    source.close()


def test_a_picture_of_the_same_size_and_time_is_told_by_its_content(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a camera without a clock that writes BMP files under one name; a backup touches many that stay the same."""
    monkeypatch.setattr("andon.runtime.source.playlist._READ", 2)
    folder = make_images(tmp_path / "in", [10] * 5)
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    source.open()
    path = folder / "part002.bmp"

    def write(shade: int, place: Path) -> None:
        before = path.stat().st_ctime_ns if path.exists() else 0
        while True:
            cv2.imwrite(str(place), np.full((48, 64, 3), shade, np.uint8))
            os.utime(place, ns=(0, 0))
            place.replace(path)
            if path.stat().st_ctime_ns != before:  # clocks of file systems are coarse
                return

    def shades() -> list[int]:
        shots = [source.read(0.001) for _ in range(12)]
        return [int(shot.load()[0, 0, 0]) for shot in shots if shot is not None]

    write(100, tmp_path / "new.bmp")
    assert sorted(shades()) == [10] * 5 + [100]
    write(200, tmp_path / "new.bmp")
    assert shades() == [200], "moved onto the name"
    write(100, path)
    assert shades() == [100], "written in place"
    for each in folder.iterdir():
        each.chmod(0o600)
    assert shades() == [], "the same pictures still"
    source.close()


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """Paths of the files that this process opens."""
    paths: list[str] = []
    listening = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            paths.append(os.fspath(arguments[0]))

    sys.addaudithook(hook)  # stays
    yield paths
    listening.clear()


def test_a_picture_of_a_watched_folder_is_read_once(
    tmp_path: Path, make_images: Callable[..., Path], opened: list[str]
) -> None:
    """Hashed and decoded from the same bytes, a share carries each picture once; the bytes go with decoding."""
    folder = make_images(tmp_path / "in", [10, 20, 30])
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    source.open()
    opened.clear()
    shots = [shot for shot in (source.read(0.001) for _ in range(5)) if shot is not None]
    assert [int(shot.load()[0, 0, 0]) for shot in shots] == [10, 20, 30]
    assert sorted(path for path in opened if path.endswith(".png")) == sorted(map(str, folder.iterdir()))
    (folder / "part000.png").unlink()
    with pytest.raises(SourceError, match="cannot read"):
        shots[0].load()
    source.close()


def test_what_is_judged_is_what_a_watched_file_held_when_it_was_taken(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    """A picture that comes under its name, with its size and time, before it is decoded: both are judged, each once."""
    folder, path = tmp_path / "in", tmp_path / "in" / "part000.bmp"
    folder.mkdir()
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    source.open()

    def write(shade: int) -> None:
        before = path.stat().st_ctime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_ctime_ns == before:  # clocks of file systems are coarse
            cv2.imwrite(str(path), np.full((48, 64, 3), shade, np.uint8))
            os.utime(path, ns=(0, 0))

    def shots() -> list[Any]:
        return [shot for shot in (source.read(0.001) for _ in range(4)) if shot is not None]

    write(100)
    (first,) = shots()
    write(200)
    assert int(first.load()[0, 0, 0]) == 100
    assert [int(shot.load()[0, 0, 0]) for shot in shots()] == [200]
    source.close()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()], ids=["share", "memory"])
def test_a_watched_file_that_cannot_be_read_or_decoded_is_said(
    error: Exception, tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "in", [10])
    cv2.imwrite(str(folder / "cut.jpg"), np.full((48, 64, 3), 90, np.uint8))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-2])
    (folder / "empty.png").touch()
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    source.open()
    assert source.read(0.001) is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(error))
        shots = [source.read(0.001) for _ in range(3)]
    assert [shot.part_id for shot in shots if shot] == ["cut", "empty", "part000"]
    said = []
    for shot in shots:
        with contextlib.suppress(SourceError):
            said.append(str(shot.load().shape) if shot else "")
    assert said == ["(30, 40, 3)"], "read again where that failed the first time; what is no whole picture is refused"
    for name in ("cut.jpg", "empty.png"):
        with pytest.raises(SourceError, match="cannot decode"):
            read_rgb(folder / name, (folder / name).read_bytes())
    source.close()


def test_what_was_consumed_is_not_remembered_for_ever(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(tmp_path, [10] * 8)
    seen = Seen(remembered=3)
    watch = watching(camera({"kind": "folder", "path": folder, "watch": True}).source, seen)
    assert [part is not None for part in itertools.islice(watch, 10)] == [False] + [True] * 8 + [False]
    for path in sorted(folder.iterdir())[:6]:
        path.unlink()
    assert next(watch) is None
    assert sorted(Path(path).name for path in seen._gone) == ["part003.png", "part004.png", "part005.png"]
