"""Alarms of one camera: a pure state machine without clock, thread or I/O. Messages are ``andon.alarm/1``.

Each kind of alarm runs through the same four states (IEC 62682, reduced):

    cleared ──raise──▶ raised ──acknowledge──▶ acknowledged
       ▲                 │ condition gone          │ condition gone
       │                 ▼ (latch)                 │
       └──acknowledge── latched                    │
       └───────────────────────────────────────────┘

Without ``latch`` a raised alarm clears by itself. A latched alarm whose condition returns is raised again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from .types import Label
from .verdict import encode, timestamp

SCHEMA = "andon.alarm/1"
Kind = Literal["defect", "cannot_judge", "camera", "drift", "delivery"]
State = Literal["cleared", "raised", "acknowledged", "latched"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class AlarmRule:
    """When the alarms that rest on verdicts are raised and cleared.

    k, n: `defect` is raised at k NG among the last n verdicts.
    clear: it clears at this many NG or fewer among the last n (hysteresis: clear < k).
    latch: a raised alarm stays until acknowledged although its condition is gone.
    unknown: count = UNKNOWN enters the window as NG; ignore = it leaves the window as it is.
    cannot_judge_after: UNKNOWN verdicts in a row that raise `cannot_judge`; None: never.
    """

    k: int = 3
    n: int = 5
    clear: int = 0
    latch: bool = True
    unknown: Literal["ignore", "count"] = "ignore"
    cannot_judge_after: int | None = 3

    def __post_init__(self) -> None:
        if not 0 <= self.clear < self.k <= self.n:
            raise ValueError(f"needs 0 <= clear < k <= n, found clear {self.clear}, k {self.k}, n {self.n}")
        if self.cannot_judge_after is not None and self.cannot_judge_after < 1:
            raise ValueError(f"cannot_judge_after is 1 or more, found {self.cannot_judge_after}")


@dataclass(frozen=True)
class Alarm:
    """One kind of alarm: its state, since when, how often raised since it was last cleared, and why."""

    kind: Kind
    state: State = "cleared"
    since: str = ""
    count: int = 0
    detail: str = ""
    by: str | None = None

    @property
    def active(self) -> bool:
        """Whether it asks for somebody's attention: everything but cleared."""
        return self.state != "cleared"


