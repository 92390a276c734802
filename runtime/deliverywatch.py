"""Tells the alarm boards how delivery stands, and again when another cause comes to those that are known."""

from __future__ import annotations

from collections.abc import Callable

from .mqtt.delivery import DeliveryHealth

#: Seconds without the broker until that is an alarm.
GRACE = 5.0


class DeliveryWatch:
    """Compares causes, not texts: a number in a text that goes on counting must not make an alarm a second.

    A cause is told once until all is well again: an alarm message is a message too, and while the caps drop the oldest,
    each would cost a verdict.

    Args:
        tell: (whether there is trouble, why, whether this is a further cause of a trouble that was told).
    """

    def __init__(self, tell: Callable[[bool, str, bool], None]):
        self._tell = tell
        # None: not looked at yet. The boards may have been restored with an alarm of the last run, so they are told how
        # delivery stands even if all is well.
        self._told: frozenset[str] | None = None

    def look(self, health: DeliveryHealth) -> bool:
        """Whether the boards were told something; a connection is given some seconds to come up or back."""
        troubles = health.troubles(GRACE)
        if not troubles and (self._told == frozenset() or not health.connected):
            return False
        if troubles and self._told and troubles.keys() <= self._told:
            return False
        further = bool(troubles and self._told)
        self._told = (self._told or frozenset()) | troubles.keys() if troubles else frozenset()
        self._tell(bool(troubles), "; ".join(troubles.values()), further)
        return True
