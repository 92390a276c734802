"""Between the cameras and the one inference thread: a short queue per camera, served in turn.

Every camera has a lane. With drop: latest a newer frame replaces the oldest waiting one and the loss is counted; with
drop: block the source waits. A frame that carries a part id is never dropped in silence: it becomes a :class:`Missed`
with reason overload. The same holds for a trigger that no frame answered (no_frame) and for a frame that waited past
its deadline (deadline_missed). So every announced part gets exactly one verdict, and one that could get none is
refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Literal, TypeVar

from .errors import ConfigError, NotNowError
from .types import Frame

log = logging.getLogger(__name__)
#: Missed items (they hold no picture) and triggers that one lane keeps: what fits into minutes of building engines at a
#: fast line's pace. Triggers are refused from there on; of others, which cannot be, the oldest are lost and counted.
MAX_WAITING = 32768

_Item = TypeVar("_Item", "Frame", "Missed")


@dataclass(frozen=True)
class Missed:
    """A part or camera that must be judged UNKNOWN without a picture; `reason` is one of types.UNKNOWN_REASONS."""

    camera: str
    seq: int
    reason: str
    captured: datetime
    monotonic: float
    part_id: str | None = None
    product: str | None = None
    path: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Trigger:
    """A part announced for a camera. `at` and `deadline` are monotonic seconds; the frame is captured after `at`.

    product: as which it was announced; expected: what the camera expected then (`auto`, too), for a frame that brings
    none: a product commanded afterwards is of the parts behind it.
    detail: what is said of a part that has no frame by the deadline.
    """

    part_id: str
    at: float
    deadline: float
    product: str | None = None
    expected: str | None = None
    detail: str = "no frame came before the trigger's deadline"

    def takes(self, item: _Item) -> _Item:
        """What comes from the camera, as this part's."""
        product = self.product or item.product or self.expected
        return replace(item, part_id=self.part_id, product=product)


@dataclass(frozen=True)
class LanePolicy:
    """How a camera's frames wait. `triggered_only`: frames without a trigger are not judged."""

    drop: Literal["latest", "block"] = "latest"
    queue: int = 1
    triggered_only: bool = False


@dataclass
class LaneCounts:
    """Counters of one camera since the start. offered = taken + dropped + untriggered + waiting.

    lost: parts without a picture that were too many to wait, and got no verdict.
    """

    offered: int = 0
    taken: int = 0
    dropped: int = 0
    untriggered: int = 0
    missed: int = 0
    triggers: int = 0
    lost: int = 0


@dataclass
class _Lane:
    policy: LanePolicy
    space: threading.Condition
    items: deque[Frame | Missed] = field(default_factory=deque)
    triggers: deque[Trigger] = field(default_factory=deque)
    counts: LaneCounts = field(default_factory=LaneCounts)
    seq: int = 0
    frames: int = 0  # of the items
    losing: bool = False


