"""Numbered snapshots of calibrated state: written atomically, checked when read, kept in a ring.

A snapshot file is the hexadecimal SHA-256 of what follows, a newline, and an npz with the arrays and a JSON `meta`.
It is written beside its place, synced and renamed, so a power cut leaves the old file or the new one, never half.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .atomic import write_atomic
from .errors import CalibrationError

Array = NDArray[Any]
_NAME = re.compile(r"^(last|ring|pinned)-(\d{10})\.snapshot$")
_META = "__meta__"
Kind = Literal["last", "ring", "pinned"]


@dataclass(frozen=True)
class Snapshot:
    """State as it was saved. identity: what it belongs to (bundle, shapes, classes); a mismatch is refused."""

    number: int
    identity: Mapping[str, Any]
    arrays: Mapping[str, Array]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Array]:
        """The arrays whose names begin with `prefix`, by the rest of their names."""
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Refusal:
    """A snapshot that was not used, and why."""

    path: Path
    reason: str


def _encode(snapshot: Snapshot) -> bytes:
    header = {"number": snapshot.number, "identity": dict(snapshot.identity), "meta": dict(snapshot.meta)}
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    np.savez(buffer, **{_META: text}, **dict(snapshot.arrays))  # type: ignore[arg-type]
    body = buffer.getvalue()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_snapshot(path: Path) -> Snapshot:
    """Read and check one file.

    Raises:
        CalibrationError: the file is missing, truncated, altered or not a snapshot.
    """

    def refuse(found: str) -> CalibrationError:
        return CalibrationError(
            f"snapshot {path.name} cannot be used",
            found=found,
            expected="a complete snapshot with a matching SHA-256",
            next_step="the last good snapshot is used instead; delete this file",
        )

    try:
        data = path.read_bytes()
    except OSError as error:
        raise refuse(str(error)) from error
    digest, newline, body = data[:64], data[64:65], data[65:]
    if newline != b"\n" or hashlib.sha256(body).hexdigest().encode() != digest:
        raise refuse(f"{len(data)} bytes whose digest does not match")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop(_META).tobytes())
        return Snapshot(int(header["number"]), header["identity"], arrays, header["meta"])
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error


def _read_header(path: Path) -> dict[str, Any] | None:
    """number, identity and meta of a snapshot without its arrays, unchecked; None where the file is damaged.

    Raises:
        OSError: it could not be read this time.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_META}.npy") as entry:
            header = json.loads(np.lib.format.read_array(entry, allow_pickle=False).tobytes())
        return header if {"number", "identity", "meta"} <= header.keys() else None
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - of altered bytes zipfile raises whatever they lead to, EOFError and RuntimeError too
        return None


