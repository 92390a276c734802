"""Evidence: pictures of NG parts under their quota, the overlay, and pictures that cannot be kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from andon.runtime.evidence import WAITING, EvidenceStore, overlay
from andon.runtime.judge import Judge
from andon.runtime.judgement import Judgement
from andon.runtime.lineconfig import EvidenceConfig

from .judging import frame, picture
from .outboxes import fill_disk


def test_evidence_is_kept_under_its_quota(
    make_judge: Callable[..., Judge], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    judge = make_judge()
    config = EvidenceConfig(max_bytes=2**16)

    def judged(shade: int) -> Judgement:
        noise = np.random.default_rng(shade).integers(0, 255, (200, 200, 3), np.uint8)
        return judge.judge(frame(noise if shade else picture(0)))

    with EvidenceStore(config, tmp_path / "evidence") as store:
        ok = judged(0)
        assert store.keep(ok.verdict, picture(0), ok.scored.map, ok.box, 0.5) is None, "only NG is kept"
        paths = []
        for shade in range(1, 9):
            bad = judged(shade)
            image = np.random.default_rng(shade).integers(0, 255, (200, 200, 3), np.uint8)
            paths.append(store.keep(bad.verdict, image, bad.scored.map, bad.box, 0.5))
            eventually(lambda shade=shade: store.written == shade)
    assert all(paths)
    left = list((tmp_path / "evidence").rglob("*.jpg"))
    assert sum(path.stat().st_size for path in left) <= config.max_bytes
    assert 0 < len(left) < 8 and Path(paths[-1]) in left and Path(paths[0]) not in left
    assert store.removed == 8 - len(left)
    assert cv2.imread(paths[-1]).shape == (200, 200, 3)
    with EvidenceStore(config, tmp_path / "evidence") as store:
        assert store.removed == 0, "pictures of an earlier run count towards the quota and stay"


def test_a_picture_that_is_larger_than_the_quota_is_kept_alone(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    bad = make_judge().judge(frame(picture(250)))
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    with EvidenceStore(EvidenceConfig(max_bytes=2**16, overlay=False), tmp_path) as store:
        paths = [store.keep(replace(bad.verdict, id=f"{n:026d}"), noise, None, bad.box, None) for n in range(2)]
    assert (store.written, store.failed, store.removed) == (2, 0, 1)
    assert [str(path) for path in tmp_path.rglob("*.jpg")] == paths[1:]


def test_the_overlay_touches_only_the_region_of_interest() -> None:
    image = picture(100)
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[2, 2] = 5
    drawn = overlay(image, anomaly_map, (16, 16, 32, 32), 1.0)
    changed = (drawn != image).any(axis=2)
    assert changed[26, 26] and not changed[:16].any() and not changed[48:].any()
    assert not changed[40:48, 40:48].any(), "what is normal is left as the camera saw it"
    assert drawn.shape == image.shape and image.min() == 100


@pytest.mark.parametrize("publish", [False, True])
def test_a_picture_shows_what_the_camera_saw(make_judge: Callable[..., Judge], tmp_path: Path, publish: bool) -> None:
    """In its colours and the quality that is asked for, drawn over only on request, and published only on request."""
    bad = make_judge().judge(frame(picture(250)))
    image = np.random.default_rng(0).integers(0, 30, (64, 64, 3), np.uint8) + np.array((200, 40, 0), np.uint8)
    sent: list[tuple[str, str, bytes]] = []
    pictures = []
    for quality in (20, 95):
        config = EvidenceConfig(overlay=False, publish=publish, quality=quality)
        with EvidenceStore(config, tmp_path / str(quality), lambda *given: sent.append(given)) as store:
            path = store.keep(bad.verdict, image, bad.scored.map, bad.box, 0.5)
        pictures.append(Path(path or "").read_bytes())
        seen = cv2.imread(str(path))[:, :, ::-1]
        assert seen.mean(axis=(0, 1)) == pytest.approx(image.mean(axis=(0, 1)), abs=3)
        assert seen.std() < image.std() + 3, "no map and no box"
    assert len(pictures[0]) < len(pictures[1]) / 2
    assert sent == ([("cam", bad.verdict.id, each) for each in pictures] if publish else [])


def test_the_map_of_the_frame_itself_is_drawn_though_the_next_one_is_judged_meanwhile(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    image = picture(60, (16, 32, 8, 4))
    bad = make_judge().judge(frame(image))
    own, expected = bad.scored.map, overlay(image, bad.scored.map, bad.box, 0.5)
    store = EvidenceStore(EvidenceConfig(quality=100), tmp_path)
    path = store.keep(bad.verdict, image, own, bad.box, 0.5)  # its thread has not begun
    own[:] = 0
    with store:
        pass
    seen = cv2.imread(str(path))[:, :, ::-1].astype(int)
    inside = (slice(33, 35), slice(17, 23))
    assert abs(expected[inside].astype(int) - image[inside]).max() > 60
    assert seen[inside].mean(axis=(0, 1)) == pytest.approx(expected[inside].mean(axis=(0, 1)), abs=40)
    assert seen[32, 16].min() > 180 and seen[35, 23].min() > 180, "in a white box"


def test_a_picture_that_cannot_be_drawn_does_not_end_the_others(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    bad = make_judge().judge(frame(picture(250)))
    assert bad.verdict.label == "NG"
    with EvidenceStore(EvidenceConfig(), tmp_path / "evidence") as store:
        store.keep(bad.verdict, "no picture at all", bad.scored.map, bad.box, 0.5)  # type: ignore[arg-type]
        kept = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.failed, store.written) == (1, 1)
    assert kept is not None and Path(kept).is_file()


def test_a_picture_that_cannot_be_stored_leaves_nothing_behind(
    make_judge: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file: int) -> None:
        raise OSError("No space left on device")

    bad = make_judge().judge(frame(picture(250)))
    folder = tmp_path / "evidence"
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", full_disk)
        with EvidenceStore(EvidenceConfig(), folder) as store:
            path = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.failed, store.written) == (1, 0) and path is not None
    assert [left for left in folder.rglob("*") if left.is_file()] == []
    killed = Path(path).with_suffix(".part")
    foreign = [folder / "download.part", killed.with_name("download.part"), folder / "other/2026-11-22" / killed.name]
    for part in (killed, *foreign):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half a picture")
    with EvidenceStore(EvidenceConfig(), folder, cameras=["cam"]):
        pass
    assert not killed.exists() and all(part.exists() for part in foreign), "what a killed process left is removed"


def picture_file(folder: Path, camera: str, day: str, number: int, size: int) -> Path:
    """One of an earlier run; number: place in the order of judging, which says nothing of the file's time."""
    path = folder / camera / day / f"{number:026d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_what_is_not_a_picture_of_this_line_is_neither_counted_nor_removed(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    """A share with the shop's other pictures, and another station's."""
    bad, size = make_judge().judge(frame(picture(250))), 2**16
    own = picture_file(tmp_path, "cam", "2026-11-20", 1, size)
    others = [picture_file(tmp_path, "press-9", "2026-11-20", 2, size), tmp_path / "logo.jpg", own.with_name("x.jpg")]
    others += [own.parents[1] / "golden" / own.name, own.parent / "more" / "0" / own.name]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    with EvidenceStore(EvidenceConfig(max_bytes=size + 100), tmp_path, cameras=["cam"]) as store:
        path = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.written, store.removed) == (1, 1) and path is not None and Path(path).is_file()
    assert not own.exists() and all(path.exists() for path in others)


def test_the_picture_judged_first_goes_first_whatever_the_clock_said(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    """Before the network has set it, a device without a battery lives in 1970."""
    bad, size = make_judge().judge(frame(picture(250))), 2**16
    early = [picture_file(tmp_path, "cam", "2026-11-20", number, size) for number in range(3)]
    unset = [picture_file(tmp_path, "cam", "1970-01-01", number, size) for number in range(3, 6)]
    for path in unset:
        os.utime(path, (1000, 1000))
    with EvidenceStore(EvidenceConfig(max_bytes=4 * size), tmp_path) as store:
        store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert store.removed == 3 and not any(path.exists() for path in early)
    assert all(path.exists() for path in unset)


def test_a_share_that_hangs_holds_up_neither_the_start_nor_the_stop(
    make_judge: Callable[..., Judge],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("andon.runtime.evidence._STOP", 0.2)
    bad, answers, asked, mkdir = make_judge().judge(frame(picture(250))), Event(), Event(), Path.mkdir

    def hangs(path: Path, *args: Any, **more: Any) -> None:
        asked.set()
        assert answers.wait(60)
        mkdir(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", hangs)
    with EvidenceStore(EvidenceConfig(), tmp_path / "evidence") as store:
        assert asked.wait(60)
        for _ in range(WAITING + 2):
            store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
        assert store.skipped == 2, "the others wait"
    assert "does not take the last pictures" in caplog.text
    answers.set()
    eventually(lambda: store.written == WAITING)


def test_a_folder_that_comes_later_is_used_then(
    make_judge: Callable[..., Judge], tmp_path: Path, caplog: pytest.LogCaptureFixture, eventually: Callable[..., None]
) -> None:
    bad, folder = make_judge().judge(frame(picture(250))), tmp_path / "share"
    folder.write_text("not mounted")
    with EvidenceStore(EvidenceConfig(), folder) as store:
        store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
        eventually(lambda: store.failed == 1)
        folder.unlink()
        path = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
        eventually(lambda: store.written == 1)
    assert path is not None and Path(path).is_file()
    assert "evidence cannot be written" in caplog.text


def test_earlier_pictures_that_cannot_be_listed_are_said_once(
    make_judge: Callable[..., Judge],
    tmp_path: Path,
    eventually: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "evidence" / "cam" / "2026-01-01").mkdir(parents=True)
    monkeypatch.setattr("andon.runtime.evidence._pictures", Mock(side_effect=OSError(5, "Input/output error")))
    bad = make_judge().judge(frame(picture(255)))
    with EvidenceStore(EvidenceConfig(), tmp_path / "evidence", cameras=["cam"]) as store:
        for count in (1, 2, 3):
            store.keep(bad.verdict, picture(255), None, bad.box, None)
            eventually(lambda count=count: store.written == count)
    said = [text for text in caplog.messages if "evidence" in text]
    assert said == ["evidence cannot be written: [Errno 5] Input/output error"]


def test_a_closed_folder_of_somebody_else_keeps_none_of_ours_from_being_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Callable[..., None]
) -> None:
    is_dir = Path.is_dir

    def closed(path: Path) -> bool:
        if path.parent.name == "other":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    (tmp_path / "other" / "2026-01-01").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_dir", closed)  # where it may be listed and not entered
    with EvidenceStore(EvidenceConfig(), tmp_path, cameras=["cam"]):
        eventually(lambda: "this line has not (other)" in caplog.text)


def test_a_picture_has_its_name_once_the_disk_has_it(
    make_judge: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the file that a verdict names would be empty."""
    synced: dict[int, int] = {}
    fsync, replace_file = os.fsync, Path.replace

    def noting(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    def named(path: Path, target: Path) -> Path:
        assert synced.get(path.stat().st_ino) == path.stat().st_size > 0
        return replace_file(path, target)

    bad = make_judge().judge(frame(picture(250)))
    with monkeypatch.context() as patch, EvidenceStore(EvidenceConfig(), tmp_path) as store:
        patch.setattr(os, "fsync", noting)
        patch.setattr(Path, "replace", named)
        store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.written, store.failed) == (1, 0)


