"""Snapshots: atomic under kill -9 (a real process), checked when read, a ring with rollback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from andon.calib.atomic import write_atomic
from andon.calib.errors import CalibrationError
from andon.calib.snapshots import SnapshotStore, read_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

IDENTITY = {"bundle": "abc", "shape": [4, 2]}


def arrays(value):
    return {"rows": np.full((4, 2), value, np.float32), "flag": np.array(True)}


def test_save_and_load_bit_exact(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY)
    saved = store.save(arrays(1.5), {"version": 7})
    loaded = store.load(saved.number)
    assert loaded.meta == {"version": 7} and loaded.identity == IDENTITY
    assert all(loaded.arrays[k].tobytes() == v.tobytes() for k, v in arrays(1.5).items())


def test_ring_keeps_the_last_and_pins_stay(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY, keep=3)
    pinned = store.save(arrays(0), {}, kind="pinned").number
    for k in range(6):
        store.save(arrays(k), {})
    assert store.numbers() == [7, 6, 5, pinned]
    assert float(store.load(pinned).arrays["rows"][0, 0]) == 0


def test_frequent_saves_do_not_push_the_ring_out(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY, keep=3)
    ring = [store.save(arrays(k), {}).number for k in range(2)]
    last = [store.save(arrays(k), {}, "last").number for k in range(9)]
    assert store.numbers() == [last[-1], last[-2], *reversed(ring)]


def test_neither_another_bundle_nor_damage_pushes_this_ones_out(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY, keep=2)
    own = [store.save(arrays(k), {}, kind).number for k, kind in enumerate(["ring", "ring", "last", "last"])]
    other = SnapshotStore(tmp_path, {"bundle": "another"}, keep=2)
    for kind in ("ring", "last"):
        for k in range(5):
            other.save(arrays(k), {}, kind)
    assert {number for number, _ in SnapshotStore(tmp_path, IDENTITY).metas()} == set(own)
    assert len(store.numbers()) == 8
    for number, path in other._files("last"):
        if number not in own:
            path.write_bytes(b"")
    assert store.save(arrays(9), {}, "last").number - 1 in store.numbers()
    assert [number for number, _ in store.metas()] == [15, own[3], own[1], own[0]]


def test_numbers_go_on_after_a_restart(tmp_path):
    assert SnapshotStore(tmp_path, IDENTITY).save(arrays(1), {}).number == 1
    assert SnapshotStore(tmp_path, IDENTITY).save(arrays(2), {}).number == 2


def test_usable_goes_from_the_newest_back(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY)
    for k in range(4):
        store.save(arrays(k), {"k": k})
    assert [snapshot.meta["k"] for snapshot in store.usable()] == [3, 2, 1, 0]
    assert SnapshotStore(tmp_path / "empty", IDENTITY).latest() == (None, [])


def test_a_header_that_could_not_be_read_once_is_read_the_next_time(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, IDENTITY)
    for k in range(2):
        store.save(arrays(k), {"k": k})

    def too_many(*_):
        raise OSError(24, "Too many open files")

    again = SnapshotStore(tmp_path, IDENTITY)
    with monkeypatch.context() as process:
        process.setattr("andon.calib.snapshots.zipfile.ZipFile", too_many)
        assert again.metas() == []
    assert [number for number, _ in again.metas()] == [2, 1]
    monkeypatch.setattr("andon.calib.snapshots.zipfile.ZipFile", too_many)
    assert [number for number, _ in again.metas()] == [2, 1], "once read, it is known"


def test_a_snapshot_that_is_not_there_is_refused(tmp_path):
    store = SnapshotStore(tmp_path, IDENTITY)
    for k in range(2):
        store.save(arrays(k), {})
    with pytest.raises(CalibrationError, match="there is no snapshot 7") as refused:
        store.load(7)
    assert refused.value.found == [2, 1]
    with pytest.raises(CalibrationError, match=r"ring-0000000007\.snapshot cannot be used"):
        read_snapshot(tmp_path / "ring-0000000007.snapshot")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_damage_is_refused_and_the_last_good_one_used(tmp_path, damage):
    store = SnapshotStore(tmp_path, IDENTITY)
    store.save(arrays(1), {"k": 1})
    bad = tmp_path / f"ring-{store.save(arrays(2), {'k': 2}).number:010d}.snapshot"
    data = bytearray(bad.read_bytes())
    if damage == "truncate":
        del data[-20:]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data.clear()
    bad.write_bytes(data)
    if damage == "foreign":
        SnapshotStore(tmp_path, IDENTITY | {"bundle": "another"}).save(arrays(3), {})
        bad = tmp_path / "ring-0000000003.snapshot"
    snapshot, refused = store.latest()
    assert [r.path for r in refused] == [bad]
    assert snapshot.meta["k"] == (2 if damage == "foreign" else 1)
    with pytest.raises(CalibrationError, match="another bundle" if damage == "foreign" else "cannot be used"):
        store.load(snapshot.number + 1)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_no_prefix_of_a_snapshot_is_taken_for_one(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("s")
    store = SnapshotStore(folder, IDENTITY)
    store.save(arrays(1), {})
    path = next(folder.glob("*.snapshot"))
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(CalibrationError):
        read_snapshot(path)


def test_no_altered_byte_is_let_through(tmp_path):
    """Also where zip's own checks do not look."""
    store = SnapshotStore(tmp_path, IDENTITY)
    store.save(arrays(1), {})
    path = next(tmp_path.glob("*.snapshot"))
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        altered = bytearray(data)
        altered[position] ^= 0x20
        path.write_bytes(altered)
        with pytest.raises(CalibrationError):
            read_snapshot(path)


