"""What the outbox holds, and how it says how it stands."""

from __future__ import annotations

from dataclasses import dataclass

#: State of the outbox: the memory's version in the newest verdict, committed with it. It never goes backwards.
MEMORY_VERSION = "memory/version"


@dataclass(frozen=True)
class Stored:
    """A message on its way to the broker. kind is the topic's last level: verdict or alarm."""

    key: int
    camera: str
    kind: str
    id: str
    payload: bytes


@dataclass(frozen=True)
class OutboxStats:
    """What the outbox holds and what it had to do.

    messages, bytes, oldest_age_s: not yet acknowledged, wherever they are; bytes of payload, not of the file, which
    keeps its size and deletes what was acknowledged a moment later. dropped: lost to the caps and to damage since the
    file was made, and to :meth:`Outbox.give_up` since it was opened. too_large, damaged: of these, since it was opened,
    what is larger than the broker takes, and what the disk has damaged. degraded: why commits fail at the moment, None
    when they do not. set_aside: where a damaged file went, what was saved from it and what was lost; None: none was.
    """

    messages: int
    bytes: int
    dropped: int
    oldest_age_s: float
    degraded: str | None
    set_aside: str | None
    in_memory: int
    too_large: int = 0
    damaged: int = 0
