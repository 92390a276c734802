"""How late a message of the broker may be by our own doing: what was sent while we stood still lies there unread."""

from __future__ import annotations

#: The connection's thread looks at its socket at least as often, in seconds.
LOOK = 0.25
#: Seconds between two looks from which on the thread, or the whole process, was held up.
_HELD_UP = 2 * LOOK
#: Where more arrives than is read at a time the socket is never found empty: from then on all is new all the same.
_LONGEST = 5.0


class Backlog:
    """Tells messages that lay there while nobody looked from new ones, which the socket does not.

    A process that is stopped, swapped out or waits for a disk reads all that came meanwhile at one moment. Each of
    these messages may have lain there since the last look before.
    """

    def __init__(self, now: float):
        """now: monotonic seconds, as everywhere here."""
        self._looked = now
        self._since: float | None = None
        self._until = now

    def looked(self, now: float, *, empty: bool) -> None:
        """Somebody has looked whether there is something to read, and will read it if so."""
        if now - self._looked > _HELD_UP:
            # `empty` means nothing here: a wait that was held up beyond its end returns without another look.
            self._since = self._looked if self._since is None else self._since
            self._until = now + _LONGEST
        elif empty or now >= self._until:
            self._since = None
        self._looked = now

    def late(self, now: float) -> float:
        """Seconds that a message which is read now may have lain there; 0: it has just come."""
        return 0.0 if self._since is None else now - self._since
