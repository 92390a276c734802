"""The memory of normal: fixed arrays, semantic rows that never change, episodic rows that the line adds (DESIGN.md 5).

The arrays have the shape of the program's state tensors, so an update is a write of rows, never a rebuild:
rows ``0 .. semantic_rows-1`` come from enrolment or training, the episodic rows follow; ``valid`` marks what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .coreset import greedy_k_center
from .errors import CalibrationError
from .policies import MemoryPolicy

Array = NDArray[Any]


@dataclass(frozen=True)
class Change:
    """What one update did. `start`, `stop`: bank rows to write to the program; `length`: valid episodic rows after."""

    version: int
    added: int
    compressed: bool
    length: int
    start: int
    stop: int


def select_farthest(patch_score: Array, count: int) -> Array:
    """Indices of the `count` patches with the highest score, best first; ties go to the lower index."""
    return np.argsort(-patch_score, kind="stable")[:count]


def select_transport(
    transport: Array, is_foreground: Array, foreground: int, background: int, eligible: Array | None = None
) -> Array:
    """FOCT eq. 6 as meant: the patches with the largest transport probability among each label.

    transport: [m] max over memory rows of P; is_foreground: [m] bool, label of the row with that maximum;
    eligible: [m] bool, patches that may be taken at all (the gate's patch limit).
    """
    order = np.argsort(-transport, kind="stable")
    if eligible is not None:
        order = order[eligible[order]]
    front = order[is_foreground[order]][:foreground]
    back = order[~is_foreground[order]][:background]
    return np.concatenate([front, back])


class EpisodicMemory:
    """Semantic and episodic rows of one product.

    bank: [rows, d] float32 and valid: [rows] of 0 or 1 as in the bundle's state; valid episodic rows are a prefix of
    the episodic part. foreground: [rows] of 0 or 1, if the method labels its rows.

    Raises:
        CalibrationError: arrays that do not fit each other, no valid semantic row, or fewer episodic rows than the
            policy's capacity.
    """

    def __init__(
        self,
        bank: Array,
        valid: Array,
        semantic_rows: int,
        policy: MemoryPolicy,
        foreground: Array | None = None,
    ) -> None:
        self.policy = policy
        self.semantic_rows = semantic_rows
        self.bank = np.array(bank, np.float32)
        self.valid = np.array(valid, np.float32)
        self.foreground = None if foreground is None else np.array(foreground, np.float32)
        self._check()
        self.origin = np.full(len(self.bank) - semantic_rows, -1, np.int64)
        self.version = 0
        labels = None if self.foreground is None else self.foreground.copy()
        self._shipped = (self.bank.copy(), self.valid.copy(), labels)

    def _check(self) -> None:
        rows = len(self.bank)
        labels = self.foreground
        fits = self.bank.ndim == 2 and self.valid.shape == (rows,) and (labels is None or labels.shape == (rows,))
        if not fits or not 0 < self.semantic_rows < rows:
            raise CalibrationError(
                "memory arrays do not fit each other",
                found=f"bank {self.bank.shape}, valid {self.valid.shape}, semantic rows {self.semantic_rows}",
                expected="bank [rows, d], valid [rows], 0 < semantic rows < rows",
                next_step="export the bundle again",
            )
        tail = self.valid[self.semantic_rows :]
        length = int(tail.sum())
        if not np.isin(self.valid, (0.0, 1.0)).all() or not tail[:length].all():
            raise CalibrationError(
                "memory mask is not 0/1 with the episodic rows first",
                found=f"{length} valid of {len(tail)} episodic rows",
                expected="values 0 or 1, valid rows before empty ones",
                next_step="reset the memory or roll back to a snapshot",
            )
        if not self.valid[: self.semantic_rows].any() or not np.isfinite(self.bank[self.valid > 0]).all():
            raise CalibrationError(
                "memory has no usable semantic row",
                found=f"{int(self.valid[: self.semantic_rows].sum())} valid semantic rows",
                expected="at least one, and finite values in every valid row",
                next_step="enroll the product again: andon enroll",
            )
        if self.policy.capacity > len(tail):
            raise CalibrationError(
                "memory capacity is larger than the bundle's episodic rows",
                found=self.policy.capacity,
                expected=f"at most {len(tail)}",
                next_step="lower memory.capacity in the line configuration, or export with more episodic rows",
            )

    @property
    def length(self) -> int:
        """Valid episodic rows."""
        return int(self.valid[self.semantic_rows :].sum())

    @property
    def semantic(self) -> Array:
        """[n, d] the valid semantic rows."""
        return self.bank[: self.semantic_rows][self.valid[: self.semantic_rows] > 0]

    @property
    def episodic(self) -> Array:
        """[length, d] the valid episodic rows."""
        return self.bank[self.semantic_rows : self.semantic_rows + self.length]

    @property
    def rows(self) -> Array:
        """[n, d] all valid rows."""
        return self.bank[self.valid > 0]

    def admit(self, rows: Array, origin: int, foreground: Array | None = None) -> Change:
        """Append rows; compress by greedy k-centre when the capacity is reached (FOCT eq. 7).

        rows: [k, d] float32, k >= 1; origin: number of the admission, kept beside each row; foreground: [k] of 0 or 1.

        Raises:
            CalibrationError: rows of another width, or not finite; the memory is unchanged.
        """
        if rows.ndim != 2 or rows.shape[1] != self.bank.shape[1] or not len(rows) or not np.isfinite(rows).all():
            raise CalibrationError(
                "rows cannot enter the memory",
                found=f"shape {rows.shape}, finite {bool(np.isfinite(rows).all())}",
                expected=f"finite [k, {self.bank.shape[1]}]",
                next_step="verify the bundle on this device: andon verify",
            )
        before, first = self.length, self.semantic_rows
        content = np.concatenate([self.episodic, rows.astype(np.float32)])
        origins = np.concatenate([self.origin[:before], np.full(len(rows), origin, np.int64)])
        labels = self._labels(before, len(rows), foreground)
        compressed = len(content) >= self.policy.capacity
        if compressed:
            kept = np.sort(greedy_k_center(content, self.policy.compressed))
            content, origins = content[kept], origins[kept]
            labels = None if labels is None else labels[kept]
        self._write(content, origins, labels)
        self.version += 1
        start = first if compressed else first + before
        stop = first + max(before, len(content))
        return Change(self.version, len(rows), compressed, len(content), start, stop)

    def _labels(self, before: int, count: int, foreground: Array | None) -> Array | None:
        if self.foreground is None:
            return None
        old = self.foreground[self.semantic_rows : self.semantic_rows + before]
        new = np.ones(count, np.float32) if foreground is None else foreground.astype(np.float32)
        return np.concatenate([old, new])

    def _write(self, content: Array, origins: Array, labels: Array | None) -> None:
        """Replace the episodic part; empty rows are zero."""
        first, length = self.semantic_rows, len(content)
        self.bank[first:] = 0.0
        self.bank[first : first + length] = content
        self.valid[first:] = 0.0
        self.valid[first : first + length] = 1.0
        self.origin[:] = -1
        self.origin[:length] = origins
        if self.foreground is not None:
            self.foreground[first:] = 0.0
            if labels is not None:
                self.foreground[first : first + length] = labels

    def reset(self) -> None:
        """Back to the rows that the bundle shipped; the version counts on."""
        bank, valid, foreground = self._shipped
        self.bank[:], self.valid[:] = bank, valid
        if self.foreground is not None and foreground is not None:
            self.foreground[:] = foreground
        self.origin[:] = -1
        self.version += 1

    def state(self) -> dict[str, Array]:
        """Everything that is not in the bundle: episodic rows, their origins and labels, the version."""
        length = self.length
        labels = np.zeros(0, np.float32)
        if self.foreground is not None:
            labels = self.foreground[self.semantic_rows : self.semantic_rows + length].copy()
        return {
            "rows": self.episodic.copy(),
            "origin": self.origin[:length].copy(),
            "foreground": labels,
            "version": np.array(self.version, np.int64),
        }

    def restore(self, state: Mapping[str, Array], *, version: int | None = None) -> None:
        """Take back what :meth:`state` gave; `version` overrides the number (a rollback is a new version).

        Raises:
            CalibrationError: the rows do not fit this memory; it is unchanged.
        """
        rows, origin, labels = state["rows"], state["origin"], state["foreground"]
        fits = rows.ndim == 2 and rows.shape[1] == self.bank.shape[1] and origin.shape == (len(rows),)
        labelled = self.foreground is None or labels.shape == (len(rows),)
        if not fits or not labelled or len(rows) > len(self.origin) or not np.isfinite(rows).all():
            raise CalibrationError(
                "saved memory does not fit this bundle",
                found=f"rows {rows.shape}, labels {labels.shape}",
                expected=f"at most {len(self.origin)} finite rows of {self.bank.shape[1]} values",
                next_step="roll back to an older snapshot or reset the memory",
            )
        self._write(rows.astype(np.float32), origin, None if self.foreground is None else labels)
        self.version = int(state["version"]) if version is None else version
