"""The outbox on a disk that refuses: what is stored, what is deleted, what is lost and said."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.errors import DeliveryError
from andon.runtime.outbox import Outbox
from andon.runtime.verdict import Ids

from .outboxes import Clocks, Events, fill, fill_disk, waiting


def test_full_disk(small_disk: Path, eventually: Callable[..., None]) -> None:
    events: Events = []
    with Outbox(small_disk / "o.db", event=lambda *e: events.append(e)) as outbox:
        ids = Ids()
        keys = [outbox.put("cam0", "verdict", ids.next(), b"x" * 2000) for _ in range(2500)]  # 5 MB
        eventually(lambda: outbox.stats().degraded is not None)
        assert "full" in str(outbox.stats().degraded) and [what for what, _ in events] == ["degraded"]
        eventually(lambda: [m.key for m in waiting(outbox)] == keys)  # offered from memory, in order, none missing
        assert outbox.stats().messages == 2500
        outbox.done(waiting(outbox)[:2000])
        eventually(lambda: outbox.stats().degraded is None)
        assert [m.key for m in waiting(outbox)] == keys[2000:] and events[-1][0] == "recovered"
        assert outbox.stats().dropped == 0
    with Outbox(small_disk / "o.db") as outbox:
        assert [m.key for m in waiting(outbox)] == keys[2000:]


def test_a_clock_that_is_set_writes_nothing_on_a_nearly_full_disk(
    small_disk: Path, eventually: Callable[..., None]
) -> None:
    clocks = Clocks()
    with clocks.open(small_disk / "o.db") as outbox:
        fill(outbox, 3000, size=500)
        clocks.wall += 3600
        fill(outbox, 1)
        assert outbox.stats().degraded is None
        outbox.done(waiting(outbox))
        eventually(lambda: outbox._file.count == 0)
    with clocks.open(small_disk / "o.db") as outbox:
        assert waiting(outbox) == [], "what was acknowledged is not sent again"


def test_memory_is_bounded_while_the_disk_refuses(tmp_path: Path, eventually: Callable[..., None]) -> None:
    with Outbox(tmp_path / "o.db", memory_bytes=10_000) as outbox:
        commit = outbox._file.commit

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        outbox._file.commit = full  # type: ignore[method-assign]
        ids = Ids()
        keys = [outbox.put("cam0", "verdict", ids.next(), b"x" * 1000) for _ in range(30)]
        eventually(lambda: outbox.stats().degraded is not None)
        assert [m.key for m in waiting(outbox)] == keys[-10:] and outbox.stats().dropped == 20
        outbox._file.commit = commit  # type: ignore[method-assign]
        assert outbox.wait(keys[-1], 5)


class Halfway:
    """A file's connection that is refused once, with the rows in and the rest of the transaction not."""

    def __init__(self, file: Any):
        self._file, self._connection = file, file._writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def executemany(self, query: str, rows: Any) -> Any:
        if query.startswith("DELETE"):
            self._file._writer = self._connection
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.executemany(query, rows)


def test_what_a_disk_refuses_in_the_middle_of_a_transaction_it_takes_whole_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("andon.runtime.outbox._RETRY", 0.01)
    with Outbox(tmp_path / "o.db") as outbox:
        keys = fill(outbox, 2)
        outbox._file._writer = Halfway(outbox._file)  # type: ignore[assignment]
        keys.append(outbox.put("cam0", "verdict", Ids(outbox.last_id).next(), b"{}"))
        assert outbox.wait(keys[-1], 5), outbox.stats().degraded
        assert [message.key for message in waiting(outbox)] == keys and outbox.stats().messages == 3


def refused(outbox: Outbox, count: int, size: int, eventually: Callable[..., None]) -> list[int]:
    """Messages that a full disk does not take."""
    ids = Ids(outbox.last_id)
    keys = [outbox.put("cam0", "verdict", ids.next(), b"v" * size) for _ in range(count)]
    eventually(lambda: outbox.stats().degraded is not None)
    return keys


