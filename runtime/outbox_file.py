"""The SQLite file under the outbox: schema, caps, damage. Writes come from one thread, reads from any."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import DeliveryError
from .outbox_floors import Floors, FloorsFile
from .outbox_replace import SCHEMA, VERSION, Replacement, Row
from .outbox_salvage import FAR, salvage, sound

log = logging.getLogger("andon.outbox")

#: Pages of 4 KiB in the write-ahead log before it is folded into the file, and the bytes kept free for doing so when
#: the disk is full.
_LOG_PAGES, _RESERVE = 128, 2**20
#: What is held of the reserve where there is no room for the whole, at least what a start takes; and to the last, for
#: the count of what is lost.
_LAST = 2**16
_PARTS = (_RESERVE, _RESERVE * 3 // 4, _RESERVE // 2, _LAST, _LAST // 2)
#: Deletions of one transaction on a full disk.
_SMALL = 64
#: Errors that sqlite3 raises as it does for a disk that refuses, and that are damage: to the schema, to a text.
_DAMAGE = ("no such ", "already exists", "malformed", "Could not decode")


class OutboxFile:
    """See the module.

    Attributes:
        count, bytes: messages and payload bytes in the file.
        dropped: messages that the caps removed, and that damage took, since the file was made.
        damaged: of these, what damage took since this was opened.
        last_key, last_id: greatest key and identifier that were ever committed.
        floors, before: what outlives a full disk and damage, and what the run before has left of that.
        set_aside: where a damaged file went, and what was saved from it; None when there was none.
    """

    def __init__(
        self, path: Path, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ):
        self._path = path
        self._reserve = path.with_name(path.name + ".reserve")
        self._replacement = Replacement(path)
        self.floors, self.before = FloorsFile(path.with_name(path.name + ".floors")), Floors()
        self._monotonic = monotonic
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._read_lock = threading.Lock()
        self._lock_file: IO[str] | None = None
        self._giving_up = False  # the reserve is for what is to be stored, and is not taken back
        self._base = (wall(), monotonic())  # the clock of ages and the monotonic one at one moment, see _now
        self.count = self.bytes = self.dropped = self.damaged = self.last_key = 0
        self.last_id = ""
        self.set_aside: str | None = None

    def lock(self) -> None:
        """Make the folder and take the file for this process alone.

        Raises:
            DeliveryError: the folder cannot be made, or another process has the outbox open.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = self._path.with_name(self._path.name + ".lock").open("w")
        except OSError as error:
            raise DeliveryError(
                f"the outbox cannot be kept at {self._path}",
                found=error.strerror,
                expected="a folder that this user may write",
                next_step="set 'state' or 'outbox.path' in the line configuration",
            ) from error
        self._giving_up = False
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            self._lock_file = None
            raise DeliveryError(
                f"the outbox {self._path} is in use",
                found="another process holds it",
                expected="one `andon run` per outbox",
                next_step="stop the other process, or give this line its own 'outbox.path'",
            ) from error
        self.before = self.floors.read()

    def open(self) -> None:
        """Open or create; a damaged file is set aside, and what can be read of it is carried over.

        Raises:
            DeliveryError: the file was written by a newer version.
            sqlite3.OperationalError, OSError: the disk refuses.
        """
        self._replacement.finish()
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._disconnect()
            if not refused(error):
                log.error("the outbox file %s is damaged: %s", self._path, error)
                self.replace_damaged()
                return
            if not self._free_reserve():
                raise
            log.warning("the outbox file %s: %s; opened with the room of its reserve", self._path, error)
            self.open()

    def _open(self) -> None:
        existed = self._path.exists()
        self._writer = self._connect()
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            self._disconnect()
            raise DeliveryError(
                f"the outbox {self._path} was written by a newer Andon",
                found=f"version {version}",
                expected=f"version {VERSION} or older",
                next_step="install that version, or move the file away once its messages are delivered",
            )
        # Not quick_check: it does not see that the index lacks a message, which would then never be offered.
        if (health := self._writer.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(health.rpartition("\n")[2])
        if version == 0:
            if existed and self.before.waiting:
                raise sqlite3.DatabaseError(f"empty, where {self.before.waiting} messages were")
            self._writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        wrong = "size IS NOT length(payload) OR stored NOT BETWEEN -1e11 AND 1e11"
        if self._writer.execute(f"SELECT 1 FROM message WHERE {wrong} LIMIT 1").fetchone():
            raise sqlite3.DatabaseError("a message has not the size or the time that it was stored with")
        dropped, last_id = int(self._state("dropped") or 0), (self._state("last_id") or b"").decode()
        row = self._writer.execute("SELECT COUNT(*), COALESCE(SUM(size), 0), COALESCE(MAX(key), 0) FROM message")
        self.count, self.bytes, last_key = row.fetchone()
        self.last_key = max(self.last_key, last_key)
        youngest = self._writer.execute("SELECT stored FROM message ORDER BY key DESC LIMIT 1").fetchone()
        if youngest is not None:
            self._base = (youngest[0], self._monotonic())
        self.dropped, self.last_id = max(dropped, self.before.dropped), max(last_id, self.before.id)
        self._reader = self._connect()
        self.reserve()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10)
        # A damaged text must not keep the other rows from being read; its message is then found not to be whole.
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        except BaseException:
            connection.close()  # at once: the error holds on to it, and the log's files stay while one is open
            raise
        return connection

    def commit(
        self,
        rows: Sequence[Row],
        states: Mapping[str, bytes],
        acked: Iterable[int],
        last_id: str | None,
        caps: tuple[int, float] | None,
    ) -> None:
        """One transaction: insert, delete what was acknowledged, keep states, enforce the caps.

        Raises:
            sqlite3.OperationalError: the disk refuses; nothing was changed.
            sqlite3.DatabaseError: the file is damaged.
        """
        if self._reader is None:  # made last: opening may have failed half way, and nothing would be read
            self._disconnect()
            self.open()
        writer = self._writer
        assert writer is not None  # open() connected or raised
        now = self._now()
        writer.execute("BEGIN IMMEDIATE")
        try:
            writer.executemany(
                "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)", [(*row, len(row[4]), now) for row in rows]
            )
            count, size = self.count + len(rows), self.bytes + sum(len(row[4]) for row in rows)
            for key in acked:
                gone = writer.execute("DELETE FROM message WHERE key = ? RETURNING size", (key,)).fetchall()
                count, size = count - len(gone), size - sum(row[0] for row in gone)
            lost = self._over(writer, size, now, caps) if caps else []
            writer.executemany("DELETE FROM message WHERE key = ?", [(key,) for key, _ in lost])
            count, size = count - len(lost), size - sum(row[1] for row in lost)
            kept = {**states, **({"last_id": last_id.encode()} if last_id and last_id > self.last_id else {})}
            if lost:
                kept["dropped"] = str(self.dropped + len(lost)).encode()
            writer.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", list(kept.items()))
            writer.execute("COMMIT")
        except sqlite3.DatabaseError:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise
        self.count, self.bytes, self.dropped = count, size, self.dropped + len(lost)
        self.last_id = max(self.last_id, last_id or "")
        if rows:
            self.last_key = rows[-1][0]

    def reserve(self) -> None:
        """Hold room on the disk in a file of its own, to be given up when it is full; less where there is less."""
        if self._giving_up:
            return
        for size in _PARTS:
            held = self._reserve.stat().st_size if self._reserve.exists() else 0
            if held >= size:
                return
            try:
                # Not for appending: where the disk has no such call, the C library refuses that (EBADF).
                with self._reserve.open("r+b" if held else "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                log.debug("no reserve of %d bytes: %s", size, error)
                with contextlib.suppress(OSError):
                    os.truncate(self._reserve, held) if held else self._reserve.unlink(missing_ok=True)

    def give_up_reserve(self) -> bool:
        """Before the end, on a full disk: let its room go to what still waits, but for the last of it.

        That is for :meth:`count_lost`. False where there is nothing to give up.
        """
        first, self._giving_up = not self._giving_up, True
        try:
            if not first or self._reserve.stat().st_size <= _LAST:
                return False
            os.truncate(self._reserve, _LAST)
        except OSError as error:
            log.debug("the reserve stays: %s", error)
            return False
        self.fold()
        return True

    def count_lost(self, lost: int) -> None:
        """Add messages that could not be stored to what was dropped, kept over restarts if the disk takes that much."""
        self._giving_up = True
        self._free_reserve()
        try:
            self.commit((), {"dropped": str(self.dropped + lost).encode()}, (), None, None)
        except sqlite3.DatabaseError as error:
            log.error("the outbox: after the next start %d lost messages are not counted: %s", lost, error)
        self.dropped += lost

    def _free_reserve(self) -> bool:
        """Whether there was one to remove."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    def delete_with_reserve(self, acked: Iterable[int]) -> None:
        """Delete what was acknowledged on a full disk: give up the reserve for it, fold the log, take it back.

        Without the reserve a disk that the log itself has filled would stay full: neither deletions nor folding could
        be written.

        Raises:
            sqlite3.OperationalError: the disk refuses even so.
        """
        self._free_reserve()
        self.fold()
        keys = sorted(acked)
        for start in range(0, len(keys), _SMALL):
            self.commit((), {}, keys[start : start + _SMALL], None, None)
            self.fold()
        self.reserve()

    def fold(self) -> None:
        """Fold the write-ahead log into the file and give its room back, as far as the disk lets us."""
        if self._writer is not None:
            try:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.DatabaseError as error:
                log.debug("no checkpoint: %s", error)

    def _over(
        self, writer: sqlite3.Connection, size: int, now: float, caps: tuple[int, float]
    ) -> list[tuple[int, int]]:
        """Keys and sizes of the oldest messages that the caps do not allow."""
        max_bytes, max_age = caps
        lost = []
        for key, length, stored in writer.execute("SELECT key, size, stored FROM message ORDER BY key"):
            if size <= max_bytes and now - stored <= max_age:
                break
            lost.append((key, length))
            size -= length
        return lost

    def _now(self) -> float:
        """Seconds on the clock that messages are stored by: it goes on only while an outbox is open.

        It starts at the wall clock, and where messages wait, at the time the youngest was stored. The wall clock is not
        asked again: it may be wrong until the network is there, and a jump must age no message, within a run or between
        two. The youngest by key, because earlier versions went by the wall clock, be it set back between their runs.
        """
        return self._base[0] + self._monotonic() - self._base[1]

    def fetch(self, cameras: Sequence[str], kind: str, after: int, limit: int) -> list[Row]:
        """Rows of these cameras above a key, oldest first; none while the file cannot be opened."""
        marks = ", ".join("?" * len(cameras))
        query = (
            f"SELECT key, camera, kind, id, payload FROM message WHERE camera IN ({marks}) AND kind = ? AND key > ?"
            " ORDER BY key LIMIT ?"
        )
        return self._read(query, (*cameras, kind, after, limit))

    def cameras(self) -> list[str]:
        """Distinct cameras with messages."""
        return [row[0] for row in self._read("SELECT DISTINCT camera FROM message ORDER BY camera", ())]

    def load_state(self, name: str) -> bytes | None:
        """A kept value, or None: there is none, or it cannot be what was kept."""
        rows = self._read("SELECT value FROM state WHERE name = ?", (name,))
        if rows and not sound(name, rows[0][0]):
            log.error("the outbox: what was kept as %s is damaged, and is not used", name)
            return None
        return rows[0][0] if rows else None

    def oldest_age(self) -> float:
        """Seconds of running that the oldest message has waited; 0 when there is none."""
        rows = self._read("SELECT stored FROM message ORDER BY key LIMIT 1", ())
        return max(0.0, self._now() - rows[0][0]) if rows else 0.0

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        with self._read_lock:
            if self._reader is None:
                return []
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                # The writer meets the same damage at its next commit and replaces the file; until then nothing is read.
                log.error("the outbox cannot be read: %s", error)
                return []

    def _state(self, name: str) -> bytes | None:
        assert self._writer is not None
        row = self._writer.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        if row and not sound(name, row[0]):
            raise sqlite3.DatabaseError(f"what was kept as {name} is {row[0]!r:.60}")
        return row[0] if row else None

    def replace_damaged(self, acked: Iterable[int] = (), below: int = FAR) -> None:
        """Put a new file in the damaged one's place, with every whole message that can be read; count what is lost.

        Args:
            acked: keys of messages that were delivered. below: all keys that were given are below it.

        Raises:
            sqlite3.OperationalError, OSError: the disk refuses; the damaged file is where it was.
        """
        saved = salvage(self._path, frozenset(acked), below)
        lost = saved.keep_floors(self.before, self.last_id, self.dropped)
        try:
            self._replacement.make(saved.rows.values(), saved.states, self._now())
        except sqlite3.OperationalError:
            if not self._free_reserve():
                raise
            self._replacement.make(saved.rows.values(), saved.states, self._now())
        self._disconnect()
        target = self._replacement.put_in_place()
        self.damaged += lost
        number = lost if saved.certain or not lost else f"about {lost}"
        self.set_aside = f"{target} (damaged; {len(saved.rows)} waiting messages were saved from it, {number} lost)"
        self._open()

    def _disconnect(self) -> None:
        with self._read_lock:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None

    def close(self) -> None:
        """Close the file and let go of the lock.

        Of a reserve that was given up, a part is taken back out of the log's room: the next start may need it.
        """
        self._disconnect()
        if self._lock_file is not None:
            if self._giving_up:
                self._giving_up = False
                self.reserve()
            self._lock_file.close()
            self._lock_file = None


def refused(error: sqlite3.DatabaseError) -> bool:
    """Whether the disk refuses (full, read-only, locked by another); else the file is damaged."""
    return isinstance(error, sqlite3.OperationalError) and not any(text in str(error) for text in _DAMAGE)
