"""A bundle as a .tar: unpacked while it is open; a damaged or hostile one is refused and leaves nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime import bundle as module
from andon.runtime import unpack
from andon.runtime.bundle import Bundle
from andon.runtime.errors import BundleError

from .bundles import THRESHOLD, MakeBundle, refused


def pack(root: Path, target: Path, prefix: str = "bundle/") -> Path:
    with tarfile.open(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, prefix + path.relative_to(root).as_posix(), recursive=False)
    return target


@pytest.mark.parametrize("prefix", ["bundle/", "", "./", "knn:v2/", "./a\\b/"])
def test_a_tar_is_unpacked_while_it_is_open(make_bundle: MakeBundle, tmp_path: Path, prefix: str) -> None:
    path = pack(make_bundle(), tmp_path / "b.tar", prefix)
    with Bundle.load(path) as bundle:
        root = bundle.root
        assert bundle.stage_path("encode", "fp32").is_file()
        with pytest.raises(BundleError, match="packed and cannot be changed"):
            bundle.save_thresholds({"a": {"default": THRESHOLD}})
    assert not root.exists()


def test_what_a_killed_process_has_unpacked_is_removed_and_what_others_use_is_not(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is killed again and again would fill its disk."""
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    monkeypatch.setattr("tempfile.tempdir", str(temp))
    path = pack(make_bundle(), tmp_path / "b.tar", "")
    script = (
        "import os, signal, sys\n"
        "from andon.runtime.bundle import Bundle\n"
        "bundle = Bundle.load(sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    (left,) = temp.iterdir()
    (temp / "andon-bundle.link").symlink_to(tmp_path)
    with Bundle.load(path) as first, Bundle.load(path) as second:
        assert not left.exists() and first.root != second.root
        for bundle in (first, second):
            assert bundle.stage_path("encode", "fp32").is_file()
    assert [each.name for each in temp.iterdir()] == ["andon-bundle.link"] and path.exists()


STREAMS = {"gzip": gzip.compress, "bz2": lambda raw: bz2.compress(raw, 1), "xz": lzma.compress}


@pytest.mark.parametrize("packed", ["a head", "zeros for a head", "gzip", "bz2", "xz"])
def test_a_damaged_tar_is_to_be_copied_again(make_bundle: MakeBundle, tmp_path: Path, packed: str) -> None:
    """tarfile takes what it cannot read for the end, and what is missing then looks like no bundle at all."""
    root = make_bundle()
    noise = np.random.default_rng(0).bytes(1 << 20)  # the damage is not in the first block, which the opening reads
    (root / "noise").write_bytes(noise)
    path = pack(root, tmp_path / "b.tar")
    raw = path.read_bytes()
    if packed in STREAMS:
        raw = STREAMS[packed](raw)
        raw = raw[: len(raw) // 2] + bytes(200) + raw[len(raw) // 2 + 200 :]
    else:
        with tarfile.open(path) as archive:
            offset = [m.offset for m in archive if m.isfile()][1]
        raw = raw[:offset] + (bytes(512) if packed == "zeros for a head" else b"?" * 512) + raw[offset + 512 :]
    path.write_bytes(raw)
    assert "copy the bundle again" in str(refused(path, r"b\.tar cannot be unpacked").next_step)


def test_a_file_that_is_no_tar_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("hello")
    assert str(refused(tmp_path / "b.tar", "cannot be unpacked").found) == "no tar archive"


def member(name: str, **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(b"x" * info.size)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (member("../evil", size=1), "leaves its directory"),
        (member("/evil", size=1), "leaves its directory"),
        (member("top:/../../evil", size=1), "leaves its directory"),
        (member("top//evil", size=1), "leaves its directory"),
        (member("top/a:b", size=1), "leaves its directory"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
        (member("hard", type=tarfile.LNKTYPE, linkname="manifest.json"), "not a plain file"),
        (member("pipe", type=tarfile.FIFOTYPE), "not a plain file"),
        (member("stages/encode.fp32.onnx", size=1), "cannot be unpacked"),  # a second file of the same name
    ],
)
def test_a_hostile_tar_is_refused_and_leaves_nothing(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Any, match: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    path = pack(make_bundle(), tmp_path / "b.tar", "")
    with tarfile.open(path, "a") as archive:
        archive.addfile(*entry)
    refused(path, match)
    assert list((tmp_path / "temp").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_size_limits(make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_bundle()
    path = pack(root, tmp_path / "b.tar")
    for reader, bundle in ((unpack, path), (module, root)):
        monkeypatch.setattr(reader, "MAX_TOTAL_BYTES", 100)
        refused(bundle, "too large")


def test_something_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"hello")
    refused(tmp_path / "b.tar", "cannot be unpacked")
