"""Temporary folders: one that is taken for abandoned while it is made is made again."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.tempfolder import TemporaryFolder


@pytest.mark.parametrize("moment", ["tempfile.mkdtemp", "fcntl.flock"])
def test_one_that_another_process_removes_before_it_is_locked_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {"tempfile.mkdtemp": tempfile.mkdtemp, "fcntl.flock": fcntl.flock}[moment]
    removed: list[Path] = []

    def too_late(*args: Any) -> Any:
        given = before(*args)
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        return given

    monkeypatch.setattr(moment, too_late)
    folder = TemporaryFolder("some")
    assert list(tmp_path.iterdir()) == [Path(folder.name)] != removed
    folder.cleanup()
    assert list(tmp_path.iterdir()) == []
