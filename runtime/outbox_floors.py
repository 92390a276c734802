"""What must never go backwards, kept beside the outbox in a few bytes of their own.

A full disk refuses a commit, but not that bytes are overwritten which are there already; and damage to the outbox does
not touch another file. So this one has, as of a moment ago, what a start must not forget with them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from .verdict import decode_id, encode_id

log = logging.getLogger("andon.outbox")

#: Two copies are written by turns, each in a block of its own: a write that is cut short leaves the other.
_BLOCK, _COPIES, _LONGEST = 4096, 2, 512
#: What may have been given after the last write, which is seconds old, and after a power cut half a minute.
_MILLISECONDS, _VERSIONS = 60_000, 1000


@dataclass(frozen=True)
class Floors:
    """What new ones have to be greater than, and what is to be counted on.

    id: greatest identifier given. version: greatest version of the memory in a verdict. dropped: messages lost since
    the outbox was made. waiting: messages in the file.
    """

    id: str = ""
    version: int = 0
    dropped: int = 0
    waiting: int = 0

    def above(self, other: Floors) -> Floors:
        """The same, with nothing that only grows below the other's."""
        return Floors(
            max(self.id, other.id), max(self.version, other.version), max(self.dropped, other.dropped), self.waiting
        )

    def beyond(self) -> Floors:
        """The same, past all that may have been given since they were written."""
        identifier = encode_id(min(decode_id(self.id) + (_MILLISECONDS << 80), 2**128 - 1)) if self.id else ""
        return replace(self, id=identifier, version=self.version + _VERSIONS if self.version else 0)


class FloorsFile:
    """The file. Thread-safe; to be used by one process at a time.

    A disk that cannot write it is said once: without it the floors are those of the outbox alone.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._serial = 0
        self._written: tuple[Floors, bool] | None = None
        self._failing = False

    def read(self) -> Floors:
        """The newest copy that is whole; nothing is a floor where there is none."""
        with self._lock:
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                return Floors()
            except OSError as error:
                log.warning("the outbox's floors cannot be read: %s", error)
                return Floors()
            copies = [_decode(content[at : at + _LONGEST]) for at in range(0, _COPIES * _BLOCK, _BLOCK)]
            self._serial, floors = max(
                (copy for copy in copies if copy), key=lambda copy: copy[0], default=(0, Floors())
            )
            return floors

    def write(self, floors: Floors, sync: bool) -> None:
        """Overwrite the older copy. sync: it is on the disk when this returns, if the disk takes it.

        Several threads do: what one of them took down before another has written sets nothing back.
        """
        with self._lock:
            if self._written:
                floors = floors.above(self._written[0])
            if self._written in ((floors, sync), (floors, True)):
                return
            try:
                self._write(_encode(self._serial + 1, floors), (self._serial + 1) % _COPIES * _BLOCK, sync)
            except OSError as error:
                if not self._failing:
                    log.error(
                        "%s cannot be written: %s; killed now, the line may use identifiers and versions again",
                        self._path, error,
                    )  # fmt: skip
                self._failing = True
            else:
                self._serial += 1
                self._written, self._failing = (floors, sync), False

    def _write(self, content: bytes, at: int, sync: bool) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size < _COPIES * _BLOCK:
                os.pwrite(descriptor, bytes(_COPIES * _BLOCK), 0)  # written, not only allocated: it takes no room later
            os.pwrite(descriptor, content, at)
            if sync:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def _encode(serial: int, floors: Floors) -> bytes:
    body = json.dumps([serial, *astuple(floors)]).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _decode(content: bytes) -> tuple[int, Floors] | None:
    """Serial number and floors; None: not a whole copy."""
    check, _, body = content.partition(b"\n")[0].partition(b" ")
    if check != b"%08x" % zlib.crc32(body):
        return None
    serial, *floors = json.loads(body)
    return serial, Floors(*floors[: len(fields(Floors))])  # a newer version may keep more
