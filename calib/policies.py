"""Settings of guard, memory and drift watch. Without numpy: whoever reads a line's configuration has to read these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import CalibrationError

Selection = Literal["farthest", "transport"]


@dataclass(frozen=True)
class GuardPolicy:
    """Settings of the guard.

    gate: False reproduces the paper, every frame with finite values teaches.
    quantile: q of the score gate. window: scores it looks back on, and frames the anchors' baseline is taken from.
    warmup: frames seen before the first may be admitted.
    local_bound, global_bound: multiples of the baseline that the two anchors allow.
    share: largest share of the episodic capacity that one frame may fill.
    """

    gate: bool = True
    quantile: float = 0.5
    window: int = 50
    warmup: int = 10
    local_bound: float = 1.5
    global_bound: float = 3.0
    share: float = 0.25

    def __post_init__(self) -> None:
        if not (0 < self.quantile <= 1 and 0 < self.warmup <= self.window and 0 < self.share <= 1) or (
            min(self.local_bound, self.global_bound) <= 0
        ):
            raise CalibrationError(
                "guard policy out of range",
                found=self,
                expected="0 < quantile <= 1, 0 < warmup <= window, 0 < share <= 1, bounds > 0",
                next_step="correct the memory.guard section of the line configuration",
            )


@dataclass(frozen=True)
class MemoryPolicy:
    """How the episodic memory fills.

    capacity: L; when that many rows are reached, they are compressed (FOCT eq. 7). Paper: 100. Here 800, see
        METHODS.md F.3.
    keep: lambda, share of L that compression keeps. Paper: 0.25.
    per_frame: rows an accepted frame adds at most.
    selection: farthest: the patches with the highest score, i.e. what the memory does not know yet;
        transport: FOCT eq. 6, the patches with the highest transport probability.
    foreground, background: rows of each label that `transport` takes (paper: 10 and 40).
    """

    capacity: int = 800
    keep: float = 0.5
    per_frame: int = 50
    selection: Selection = "farthest"
    foreground: int = 10
    background: int = 40

    def __post_init__(self) -> None:
        if (
            self.capacity < 1
            or not 0 < self.keep < 1
            or self.per_frame < 1
            or min(self.foreground, self.background) < 0
        ):
            raise CalibrationError(
                "memory policy out of range",
                found=self,
                expected="capacity >= 1, 0 < keep < 1, per_frame >= 1, foreground and background >= 0",
                next_step="correct the memory section of the line configuration",
            )

    @property
    def compressed(self) -> int:
        """Rows left after a compression."""
        return max(1, int(self.keep * self.capacity))


@dataclass(frozen=True)
class DriftPolicy:
    """reference: first scores that make up the reference; window: recent scores held against them;
    alpha: chance of a warning per test while nothing moves (small, because a line tests for weeks). Scores are those
    of different parts."""

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
        return self.bound(self.reference)

    def bound(self, reference: int) -> float:
        """The same for a reference of another size."""
        n, m = reference, self.window
        return math.sqrt(-math.log(self.alpha) / 2 * (n + m) / (n * m))