class SnapshotStore:
    """The snapshots of one line in one folder.

    Three kinds: `last`, the frequent save that a restart reads (two are kept, should one be damaged); `ring`, spaced
    out for rolling back, the newest `keep`; `pinned`, made by command, the newest `keep`. The caller says which.
    As many are kept of other bundles, together.

    Args:
        folder: created if missing; left-over temporary files of a killed process are removed.
        identity: what the running bundle is; snapshots of anything else are refused. One may say more of itself, as
            those of earlier versions do.
        former: what earlier versions called the same bundle.

    Raises:
        CalibrationError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *former: Mapping[str, Any], keep: int = 8) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity), sort_keys=True))
        self._accepted: list[dict[str, Any]] = json.loads(json.dumps([self.identity, *map(dict, former)]))
        self.keep = keep
        self._headers: dict[str, dict[str, Any] | None] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.snapshot.*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise CalibrationError(
                f"state folder {folder} cannot be used",
                found=str(error),
                expected="a folder that this user can write",
                next_step="correct state_dir in the line configuration",
            ) from error

    def _files(self, kind: Kind | None = None) -> list[tuple[int, Path]]:
        """Snapshot files by number, newest first; none where the folder is gone.

        Raises:
            CalibrationError: the folder cannot be read.
        """
        try:
            paths = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CalibrationError(
                f"state folder {self.folder} cannot be read",
                found=str(error),
                expected="a folder that this user can read and write",
                next_step=f"mend {self.folder}; the memory goes on unsaved until then",
            ) from error
        found = [(m, p) for p in paths if (m := _NAME.match(p.name)) and kind in (None, m.group(1))]
        return sorted(((int(m.group(2)), p) for m, p in found), key=lambda item: -item[0])

    def save(self, arrays: Mapping[str, Array], meta: Mapping[str, Any], kind: Kind = "ring") -> Snapshot:
        """Write the next snapshot and drop the oldest of its kind beyond what is kept. A removed folder is made again.

        Raises:
            CalibrationError: the disk refuses; earlier snapshots are untouched.
        """
        files = self._files()
        snapshot = Snapshot((files[0][0] if files else 0) + 1, self.identity, dict(arrays), dict(meta))
        path = self.folder / f"{kind}-{snapshot.number:010d}.snapshot"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _encode(snapshot))
            for old in self._surplus(kind):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise CalibrationError(
                f"snapshot {path.name} could not be written",
                found=str(error),
                expected="space and permission in the state folder",
                next_step=f"make room in {self.folder}; the memory goes on unsaved until then",
            ) from error
        return snapshot

    def _surplus(self, kind: Kind) -> list[Path]:
        """Snapshots of a kind beyond those that are kept; of this bundle and of all others as many each.

        So a bundle that is taken back finds what it had learnt, and what cannot be read pushes out nothing that can.
        """
        files, keep = self._files(kind), 2 if kind == "last" else self.keep
        own = {number for number, _ in self.metas()}
        return [
            path
            for mine in (True, False)
            for _, path in [(number, path) for number, path in files if (number in own) is mine][keep:]
        ]

    def numbers(self) -> list[int]:
        """Numbers on disk, newest first, unchecked."""
        return [number for number, _ in self._files()]

    def metas(self) -> list[tuple[int, Mapping[str, Any]]]:
        """(number, meta) of this bundle's snapshots, newest first, unchecked: :meth:`load` may still refuse one.

        Cheap, for arrays are not read, and headers once: a file is never written a second time.

        Raises:
            CalibrationError: the folder cannot be read.
        """
        files, known = self._files(), self._headers
        headers: dict[str, dict[str, Any] | None] = {}
        for _, path in files:
            with suppress(OSError):  # too many open files, a network share: the next time may do better
                headers[path.name] = known[path.name] if path.name in known else _read_header(path)
        self._headers = headers
        own = ((number, headers.get(p.name)) for number, p in files)
        return [(number, header["meta"]) for number, header in own if header and self._owns(header["identity"])]

    def load(self, number: int) -> Snapshot:
        """One snapshot.

        Raises:
            CalibrationError: there is none of that number, it is damaged, or it belongs to another bundle.
        """
        for found, path in self._files():
            if found == number:
                snapshot = read_snapshot(path)
                self._check_identity(path, snapshot)
                return snapshot
        raise CalibrationError(
            f"there is no snapshot {number}",
            found=self.numbers(),
            expected="a number from this list",
            next_step="choose one of them",
        )

    def _owns(self, identity: Any) -> bool:
        return isinstance(identity, Mapping) and any(
            all(identity.get(key) == value for key, value in own.items()) for own in self._accepted
        )

    def _check_identity(self, path: Path, snapshot: Snapshot) -> None:
        if not self._owns(snapshot.identity):
            raise CalibrationError(
                f"snapshot {path.name} belongs to another bundle",
                found=dict(snapshot.identity),
                expected=self.identity,
                next_step="use the bundle it was made with, or reset the memory",
            )

    def age(self, kind: Kind) -> float | None:
        """Seconds by the wall clock since this bundle's newest of a kind was written; None where there is none.

        Negative where the clock was set back since.

        Raises:
            CalibrationError: the folder cannot be read.
        """
        own = {number for number, _ in self.metas()}
        try:
            return next((time.time() - path.stat().st_mtime for n, path in self._files(kind) if n in own), None)
        except OSError:
            return None  # it was removed a moment ago

    def usable(self, kind: Kind | None = None) -> Iterator[Snapshot | Refusal]:
        """Snapshots (of one kind) from the newest on, checked one by one; what cannot be used comes as a refusal."""
        for _, path in self._files(kind):
            try:
                snapshot = read_snapshot(path)
                self._check_identity(path, snapshot)
            except CalibrationError as error:
                yield Refusal(path, f"{error.what}: {error.found}")
            else:
                yield snapshot

    def latest(self) -> tuple[Snapshot | None, list[Refusal]]:
        """The newest usable snapshot and those refused on the way."""
        refused: list[Refusal] = []
        for item in self.usable():
            if isinstance(item, Snapshot):
                return item, refused
            refused.append(item)
        return None, refused
