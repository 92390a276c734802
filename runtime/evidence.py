"""Pictures kept as evidence: JPEG files with the heat map drawn over them, under a disk quota.

Verdicts go first: pictures leave a part of the disk free, and the oldest go when others fill it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from numpy.typing import NDArray

from . import heatmap
from .lineconfig import EvidenceConfig
from .regions import Box
from .types import Verdict

Array = NDArray[Any]
log = logging.getLogger(__name__)
#: Pictures that may wait for the disk; beyond it a verdict goes without one, counted.
WAITING = 8
#: Bytes that pictures leave free on their disk, for verdicts; on a small one this share of it.
FREE, FREE_SHARE = 16 * 2**20, 0.25
#: Seconds between looks at the disk while no picture comes; seconds that a stop waits for the last pictures.
_LOOK, _STOP = 5.0, 10.0
#: A picture lies in <camera>/<day>/ and is named as its verdict, by a ULID; .part while it is written.
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_PICTURE = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}\.(jpg|part)")


@dataclass(frozen=True)
class _Job:
    path: Path
    image: Array
    map: Array | None
    box: Box
    verdict: Verdict
    threshold: float | None


def overlay(image: Array, anomaly_map: Array, box: Box, threshold: float | None) -> Array:
    """The picture with the map over its region of interest, hot above the pixel threshold; uint8 [h, w, 3] RGB."""
    x, y, width, height = box
    drawn = image.copy()
    heatmap.draw(drawn[y : y + height, x : x + width], anomaly_map, *heatmap.scale(anomaly_map, threshold))
    return drawn


class EvidenceStore:
    """Writes pictures on a thread of its own, within the quota and what the disk has to spare. A context manager.

    Nobody else waits for the disk, neither at the start nor in between, and a stop only for seconds: a share may hang.
    Counters: written, skipped (the disk was too slow), failed, removed.
    """

    def __init__(
        self,
        config: EvidenceConfig,
        folder: Path,
        published: Callable[[str, str, bytes], None] = lambda camera, identifier, jpeg: None,
        cameras: Collection[str] | None = None,
    ):
        """published: told of each picture (camera, id of the verdict, JPEG) after it is written, if the
        configuration says `publish`; called on the store's thread. cameras: those whose earlier pictures are counted
        and removed; None: of all, which the folder must then be this line's alone for.
        """
        self._config = config
        self._cameras = cameras
        self._published = published
        self._folder = folder
        self._jobs: queue.Queue[_Job | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="evidence", daemon=True)
        self._files: dict[str, int] = {}  # path -> bytes, oldest first; text, for a large quota holds half a million
        self._held = 0  # their sum
        self._yielding = False
        self.written = self.skipped = self.failed = self.removed = 0

    def __enter__(self) -> EvidenceStore:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        until = time.monotonic() + _STOP
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=_STOP)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.error("evidence: %s does not take the last pictures within %g s; they are lost", self._folder, _STOP)

    def keep(
        self, verdict: Verdict, image: Array, anomaly_map: Array | None, box: Box, pixel: float | None
    ) -> str | None:
        """Take the picture of a verdict whose label is one to keep; the file's path, or None if none is written."""
        if verdict.label not in self._config.labels:
            return None
        path = self._folder / verdict.camera / verdict.ts_capture.strftime("%Y-%m-%d") / f"{verdict.id}.jpg"
        held = None if anomaly_map is None else anomaly_map.copy()
        try:
            self._jobs.put_nowait(_Job(path, image, held, box, verdict, pixel))
        except queue.Full:
            self.skipped += 1
            return None
        return str(path)

    def _run(self) -> None:
        broken, unlisted, found = "", "", False  # what went wrong last, each; whether earlier pictures are known
        job: _Job | None
        while True:
            if not found:  # a share may be away at the start
                unlisted = self._attempt(self._find, unlisted, broken)
                found = not unlisted
            try:
                job = self._jobs.get(timeout=_LOOK)
            except queue.Empty:
                with contextlib.suppress(OSError):  # no place to look at: the next picture finds the same, and says so
                    self._leave_free(0)
                continue
            if job is None:
                return
            failed = self._attempt(partial(self._write, job), broken, unlisted)
            self.failed += bool(failed)
            if broken and not failed:
                log.info("evidence is written again")
            broken = failed

    @staticmethod
    def _attempt(work: Callable[[], None], *before: str) -> str:
        """What went wrong, empty if nothing did; said unless it is what went wrong before."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a picture that cannot be drawn must not end the others
            if str(error) not in before:
                log.error("evidence cannot be written: %s", error)
            return str(error) or type(error).__name__
        return ""

    def _find(self) -> None:
        """Take stock of the pictures of earlier runs, in the order in which they were judged: that of their names.

        Not by the time of the file, which a clock that was not set yet has given to some. What is named or lies
        otherwise is not ours. Half pictures of a process that was killed while it wrote are removed.

        Raises:
            OSError: the folder cannot be made or listed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, int] = {}
        others: list[str] = []
        for day in self._folder.glob("*/*"):
            if not _DAY.fullmatch(day.name):
                continue
            if self._cameras is not None and day.parent.name not in self._cameras:
                others.append(day.parent.name)  # not looked at: it may be closed to us
                continue
            for path, size in _pictures(day):
                if path.endswith(".jpg"):
                    found[path] = size
                else:
                    with contextlib.suppress(OSError):
                        Path(path).unlink()
        self._files = {path: found[path] for path in sorted(found, key=os.path.basename)}
        self._held = sum(found.values())
        if others:
            names = ", ".join(sorted(set(others)))
            log.warning("%s has pictures of cameras that this line has not (%s): they stay", self._folder, names)

    def _write(self, job: _Job) -> None:
        image = job.image
        if self._config.overlay and job.map is not None:
            image = overlay(image, job.map, job.box, job.threshold)
            for region in job.verdict.regions:
                x, y, width, height = region.bbox
                cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), (255, 255, 255), 1)
        encoded = cv2.imencode(
            ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, self._config.quality]
        )[1].tobytes()
        job.path.parent.mkdir(parents=True, exist_ok=True)  # first: only a folder that is there says what room it has
        self._make_room(len(encoded))
        part = job.path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves an empty file under the name that the verdict gives
            part.replace(job.path)
        except OSError:
            part.unlink(missing_ok=True)  # what a full disk took of it counts towards no quota
            raise
        self._files[str(job.path)] = len(encoded)
        self._held += len(encoded)
        self.written += 1
        if self._config.publish:
            self._published(job.verdict.camera, job.verdict.id, encoded)

    def _make_room(self, needed: int) -> None:
        """Remove the oldest beyond the quota, and where the disk is nearly full.

        Raises:
            OSError: it is, and there are too few to remove.
        """
        while self._files and self._held + needed > self._config.max_bytes:
            self._remove_oldest()
        if not self._leave_free(needed):
            raise OSError(errno.ENOSPC, f"the disk of {self._folder} is nearly full: what is left is for verdicts")

    def _leave_free(self, needed: int) -> bool:
        """Whether so many bytes may be written; the oldest pictures make room, no more of them than it takes."""
        disk = os.statvfs(self._folder)
        if not disk.f_blocks:  # one that does not say, as some of FUSE: then the quota alone counts
            return True
        floor = min(FREE, int(FREE_SHARE * disk.f_blocks * disk.f_frsize))
        missing = floor + needed - disk.f_bavail * disk.f_frsize
        if missing <= -floor:
            self._yielding = False
        if missing <= 0:
            return True
        if self._files and not self._yielding:
            log.warning("%s: the disk is nearly full; the oldest pictures are removed, for verdicts", self._folder)
            self._yielding = True
        while self._files and missing > 0:
            missing -= self._remove_oldest()
        return missing <= 0

    def _remove_oldest(self) -> int:
        """Bytes that it had."""
        oldest = next(iter(self._files))
        size = self._files.pop(oldest)
        self._held -= size
        Path(oldest).unlink(missing_ok=True)
        self.removed += 1
        return size


def _pictures(day: Path) -> Iterator[tuple[str, int]]:
    """The pictures of a day, whole and half, with their bytes; none of a folder that this user may not read."""
    with contextlib.suppress(PermissionError, NotADirectoryError), os.scandir(day) as entries:
        for entry in entries:
            if _PICTURE.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    yield entry.path, entry.stat(follow_symlinks=False).st_size
