"""What one kind of message (verdict, alarm) of one connection has in flight, and where it stands in the outbox."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ..stored import Stored

_FIRST_HOLD, _LONGEST_HOLD = 1.0, 30.0


class Stream:
    """Reads one kind from the outbox in order and keeps that order over refusals.

    A refused message stays in the outbox. The stream then goes back to it, holds, and probes with that one message
    until the broker takes it: nothing overtakes it, nothing is lost, and the broker is not flooded.

    Args:
        kind: the topic's last level.
        fetch: (after key, limit) -> committed messages of this kind above the key, oldest first.
        boundary: keys below it waited for this connection and are replayed.
    """

    def __init__(self, kind: str, fetch: Callable[[int, int], list[Stored]], boundary: int):
        self.kind = kind
        self.inflight: dict[int, Stored] = {}
        self.refusal: str | None = None
        self._fetch = fetch
        self._replay_below = boundary
        self._cursor = 0
        self._buffer: deque[Stored] = deque()
        self._hold_until = 0.0
        self._hold = _FIRST_HOLD

    def replayed(self, message: Stored) -> bool:
        """Whether the message waited over an outage, a restart or a refusal."""
        return message.key < self._replay_below

    def next(self, room: int) -> Stored | None:
        """The next message to offer, or None when there is none, the window is full or the stream is on hold."""
        if room < 1 or (self.refusal and (self.inflight or time.monotonic() < self._hold_until)):
            return None
        if not self._buffer:
            fetched = self._fetch(self._cursor, max(room, 32))
            self._buffer.extend(message for message in fetched if message.key not in self.inflight)
            if fetched:
                self._cursor = fetched[-1].key
        if not self._buffer:
            return None
        message = self._buffer.popleft()
        self.inflight[message.key] = message
        return message

    def acknowledged(self, message: Stored) -> bool:
        """The broker took it. True when that ends a refusal."""
        self.inflight.pop(message.key, None)
        ended, self.refusal = self.refusal is not None, None
        self._hold = _FIRST_HOLD
        return ended

    def refused(self, message: Stored, reason: str) -> bool:
        """The broker refused it. True when that is news."""
        self.inflight.pop(message.key, None)
        news = self.refusal != reason
        again = time.monotonic() >= self._hold_until
        self.refusal = reason
        self._cursor = min(self._cursor, message.key - 1)
        # Of those in flight behind it, the ones that will come again come through here themselves.
        self._replay_below = max(self._replay_below, message.key + 1)
        self._buffer.clear()
        if again:
            self._hold_until = time.monotonic() + self._hold
            self._hold = min(self._hold * 2, _LONGEST_HOLD)
        return news

    def given_up(self, message: Stored) -> None:
        """It is not offered after all, nor again: its owner has taken it out of the outbox."""
        self.inflight.pop(message.key, None)
