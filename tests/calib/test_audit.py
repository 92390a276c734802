"""The audit log: torn lines, the older half dropped while others write, a disk that refuses."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
from andon.calib.audit import AuditLog


def test_audit_log_appends_survives_a_torn_line_and_rotates(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write({"version": 1, "frame": 5})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"version": 2, "fr')
    log = AuditLog(path, limit=2000)
    log.write({"version": 3})
    log.sync()
    assert [e["version"] for e in log.entries()] == [1, 3]
    for k in range(4, 200):
        log.write({"version": k})
    assert path.stat().st_size < 2100
    versions = [e["version"] for e in log.entries()]
    assert versions[-1] == 199 and versions == list(range(versions[0], 200))
    log.close()


def test_audit_log_keeps_its_lines_where_there_is_no_room_to_drop_the_older_half(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, limit=2000)
    refused = []

    def full(*_):
        refused.append(OSError(28, "No space left on device"))
        raise refused[-1]

    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.audit.write_atomic", full)
        for k in range(200):
            try:
                log.write({"version": k})
            except OSError as error:
                assert error is refused[-1]
        assert [e["version"] for e in log.entries()] == list(range(200))
        assert 1 < len(refused) < 20, "tried again, but not with every line"
    for k in range(200, 300):
        log.write({"version": k})
    assert path.stat().st_size < 2100 and log.entries()[-1] == {"version": 299}
    log.close()


@pytest.mark.parametrize("slow", [1, 2, 3, 4])
def test_what_is_written_while_another_thread_rotates_waits_for_no_disk_and_is_kept(tmp_path, monkeypatch, slow):
    """slow: which of the waits for the disk takes long."""
    path, syncs, fsync = tmp_path / "audit.jsonl", [], os.fsync
    log = AuditLog(path, limit=2000, rotates=False)
    waits, go_on = threading.Event(), threading.Event()

    def hang(number):
        syncs.append(number)
        if len(syncs) == slow:
            waits.set()
            assert go_on.wait(60)
        fsync(number)

    for k in range(200):
        log.write({"version": k})
    monkeypatch.setattr("andon.calib.audit.os.fsync", hang)
    rotation = threading.Thread(target=log.rotate)
    rotation.start()
    assert waits.wait(60)
    for k in range(200, 205):
        log.write({"version": k})
    assert rotation.is_alive()
    go_on.set()
    rotation.join(60)
    log.write({"version": 205})
    assert len(syncs) >= slow and [e["version"] for e in log.entries()] == list(range(100, 206))
    assert [p.name for p in tmp_path.iterdir()] == ["audit.jsonl"]
    log.close()


def test_half_a_rotated_audit_log_does_not_stay(tmp_path):
    """A kill -9 while the older half is dropped leaves the other half beside the log."""
    for name in (".audit.jsonl.123.tmp", ".audit.jsonl.half.45.tmp", "audit.jsonl.half", ".other.jsonl.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    log = AuditLog(tmp_path / "audit.jsonl")
    log.open()
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.jsonl.123.tmp", "audit.jsonl"]


def test_audit_log_may_be_rotated_while_another_thread_syncs_it(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write({"version": 1})

    def rotated_meanwhile(_):
        log.close()
        raise OSError(9, "Bad file descriptor")

    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.audit.os.fsync", rotated_meanwhile)
        log.sync()
    log.write({"version": 2})

    def broken(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="Input/output"):
        disk.setattr("andon.calib.audit.os.fsync", broken)
        log.sync()
    assert [entry["version"] for entry in log.entries()] == [1, 2]
    log.close()


def test_audit_log_goes_on_in_a_new_file_where_it_was_removed(tmp_path):
    path = tmp_path / "memory" / "audit.jsonl"
    log = AuditLog(path)
    log.write({"version": 1})
    shutil.rmtree(path.parent)
    assert log.entries() == []
    log.write({"version": 2})
    assert log.entries() == [{"version": 2}]
    log.close()


def test_audit_log_does_not_read_itself_again_for_each_line(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write({"version": 1})
    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.audit.Path.read_bytes", lambda path: pytest.fail("16 MiB are read"))
        log.write({"version": 2})
    assert [entry["version"] for entry in log.entries()] == [1, 2]
    log.close()