def test_pictures_yield_to_verdicts_on_a_full_disk(
    make_judge: Callable[..., Judge], small_disk: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    """A disk of 4 MiB, of which a quarter is left free."""
    monkeypatch.setattr("andon.runtime.evidence._LOOK", 0.05)
    bad = make_judge().judge(frame(picture(250)))
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)

    def free() -> int:
        disk = os.statvfs(small_disk)
        return disk.f_bavail * disk.f_frsize

    with EvidenceStore(EvidenceConfig(overlay=False), small_disk / "evidence") as store:
        for count in range(1, 41):
            verdict = replace(bad.verdict, id=f"{count:026d}")
            path = store.keep(verdict, noise, None, bad.box, None)
            eventually(lambda count=count: store.written + store.failed == count)
        assert (store.written, store.failed) == (40, 0) and 0 < store.removed < 40
        assert path is not None and Path(path).exists() and free() >= 2**20
        fill_disk(small_disk, leave=2**19)
        eventually(lambda: free() >= 2**20)  # without a new picture
        assert Path(path).exists(), "no more are removed than it takes"
        eventually(lambda: fill_disk(small_disk).exists() and not list(small_disk.rglob("*.jpg")))
        store.keep(bad.verdict, noise, None, bad.box, None)
        eventually(lambda: store.failed == 1)
        assert store.written == 40 and not list(small_disk.rglob("*.jpg"))


