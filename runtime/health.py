"""Whether the line works, as systemd, a load balancer or a person may ask: alive, and ready.

Alive: the judging thread gets on. It is stuck when items wait for judgement and none has been taken for a while; a line
without parts is alive, and so is one that opens its engines. Ready: what the line is there for works from end to end:
engines open, every camera delivers, verdicts are stored and reach the broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Seconds without progress, while something waits, after which the judging thread counts as stuck: at least this, or
#: five times the longest that a frame has taken; before the first frame, which warms the engines up, more. Engines may
#: be opened again while the line runs.
STUCK, FIRST, SLOWER = 10.0, 300.0, 5.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail says why not, or how it stands."""

    name: str
    ok: bool
    detail: str = ""


class Progress:
    """Watches a counter of judged items and the number of waiting ones. Thread-safe.

    Args:
        ask: (judged so far, waiting now).
        limit, first: seconds after which waiting without judging means stuck, and before the engines' first item.
    """

    def __init__(
        self,
        ask: Callable[[], tuple[int, int]],
        limit: float = STUCK,
        first: float = FIRST,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ask, self._limit, self._first, self._clock = ask, limit, first, clock
        self._judged = 0
        self._good_at = clock()
        self._longest = 0.0
        self._warm = False
        self._lock = threading.Lock()

    def opening(self) -> Check:
        """Engines are being opened, which may take minutes in which nothing is judged: the clock starts anew.

        To be asked instead of :meth:`check`, as often, until they are open.
        """
        judged, _ = self._ask()
        with self._lock:
            self._judged, self._good_at, self._warm = judged, self._clock(), False
        return Check("judging", True, "opening engines")

    def check(self) -> Check:
        """Look now. It must be asked more often than ``limit`` to be exact."""
        judged, waiting = self._ask()
        now = self._clock()
        with self._lock:
            if judged != self._judged:
                self._longest = max(self._longest, now - self._good_at)
                self._warm = True
            if judged != self._judged or waiting == 0:
                self._judged, self._good_at = judged, now
            idle = now - self._good_at
            limit = max(self._limit, SLOWER * self._longest) if self._warm else self._first
        if idle >= limit:
            return Check("judging", False, f"{waiting} frames wait and none was judged for {idle:.0f} s")
        return Check("judging", True, f"{judged} verdicts, {waiting} waiting")


def readiness(snapshot: Mapping[str, Any]) -> list[Check]:
    """Checks of a snapshot of :class:`LineState`."""
    checks = [Check("engines", bool(snapshot.get("ready")), "" if snapshot.get("ready") else "not open yet")]
    for name, camera in snapshot.get("cameras", {}).items():
        source = camera["source"]
        detail = ": ".join(filter(None, (source["state"], source["detail"].partition("\n")[0])))
        checks.append(Check(f"camera {name}", source["state"] in ("live", "ended"), detail))
    delivery = snapshot.get("delivery")
    if delivery is not None:
        outbox = delivery["outbox"]
        checks.append(
            Check("outbox", outbox["degraded"] is None, outbox["degraded"] or f"{outbox['messages']} waiting")
        )
        if delivery["broker"] is not None:
            checks.append(Check("broker", not delivery["reason"], delivery["reason"] or delivery["broker"]))
    return checks
