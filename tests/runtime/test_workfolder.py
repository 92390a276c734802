"""Folders beside a bundle in the making: what a killed process leaves goes with the next one, and nothing else does."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from andon.runtime import workfolder
from andon.runtime.bundlefiles import new_bundle
from andon.runtime.workfolder import OWNER, remove_abandoned, work_folder

WAITS = """
import sys
from pathlib import Path
from andon.runtime.bundlefiles import new_bundle
with new_bundle(Path(sys.argv[1])) as root:
    (root / "stages").mkdir()
    (root / "stages" / "encode.onnx").write_bytes(bytes(1000))
    print("begun", flush=True)
    sys.stdin.read()
"""


@contextmanager
def export(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing a bundle."""
    command = [sys.executable, "-c", WAITS, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        try:
            yield process
        finally:
            process.kill()


def hidden(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


def test_the_next_bundle_removes_what_a_killed_export_has_left_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with export(tmp_path / "living") as living:
        with export(tmp_path / "dead") as dead:
            dead.send_signal(signal.SIGKILL)
            dead.wait()
        left = [path for path in hidden(tmp_path) if path.name.startswith(".dead.")]
        assert len(left) == 1 and len(hidden(tmp_path)) == 2
        (tmp_path / ".git").mkdir()
        before = tmp_path / ".before.ab12cd34"  # an earlier version's, of which nobody knows
        before.mkdir()
        with caplog.at_level(logging.WARNING), new_bundle(tmp_path / "next") as root:
            (root / "file").touch()
        (said,) = caplog.messages
        assert said == f"removed from {tmp_path} what killed processes had begun: {left[0].name}"
        assert [path.name.partition(".")[2].split(".")[0] for path in hidden(tmp_path)] == ["before", "git", "living"]
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait() == 0
    assert (tmp_path / "living" / "stages" / "encode.onnx").stat().st_size == 1000
    assert [path.name for path in (tmp_path / "living").iterdir()] == ["stages"], "the bundle and nothing else"
    assert hidden(tmp_path) == [before, tmp_path / ".git"]
    caplog.clear()
    assert remove_abandoned(tmp_path) == [] and not caplog.messages


def test_a_bundle_has_the_rights_of_a_folder_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "new") as root:
        assert root.name.startswith(".") and root.parent.name.startswith(".new."), "no line takes it for a bundle"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    with pytest.raises(ValueError, match="failed"), new_bundle(tmp_path / "other") as root:
        raise ValueError("failed")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


HERE = {"boot": "boot 1", "machine": "machine 1"}


@pytest.mark.parametrize(
    ("owner", "goes"),
    [
        (HERE, True),
        ({"boot": "boot 0", "machine": "machine 1"}, True),  # the power went
        ({"boot": "boot 0", "machine": "machine 2"}, False),
        ({"boot": "boot 0", "machine": ""}, False),  # a container's
        ({"boot": "", "machine": "machine 1"}, False),
        ({"boot": "boot 1"}, False),
        (["boot 1", "machine 1"], False),
        (None, False),  # it is being made, or the share knows no locks
    ],
)
def test_only_what_a_dead_process_of_this_machine_has_left_is_removed(
    owner: object, goes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a share another machine's lock may not be seen here, so a lock that is free is not enough."""
    monkeypatch.setattr(workfolder, "_boot", lambda: "boot 1")
    monkeypatch.setattr(workfolder, "_machine", lambda: "machine 1")
    folder = tmp_path / ".bundle.ab12cd34"
    (folder / ".new").mkdir(parents=True)
    (folder / OWNER).write_text("" if owner is None else json.dumps(owner))
    assert remove_abandoned(tmp_path) == ([folder] if goes else [])
    assert folder.exists() is not goes


@pytest.mark.parametrize("how", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_what_is_locked_stays_whosesoever_it_is(how: int, tmp_path: Path) -> None:
    with work_folder(tmp_path / "a") as folder:
        assert json.loads((folder / OWNER).read_text())["boot"] == workfolder._boot()
        assert remove_abandoned(tmp_path) == [] and folder.is_dir(), "its own process, too"
    left = tmp_path / ".b.ab12cd34"
    left.mkdir()
    (left / OWNER).write_text(json.dumps({"boot": workfolder._boot(), "machine": ""}))
    handle = os.open(left / OWNER, os.O_RDWR)
    fcntl.flock(handle, how)
    assert remove_abandoned(tmp_path) == []
    os.close(handle)
    assert remove_abandoned(tmp_path) == [left]


def test_where_locks_or_the_machines_start_are_not_known_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        with work_folder(tmp_path / "a") as folder:
            kept = folder.rename(tmp_path / ".kept.ab12cd34")
        assert (kept / OWNER).read_text() == "" and remove_abandoned(tmp_path) == []
    assert remove_abandoned(tmp_path) == []
    monkeypatch.setattr(workfolder, "_BOOT", tmp_path / "none")
    assert workfolder._boot() == ""
    (kept / OWNER).write_text(json.dumps({"boot": "", "machine": workfolder._machine()}))
    assert remove_abandoned(tmp_path) == [] and kept.is_dir()


def test_what_could_be_removed_in_part_is_known_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".b.ab12cd34"
    (left / ".new" / "stages").mkdir(parents=True)
    (left / OWNER).write_text(json.dumps({"boot": workfolder._boot(), "machine": ""}))
    with monkeypatch.context() as patch:
        patch.setattr(workfolder.shutil, "rmtree", lambda *_, **__: None)
        assert remove_abandoned(tmp_path) == []
    assert (left / OWNER).is_file()
    assert remove_abandoned(tmp_path) == [left]


def test_a_link_to_elsewhere_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / ".b.ab12cd34"
    elsewhere.mkdir(parents=True)
    (elsewhere / OWNER).write_text(json.dumps({"boot": workfolder._boot(), "machine": ""}))
    (tmp_path / ".link").symlink_to(elsewhere)
    assert remove_abandoned(tmp_path) == [] and (elsewhere / OWNER).is_file()


def test_a_machine_is_told_by_its_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one system image have one name; containers see none, and bridges have one address everywhere."""

    def machine(make: Callable[[Path], None]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder)
        monkeypatch.setattr(workfolder, "_CARDS", folder)
        return workfolder._machine()

    def card(address: str, *, real: bool = True) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / "eth0" / "device").mkdir(parents=True) if real else (folder / "eth0").mkdir()
            (folder / "eth0" / "address").write_text(f"{address}\n")

        return make

    assert machine(card("aa:01")) == machine(card("aa:01")) != machine(card("aa:02"))
    assert machine(card("aa:01", real=False)) == machine(lambda folder: None) == ""