class Slots:
    """The lanes of all cameras. Producers call :meth:`put`, one consumer calls :meth:`take`; both are thread-safe."""

    def __init__(self, policies: Mapping[str, LanePolicy], clock: Callable[[], float] = time.monotonic):
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._lanes = {name: _Lane(policy, threading.Condition(self._lock)) for name, policy in policies.items()}
        self._order = list(self._lanes)
        self._clock = clock
        self._closed = False
        self._poked = False
        self._served = 0

    def wanted(self, camera: str, monotonic: float) -> bool:
        """False where only triggered frames count and no trigger waits for one captured then; that frame is counted."""
        lane = self._lanes[camera]
        with self._lock:
            wanted = not lane.policy.triggered_only or (bool(lane.triggers) and monotonic >= lane.triggers[0].at)
            if not wanted:
                lane.counts.offered += 1
                lane.counts.untriggered += 1
            return wanted

    def awaited(self, camera: str, monotonic: float) -> bool:
        """Whether a trigger waits for a frame captured then."""
        lane = self._lanes[camera]
        with self._lock:
            return bool(lane.triggers) and monotonic >= lane.triggers[0].at

    def put(self, item: Frame | Missed, *, wait: bool = True) -> bool:
        """Hand over a frame or a missed one; waits for room with drop: block. False once the slots are closed.

        wait: False for a missed one that another thread than the camera's hands over, which is not to be held up.
        The item's sequence number is set here: one series per camera, from 1, in the order in which items are taken.
        """
        lane = self._lanes[item.camera]
        with self._lock:
            while wait and not self._closed and lane.policy.drop == "block" and lane.frames >= lane.policy.queue:
                lane.space.wait()
            if self._closed:
                return False
            self._expire(item.camera, lane, self._clock())
            item = replace(item, seq=self._number(lane))
            if isinstance(item, Missed):
                # A picture that cannot be read was the part's: the next one may show the part behind it.
                if item.reason == "bad_frame" and lane.triggers and item.monotonic >= lane.triggers[0].at:
                    item = lane.triggers.popleft().takes(item)
                self._miss(lane, item)
            else:
                self._put_frame(lane, item)
            self._ready.notify()
            return True

    def configure(self, camera: str, policy: LanePolicy) -> None:
        """Let a camera's frames wait in another way from the next one on; what waits now is kept."""
        lane = self._lanes[camera]
        with self._lock:
            lane.policy = policy
            lane.space.notify_all()

    def trigger(self, camera: str, trigger: Trigger) -> None:
        """Announce a part: the next frame of the camera captured at or after `trigger.at` is taken for it.

        Raises:
            ConfigError: no such camera.
            NotNowError: the slots are closed, or too many parts wait already.
        """
        with self._lock:
            lane = self._lanes.get(camera)
            if lane is None:
                raise ConfigError(f"no camera '{camera}'", found=camera, expected=", ".join(self._order))
            if self._closed:
                raise NotNowError("the line is stopping", next_step="repeat it after the restart")
            waiting = len(lane.triggers) + len(lane.items)
            if waiting >= MAX_WAITING:
                raise NotNowError(
                    f"camera {camera} takes no more triggers",
                    found=f"{waiting} parts that wait for their verdict",
                    next_step="repeat it when its status says ready",
                )
            lane.triggers.append(trigger)
            lane.counts.triggers += 1
            self._ready.notify()

    def take(self, timeout: float | None = None) -> Frame | Missed | None:
        """The next item, cameras in turn; None after `timeout` seconds, when poked, or when closed and empty."""
        until = None if timeout is None else self._clock() + timeout
        with self._lock:
            while True:
                now = self._clock()
                wake = [until] if until is not None else []
                for name, lane in self._lanes.items():
                    self._expire(name, lane, now)
                    wake.extend(trigger.deadline for trigger in lane.triggers)
                item = self._next(now)
                if item is not None:
                    return item
                if self._poked or self._closed or (until is not None and now >= until):
                    self._poked = False
                    return None
                self._ready.wait(max(0.0, min(wake) - now) if wake else None)

    def poke(self) -> None:
        """Make a waiting :meth:`take` return, because its thread has something else to do."""
        with self._lock:
            self._poked = True
            self._ready.notify_all()

    @property
    def drained(self) -> bool:
        """Closed, and everything was taken."""
        with self._lock:
            return self._closed and not any(lane.items for lane in self._lanes.values())

    @property
    def closed(self) -> bool:
        """Nothing more is taken."""
        with self._lock:
            return self._closed

    def close(self) -> None:
        """Take nothing more; what waits can still be taken, and triggers without a frame become no_frame."""
        with self._lock:
            self._closed = True
            for name, lane in self._lanes.items():
                self._expire(name, lane, float("inf"))
                lane.space.notify_all()
            self._ready.notify_all()

    def waiting(self, camera: str) -> int:
        """Items of a camera that wait for judgement."""
        with self._lock:
            return len(self._lanes[camera].items)

    @property
    def served(self) -> int:
        """Items that :meth:`take` has handed out: what grows only while somebody judges."""
        with self._lock:
            return self._served

    def counts(self) -> dict[str, LaneCounts]:
        """A copy of every camera's counters."""
        with self._lock:
            return {name: replace(lane.counts) for name, lane in self._lanes.items()}

    # The rest runs under the lock.

    @staticmethod
    def _number(lane: _Lane) -> int:
        lane.seq += 1
        return lane.seq

    def _put_frame(self, lane: _Lane, frame: Frame) -> None:
        lane.counts.offered += 1
        if lane.triggers and frame.monotonic >= lane.triggers[0].at:
            frame = lane.triggers.popleft().takes(frame)
        elif lane.policy.triggered_only:
            lane.counts.untriggered += 1
            return
        lane.items.append(frame)
        lane.frames += 1
        if lane.frames > lane.policy.queue:
            self._displace(lane)

    def _displace(self, lane: _Lane) -> None:
        """One frame must go: the oldest without a part id, else the oldest, which then is a missed part."""
        frames: list[tuple[int, Frame]] = []  # the newest first: few frames wait, but many missed ones may
        last = len(lane.items) - 1
        for distance, item in enumerate(reversed(lane.items)):
            if isinstance(item, Frame):
                frames.append((last - distance, item))
                if len(frames) == lane.frames:
                    break
        frames.reverse()
        index, victim = next(((i, item) for i, item in frames if item.part_id is None), frames[0])
        lane.frames -= 1
        lane.counts.dropped += 1
        if victim.part_id is None:
            del lane.items[index]
        else:
            lane.items[index] = missed(victim, "overload", "a newer frame came before this one could be judged")
            lane.counts.missed += 1
            self._bound(lane)

    def _miss(self, lane: _Lane, item: Missed) -> None:
        lane.items.append(item)
        lane.counts.missed += 1
        self._bound(lane)

    def _bound(self, lane: _Lane) -> None:
        """Memory has an end: the oldest missed one goes, which is said once until none waits any more."""
        if len(lane.items) - lane.frames <= MAX_WAITING:
            return
        oldest, item = next((index, other) for index, other in enumerate(lane.items) if isinstance(other, Missed))
        del lane.items[oldest]
        lane.counts.lost += 1
        if not lane.losing:
            lane.losing = True
            log.error(
                "camera %s: more than %d parts wait for judgement; from %s on the oldest get no verdict (slots.lost)",
                item.camera, MAX_WAITING, item.part_id or f"number {item.seq}",
            )  # fmt: skip

    def _expire(self, name: str, lane: _Lane, now: float) -> None:
        for trigger in [trigger for trigger in lane.triggers if trigger.deadline <= now]:
            lane.triggers.remove(trigger)
            item = Missed(
                camera=name,
                seq=self._number(lane),
                reason="no_frame",
                captured=datetime.now(timezone.utc),
                monotonic=trigger.at,
                part_id=trigger.part_id,
                product=trigger.product or trigger.expected,
                detail=trigger.detail,
            )
            self._miss(lane, item)

    def _next(self, now: float) -> Frame | Missed | None:
        for position, name in enumerate(self._order):
            lane = self._lanes[name]
            if not lane.items:
                continue
            item = lane.items.popleft()
            lane.losing = lane.losing and bool(lane.items)
            self._served += 1
            self._order = self._order[position + 1 :] + self._order[: position + 1]
            if isinstance(item, Frame):
                lane.frames -= 1
                lane.counts.taken += 1
                lane.space.notify()
                if item.deadline is not None and now > item.deadline:
                    lane.counts.missed += 1
                    return missed(item, "deadline_missed", "the frame waited past its deadline")
            return item
        return None


def missed(frame: Frame, reason: str, detail: str) -> Missed:
    """The missed item a frame turns into."""
    return Missed(
        camera=frame.camera,
        seq=frame.seq,
        reason=reason,
        captured=frame.captured,
        monotonic=frame.monotonic,
        part_id=frame.part_id,
        product=frame.product,
        path=frame.path,
        detail=detail,
    )
