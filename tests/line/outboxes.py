"""Outboxes for the tests: filled, looked into, damaged, and with clocks that anybody may set."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from andon.runtime.outbox import Outbox
from andon.runtime.stored import Stored
from andon.runtime.verdict import Ids, encode

Events = list[tuple[str, str]]
SECTOR, PAGE = 512, 4096


def fill(outbox: Outbox, count: int, camera: str = "cam0", size: int = 100, ids: Ids | None = None) -> list[int]:
    ids = ids or Ids(outbox.last_id)
    keys = [outbox.put(camera, "verdict", name := ids.next(), message(name, camera, size)) for _ in range(count)]
    assert outbox.wait(keys[-1], 10)
    return keys


def message(identifier: str, camera: str = "cam0", size: int = 100) -> bytes:
    """What goes for a whole message, of so many bytes or some more."""
    document = {"schema": "andon.verdict/1", "id": identifier, "camera": camera, "x": ""}
    return encode({**document, "x": "x" * (size - len(encode(document)))})


def waiting(outbox: Outbox, camera: str = "cam0") -> list[Stored]:
    return outbox.fetch([camera], "verdict", 0, 100_000)


def fill_disk(folder: Path, leave: int = 0) -> Path:
    """A file that leaves so many bytes free."""
    path = folder / "fill"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - leave)
    return path


class Clocks:
    """The wall clock, which anybody may set, and the monotonic one."""

    def __init__(self, wall: float = 1.7e9):
        self.wall, self.monotonic = wall, 1000.0

    def run(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def restart(self, off: float) -> None:
        self.wall += off
        self.monotonic = 5.0  # since the boot

    def open(self, path: Path) -> Outbox:
        return Outbox(path, max_age=3600, wall=lambda: self.wall, monotonic=lambda: self.monotonic)


YEAR = 365 * 86400.0


def root(path: Path, name: str) -> int:
    """Offset of the first page of a table or index."""
    with sqlite3.connect(path) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        return (int(connection.execute(query, (name,)).fetchone()[0]) - 1) * PAGE


def damage(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
