"""Drift monitor: a warning when scores have become larger than they were (light, lens, supplier, a worn tool)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .policies import DriftPolicy
from .spacing import Pace, Spacing, Standstill

Array = NDArray[Any]


@dataclass(frozen=True)
class Drift:
    """warning: the state now; changed: it changed with this score; statistic against critical; renewed: the reference
    was thrown away, as it was of too few parts: an earlier version took it, or the line stood or was faster then."""

    warning: bool
    changed: bool
    statistic: float
    critical: float
    renewed: bool = False


class DriftMonitor:
    """One-sided two-sample Kolmogorov-Smirnov test of the latest scores against the first ones.

    Only upwards: an episodic memory that learns lowers the scores, and that is no alarm. The warning clears when the
    statistic falls below 0.8 of the bound. The test holds for scores of different parts: where nothing names the parts,
    `spacing` picks the scores that count.
    """

    def __init__(self, policy: DriftPolicy) -> None:
        self.policy = policy
        self.spacing = Spacing()
        self._pace = Pace()
        self._reference: list[float] = []
        self._complete = False
        self._standstill, self._standing = Standstill(()), False
        self._recent: deque[float] = deque(maxlen=policy.window)
        self._warning = False
        self._statistic = 0.0
        self._known: float | None = None  # what statistic() gives, until a sample changes
        self._of_parts = True

    @property
    def warning(self) -> bool:
        """Whether the warning stands."""
        return self._warning

    @property
    def complete(self) -> bool:
        """Whether the reference has all its scores."""
        return self._complete

    @property
    def critical(self) -> float:
        """The bound for the reference as it is: one that was taken under another policy may be shorter."""
        return self.policy.bound(len(self._reference)) if self._complete else self.policy.critical

    def observe(self, score: float, apart: bool = True) -> Drift:
        """Take one score; those that are not finite are left out.

        apart: it is of another part than the one before, as a part id says. False: nobody knows, and `spacing` picks.
        """
        before, renewed = self._warning, False
        counted: Sequence[float] = ()
        if np.isfinite(score):
            counted = (float(score),) if apart else self.spacing.pick(float(score))
        if not apart and self.spacing.measured and not self._of_parts:
            renewed = self.spacing.stride > 1
            if renewed:
                self._begin()
            self._of_parts = True
        for each in counted:
            if apart or not self._stands(each):
                self._count(each)
                if not apart and self._pace.add(each):
                    renewed = True
                    self.reset()
                    break
        return Drift(self._warning, self._warning != before, self._statistic, self.critical, renewed)

    def _count(self, score: float) -> None:
        self._known = None
        if not self._complete:
            self._reference.append(score)
            self._complete = len(self._reference) >= self.policy.reference
            if self._complete:
                self._standstill = Standstill(self._reference)
            return
        self._recent.append(score)
        if len(self._recent) == self.policy.window:  # until then what was warned of before a restart stands
            self._statistic = self.statistic()
            self._warning = self._statistic > self.critical * (0.8 if self._warning else 1.0)

    def _stands(self, score: float) -> bool:
        """Whether it is one more score of a scene that stays in view; of its scores one counts."""
        before, self._standing = self._standing, self._complete and self._standstill.add(score)
        if self._standing and not before:  # this was seen by ten of them
            self._known = None
            for _ in range(min(self._standstill.RUN - 2, len(self._recent))):
                self._recent.pop()
        return self._standing

    def statistic(self) -> float:
        """max_x F_reference(x) - F_recent(x), in 0..1; 0 without both samples."""
        if self._known is None:
            self._known = self._compare()
        return self._known

    def _compare(self) -> float:
        if not self._reference or not self._recent:
            return 0.0
        reference, recent = np.sort(self._reference), np.sort(np.array(self._recent))
        points = np.concatenate([reference, recent])
        below = np.searchsorted(reference, points, "right") / len(reference)
        return float(max(0.0, (below - np.searchsorted(recent, points, "right") / len(recent)).max()))

    def reset(self) -> None:
        """Take a new reference from the next scores, and measure anew which of them are of different parts."""
        self._begin()
        self.spacing, self._pace, self._of_parts = Spacing(), Pace(), True

    def _begin(self) -> None:
        self._reference, self._complete, self._warning, self._statistic = [], False, False, 0.0
        self._recent.clear()
        self._known = None

    def state(self) -> dict[str, Array]:
        """Both samples, the warning and the spacing."""
        return {
            "reference": np.array(self._reference, np.float64),
            "complete": np.array(self._complete),
            "recent": np.array(self._recent, np.float64),
            "warning": np.array(self._warning),
            "of_parts": np.array(self._of_parts),
            **self.spacing.state(),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take back what :meth:`state` gave, cut to this policy's sizes.

        A reference that was complete stays so where it is shorter than this policy's, or what has drifted would enter
        it; unless the test could then never warn.
        """
        self._reference = [float(x) for x in state["reference"]][: self.policy.reference]
        self._recent = deque((float(x) for x in state["recent"]), maxlen=self.policy.window)
        self._warning, self._statistic, self._known = bool(state["warning"]), 0.0, None
        # Earlier versions did not say so, and took every picture of a camera for a part of its own.
        was_complete = bool(state["complete"]) if "complete" in state else len(self._recent) > 0
        size = len(self._reference)
        self._complete = size >= self.policy.reference or (was_complete and self.policy.bound(size) < 1)
        if self._complete:
            self._standstill = Standstill(self._reference)
        else:
            self._recent.clear()
        self._of_parts = bool(state["of_parts"]) if "of_parts" in state else False
        if "stride" in state:
            self.spacing.restore(state)
