"""Drift monitor: a warning when scores have become larger than they were (light, lens, supplier, a worn tool)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[Any]


@dataclass(frozen=True)
class DriftPolicy:
    """reference: first scores that make up the reference; window: recent scores held against them;
    alpha: chance of a warning per test while nothing moves (small, because a line tests for weeks)."""

    reference: int = 100
    window: int = 100
    alpha: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.reference, self.window) < 5 or not 0 < self.alpha < 1:
            raise CalibrationError(
                "drift policy out of range",
                found=self,
                expected="reference and window >= 5, 0 < alpha < 1",
                next_step="correct the memory.drift section of the line configuration",
            )
        if self.critical >= 1:
            raise CalibrationError(
                "drift could never be warned of: the samples are too small for this alpha",
                found=f"a bound of {self.critical:.2f} for a statistic of at most 1",
                expected="reference, window and alpha large enough for a bound below 1",
                next_step="raise memory.drift.window, reference or alpha in the line configuration",
            )

    @property
    def critical(self) -> float:
        """One-sided Kolmogorov-Smirnov bound of two samples at `alpha`."""
        n, m = self.reference, self.window
        return float(np.sqrt(-np.log(self.alpha) / 2 * (n + m) / (n * m)))


@dataclass(frozen=True)
class Drift:
    """warning: the state now; changed: it changed with this score; statistic against critical."""

    warning: bool
    changed: bool
    statistic: float
    critical: float


class DriftMonitor:
    """One-sided two-sample Kolmogorov-Smirnov test of the latest scores against the first ones.

    Only upwards: an episodic memory that learns lowers the scores, and that is no alarm. The warning clears when the
    statistic falls below 0.8 of the bound.
    """

    def __init__(self, policy: DriftPolicy) -> None:
        self.policy = policy
        self._reference: list[float] = []
        self._recent: deque[float] = deque(maxlen=policy.window)
        self._warning = False

    @property
    def warning(self) -> bool:
        """Whether the warning stands."""
        return self._warning

    @property
    def complete(self) -> bool:
        """Whether the reference has all its scores."""
        return len(self._reference) >= self.policy.reference

    def observe(self, score: float) -> Drift:
        """Add one score; scores that are not finite are left out."""
        statistic = 0.0
        if np.isfinite(score):
            if not self.complete:
                self._reference.append(float(score))
            else:
                self._recent.append(float(score))
        if len(self._recent) == self.policy.window:
            statistic = self.statistic()
        before = self._warning
        bound = self.policy.critical * (0.8 if before else 1.0)
        self._warning = statistic > bound
        return Drift(self._warning, self._warning != before, statistic, self.policy.critical)

    def statistic(self) -> float:
        """max_x F_reference(x) - F_recent(x), in 0..1; 0 without both samples."""
        if not self._reference or not self._recent:
            return 0.0
        reference, recent = np.sort(self._reference), np.sort(np.array(self._recent))
        points = np.concatenate([reference, recent])
        below = np.searchsorted(reference, points, "right") / len(reference)
        return float(max(0.0, (below - np.searchsorted(recent, points, "right") / len(recent)).max()))

    def reset(self) -> None:
        """Take a new reference from the next scores."""
        self._reference, self._warning = [], False
        self._recent.clear()

    def state(self) -> dict[str, Array]:
        """Both samples and the warning."""
        return {
            "reference": np.array(self._reference, np.float64),
            "recent": np.array(self._recent, np.float64),
            "warning": np.array(self._warning),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take back what :meth:`state` gave, cut to this policy's sizes."""
        self._reference = [float(x) for x in state["reference"]][: self.policy.reference]
        self._recent = deque((float(x) for x in state["recent"]), maxlen=self.policy.window)
        self._warning = bool(state["warning"])
