"""What can still be read of a damaged outbox file: whole messages and states, stepping over what cannot be read."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .outbox_floors import Floors
from .outbox_replace import Row
from .stored import MEMORY_VERSION
from .verdict import decode_id, whole

log = logging.getLogger("andon.outbox")

#: Keys are below it; a greater one is damage.
FAR = 2**62
#: Keys between two that can be read, which are asked for one by one: as many as some thousand pages hold.
_MOST = 2**14
_ROWS = "SELECT key, camera, kind, id, payload FROM message NOT INDEXED"


@dataclass
class Salvaged:
    """rows: whole messages by key. states: those that can be what was kept. lost: messages that were there and are not
    whole. certain: whether lost is all of them, and no guess."""

    rows: dict[int, Row] = field(default_factory=dict)
    states: dict[str, bytes] = field(default_factory=dict)
    lost: int = 0
    certain: bool = False

    def keep_floors(self, floors: Floors, last_id: str, dropped: int) -> int:
        """Make the states such that damage sets nothing back that only grows; how many messages were lost.

        floors: what was kept beside the file, some seconds old. last_id, dropped: what a run knows that met the damage;
        at a start "" and 0.
        """
        lost, states = self.lost, self.states
        beyond = floors
        if not last_id:
            beyond = floors.beyond()
            lost = lost if self.certain else max(lost, floors.waiting - len(self.rows))
        stored = states["last_id"].decode() if "last_id" in states else beyond.id
        if identifier := max(stored, floors.id, last_id, *(row[3] for row in self.rows.values())):
            states["last_id"] = identifier.encode()
        if version := max(int(states.get(MEMORY_VERSION, beyond.version)), floors.version):
            states[MEMORY_VERSION] = b"%d" % version
        states["dropped"] = b"%d" % (max(int(states.get("dropped", 0)), floors.dropped, dropped) + lost)
        return lost


def salvage(path: Path, gone: Collection[int] = (), below: int = FAR) -> Salvaged:
    """Read what can be read.

    gone: keys of messages that are not wanted any more. below: keys that were given are below it.
    """
    saved = Salvaged()
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as connection:
            connection.text_factory = lambda raw: raw.decode(errors="replace")
            # A table is read although the schema names an index that is damaged.
            connection.execute("PRAGMA writable_schema = ON")
            saved.states = _states(connection)
            _messages(connection, saved, frozenset(gone), below)
    except sqlite3.Error as error:
        log.warning("the damaged outbox cannot be read: %s", error)
    return saved


def sound(name: str, value: Any) -> bool:
    """Whether a state can be what was kept under its name; of a name that is not known here any bytes can."""
    if not isinstance(value, bytes):
        return False
    try:
        if name in ("last_id", "used_id"):
            return decode_id(value.decode()) < 2**128
        if name in ("dropped", MEMORY_VERSION):
            return value.isdigit()
        return not name.startswith("alarm/") or isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _states(connection: sqlite3.Connection) -> dict[str, bytes]:
    found: dict[Any, Any] = {}
    for order in ("ASC", "DESC"):  # from both ends up to what cannot be read
        rows, ended = _read(connection, f"SELECT name, value FROM state ORDER BY name {order}")
        found.update(rows)
        if ended:
            break
    return {name: value for name, value in found.items() if isinstance(name, str) and sound(name, value)}


def _messages(connection: sqlite3.Connection, saved: Salvaged, gone: frozenset[int], below: int) -> None:
    listed, complete = _listed(connection, below)
    rows, gaps = _scan(connection, max(listed, default=0) if complete and listed else below)
    unread: set[int] = set()
    for first, last in gaps:
        asked = [key for key in listed if first <= key <= last] if complete else range(first, min(last, first + _MOST))
        for key in asked:
            if key not in rows:
                found, ended = _read(connection, f"{_ROWS} WHERE key = ?", (key,))
                rows.update((row[0], row) for row in found)
                if not ended:
                    unread.add(key)
    seen: set[str] = set()
    for key, row in sorted(rows.items()):
        if key not in gone and row[3] not in seen and _is_whole(row):
            saved.rows[key] = row
            seen.add(row[3])
    known = {*listed, *rows}
    greatest = max(known, default=0)
    known = {*known, *(key for key in unread if key < greatest)} - gone
    saved.lost, saved.certain = len(known - saved.rows.keys()), complete


def _listed(connection: sqlite3.Connection, below: int) -> tuple[set[int], bool]:
    """Keys as the index has them, a second list of what was there, and whether all of it can be read."""
    keys: set[int] = set()
    for order in ("ASC", "DESC"):
        query = "SELECT key FROM message INDEXED BY message_order ORDER BY camera {0}, kind {0}, key {0}"
        rows, ended = _read(connection, query.format(order))
        keys.update(row[0] for row in rows if _is_key(row[0], below))
        if ended:
            return keys, True
    return keys, False


def _scan(connection: sqlite3.Connection, greatest: int) -> tuple[dict[int, Row], list[tuple[int, int]]]:
    """Rows in order of their keys, over pages that cannot be read; and the first and last keys of what was passed over.

    Above such a page the scan goes on where a key can be found again, in steps that double.
    """
    rows: dict[int, Row] = {}
    gaps: list[tuple[int, int]] = []
    after = 0
    while after < greatest:
        found, ended = _read(connection, f"{_ROWS} WHERE key > ? ORDER BY key", (after,))
        for row in found:
            if _is_key(row[0], greatest + 1):
                rows.setdefault(row[0], row)
                after = max(after, row[0])
        if ended:
            break
        beyond = next((key for key in _steps(after, greatest) if _reads(connection, key)), greatest)
        gaps.append((after + 1, beyond))
        after = beyond
    return rows, gaps


def _steps(after: int, greatest: int) -> Iterator[int]:
    step = 1
    while after + step < greatest:
        yield after + step
        step *= 2


def _reads(connection: sqlite3.Connection, after: int) -> bool:
    return _read(connection, f"{_ROWS} WHERE key > ? ORDER BY key LIMIT 1", (after,))[1]


def _read(connection: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> tuple[list[Any], bool]:
    """Rows up to the end, or to what cannot be read; whether it was the end."""
    rows: list[Any] = []
    try:
        for row in connection.execute(query, values):
            rows.append(row)
    except sqlite3.Error as error:
        log.debug("the damaged outbox: %s: %s", query, error)
        return rows, False
    return rows, True


def _is_key(key: Any, below: int) -> bool:
    return isinstance(key, int) and 0 < key < below


def _is_whole(row: Row) -> bool:
    _, camera, kind, identifier, payload = row
    return sound("last_id", str(identifier).encode()) and whole(payload, camera, kind, identifier)
