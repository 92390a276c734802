"""Pictures of parts as files: named by time, camera and part, lossless, whole, none twice, none overwritten."""

from __future__ import annotations

import errno
import hashlib
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from numpy.typing import NDArray

from ..calib.atomic import write_new
from .errors import SourceError
from .types import Frame

Array = NDArray[Any]
#: In front of the part id in a file's name; what finds the part there, for --group-by.
_PART = "_part-"
GROUP_BY = r"_part-([^/]+)\.png$"
#: Bytes of a part id in a file's name; of a longer one the rest is a hash.
_LONGEST = 120
#: Bytes that are left free on the disk; on a small one this share of it.
FREE, FREE_SHARE = 1 << 30, 0.1


class NoRoomError(OSError):
    """The disk is as full as it may become, or the byte limit is reached; nothing was written."""

    def __init__(self, what: str, *, limit: bool):
        """limit: it is the byte limit, which somebody set."""
        super().__init__(errno.ENOSPC, what)
        self.limit = limit


def file_name(camera: str, captured: datetime, part_id: str | None, repeat: int = 0) -> str:
    """As 20261123T075348.104512Z_cam0_part-4711.png: names sort by time. A part id is percent-encoded, `/` too.

    repeat: tells apart what would have one name, from 1 on.
    """
    moment = captured.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    again = f"_{repeat}" if repeat else ""
    return f"{moment}{again}_{camera}{'' if part_id is None else _PART + _encoded(part_id)}.png"


def _encoded(part_id: str) -> str:
    text = quote(part_id, safe="", errors="surrogateescape")
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return f"{text[:_LONGEST]}-{digest}"


def encode_png(image: Array) -> bytes:
    """A picture uint8 [h, w, 3] RGB as PNG, one channel where all three are equal, as a grey camera's are.

    Raises:
        SourceError: OpenCV cannot encode it.
    """
    grey = np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 1], image[..., 2])
    pixels = np.ascontiguousarray(image[..., 0]) if grey else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # No compression level on purpose: without one OpenCV takes the quickest, with filters and strategy to match, which
    # is twice as fast as level 1 when asked for, at the same size.
    done, data = cv2.imencode(".png", pixels)
    if not done:
        raise SourceError("a picture cannot be encoded as PNG", found=f"{image.shape[1]}x{image.shape[0]}")
    return data.tobytes()


class PictureFolder:
    """Writes pictures under folders that it makes as they are needed. Used by one thread.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, max_bytes: int):
        """max_bytes: of all pictures of this run."""
        self._max_bytes = max_bytes
        self._seen: dict[Path, set[bytes]] = {}
        self.written = 0

    def add(self, folder: Path, frame: Frame) -> Path | None:
        """Write the picture of a frame; None where this run has written the same pixels into the folder before.

        Raises:
            NoRoomError: see there. OSError: the disk or share does not take it.
        """
        digest = hashlib.blake2b(np.ascontiguousarray(frame.image).data, digest_size=16)
        digest.update(repr(frame.image.shape).encode())
        seen = self._seen.setdefault(folder, set())
        if (content := digest.digest()) in seen:
            return None
        data = encode_png(frame.image)
        folder.mkdir(parents=True, exist_ok=True)
        self._require_room(folder, len(data))
        path = self._write(folder, frame, data)
        seen.add(content)
        self.written += len(data)
        return path

    @staticmethod
    def _write(folder: Path, frame: Frame, data: bytes) -> Path:
        repeat = 0
        while True:
            path = folder / file_name(frame.camera, frame.captured, frame.part_id, repeat)
            try:
                write_new(path, data)
                return path
            except FileExistsError:  # two pictures of one microsecond, or a clock that was set back
                repeat += 1

    def _require_room(self, folder: Path, needed: int) -> None:
        if self.written + needed > self._max_bytes:
            raise NoRoomError("the byte limit of this recording is reached", limit=True)
        disk = os.statvfs(folder)
        floor = min(FREE, int(FREE_SHARE * disk.f_blocks * disk.f_frsize))
        if disk.f_blocks and disk.f_bavail * disk.f_frsize - needed < floor:  # some of FUSE do not say
            raise NoRoomError(f"the disk of {folder} is nearly full: the last {floor >> 20} MiB stay free", limit=False)
