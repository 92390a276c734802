"""What is saved of the memory, and when: the ring keeps its history, and the thread outlives the disk's troubles."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from andon.calib.snapshots import SnapshotStore
from andon.runtime.autosave import Autosave
from andon.runtime.errors import CalibrationError
from hypothesis import given, settings
from hypothesis import strategies as st

from .memorystation import CONFIG, Station


def test_what_is_offered_for_saving_is_the_present_state_and_copied_only_where_it_changed(station):
    line = station()

    def offered():
        for calibrator, index in zip(line.memory._banks.calibrators, "01", strict=True):
            for name, value in calibrator.state().items():
                np.testing.assert_array_equal(line.memory._saver._pending[0][f"{index}.{name}"], value, err_msg=name)
        return line.memory._saver._pending[0]

    for product in "aabbab":
        line.see(104, product)
    before = offered()
    line.see(105)
    line.see(160, "b")  # teaches nothing, but a calibrator may have looked at it
    line.see(105)
    after = offered()
    assert before["0.memory.rows"] is not after["0.memory.rows"]
    line.see(103)
    last = offered()
    assert last["1.memory.rows"] is after["1.memory.rows"], "the other product is not copied again"
    line.memory._saver.flush()
    for command in ("freeze", "unfreeze", "reset"):
        line.memory.command(command, {})
        line.memory._offer()
        offered()


@pytest.mark.parametrize("error", [CalibrationError("no room"), OSError(5, "Input/output error"), ValueError("what?")])
def test_autosave_outlives_whatever_goes_wrong(error, caplog):
    saved, failures = threading.Event(), [error, error, error]

    class Disk:
        def age(self, kind):
            return None

        def metas(self):
            return []

        def usable(self, kind):
            return iter(())

        def save(self, arrays, meta, kind):
            if failures:
                raise failures.pop()
            saved.set()

    caplog.set_level("INFO")
    saver = Autosave(Disk(), 0.01, 3600)
    saver.offer({}, {})
    assert saved.wait(10)
    saver.close()
    said = [record.message for record in caplog.records]
    assert said == [f"memory is not being saved: {error}", "memory is saved again"]


def test_telling_of_the_memory_lists_no_folder(station, monkeypatch):
    """The line asks for it every second, on the judging thread."""
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    with monkeypatch.context() as disk:
        disk.setattr(SnapshotStore, "_files", lambda *_: pytest.fail("the folder is listed"))
        assert line.memory.describe()["snapshots"] == [1]
    line.close()
    assert station().memory.describe()["snapshots"] == [1], "what earlier runs, killed or not, have left is known"


def test_what_is_saved_follows_the_folder(tmp_path):
    """People remove files, and folders come back."""
    folder, away, looked = tmp_path / "memory", tmp_path / "away", threading.Semaphore(0)

    class Store(SnapshotStore):
        def metas(self):
            looked.release()
            return super().metas()

    def saved_after_a_look():
        while looked.acquire(blocking=False):
            pass
        for _ in range(3):  # the first may have begun before, the second ends when the third begins
            assert looked.acquire(timeout=10)
        return [number for number, _ in saver.saved]

    store = Store(folder, {})
    kept, removed = (store.save({}, {"version": version}, "pinned").number for version in (1, 2))
    saver = Autosave(store, 0.01, 3600)
    assert [number for number, _ in saver.saved] == [removed, kept]
    (folder / f"pinned-{removed:010d}.snapshot").unlink()
    assert saved_after_a_look() == [kept]
    folder.rename(away)
    folder.write_text("a file where the folder was")
    assert saved_after_a_look() == [kept], "one that cannot be read says nothing, and ends no thread"
    folder.unlink()
    assert saved_after_a_look() == []
    away.rename(folder)
    assert saved_after_a_look() == [kept]
    saver.close()


def age_snapshots(folder, seconds):
    """As if every snapshot had been written so much earlier."""
    for path in folder.glob("*.snapshot"):
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - seconds))


def test_another_bundles_ring_does_not_put_off_this_ones(tmp_path):
    SnapshotStore(tmp_path, {"model": "another"}).save({}, {}, "ring")
    store = SnapshotStore(tmp_path, {"model": "this"})
    for expected in ("ring", "last"):
        saver = Autosave(store, 3600, 3600)
        saver.offer({"rows": np.array(expected)}, {})
        saver.close()
        (number, _), *_ = store.metas()
        assert (tmp_path / f"{expected}-{number:010d}.snapshot").exists()


MOMENTS = st.tuples(st.sampled_from(["save", "restart"]), st.integers(0, 12), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(MOMENTS, max_size=25))
def test_neither_restarts_nor_standing_still_push_history_out(tmp_path_factory, moments):
    """The ring is what its rule says, whenever the line is restarted; a restart loses nothing.

    moments: what happens, after how many hundred seconds, with which memory.
    """
    folder, every, keep, now = tmp_path_factory.mktemp("s"), 1000.0, 3, 0.0

    def start():
        return Autosave(SnapshotStore(folder, {}, keep=keep), 3600, every, lambda: now, lambda a: {"rows": a["rows"]})

    saver, expected, taken = start(), [], None
    for frames, (what, hundreds, value) in enumerate(moments):
        now += 100.0 * hundreds
        age_snapshots(folder, 100.0 * hundreds)
        saver.offer({"rows": np.full(2, value), "guard": np.array(frames)}, {"frames": frames})
        if what == "save":
            saver.flush()
        else:
            saver.close()
            saver = start()
        if (taken is None or now - taken >= every) and expected[-1:] != [value]:
            expected, taken = [*expected, value], now
        store = SnapshotStore(folder, {}, keep=keep)
        assert [int(kept.arrays["rows"][0]) for kept in store.usable("ring")] == expected[: -keep - 1 : -1]
        assert store.latest()[0].meta == {"frames": frames}, "whatever the ring takes, what was offered is saved"
    saver.close()


def test_a_clock_that_was_set_back_neither_pushes_history_out_nor_ends_it(tmp_path):
    now = 0.0
    store = SnapshotStore(tmp_path, {}, keep=2)
    for value in range(5):
        saver = Autosave(store, 3600, 1000, lambda: now)
        saver.offer({"rows": np.array(value)}, {})
        saver.close()
        age_snapshots(tmp_path, -(10.0**8))
    assert [int(kept.arrays["rows"]) for kept in store.usable("ring")] == [0]
    saver = Autosave(store, 3600, 1000, lambda: now)
    now += 1000
    saver.offer({"rows": np.array(5)}, {})
    saver.close()
    assert [int(kept.arrays["rows"]) for kept in store.usable("ring")] == [5, 0]


def test_quick_restarts_leave_something_to_roll_back_to(station, tmp_path):
    config = CONFIG.model_copy(update={"snapshot_every": 900, "snapshots": 2})
    line = station(config)
    for _ in range(3):
        line.see(104)
    line.close()
    age_snapshots(tmp_path / "state", 1000)
    for shade in (105, 106, 107, 108):  # each start goes on learning
        line = station(config)
        line.see(shade)
        line.close()
    line = station(config)
    assert line.memory.version("a") == 5
    line.memory.command("rollback", {"version": 1})
    assert line.memory.describe()["rows"]["a"] == 2


def test_a_memory_that_stands_still_keeps_its_history(station, tmp_path):
    line = station(CONFIG.model_copy(update={"snapshot_every": 1e-9}))  # the ring's turn comes with every save
    for _ in range(3):
        line.see(104)
    for _ in range(4):
        line.memory.command("freeze", {})  # it saves
        line.see(104)
    assert len(list((tmp_path / "state").glob("ring-*"))) == 1


def test_autosave_writes_while_the_line_runs(memory_bundle, tmp_path):
    line = Station(memory_bundle(), tmp_path / "s", CONFIG.model_copy(update={"save_every": 0.02}))
    for _ in range(3):
        line.see(104)
    for _ in range(200):
        if line.memory._store.numbers():
            break
        line.memory._saver._stop.wait(0.02)
    snapshot, _ = line.memory._store.latest()
    assert snapshot.meta["version"] == 1
    line.close()
