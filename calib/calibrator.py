"""Online calibration of one product's memory: score, guard, select, admit (DESIGN.md 5). numpy only.

The runtime (runtime/memorybanks.py) and the few-shot evaluation (runtime/enrolment/fewshot.py) drive the same object,
so what is measured is what runs on the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distance import nearest
from .errors import CalibrationError
from .guard import AdmissionGuard, Decision, Reason
from .memory import Change, EpisodicMemory, select_farthest, select_transport
from .policies import GuardPolicy, MemoryPolicy

Array = NDArray[Any]


@dataclass(frozen=True)
class Observation:
    """What the program says about one frame, against the memory as it was.

    score: image score; candidates: [m, d] patch features in bank space; patch_score: [m];
    transport: [m] largest transport probability, matched: [m] int32 bank row of it (both only for methods with CT).
    anchored: [m] distance of each patch to its nearest semantic row; None: it is computed here, of the candidates.
    """

    score: float
    candidates: Array
    patch_score: Array
    transport: Array | None = None
    matched: Array | None = None
    anchored: Array | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a frame. change and patches (indices into the frame's patches) are None unless admitted."""

    decision: Decision
    change: Change | None = None
    patches: Array | None = None


class OnlineCalibrator:
    """Memory and guard of one product. Not thread-safe: the inference thread owns it."""

    def __init__(self, memory: EpisodicMemory, guard: GuardPolicy) -> None:
        self.memory = memory
        self.guard = AdmissionGuard(guard)
        self.frozen = False
        self.admissions = 0
        self.counts: Counter[str] = Counter()
        self._typical_patch = float("nan")

    @classmethod
    def create(
        cls,
        bank: Array,
        valid: Array,
        semantic_rows: int,
        memory: MemoryPolicy,
        guard: GuardPolicy,
        foreground: Array | None = None,
    ) -> OnlineCalibrator:
        """From the arrays of a bundle.

        Raises:
            CalibrationError: see :class:`EpisodicMemory`.
        """
        return cls(EpisodicMemory(bank, valid, semantic_rows, memory, foreground), guard)

    def observe(self, seen: Observation, *, trusted: bool = True) -> Outcome:
        """Let one judged frame teach the memory, if it may.

        trusted: False for frames that were not judged OK; they never teach while the gate is on, and do not count as
        seen either.
        """
        policy = self.guard.policy
        if (reason := self._closed(trusted)) is not None:
            return self._refuse(reason)
        anchored = None
        if policy.gate and (self.guard.needs_anchor() or seen.score <= self.guard.score_limit()):
            anchored = self._anchored(seen)
        decision = self.guard.judge(seen.score, anchored)
        if not decision.admit:
            self.counts[decision.reason] += 1
            return Outcome(decision)
        median = float(np.median(seen.patch_score))
        self._typical_patch = median if np.isnan(self._typical_patch) else 0.95 * self._typical_patch + 0.05 * median
        patches = self._select(seen)
        if not len(patches):
            return self._refuse("no_candidate")
        self.admissions += 1
        labels = None if self.memory.foreground is None or seen.matched is None else self._labels(seen)[patches]
        change = self.memory.admit(seen.candidates[patches], self.admissions, labels)
        self.counts["admitted"] += 1
        return Outcome(decision, change, patches)

    def _anchored(self, seen: Observation) -> Array:
        """[m] distance of each patch to its nearest semantic row, which nothing that is learnt moves."""
        if seen.anchored is not None:
            return seen.anchored
        return nearest(seen.candidates.astype(np.float32, copy=False), self.memory.semantic)[0]

    def turns_away(self, *, trusted: bool = True) -> bool:
        """Whether a frame cannot teach, whatever it shows; it is counted as :meth:`observe` would count it."""
        reason = self._closed(trusted)
        if reason is not None:
            self._refuse(reason)
        return reason is not None

    def _closed(self, trusted: bool) -> Reason | None:
        if self.frozen:
            return "frozen"
        return "not_ok" if self.guard.policy.gate and not trusted else None

    def _refuse(self, reason: Reason) -> Outcome:
        self.counts[reason] += 1
        return Outcome(Decision(False, reason))

    def _labels(self, seen: Observation) -> Array:
        """[m] 0 or 1: query patches inherit the label of the row they match."""
        if self.memory.foreground is None or seen.matched is None:
            return np.ones(len(seen.patch_score), np.float32)
        return self.memory.foreground[seen.matched]

    def _select(self, seen: Observation) -> Array:
        policy = self.memory.policy
        count = self.guard.rows_per_frame(policy.per_frame, policy.capacity)
        if policy.selection == "farthest":
            return select_farthest(seen.patch_score, count)
        if seen.transport is None:
            raise CalibrationError(
                "selection 'transport' needs transport probabilities, which this program does not give",
                found="no memory.transport output in the manifest",
                expected="a method with conditional transport (foct)",
                next_step="set memory.selection: farthest",
            )
        eligible = None
        if self.guard.policy.gate:
            # An anomalous patch can have a high transport probability (METHODS.md 5.4): take known-normal ones only.
            eligible = seen.patch_score <= self._typical_patch
        front = self._labels(seen) > 0
        return select_transport(seen.transport, front, policy.foreground, policy.background, eligible)[:count]

    def reset(self) -> None:
        """Memory as shipped, guard warming up again."""
        self.memory.reset()
        self.guard.reset()
        self._typical_patch = float("nan")

    def state(self) -> dict[str, Array]:
        """Flat arrays for a snapshot."""
        own = {
            "admissions": np.array(self.admissions, np.int64),
            "frozen": np.array(self.frozen),
            "typical_patch": np.array(self._typical_patch),
        }
        guard = {f"guard.{name}": array for name, array in self.guard.state().items()}
        return {f"memory.{name}": array for name, array in self.memory.state().items()} | guard | own

    def restore(self, state: Mapping[str, Array], *, version: int | None = None) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            CalibrationError: arrays are missing or do not fit; nothing has changed then.
        """

        def part(prefix: str) -> dict[str, Array]:
            return {name[len(prefix) :]: array for name, array in state.items() if name.startswith(prefix)}

        try:
            admissions, frozen, typical = state["admissions"], state["frozen"], state["typical_patch"]
            guard = AdmissionGuard(self.guard.policy)
            guard.restore(part("guard."))
            self.memory.restore(part("memory."), version=version)
        except KeyError as error:
            raise CalibrationError(
                "saved memory is incomplete",
                found=sorted(state),
                expected=str(error),
                next_step="roll back to an older snapshot or reset the memory",
            ) from error
        self.guard = guard
        self.admissions, self.frozen, self._typical_patch = int(admissions), bool(frozen), float(typical)
