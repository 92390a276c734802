"""Which bundle a `*` in the configuration means."""

from __future__ import annotations

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import MANIFEST, Bundle
from andon.runtime.errors import BundleError, ConfigError
from andon.runtime.newest import calibration_time, export_time, may_be_bundle, newest, newest_first
from andon.runtime.startup import Options, bundle_path, effective, open_bundle

LINE = "site: s\nline: l\nstation: p\nbundle: hvq-*\ncameras: {cam0: {source: {kind: test}, product: mono}}\n"


def exported(path: Path, created: object, touched: float) -> Path:
    path.mkdir()
    (path / MANIFEST).write_text(json.dumps({"created": created}))
    os.utime(path, (touched, touched))
    return path


def packed(folder: Path, top: str, touched: float) -> Path:
    path = folder.with_name(folder.name + ".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, top)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    os.utime(path, (touched, touched))
    return path


def forbid(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """As another user's folder is."""
    stat, open_file = Path.stat, Path.open

    def refuse(path: Path) -> None:
        if path.parent.name == folder:
            raise PermissionError(13, "Permission denied", str(path))

    def refusing_stat(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        refuse(self)
        return stat(self, follow_symlinks=follow_symlinks)

    def refusing_open(self: Path, *args: Any, **more: Any) -> Any:
        refuse(self)
        return open_file(self, *args, **more)

    monkeypatch.setattr(Path, "stat", refusing_stat)
    monkeypatch.setattr(Path, "open", refusing_open)


def test_the_newest_export_counts_not_the_one_touched_last(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    config = effective(Options(config=path))
    with pytest.raises(ConfigError, match="no bundle matches"):
        bundle_path(config)
    exported(tmp_path / "hvq-a", "2026-01-01T00:00:00Z", touched=4e9)  # calibrated again
    new = exported(tmp_path / "hvq-b", "2026-03-01T01:00:00+02:00", touched=1e9)
    exported(tmp_path / "hvq-c", "2026-02-28T22:30:00Z", touched=3e9)
    exported(tmp_path / ".hvq-d", "2027-01-01T00:00:00Z", touched=5e9)  # being written
    assert bundle_path(config) == new


def test_what_is_no_bundle_yet_is_not_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    config = effective(Options(config=path))
    (tmp_path / "hvq-copying").mkdir()
    (tmp_path / "hvq-x.tar.tmp").write_bytes(b"half")
    (tmp_path / "hvq-link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="no bundle matches") as caught:
        bundle_path(config)
    assert "hvq-copying, hvq-link, hvq-x.tar.tmp" in str(caught.value.found)
    old = exported(tmp_path / "hvq-a", "2020-01-01T00:00:00Z", touched=1e9)
    assert bundle_path(config) == old


@pytest.mark.parametrize("name", [".hvq-a", "hvq-a.tmp", "hvq-a.part", "hvq-a.partial", "hvq-a.filepart"])
def test_what_is_being_written_is_no_bundle_whatever_the_pattern(name: str, tmp_path: Path) -> None:
    whole = exported(tmp_path / "hvq-a", "2026-01-01T00:00:00Z", touched=1e9)
    assert may_be_bundle(whole) is True
    assert may_be_bundle(whole.rename(tmp_path / name)) is False


def test_a_folder_that_may_not_be_read_stops_no_newer_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied by root; the tests may be root themselves, who is refused nothing."""
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    exported(tmp_path / "hvq-theirs", "2020-01-01T00:00:00Z", touched=1e9)
    new = exported(tmp_path / "hvq-a", "2026-01-01T00:00:00Z", touched=2e9)
    forbid(monkeypatch, "hvq-theirs")
    assert bundle_path(effective(Options(config=path))) == new


@pytest.mark.parametrize("what", ["half copied", "changed", "half a .tar", "another user's"])
def test_a_line_starts_with_the_newest_bundle_that_is_whole(
    what: str,
    tmp_path: Path,
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a power cut during a copy it must not stay down with a good one beside."""
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    config = effective(Options(config=path))
    bundles = [make_bundle(tmp_path / f"hvq-{n}", created=f"2026-01-0{n}T00:00:00Z") for n in (1, 2, 3)]
    old, good, bad = bundles
    if what == "half copied":
        shutil.rmtree(bad / "stages")
    elif what == "changed":
        (bad / "stages/judge.onnx").write_bytes(b"something else")
    elif what == "half a .tar":
        with tarfile.open(tmp_path / "hvq-3.tar", "w") as archive:
            archive.add(bad, bad.name)
        shutil.rmtree(bad)
        os.truncate(tmp_path / "hvq-3.tar", 3000)
        os.utime(tmp_path / "hvq-3.tar", (4e9, 4e9))
    else:
        forbid(monkeypatch, bad.name)
    with open_bundle(config, starting=True) as bundle:
        assert bundle.path == good
    assert f"cannot be used, the line runs with {good}" in caplog.text and str(bad) in caplog.text
    with pytest.raises((BundleError, PermissionError)):  # `rebuild`: the line has one
        open_bundle(config)
    for each in (old, good):
        (each / "stages/judge.onnx").unlink()
    with pytest.raises((BundleError, PermissionError)) as refused:
        open_bundle(config, starting=True)
    with pytest.raises(type(refused.value)) as newest_refused:
        open_bundle(config)
    assert str(refused.value) == str(newest_refused.value), "about the newest"


@pytest.mark.parametrize("top", ["", "hvq-b", "./"])
def test_the_manifest_of_an_archive_is_read_in_it(top: str, tmp_path: Path) -> None:
    old = exported(tmp_path / "hvq-a", "2026-01-01T00:00:00Z", touched=3e9)
    new = packed(exported(tmp_path / "hvq-b", "2026-01-02T00:00:00Z", touched=0), top, touched=1e9)
    assert newest([old, new]) == new


@pytest.mark.parametrize("created", [None, "yesterday", 7, "2026-01-02"])
def test_without_a_manifest_that_says_when_the_time_of_the_file_counts(created: object, tmp_path: Path) -> None:
    before = exported(tmp_path / "a", "2026-01-01T00:00:00Z", touched=3e9)
    other = exported(tmp_path / "b", created, touched=1.8e9)  # 2027
    assert newest([before, other]) == other
    empty, broken = tmp_path / "c", tmp_path / "d.tar"
    empty.mkdir()
    broken.write_bytes(b"no archive")
    os.utime(empty, (1.9e9, 1.9e9))
    os.utime(broken, (2e9, 2e9))
    assert newest([before, empty]) == empty and newest([before, empty, broken]) == broken


def calibrated(folder: Path, set_at: str | None) -> Path:
    entry = {"value": 1.0, **({} if set_at is None else {"set_at": set_at})}
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "thresholds": {"mono": {"default": entry}}}))
    return folder


def test_of_one_export_what_was_calibrated_last_counts_whatever_was_copied_last(tmp_path: Path) -> None:
    """A line took the .tar beside its calibrated folder and judged nothing, or a copy with older thresholds."""
    stages = [
        ("none", False, None),
        ("by hand", True, None),
        ("old", True, "2026-01-02T00:00:00Z"),
        ("new", True, "2026-01-02T00:00:01Z"),
    ]
    bundles = []
    for age, (name, has, set_at) in enumerate(stages):
        touched = 2e9 - age * 1e8  # the other way round
        folder = exported(tmp_path / name, "2026-01-01T00:00:00Z", touched=0)
        if has:
            calibrated(folder, set_at)
        os.utime(folder, (touched, touched))
        bundles.append(folder)
    assert [path.name for path in newest_first(bundles)] == ["new", "old", "by hand", "none"]
    document = json.loads((tmp_path / "old" / MANIFEST).read_text())
    lane = {"camera_thresholds": {"lane2": {"mono": {"default": {"set_at": "2026-01-02T00:00:02Z"}}}}}
    (tmp_path / "old" / MANIFEST).write_text(json.dumps({**document, **lane}))
    assert newest(bundles).name == "old", "one camera's calibration is one, too"
    later = exported(tmp_path / "later", "2026-01-01T00:00:01Z", touched=0)
    assert newest([*bundles, later]) == later, "another export, calibrated or not"


@pytest.mark.parametrize(
    "thresholds", [None, 3, {"mono": 3}, {"mono": {"default": 3}}, {"mono": {"default": {"set_at": 3}}}]
)
def test_thresholds_that_are_none_are_in_nobodys_way(thresholds: object, tmp_path: Path) -> None:
    odd = exported(tmp_path / "a", "2026-01-02T00:00:00Z", touched=0)
    document = {"thresholds": thresholds, "camera_thresholds": thresholds}
    (odd / MANIFEST).write_text(json.dumps({"created": "2026-01-02T00:00:00Z", **document}))
    assert newest([exported(tmp_path / "b", "2026-01-01T00:00:00Z", touched=3e9), odd]) == odd


def test_a_folder_stands_before_its_tar(tmp_path: Path) -> None:
    """Nobody can calibrate the .tar, which a copy of both writes last."""
    folder = exported(tmp_path / "hvq-a", "2026-01-01T00:00:00Z", touched=1e9)
    with tarfile.open(tmp_path / "hvq-a.tar", "w") as archive:
        archive.add(folder, folder.name)
    os.utime(tmp_path / "hvq-a.tar", (4e9, 4e9))
    assert newest([tmp_path / "hvq-a.tar", folder]) == folder


def test_a_calibration_is_later_than_the_one_before_whatever_the_clock_says(bundle: Path) -> None:
    with Bundle.load(bundle) as loaded:
        entry = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"set_at": "2100-01-01T00:00:00Z"})
        loaded.save_thresholds({"mono": {"default": entry}})
    with Bundle.load(bundle) as loaded:
        assert calibration_time(loaded.manifest) == "2100-01-01T00:00:01Z"
        later = entry.model_copy(update={"set_at": "2200-01-01T00:00:00Z"})
        updated = loaded.save_thresholds({"mono": {"default": later}}, "lane2")
        assert calibration_time(updated.manifest) == "2200-01-01T00:00:01Z"


