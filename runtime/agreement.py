"""How far an engine may be from what the export recorded, and how that is measured (export's gate, `andon verify`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import Variant

Array = NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """What a variant may differ by.

    output: largest difference of any stage's output over its largest magnitude; of one that a loop gives, for each of
        its steps, up to LOOP in all. None: a reduced variant is free to differ inside a program; what the runtime reads
        counts.
    score: of FP32 the largest relative difference of a frame's score; of a reduced variant the RMS difference of scores
        over their RMS, as a frame that scores next to nothing has no scale of its own.
    read: RMS difference over RMS of maps and of whatever else the runtime reads: logits, what the memory learns from,
        telemetry. None: `output` says it.
    index: share of integer outputs that may differ, of those that are limited.
    carried: RMS difference over RMS of what a program carries from frame to frame, after the warm set.
    correlation: least correlation of all maps together; flips: share of changed decisions, and of products that a
        classifier tells otherwise; auroc_drop: against FP32, beyond the standard error on so few frames.

    tie: how near to the threshold, relative to it, a reference score has no verdict that could change. Where one good
    frame alone sets a threshold it lies on it, and the last bit would decide. FP32: what its scores may differ by; else
    FP32's rounding alone, as what is reduced has to keep every verdict that FP32 gives.
    """

    score: float
    output: float | None
    correlation: float
    flips: float
    auroc_drop: float
    read: float | None = None
    index: float = 0.01
    carried: float = 0.05
    tie: float = 1e-6


#: Measured over bundles of all six methods (elpv; knn and foct enrolled from 1 and 4 images, too), golden and gate
#: sets, files as onnxruntime runs them and as a GPU rounds (precision.simulate), the worst: score .004 in FP16 and .032
#: in INT8, map .012 and .080, logits .012 and .14, candidates .015 and .13, patch_score and nearest .011 and .096 (and
#: anchors: of a memory that has learnt nothing they are the patch scores), transport .013 and .074, matched .07 and
#: .17 of the rows, foct's carried moments after 16 frames .09 and .43 (1 where they are not carried); correlation of
#: all golden maps .9999 and .988 (of one alone down to .93); FP32 score 3e-6, outputs 1.2e-5 outside loops. TensorRT on
#: a device rounds otherwise again, which nobody has measured: so there is room for two to five times that.
LIMITS: Mapping[Variant, Limits] = {
    "fp32": Limits(score=1e-3, output=1e-3, correlation=0.9999, flips=0.0, auroc_drop=0.001, tie=1e-3),
    "fp16": Limits(
        score=0.02, output=None, correlation=0.999, flips=0.005, auroc_drop=0.002, read=0.05, index=0.25, carried=0.3
    ),
    "int8": Limits(
        score=0.1, output=None, correlation=0.98, flips=0.015, auroc_drop=0.005, read=0.3, index=0.5, carried=0.8
    ),
}

#: Most that an output of a loop may differ by in FP32, whatever its number of steps. foct's ten Adam steps, which
#: divide tiny gradients by their own size, were 1.1e-3 from torch (limit 1e-2), no step alone more than 4.4e-4.
LOOP = 0.05


def difference(value: Array, reference: Array) -> float:
    """Largest difference over the largest magnitude; of integers and booleans the share that differs.

    Not a number or an infinity on one side only counts as infinite.
    """
    if reference.dtype.kind != "f":
        return float(np.mean(value != reference))
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(value)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(reference[finite]).max())
    return float(np.abs(value[finite].astype(np.float64) - reference[finite]).max()) / max(scale, 1e-12)


class Rms:
    """RMS difference of an output over the frames that are added, over the RMS of all its recorded values."""

    def __init__(self, recorded: Array):
        finite = np.asarray(recorded, np.float64)[np.isfinite(recorded)]
        self._scale = float(np.sqrt(np.mean(finite * finite))) if finite.size else 0.0
        self._sum, self._count = 0.0, 0

    def add(self, value: Array, reference: Array) -> None:
        """Another frame: arrays of one shape. Not a number on one side only counts as infinite."""
        finite = np.isfinite(reference)
        if not np.array_equal(finite, np.isfinite(value)):
            self._sum = float("inf")  # and stays so: what is not a number would make the sum none
            return
        apart = np.asarray(value, np.float64)[finite] - np.asarray(reference, np.float64)[finite]
        self._sum += float((apart * apart).sum())
        self._count += apart.size

    @property
    def value(self) -> float:
        """So far."""
        return float(np.sqrt(self._sum / max(self._count, 1))) / max(self._scale, 1e-12)


def rms_difference(value: Array, reference: Array) -> float:
    """RMS difference over RMS, of arrays of one shape."""
    found = Rms(reference)
    found.add(value, reference)
    return found.value


def correlation(value: Array, reference: Array) -> float:
    """Pearson correlation over all pixels of all maps; 1 for two constant ones that agree."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (value, reference))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if scale == 0:
        return 1.0 if np.allclose(np.ravel(value), np.ravel(reference), rtol=1e-3) else 0.0
    return float((a * b).sum() / scale) if np.isfinite(scale) else 0.0