def test_no_altered_bit_keeps_the_others_from_being_listed_and_saved(tmp_path):
    """Headers are read without the digest, and zipfile raises more than BadZipFile."""
    store = SnapshotStore(tmp_path, IDENTITY)
    store.save({}, {})
    path = next(tmp_path.glob("*.snapshot"))
    data = path.read_bytes()
    store.save({}, {})
    for position in range(8 * len(data)):
        altered = bytearray(data)
        altered[position // 8] ^= 1 << position % 8
        path.write_bytes(altered)
        assert SnapshotStore(tmp_path, IDENTITY).metas()[0] == (2, {}), f"bit {position}"
    assert store.save(arrays(3), {}).number == 3


def test_kill_9_in_the_middle_of_a_snapshot_leaves_a_loadable_state(tmp_path):
    """A process that does nothing but save is killed many times; a usable state is there every time."""
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import numpy as np
        from andon.calib.snapshots import SnapshotStore
        store = SnapshotStore(Path(sys.argv[1]), {"a": 1}, keep=3)
        k = 0
        while True:
            k += 1
            store.save({"rows": np.full((600, 200), k, np.float32)}, {"k": k})
            print(k, flush=True)
        """
    )
    interrupted = attempt = 0
    while attempt < 6 or (not interrupted and attempt < 60):  # how many are enough depends on how busy the machine is
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.0007 * (attempt % 6))
        attempt += 1
        process.send_signal(signal.SIGKILL)
        tail = process.stdout.read().split()
        process.wait()
        interrupted += any(tmp_path.glob(".*.tmp"))
        snapshot, refused = SnapshotStore(tmp_path, {"a": 1}, keep=3).latest()
        assert refused == []
        assert (snapshot.arrays["rows"] == snapshot.meta["k"]).all()
        assert snapshot.meta["k"] >= (int(tail[-1]) if tail else 3)
        assert not any(tmp_path.glob(".*.tmp"))
    assert interrupted, "no kill fell into a write; the test proves nothing"


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, IDENTITY)
    store.save(arrays(1), {"k": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("andon.calib.atomic.os.fsync", full)
    with pytest.raises(CalibrationError, match="could not be written"):
        store.save(arrays(2), {"k": 2})
    assert store.latest()[0].meta == {"k": 1}
    assert not any(tmp_path.glob(".*.tmp"))


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot be used"):
        SnapshotStore(tmp_path / "file", IDENTITY)


def test_a_folder_that_is_removed_is_made_again(tmp_path):
    store = SnapshotStore(tmp_path / "memory", IDENTITY)
    store.save(arrays(1), {})
    shutil.rmtree(store.folder)
    assert store.numbers() == [] and store.latest() == (None, [])
    store.save(arrays(2), {"k": 2})
    assert store.latest()[0].meta == {"k": 2}


def test_a_folder_that_turns_unusable_is_refused(tmp_path):
    store = SnapshotStore(tmp_path / "memory", IDENTITY)
    store.folder.rmdir()
    store.folder.write_text("")
    with pytest.raises(CalibrationError, match="cannot be read"):
        store.numbers()
    with pytest.raises(CalibrationError, match="memory"):
        store.save(arrays(1), {})


def test_an_old_snapshot_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path, IDENTITY, keep=1)
    store.save(arrays(1), {})

    def refuse(path, missing_ok=False):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("andon.calib.snapshots.Path.unlink", refuse)
    with pytest.raises(CalibrationError, match=r"Operation not permitted: .*ring-0000000001"):
        store.save(arrays(2), {})


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "x.json"
    for value in (1, 2):
        write_atomic(path, json.dumps(value).encode())
    assert path.read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
