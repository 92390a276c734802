"""The audit log of the memory: what it says, and that no trouble of it reaches the line."""

from __future__ import annotations

import os

import numpy as np
import pytest
from andon.runtime.errors import CalibrationError

from .memorystation import DRIFTS, drift_up


def test_audit_says_what_was_admitted_from_which_frame_and_why(station):
    line = station()
    for _ in range(3):
        line.see(104)
    entry = [e for e in line.memory._audit.entries() if e["action"] == "admit"][-1]
    assert entry["camera"] == "cam" and entry["seq"] == 3 and entry["verdict"] == "3"
    assert entry["version"] == 1 and entry["product"] == "a" and len(entry["patches"]) == 2
    assert entry["score"] == 12 and entry["limit"] == 12 and "quantile" in entry["why"]


def test_no_frame_waits_while_the_audit_log_is_cut(station, monkeypatch):
    """A second on an SD card, once in so many parts."""
    line, fsync, waited = station(), os.fsync, []
    line.memory._audit.limit = 300
    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.audit.os.fsync", lambda number: (waited.append(number), fsync(number)))
        for value in (104, 104, 104, 105, 106, 107):
            line.see(value)
    written = line.memory._audit.path.stat().st_size
    assert not waited and written > 300
    line.memory._saver.flush()
    assert line.memory._audit.path.stat().st_size < written
    assert line.memory._audit.entries()[-1]["version"] == line.memory.version("a")


def test_an_audit_log_that_cannot_be_written_costs_nothing_but_its_lines(station, monkeypatch, caplog):
    line = station()
    line.memory._audit.limit = 300

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.audit.write_atomic", full)
        disk.setattr("andon.calib.snapshots.write_atomic", full)
        for value in (104, 104, 104, 105, 106):
            line.see(value)
        with pytest.raises(CalibrationError, match="freeze is in force, but not saved"):
            line.memory.command("freeze", {})
        assert line.memory.describe()["frozen"]
    line.memory.command("unfreeze", {})
    line.see(103)
    assert line.memory.version("a") == 4
    assert line.memory._saver._pending[1]["version"] == 4, "what was learnt is offered for saving"
    line.close()
    assert [r.message for r in caplog.records if "audit log" in r.message and r.levelname == "ERROR"] != []
    assert station().memory.version("a") == 4


def test_an_audit_log_that_cannot_be_opened_does_not_stop_the_line_and_is_said_once(station, tmp_path, caplog):
    """Another user's, say; a folder in its place cannot be opened by root either."""
    obstacle = tmp_path / "state" / "audit.jsonl"
    obstacle.mkdir(parents=True)
    line = station()
    for value in (104, 104, 104):
        line.see(value)
    version = line.memory.version("a")
    assert version and line.memory.command("snapshot", {})["version"] == version
    line.close()
    said = [r.message for r in caplog.records if "audit log" in r.message and r.levelname == "ERROR"]
    assert len(said) == 1 and str(obstacle) in said[0]
    obstacle.rmdir()
    again = station()
    assert again.memory.version("a") == version and again.memory._audit.entries()[-1]["action"] == "restore"


@pytest.mark.parametrize("method", ["write", "sync", "close"])
def test_no_trouble_of_the_audit_log_reaches_the_line(station, monkeypatch, caplog, method):
    line = station(DRIFTS)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(line.memory._audit, method, refuse)
    drift_up(line, np.random.default_rng(0))
    version = line.memory.command("reset", {})["version"]
    line.close()
    said = [r.message for r in caplog.records if "audit log" in r.message and r.levelname == "ERROR"]
    assert said and "No space left" in said[0] and str(line.memory._audit.path) in said[0]
    assert method != "write" or len(said) == 1, "once"
    monkeypatch.undo()
    line.memory._audit.close()
    assert station(DRIFTS).memory.version("a") == version


def test_the_audit_log_is_on_the_disk_before_the_snapshot_that_it_explains(station, monkeypatch):
    line, calls = station(), []
    for owner, name in ((line.memory._audit, "sync"), (line.memory._store, "save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    for _ in range(3):
        line.see(104)
    line.memory._saver.flush()
    assert calls == ["sync", "save"]