def test_at_the_stop_the_reserve_goes_to_what_waits_in_memory(
    small_disk: Path, eventually: Callable[..., None]
) -> None:
    with Outbox(small_disk / "o.db") as outbox:
        fill(outbox, 3)
        eventually(lambda: (small_disk / "o.db.reserve").exists())
        filler = fill_disk(small_disk)
        keys = refused(outbox, 300, 650, eventually)
        outbox.finish()
        assert (outbox.stats().messages, outbox.stats().dropped) == (303, 0)
    with Outbox(small_disk / "o.db") as outbox:  # the disk is still full
        assert [m.key for m in waiting(outbox)][3:] == keys and outbox.stats().dropped == 0
        outbox.done(waiting(outbox))
        eventually(lambda: outbox._file.count == 0)
        filler.unlink()
        fill(outbox, 1)
    with Outbox(small_disk / "o.db") as outbox:
        assert len(waiting(outbox)) == 1 and (small_disk / "o.db.reserve").stat().st_size == 2**20


def test_what_is_lost_at_the_stop_is_said_and_still_counted_after_the_next_start(
    small_disk: Path, eventually: Callable[..., None]
) -> None:
    events: Events = []
    with Outbox(small_disk / "o.db", event=lambda *e: events.append(e)) as outbox:
        eventually(lambda: (small_disk / "o.db.reserve").exists())
        filler = fill_disk(small_disk)
        keys = refused(outbox, 1000, 3000, eventually)
        outbox.finish()
        stats = outbox.stats()
        assert stats.messages + stats.dropped == 1000 and stats.messages >= 100 and stats.dropped >= 100
        assert events[-1][0] == "dropped" and events[-1][1].startswith(f"{stats.dropped} messages were never stored")
    filler.unlink()
    with Outbox(small_disk / "o.db") as outbox:
        assert [m.key for m in waiting(outbox)] == keys[: stats.messages], (
            "the oldest are kept, none is missing between"
        )
        assert outbox.stats().dropped == stats.dropped


def test_a_file_that_was_closed_in_order_opens_on_a_full_disk(
    small_disk: Path, eventually: Callable[..., None]
) -> None:
    with Outbox(small_disk / "o.db") as outbox:
        keys = fill(outbox, 300, size=650)
    filler = fill_disk(small_disk)
    with Outbox(small_disk / "o.db") as outbox:
        assert [m.key for m in waiting(outbox)] == keys
        refused(outbox, 1000, 2000, eventually)
        eventually(lambda: outbox._file._reserve.exists())
        outbox.done(waiting(outbox))
        eventually(lambda: outbox.stats().degraded is None and outbox.stats().messages == 0)
    (small_disk / "o.db.reserve").unlink()
    fill_disk(small_disk)
    with pytest.raises(DeliveryError, match="cannot be opened"):
        Outbox(small_disk / "o.db").open()
    filler.unlink()
    with Outbox(small_disk / "o.db") as outbox:
        assert waiting(outbox) == []


def test_caps_that_drop_every_message_are_said_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    events: Events = []
    with Outbox(tmp_path / "o.db", max_bytes=1000, event=lambda *e: events.append(e)) as outbox:
        for _ in range(30):
            fill(outbox, 1)
        assert len(events) == 1
        monkeypatch.setattr("andon.runtime.outbox_news._AGAIN", 0.0)
        fill(outbox, 1)
        eventually(lambda: len(events) == 2)
        assert sum(int(text.split()[0]) for _, text in events) == outbox.stats().dropped


def test_a_disk_that_cannot_allocate_has_a_reserve_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext3, FAT, NFS 3: the C library writes the file then, and refuses one that is open for appending."""

    def emulated(descriptor: int, offset: int, length: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, "Bad file descriptor")
        end = os.fstat(descriptor).st_size
        os.pwrite(descriptor, bytes(max(0, offset + length - end)), end)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    reserve = tmp_path / "o.db.reserve"
    with Outbox(tmp_path / "o.db") as outbox:
        assert reserve.stat().st_size == 2**20
        os.truncate(reserve, 2**19)
        outbox._file.reserve()
        assert reserve.stat().st_size == 2**20


def test_a_line_starts_again_and_again_on_a_full_disk(small_disk: Path) -> None:
    """Others take every byte that it leaves free."""
    with Outbox(small_disk / "o.db"):
        pass
    for _ in range(3):
        fill_disk(small_disk)
        with Outbox(small_disk / "o.db") as outbox:
            fill_disk(small_disk)
            ids = Ids(outbox.last_id)
            for _ in range(1000):
                outbox.put("cam0", "verdict", ids.next(), b"x" * 1000)
