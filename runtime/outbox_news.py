"""What an outbox has to say, in the log and to the line; of what recurs with every message not each time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("andon.outbox")

#: Called as (what, text) on `set_aside`, `degraded`, `recovered`, `dropped`.
Event = Callable[[str, str], None]
#: Seconds between two words about messages that the caps drop, which may be every one that comes.
_AGAIN = 60.0


class News:
    """Used by one thread at a time. dropped: messages lost to the caps before, of which nothing is said."""

    def __init__(self, event: Event | None):
        self._event = event
        self.dropped = 0
        self._at = -_AGAIN
        self._set_aside: str | None = None

    def say(self, what: str, text: str) -> None:
        """Say it now."""
        (log.info if what == "recovered" else log.error)("outbox %s: %s", what, text)
        if self._event is not None:
            self._event(what, text)

    def losses(self, set_aside: str | None, dropped: int, now: bool = False) -> None:
        """Say what is new of these: where a damaged file went, each once, and how many messages the caps have dropped.

        now: of these too, although it was said a moment ago.
        """
        if set_aside not in (None, self._set_aside):
            self._set_aside = set_aside
            self.say("set_aside", str(set_aside))
        if dropped > self.dropped and (now or time.monotonic() >= self._at + _AGAIN):
            self.say("dropped", f"{dropped - self.dropped} oldest messages dropped by the outbox caps")
            self.dropped, self._at = dropped, time.monotonic()
