"""What the outbox holds, and how it says how it stands."""

from __future__ import annotations

from dataclasses import dataclass


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
    keeps its size and deletes what was acknowledged a moment later. dropped: lost to the caps since the file was made,
    and to :meth:`Outbox.give_up` since it was opened; too_large: to the latter alone. degraded: why commits fail at the
    moment, None when they do not. set_aside: name of a corrupt file found at the start.
    """

    messages: int
    bytes: int
    dropped: int
    oldest_age_s: float
    degraded: str | None
    set_aside: str | None
    in_memory: int
    too_large: int = 0
