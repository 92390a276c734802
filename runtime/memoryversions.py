"""Numbers of the memory: its version, the version its content was made in, and what rollbacks have left behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..calib.snapshots import Snapshot, SnapshotStore
from .errors import CalibrationError

log = logging.getLogger(__name__)


class MemoryVersions:
    """One number for the whole bundle, which counts every change, a rollback included.

    Attributes:
        number: the present version.
        content: the version that the present content was made in; a rollback brings an older one back.
    """

    def __init__(self) -> None:
        self.number = 0
        self.content = 0
        self._left: list[tuple[int, int]] = []  # first and last of the versions that a rollback took out of use

    def changed(self) -> None:
        """The memory is another than any before."""
        self.number += 1
        self.content = self.number

    def rolled_back(self) -> None:
        """The content taken last (:meth:`take`) is in use again; the versions since it are left behind."""
        self._left.append((self.content + 1, self.number))
        self.number += 1

    def restored(self, saved: int, last: int) -> None:
        """A start goes on from version `saved`; `last` is the newest that audit log or verdicts know.

        Killed after the last save, the line may have published later versions: their numbers are not used again.
        """
        self.number = saved if last <= saved else last + 1

    def begin(self, last: int) -> None:
        """A start with nothing saved, or with nothing left of it."""
        self.number = self.content = last + 1 if last else 0

    def meta(self) -> dict[str, Any]:
        """What a snapshot keeps of this."""
        return {"version": self.number, "content": self.content, "left": list(self._left)}

    def take(self, meta: Mapping[str, Any]) -> None:
        """The content is the one saved with `meta`; the number stays, for it goes on whatever comes back."""
        self.content = content_version(meta)
        self._left = [(int(first), int(last)) for first, last in meta.get("left", ())]

    def find(self, store: SnapshotStore, version: int | None) -> Snapshot:
        """What a rollback returns to: of snapshots of the same content the newest that is whole.

        Without a version: the newest that the present content came from. What an earlier rollback took out of use is
        not among these, or the second of two would bring back what the first was for.

        Raises:
            CalibrationError: there is none.
        """
        saved = sorted(store.metas(), key=lambda item: (content_version(item[1]), item[0]), reverse=True)
        for number, meta in list(saved):
            if int(meta["version"]) == version or (version is None and self._came_from(content_version(meta))):
                try:
                    snapshot = store.load(number)
                except CalibrationError as error:
                    log.warning("rollback: snapshot %d is passed over: %s", number, error)
                else:
                    if not made_without_memory(snapshot):
                        return snapshot
                saved.remove((number, meta))
        if version is not None:
            choice = sorted({int(meta["version"]) for _, meta in saved})
        else:  # of what is saved only other content: what an earlier rollback left
            choice = sorted({int(meta["version"]) for _, meta in saved if content_version(meta) != self.content})
        none = "nothing older is kept: snapshot keeps what is there now, reset forgets all that was learnt"
        raise CalibrationError(
            "there is no such version to roll back to" if version is not None else "there is no older version",
            found=version if version is not None else f"version {self.number}",
            expected=f"one of {choice}" if choice else "a saved snapshot of an older state",
            next_step="choose one of these as 'version', or reset the memory" if choice else none,
        )

    def _came_from(self, content: int) -> bool:
        return content < self.content and not any(first <= content <= last for first, last in self._left)


def made_without_memory(snapshot: Snapshot) -> bool:
    """Whether an earlier version saved it with the memory switched off: it says nothing of what had been learnt."""
    return snapshot.identity.get("memory") is False


def content_version(meta: Mapping[str, Any]) -> int:
    """The version that a snapshot's content was made in: an older one than its own after a rollback."""
    return int(meta.get("content", meta["version"]))