def test_an_evidence_folder_that_somebody_removed_is_made_again(
    make_judge: Callable[..., Judge], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    bad = make_judge().judge(frame(picture(250)))
    folder = tmp_path / "evidence"
    with EvidenceStore(EvidenceConfig(), folder) as store:
        eventually(folder.is_dir)  # the store's thread makes it
        folder.rmdir()
        path = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
        eventually(lambda: store.written + store.failed == 1)
    assert store.failed == 0 and path is not None and Path(path).is_file()


def test_a_disk_that_does_not_say_its_size_is_not_full(
    make_judge: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE answers so for whoever does not implement it."""
    nothing = os.statvfs_result((512, 0, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: nothing)
    bad = make_judge().judge(frame(picture(250)))
    with EvidenceStore(EvidenceConfig(), tmp_path / "evidence") as store:
        paths = [
            store.keep(replace(bad.verdict, id=f"{count:026d}"), picture(250), bad.scored.map, bad.box, 0.5)
            for count in range(2)
        ]
    assert store.failed == 0 and all(path and Path(path).is_file() for path in paths)


def test_the_sum_of_sizes_is_kept_not_taken_for_each_picture(
    make_judge: Callable[..., Judge], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """Of a large quota that was milliseconds in which nothing else runs."""

    class Counting(dict[str, int]):
        sums = 0

        def values(self) -> Any:
            Counting.sums += 1
            return super().values()

    bad = make_judge().judge(frame(picture(250)))
    early = [picture_file(tmp_path, "cam", "2026-11-20", number, 2**15) for number in range(4)]
    with EvidenceStore(EvidenceConfig(max_bytes=2**16), tmp_path) as store:
        for number in range(3):
            store._files = Counting(store._files)
            verdict = replace(bad.verdict, id=f"{number + 10:026d}")
            store.keep(verdict, picture(250), bad.scored.map, bad.box, 0.5)
            eventually(lambda number=number: store.written == number + 1)
            left = [path for path in tmp_path.rglob("*.jpg") if path.is_file()]
            assert store._held == sum(path.stat().st_size for path in left) <= 2**16
            assert set(store._files) == {str(path) for path in left}
    assert Counting.sums == 0 and not early[0].exists() and not early[2].exists() and early[3].exists()