@dataclass(frozen=True)
class AlarmEvent:
    """One transition, to be published."""

    kind: Kind
    before: State
    alarm: Alarm


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass
class AlarmBoard:
    """All alarms of one camera.

    Every method that may change a state returns the transitions it made, oldest first, and keeps none itself.
    Not thread-safe: the thread that judges owns it.
    """

    camera: str
    rule: AlarmRule = field(default_factory=AlarmRule)
    now: Callable[[], datetime] = _utc_now
    _alarms: dict[Kind, Alarm] = field(default_factory=lambda: {kind: Alarm(kind) for kind in KINDS})
    _window: deque[bool] = field(default_factory=deque)
    _unknown_run: int = 0

    def verdict(self, label: Label, reason: str = "", part_id: str | None = None) -> list[AlarmEvent]:
        """Count one verdict."""
        return [*self._count_unknown(label, reason), *self._count_defect(label, part_id)]

    def condition(self, kind: Kind, present: bool, detail: str = "", further: bool = False) -> list[AlarmEvent]:
        """Say whether the condition of an alarm is there; used for camera, drift and delivery.

        further: it has a cause that it had not when it was raised. The alarm is raised with the new detail, whatever it
        was; one that is not acknowledged is not counted again.
        """
        alarm = self._alarms[kind]
        if present:
            if alarm.state in ("cleared", "latched") or further:
                return [self._move(alarm, "raised", detail=detail, count=alarm.count + (alarm.state != "raised"))]
            return []
        if alarm.state == "raised":
            return [self._move(alarm, "latched" if self.rule.latch else "cleared")]
        if alarm.state == "acknowledged":
            return [self._move(alarm, "cleared")]
        return []

    def renew(self, kind: Kind, detail: str) -> list[AlarmEvent]:
        """Say anew why an alarm stands, where one of its causes is gone and another is not; its state stays."""
        alarm = self._alarms[kind]
        if alarm.state not in ("raised", "acknowledged") or alarm.detail == detail:
            return []
        return [self._move(alarm, alarm.state, detail=detail, by=alarm.by)]

    def acknowledge(self, kind: Kind | None = None, by: str | None = None) -> list[AlarmEvent]:
        """Acknowledge one kind, or all. What is already acknowledged or cleared stays as it is."""
        events = []
        for each in KINDS if kind is None else (kind,):
            alarm = self._alarms[each]
            if alarm.state == "raised":
                events.append(self._move(alarm, "acknowledged", by=by))
            elif alarm.state == "latched":
                events.append(self._move(alarm, "cleared", by=by))
        return events

    def reset_window(self) -> None:
        """Forget the counted verdicts, as after a product change. Alarms keep their states."""
        self._window.clear()
        self._unknown_run = 0

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All kinds, in the order of KINDS."""
        return tuple(self._alarms[kind] for kind in KINDS)

    @property
    def active(self) -> tuple[Alarm, ...]:
        """Those that are not cleared."""
        return tuple(alarm for alarm in self.alarms if alarm.active)

    def dump(self) -> dict[str, Any]:
        """What has to survive a restart: the states, and the window they rest on."""
        return {
            "alarms": [vars(alarm) for alarm in self.active],
            "window": list(self._window),
            "unknown_run": self._unknown_run,
        }

    def restore(self, dumped: Mapping[str, Any]) -> None:
        """Take over what :meth:`dump` gave. A raised alarm stays raised until its condition is seen to be gone."""
        for entry in dumped.get("alarms", ()):
            if entry.get("kind") in KINDS:
                alarm = Alarm(**{name: entry[name] for name in Alarm.__dataclass_fields__ if name in entry})
                self._alarms[alarm.kind] = alarm
        # Not bounded here: the rule may change while the line runs, and counting drops what it does not need.
        self._window = deque(bool(ng) for ng in dumped.get("window", ()))
        self._unknown_run = int(dumped.get("unknown_run", 0))

    def _count_defect(self, label: Label, part_id: str | None) -> list[AlarmEvent]:
        if label == "UNKNOWN" and self.rule.unknown == "ignore":
            return []
        self._window.append(label != "OK")
        while len(self._window) > self.rule.n:
            self._window.popleft()
        bad = sum(self._window)
        if bad >= self.rule.k:
            part = f", last part {part_id}" if part_id else ""
            return self.condition("defect", True, f"{bad} NG of the last {len(self._window)} verdicts{part}")
        return self.condition("defect", False) if bad <= self.rule.clear else []

    def _count_unknown(self, label: Label, reason: str) -> list[AlarmEvent]:
        if label != "UNKNOWN":
            self._unknown_run = 0
            return self.condition("cannot_judge", False)
        self._unknown_run += 1
        limit = self.rule.cannot_judge_after
        if limit is None or self._unknown_run < limit:
            return []
        return self.condition("cannot_judge", True, f"{self._unknown_run} UNKNOWN in a row, last: {reason}")

    def _move(
        self, alarm: Alarm, state: State, *, detail: str | None = None, count: int | None = None, by: str | None = None
    ) -> AlarmEvent:
        changed = replace(
            alarm,
            state=state,
            since=timestamp(self.now()),
            detail=alarm.detail if detail is None else detail,
            count=0 if state == "cleared" else alarm.count if count is None else count,
            by=by,
        )
        self._alarms[alarm.kind] = changed
        return AlarmEvent(alarm.kind, alarm.state, changed)


def payload(identifier: str, camera: str, alarms: Iterable[Alarm], event: AlarmEvent | None = None) -> bytes:
    """An alarm message (configs/schema/alarm.json): the transition, if any, and the whole board.

    The topic is retained and holds one message, so every message carries all alarms that are not cleared: whoever
    connects later sees the camera's full state. ``event`` None announces the state again after a connect.
    """
    board = [
        {"kind": a.kind, "state": a.state, "since": a.since, "count": a.count, "detail": a.detail}
        for a in alarms
        if a.active
    ]
    order = ("raised", "latched", "acknowledged")
    worst = next((state for state in order if any(entry["state"] == state for entry in board)), "cleared")
    transition = event and {
        "kind": event.kind,
        "from": event.before,
        "to": event.alarm.state,
        "detail": event.alarm.detail,
        "by": event.alarm.by,
    }
    return encode(
        {
            "schema": SCHEMA,
            "id": identifier,
            "ts": event.alarm.since if event else timestamp(),
            "camera": camera,
            "state": worst,
            "event": transition or None,
            "alarms": board,
        }
    )