def flipped(variant: Variant, scores: Array, reference: Array, threshold: Array) -> Array:
    """Which verdicts a variant changes: bool [n] of scores, reference scores and thresholds [n] of the same frames.

    Not the verdict of a frame whose reference score lies on its threshold (Limits.tie): that has none to keep. A score
    that is not a number is always a change.
    """
    # The floor is that of the scores' own comparison: a threshold of 0 has no scale to be near to.
    near = np.abs(reference - threshold) <= LIMITS[variant].tie * np.maximum(np.abs(threshold), 1e-6)
    return np.asarray(~np.isfinite(scores) | (~near & ((scores > threshold) != (reference > threshold))))


def retold(variant: Variant, logits: Array, reference: Array) -> Array:
    """Of which frames a variant's classifier tells another product: bool [n] of logits [n, classes] of the same frames.

    Not of a frame whose two likeliest products are equally likely (Limits.tie). Logits that are no numbers always do.
    """
    if reference.shape[1] < 2:
        return np.asarray(~np.isfinite(logits).all(1))
    ordered = np.sort(reference, axis=1)
    tie = LIMITS[variant].tie * np.maximum(np.abs(reference).max(1), 1e-6)
    near = ordered[:, -1] - ordered[:, -2] <= tie
    return np.asarray(~np.isfinite(logits).all(1) | (~near & (logits.argmax(1) != reference.argmax(1))))


def most_flips(variant: Variant, frames: int) -> float:
    """The share of flips that is allowed on so many frames.

    Export keeps the limit on the whole test set. On few frames more of those flips may be found than belong there: a
    bundle that is at its limit is beyond three standard errors in one or two of a hundred draws of 64 frames. One frame
    is the least that can be seen.
    """
    share = LIMITS[variant].flips
    return max(share + 3 * float(np.sqrt(share * (1 - share) / frames)), 1 / frames) if share else 0.0


def auroc_drop(before: Array, now: Array, defective: Array) -> tuple[float, float] | None:
    """How much AUROC is lost, and the standard error of that; None unless both kinds of frames are there.

    The gate set is small: one (defective, good) pair in another order weighs more than the limit, which export kept on
    the whole test set. So only a drop beyond the error of so few frames counts (DeLong et al. 1988, paired).
    """
    if not defective.any() or defective.all():
        return None
    order = [np.sign(v[defective][:, None].astype(np.float64) - v[~defective][None]) / 2 for v in (before, now)]
    lost = order[0] - order[1]
    spread = sum(float(lost.mean(axis=a).var()) / max(lost.shape[1 - a] - 1, 1) for a in (0, 1))
    return float(lost.mean()), float(np.sqrt(spread))
