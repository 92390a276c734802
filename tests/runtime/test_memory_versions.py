"""Versions of the memory: restarts, rollbacks and what they leave behind, snapshots that are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from andon.calib.snapshots import Snapshot, SnapshotStore, _encode
from andon.runtime.errors import CalibrationError, ConfigError
from andon.runtime.memory import LineMemory

from .memorystation import CONFIG, DRIFTS


def test_restart_goes_on_where_it_stopped(station):
    line = station()
    for value in (104, 105, 104, 103):
        line.see(value)
    version, rows = line.memory.version("a"), line.memory.describe()["rows"]
    line.close()
    again = station()
    assert again.memory.version("a") == version
    assert again.memory.describe()["rows"] == rows
    assert again.see(104) == 0


def test_a_command_outlives_a_power_cut_right_after_its_answer(station):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("freeze", {})
    after = station()  # the first one never closes, and its next save is an hour away
    assert after.memory.describe()["frozen"] and after.memory.describe()["rows"]["a"] == 2
    after.memory.command("reset", {})
    assert station().memory.describe()["rows"]["a"] == 0, "what had been learnt wrongly is not back"


@pytest.mark.parametrize("name", ["freeze", "rollback", "reset"])
def test_what_a_command_did_and_the_disk_refused_is_not_answered_as_done(station, monkeypatch, name):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    line.see(108)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.snapshots.write_atomic", full)
        with pytest.raises(CalibrationError, match=f"{name} is in force, but not saved(.|\n)*No space left"):
            line.memory.command(name, {})
    described = line.memory.describe()
    assert described["frozen"] if name == "freeze" else described["rows"]["a"] == {"rollback": 2, "reset": 0}[name]
    assert line.memory._saver.flush() is None, "it is saved with the next turn"
    after = station().memory.describe()
    assert (after["frozen"], after["rows"], after["version"]) == tuple(
        described[key] for key in ("frozen", "rows", "version")
    )


def test_rollback_without_a_version_takes_the_newest_older_one(station):
    line = station()
    with pytest.raises(CalibrationError, match="no older version") as refused:
        line.memory.command("rollback", {})
    assert "choose" not in str(refused.value), "there is nothing to choose from"
    for _ in range(3):
        line.see(104)
    saved = line.memory.command("snapshot", {})["version"]
    with pytest.raises(CalibrationError, match="no older version") as refused:
        line.memory.command("rollback", {})
    assert "choose" not in str(refused.value) and str(saved) not in str(refused.value.expected), "it is the present one"
    line.see(108)
    answer = line.memory.command("rollback", {})
    (noted,) = [entry for entry in line.memory._audit.entries() if entry.get("action") == "rollback"]
    assert answer["of"] == noted["of"] == saved and answer["version"] > answer["before"]
    assert line.memory.describe()["rows"]["a"] == 2
    with pytest.raises(CalibrationError, match="no such version") as refused:
        line.memory.command("rollback", {"version": 99})
    assert f"one of [{saved}" in str(refused.value) and "choose one of these" in str(refused.value)
    with pytest.raises(ConfigError, match="no memory action"):
        line.memory.command("explode", {})


def test_the_snapshots_of_an_answer_are_the_versions_that_rollback_takes(station, tmp_path):
    line = station()
    for value in (104, 104, 104, 105):
        line.see(value)
    line.memory.command("snapshot", {})
    line.memory.command("snapshot", {})
    line.see(106)
    answer = line.memory.command("freeze", {})  # it saves
    assert answer["snapshots"] == [3, 2]
    for version in answer["snapshots"]:
        line.memory.command("rollback", {"version": version})
    (tmp_path / "state" / "pinned-0000000099.snapshot").write_bytes(b"half")
    answer = line.memory.command("snapshot", {})
    assert answer["snapshots"] == [5, 4, 3, 2], "what cannot be read is not offered"


def poisoned(station):
    """A line with four saved versions of 1 to 4 rows, the last of which has learnt a defect, then scored 0."""
    line = station(CONFIG.model_copy(update={"per_frame": 1, "snapshot_every": 3600}))
    for value in (104, 104, 104, 105, 106, 150, 150):  # the guard takes the second of two that are alike
        line.see(value, label="OK")
        line.memory.command("snapshot", {})
    assert line.memory.version("a") == line.memory.describe()["rows"]["a"] == 4 and line.see(150, label="NG") == 0
    return line


def test_no_number_of_rollbacks_brings_back_what_the_first_took_out(station):
    line, rows = poisoned(station), []
    for _ in range(3):
        line.memory.command("rollback", {})
        assert line.see(150, label="NG") > 0
        rows.append(line.memory.describe()["rows"]["a"])
    assert rows == [3, 2, 1], "each goes on from where the one before went"


def test_what_was_rolled_back_stays_out_when_the_memory_learns_on(station):
    line = poisoned(station)
    line.memory.command("rollback", {})
    for value in (103, 102, 101):  # the ring's next turn is an hour away: of these only the two newest are saved
        line.see(value)
        line.memory._saver.flush()
    line.close()
    line = station()
    for _ in range(5):
        line.memory.command("rollback", {})
        assert line.see(150, label="NG") > 0
        if line.memory.describe()["rows"]["a"] == 0:
            break
    assert line.memory.describe()["rows"]["a"] == 0, "down to what was enrolled"
    with pytest.raises(CalibrationError, match="no older version"):
        line.memory.command("rollback", {})
    line.memory.command("rollback", {"version": 4})
    assert line.see(150, label="NG") == 0, "by its number it can be had again"
    line.memory.command("rollback", {})
    assert line.memory.describe()["rows"]["a"] == 3 and line.see(150, label="NG") > 0


def test_damaged_newest_snapshot_is_passed_over(station, tmp_path, caplog):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    line.see(108)
    line.close()
    newest = max((tmp_path / "state").glob("*.snapshot"), key=lambda p: int(p.stem.split("-")[1]))
    newest.write_bytes(newest.read_bytes()[:-9])
    again = station()
    assert again.memory.describe()["rows"]["a"] == 2, "the state of version 1"
    assert again.memory.version("a") == 3, "under a new number, for 2 was in use"
    assert "is not used" in caplog.text


def test_a_number_that_was_published_is_not_used_again_where_no_snapshot_is_left(station, tmp_path):
    line = station()
    for value in (104, 105, 104, 108):
        line.see(value)
    assert line.memory.version("a") == 2 and not list((tmp_path / "state").glob("*.snapshot"))
    again = station()  # the first one was killed within its first minute
    assert again.memory.version("a") == 3 and again.memory.describe()["rows"]["a"] == 0
    assert station().memory.version("a") == 3, "nothing has changed since"


def test_a_number_that_was_published_is_not_used_again_where_a_power_cut_took_the_audit_log(station, tmp_path):
    line = station()
    for value in (104, 105, 104, 108):
        line.see(value)
    line.memory._audit.path.unlink()
    after = LineMemory(line.detector.program, CONFIG, tmp_path / "state", published=line.memory.version("a"))
    assert after.version("a") == 3
    after.close()
    assert station().memory.version("a") == 3


def test_state_of_another_bundle_is_refused(station, memory_bundle, caplog):
    line = station()
    for _ in range(3):
        line.see(104)
    line.close()
    other = station(bundle=memory_bundle(("x", "y")))
    assert other.memory.describe()["rows"] == {"x": 0, "y": 0}
    assert other.memory.version("x") == 2, "the numbers of a state folder go on, whatever is in them"
    assert "another bundle" in caplog.text


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_learnt_under_a_former_name_of_the_bundle_is_taken(station, caplog, which):
    line, rng = station(DRIFTS), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)))
    line.close()
    store, rows = line.memory._store, line.memory.describe()["rows"]["a"]
    for newest in [item for item in store.usable() if isinstance(item, Snapshot)]:
        (path,) = store.folder.glob(f"*-{newest.number:010d}.snapshot")
        identity = {**newest.identity, "model": line.bundle.former_ids[which]}
        path.write_bytes(_encode(replace(newest, identity=identity)))
    line = station(DRIFTS)
    assert rows and line.memory.describe()["rows"]["a"] == rows and "another bundle" not in caplog.text
    assert line.memory.describe()["snapshots"], "rollback finds them, the ring counts them"
    for _ in range(12):
        line.see(int(rng.integers(106, 109)), label="NG")
    assert line.memory.drift("cam"), "held against the reference of before the update"


def test_a_memory_that_is_switched_off_is_there_when_it_is_switched_on_again(station, caplog):
    line, rng = station(DRIFTS), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)))
    rows, version = line.memory.describe()["rows"]["a"], line.memory.version("a")
    assert rows > 0
    line.close()
    off = DRIFTS.model_copy(update={"enabled": False})
    for _ in range(9):  # more often than snapshots are kept
        line = station(off)
        line.see(101)
        line.close()
    line = station(off)
    for _ in range(12):
        line.see(int(rng.integers(106, 109)), label="NG")
    assert line.memory.drift("cam"), "held against the reference of before"
    line.close()
    line = station(DRIFTS)
    assert (line.memory.describe()["rows"]["a"], line.memory.version("a")) == (rows, version)
    assert line.memory.drift("cam") and "another bundle" not in caplog.text


def save_as_before(memory, in_use):
    """The newest snapshot becomes one of an earlier version, without rows where the memory was not in use."""
    store = memory._store
    newest, _ = store.latest()
    (path,) = store.folder.glob(f"*-{newest.number:010d}.snapshot")
    path.unlink()
    rows = newest.part("") if in_use else {}
    arrays = {name: array for name, array in newest.arrays.items() if name.startswith("drift.")} | rows
    SnapshotStore(store.folder, {**store.identity, "memory": in_use}).save(arrays, newest.meta, "last")


@pytest.mark.parametrize("switched_on", [False, True])
def test_an_update_keeps_the_drift_warning_and_the_rows_of_a_memory_that_was_off(station, caplog, switched_on):
    line, rng = station(DRIFTS), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)))
    rows = line.memory.describe()["rows"]["a"]
    line.close()
    save_as_before(line.memory, in_use=True)
    off = DRIFTS.model_copy(update={"enabled": False})
    line = station(off)
    for _ in range(12):
        line.see(int(rng.integers(106, 109)), label="NG")
    line.close()
    save_as_before(line.memory, in_use=False)
    line = station(DRIFTS if switched_on else off)
    assert line.memory.drift("cam"), "held against the reference of before the update"
    line.close()
    line = station(DRIFTS)
    assert rows and line.memory.describe()["rows"]["a"] == rows
    assert line.memory.drift("cam") and "another bundle" not in caplog.text


def test_no_rollback_to_what_was_saved_by_an_earlier_version_with_the_memory_off(station):
    off = DRIFTS.model_copy(update={"enabled": False})
    line = station(off)
    line.see(101)
    line.close()
    save_as_before(line.memory, in_use=False)
    line = station(DRIFTS)
    for _ in range(3):
        line.see(104)
    with pytest.raises(CalibrationError, match="no older version"):
        line.memory.command("rollback", {})


def test_a_memory_that_is_switched_on_later_starts_as_enrolled(station):
    off = DRIFTS.model_copy(update={"enabled": False})
    line = station(off)
    for _ in range(12):
        line.see(101, label="NG")
    line.close()
    line = station(DRIFTS)
    assert line.memory.describe()["rows"]["a"] == 0 and line.memory._drift.monitors["cam/a"].complete


def test_a_state_folder_that_is_removed_is_made_again(station, tmp_path):
    line = station()
    for _ in range(3):
        line.see(104)
    shutil.rmtree(tmp_path / "state")
    assert line.memory.describe()["snapshots"] == []
    line.see(105)
    line.close()
    assert "admit" in (tmp_path / "state" / "audit.jsonl").read_text()
    assert station().memory.version("a") == 2