def test_a_damaged_compressed_archive_does_not_hide_the_others(tmp_path: Path) -> None:
    good = exported(tmp_path / "a", "2026-01-01T00:00:00Z", touched=0)
    other = exported(tmp_path / "b", "2026-01-02T00:00:00Z", touched=0)
    (other / "weights").write_bytes(random.Random(0).randbytes(100_000))
    damaged = tmp_path / "b.tar"
    with tarfile.open(damaged, "w:xz") as archive:
        archive.add(other / "weights", "weights")  # what is damaged lies before the manifest
        archive.add(other / MANIFEST, MANIFEST)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:70_000] + bytes(20_000) + data[90_000:])
    os.utime(damaged, (1e9, 1e9))
    assert newest([good, damaged]) == good


def test_an_export_is_newer_than_what_is_there_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = exported(tmp_path / "a", "2026-01-01T00:00:00+01:00", touched=1e9)
    now = datetime.now(timezone.utc)
    assert timedelta(seconds=-1) <= export_time([old]) - now <= timedelta(minutes=5)

    class Unset(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(1970, 1, 1, tzinfo=tz)

    monkeypatch.setattr("andon.runtime.newest.datetime", Unset)
    assert export_time([old, tmp_path / "none"]).isoformat() == "2025-12-31T23:00:01+00:00"
    made = exported(tmp_path / "b", export_time([old]).isoformat(), touched=0)
    assert newest([old, made]) == made
