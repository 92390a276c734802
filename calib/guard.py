"""The admission guard: which frames may teach the memory. Unguarded updates learn defects (METHODS.md 5.4, F.3).

Three conditions, each with its own reason in the audit log:

- score: the frame's score is at most the q-quantile of the last `window` scores. Relative, so it needs no threshold
  and follows a stream whose level moves; it bounds the share of frames, not how far the memory can wander.
- local anchor: no patch stands out of the frame, by its distance to the *semantic* memory in excess of the frame's own
  median distance, further than patches of the first frames did. A defect that fades in slowly passes every relative
  gate, and the episodic memory follows it; the semantic memory does not move, so this bound stops it.
- global anchor: the frame's median distance to the semantic memory stays within a multiple of the first frames'.
  Light and dust move all patches together and are followed up to here; beyond it a person has to look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError
from .policies import GuardPolicy

Array = NDArray[Any]
Reason = Literal[
    "admitted", "warmup", "score", "anchor_local", "anchor_global", "not_finite", "frozen", "not_ok", "no_candidate"
]


@dataclass(frozen=True)
class Decision:
    """Whether a frame may teach, why, and the numbers behind it (found against limit)."""

    admit: bool
    reason: Reason
    found: float = 0.0
    limit: float = 0.0


class AdmissionGuard:
    """Judges frame after frame; its state is a few short arrays."""

    def __init__(self, policy: GuardPolicy) -> None:
        self.policy = policy
        self._scores: list[float] = []
        self._level: list[float] = []
        self._excess: list[float] = []

    def needs_anchor(self) -> bool:
        """Whether every frame's distances to the semantic memory are wanted (while the baseline is taken)."""
        return self.policy.gate and len(self._level) < self.policy.window

    def score_limit(self) -> float:
        """Largest score that passes now; -inf while warming up, inf with the gate off."""
        if not self.policy.gate:
            return float("inf")
        if len(self._scores) < self.policy.warmup:
            return float("-inf")
        return float(np.quantile(self._scores, self.policy.quantile))

    def anchor_limits(self) -> tuple[float, float]:
        """Largest (excess over the frame's median, median) distance to the semantic memory that passes now."""
        if not self._level:
            return float("-inf"), float("-inf")
        excess = float(np.quantile(self._excess, self.policy.quantile)) * self.policy.local_bound
        return excess, float(np.median(self._level)) * self.policy.global_bound

    def judge(self, score: float, anchored: Array | None) -> Decision:
        """Decide about one frame and remember its score.

        score: the frame's image score against the memory as it was.
        anchored: [m] distance of each patch to the nearest semantic row; may be None where the score alone refuses the
            frame and :meth:`needs_anchor` is False.
        """
        if not np.isfinite(score) or (anchored is not None and not np.isfinite(anchored).all()):
            return Decision(False, "not_finite", float("nan"))
        limit = self.score_limit()
        self._scores = [*self._scores, float(score)][-self.policy.window :]
        if not self.policy.gate:
            return Decision(True, "admitted", score, limit)
        level = excess = 0.0
        if anchored is not None:
            level = float(np.median(anchored))
            excess = float(anchored.max()) - level
        bounds = self.anchor_limits()
        if anchored is not None and self.needs_anchor():
            self._level.append(level)
            self._excess.append(excess)
        if np.isneginf(limit):
            return Decision(False, "warmup", float(len(self._scores)), float(self.policy.warmup))
        if score > limit:
            return Decision(False, "score", score, limit)
        if anchored is None:
            raise CalibrationError(
                "the guard needs the distances to the semantic memory",
                found=None,
                expected="one distance per patch for a frame that passes the score gate",
                next_step="report this as a bug",
            )
        if level > bounds[1]:
            return Decision(False, "anchor_global", level, bounds[1])
        if excess > bounds[0]:
            return Decision(False, "anchor_local", excess, bounds[0])
        return Decision(True, "admitted", score, limit)

    def rows_per_frame(self, per_frame: int, capacity: int) -> int:
        """Cap on the rows of one frame; with the gate off the paper's number alone counts."""
        return min(per_frame, max(1, int(self.policy.share * capacity))) if self.policy.gate else per_frame

    def reset(self) -> None:
        """Forget scores and baseline; warming up starts again."""
        self._scores, self._level, self._excess = [], [], []

    def state(self) -> dict[str, Array]:
        """Scores of the window and the anchors' baseline, float64."""
        return {"scores": np.array(self._scores), "level": np.array(self._level), "excess": np.array(self._excess)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take back what :meth:`state` gave, cut to this policy's window."""
        self._scores = [float(x) for x in state["scores"]][-self.policy.window :]
        self._level = [float(x) for x in state["level"]][: self.policy.window]
        self._excess = [float(x) for x in state["excess"]][: self.policy.window]
