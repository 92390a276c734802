"""Puts a new outbox file in a damaged one's place; a kill at any moment leaves one or the other for the start."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

log = logging.getLogger("andon.outbox")

VERSION = 1
SCHEMA = """
CREATE TABLE message (
    key INTEGER PRIMARY KEY, camera TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL,
    payload BLOB NOT NULL, size INTEGER NOT NULL, stored REAL NOT NULL);
CREATE INDEX message_order ON message (camera, kind, key);
CREATE TABLE state (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
Row = tuple[int, str, str, str, bytes]


class Replacement:
    """The new file beside the damaged one. The file's user closes it before :meth:`put_in_place`."""

    def __init__(self, path: Path):
        self._path = path
        self._new = path.with_name(path.name + ".new")

    def make(self, rows: Iterable[Row], states: Mapping[str, bytes], stored: float) -> None:
        """Write it: whole and on the disk when this returns.

        Raises:
            sqlite3.OperationalError, OSError: the disk refuses; nothing of it is left.
        """
        self._remove()
        try:
            with contextlib.closing(sqlite3.connect(self._new, isolation_level=None)) as new:
                new.execute("PRAGMA synchronous = FULL")
                new.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION};")
                full = ((*row, len(row[4]), stored) for row in rows)
                new.executemany("INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)", full)
                new.executemany("INSERT INTO state VALUES (?, ?)", states.items())
                new.execute("COMMIT")
        except sqlite3.DatabaseError:
            self._remove()
            raise

    def put_in_place(self) -> Path:
        """Move the damaged file and its log away under a new name, which is returned, and the new one to its place."""
        number = 1
        while (target := self._aside(number)).exists():
            number += 1
        self._path.rename(target)  # before its log: a start that finds it gone knows that the new one is complete
        self._move_log(target)
        self._new.rename(self._path)
        return target

    def finish(self) -> None:
        """Before the file is opened: where a run was killed in this, take the new one, or remove its beginning."""
        journal = self._new.with_name(self._new.name + "-journal")
        if self._new.exists() and not journal.exists() and not self._path.exists():
            number = 1
            while self._aside(number + 1).exists():
                number += 1
            log.warning("the outbox file was damaged; it is at %s, and what was saved is used", self._aside(number))
            self._move_log(self._aside(number))
            self._new.rename(self._path)
        self._remove()

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.corrupt-{number}")

    def _move_log(self, target: Path) -> None:
        for suffix in ("-wal", "-shm"):  # they must not be taken for the new file's
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.rename(target.with_name(target.name + suffix))

    def _remove(self) -> None:
        for suffix in ("-journal", ""):
            self._new.with_name(self._new.name + suffix).unlink(missing_ok=True)
