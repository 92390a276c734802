"""The audit log of what was learnt and what commands have set."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import write_atomic


class AuditLog:
    """What entered the memory, from which frame, and why: JSON lines, the older half dropped at `limit` bytes.

    Opened with the first line, or by :meth:`open`. Lines are flushed to the operating system at once and synced before
    a snapshot is saved (:meth:`sync`). Every method raises OSError where the disk refuses. That costs lines, not the
    log: it goes on when the disk does, a file that was removed is made again, and where there is no room for its
    younger half it stays whole and grows.

    rotates: :meth:`write` drops the older half itself. Else somebody calls :meth:`rotate`, from a thread that may wait
    for the disk.
    """

    def __init__(self, path: Path, limit: int = 16 * 2**20, *, rotates: bool = True) -> None:
        self.path = path
        self.limit = limit
        self._rotates = rotates
        self._put_off = 0
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()  # of the file and its name; nobody waits for the disk with it
        self._half = path.with_name(f"{path.name}.half")

    def open(self) -> None:
        """Open the file, or make it, and remove what a process that was killed while it rotated has left."""
        for leftover in (self._half, *self.path.parent.glob(f".{self.path.name}.*.tmp")):
            leftover.unlink(missing_ok=True)
        with self._lock:
            self._opened()

    def _opened(self) -> BinaryIO:
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._file.close()
            self._file = None
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            present = self.path.read_bytes() if self.path.exists() else b""
            self._file = self.path.open("ab")
            if present and not present.endswith(b"\n"):
                self._file.write(b"\n")  # a killed process left half a line; the next one must not be glued to it
        return self._file

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one entry; values that JSON has no form for are written as text."""
        line = json.dumps(dict(entry), default=str).encode() + b"\n"
        with self._lock:
            file = self._opened()
            file.write(line)
            file.flush()
        if self._rotates:
            self.rotate()

    def rotate(self) -> None:
        """Drop the older half if there is more than the limit; what other threads write meanwhile waits for no disk."""
        with self._lock:
            size = self._opened().tell()
        if size <= self.limit + self._put_off:
            return
        self._put_off = size - self.limit + self.limit // 16  # if it fails, not with every line again
        with self.path.open("rb") as present:
            lines = present.read(size).splitlines(keepends=True)
            write_atomic(self._half, b"".join(lines[len(lines) // 2 :]))
            with self._half.open("ab") as younger:
                younger.write(present.read())  # what has come since; after the next line next to nothing is left
                younger.flush()
                os.fsync(younger.fileno())
                with self._lock:
                    younger.write(present.read())
                    younger.flush()
                    self._half.replace(self.path)
                    old, self._file = self._file, self.path.open("ab")
                os.fsync(younger.fileno())
        if old is not None:
            old.close()
        self._put_off = 0

    def entries(self) -> list[dict[str, Any]]:
        """All readable entries, oldest first; a line torn by a power cut is left out."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def sync(self) -> None:
        """Force the lines to the disk; also from a thread that does not write."""
        file = self._file
        if file is None:
            return
        try:
            file.flush()
            os.fsync(file.fileno())
        except (OSError, ValueError):
            if not file.closed:  # else another thread has rotated, and synced what it kept
                raise

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()
