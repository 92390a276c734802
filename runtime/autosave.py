"""The thread that writes calibrated state to disk, so that no frame waits for an fsync."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ..calib.snapshots import Kind, Snapshot, SnapshotStore
from .errors import AndonError, CalibrationError

log = logging.getLogger(__name__)

Arrays = Mapping[str, Any]


class Autosave:
    """Writes the latest offered state every `interval` seconds and, of these, one every `ring_interval` to the ring.

    The ring is spaced out over restarts, too, and a state takes no place in it whose content is that of the newest
    there: neither a line that is restarted again and again nor one that learns nothing pushes its own history out.

    Owns one thread; :meth:`close` joins it and writes what is left.

    Attributes:
        saved: (number, meta) of this bundle's snapshots, newest first, as they were after the last save or look:
            the thread looks every `interval` seconds, for people remove files, too. Whoever only wants to tell of them
            reads this and waits for no disk.

    Args:
        store: where snapshots go; nobody else writes to it.
        interval: seconds between frequent saves.
        ring_interval: seconds between saves that rollback can return to.
        clock: seconds, monotonic.
        before: called before each of these saves; raises nothing.
        content: of the offered arrays those that make two states different.

    Raises:
        CalibrationError: the store's folder cannot be read.
    """

    def __init__(
        self,
        store: SnapshotStore,
        interval: float,
        ring_interval: float,
        clock: Callable[[], float] = time.monotonic,
        content: Callable[[Arrays], Arrays] = lambda arrays: arrays,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.lock = threading.Lock()  # held while the store is read or written
        self._store = store
        self._interval, self._ring_interval, self._clock = interval, ring_interval, clock
        self._content, self._before = content, before
        age = store.age("ring")
        self.saved = tuple(store.metas())
        # A wall clock that was set back says nothing of the age: then as if it had been written just now.
        self._ring_due = clock() if age is None else clock() + ring_interval - max(0.0, age)
        self._pending: tuple[Arrays, Mapping[str, Any]] | None = None
        self._handover = threading.Lock()
        self._flushing = threading.Lock()  # one after the other, or an older state could be written last
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="andon-autosave", daemon=True)
        self._thread.start()

    def offer(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """State that the next save writes; replaces what was offered before. The arrays are not changed any more."""
        with self._handover:
            self._pending = arrays, meta

    def write(self, arrays: Arrays, meta: Mapping[str, Any], kind: Kind) -> Snapshot:
        """Write now.

        Raises:
            CalibrationError: the disk refuses.
        """
        with self.lock:
            snapshot = self._store.save(arrays, meta, kind)
            self._look()
        return snapshot

    def _look(self) -> None:
        """See what is saved; with the lock. Where the folder cannot be read no save succeeds, and that is said."""
        with suppress(CalibrationError):
            self.saved = tuple(self._store.metas())

    def flush(self) -> Exception | None:
        """Write what was offered, if anything; what goes wrong is logged once and tried again later. Raises nothing.

        From any thread; when it returns None, all that was offered before is on the disk. Else: why it is not.
        """
        with self._flushing:
            return self._flush()

    def _flush(self) -> Exception | None:
        with self._handover:
            pending, self._pending = self._pending, None
        if pending is None:
            return None
        now = self._clock()
        self._before()
        try:
            kind: Kind = "ring" if now >= self._ring_due and self._is_new(pending[0]) else "last"
            self.write(*pending, kind)
        except Exception as error:  # whatever it is, its thread must be there when the disk works again
            if not self._failing:
                log.error("memory is not being saved: %s", error, exc_info=not isinstance(error, AndonError))
            self._failing = True
            with self._handover:
                self._pending = self._pending or pending
            return error
        if self._failing:
            log.info("memory is saved again")
        self._failing = False
        if kind == "ring":
            self._ring_due = now + self._ring_interval
        return None

    def _is_new(self, arrays: Arrays) -> bool:
        """Whether the content is another than that of the ring's newest usable snapshot."""
        with self.lock:
            newest = next((item for item in self._store.usable("ring") if isinstance(item, Snapshot)), None)
        if newest is None:
            return True
        before, now = self._content(newest.arrays), self._content(arrays)
        return before.keys() != now.keys() or not all(np.array_equal(before[name], now[name]) for name in now)

    def _work(self) -> None:
        while not self._stop.wait(self._interval):
            with self.lock:
                self._look()
            self.flush()

    def close(self) -> None:
        """Stop the thread and write what is left."""
        self._stop.set()
        self._thread.join()
        self.flush()
