"""Replays what a bundle proved at export on the engines of this machine (`andon verify`, DESIGN.md 3).

golden/golden.npz: frames uint8 [n, h, w, 3], class_ids int32 [n], score [n], map [n, 1, h, w] and every
``<stage>.<output>`` [n, ...] as torch gave them; each frame starts from the shipped state.
golden/gate.npz: what export's decision gate judged by: frames, class_ids, labels int32 [n] (1 defective, 0 good, -1
unknown), score [n] of the FP32 engines and threshold [classes]; of an alternative score.<program> and
threshold.<program>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, read_npz
from .bundlefiles import MAX_FILE_BYTES, inside
from .errors import BundleError
from .manifest import Variant
from .program import Program

Array = NDArray[Any]
Step = Callable[[int], object]
GOLDEN = "golden/golden.npz"
GATE = "golden/gate.npz"


@dataclass(frozen=True)
class Limits:
    """What a variant may differ by. output: of a stage's output, relative to its largest magnitude, None: not limited;
    correlation: least correlation of a map; flips: share of changed decisions; auroc_drop: against FP32, beyond the
    standard error on so few frames.

    tie: how near to the threshold, relative to it, a reference score has no verdict that could change. Where one good
    frame alone sets a threshold it lies on it, and the last bit would decide. FP32: what its scores may differ by; else
    FP32's rounding alone, as what is reduced has to keep every verdict that FP32 gives.
    """

    score: float | None
    output: float | None
    correlation: float
    flips: float
    auroc_drop: float
    tie: float = 1e-6


LIMITS: Mapping[Variant, Limits] = {
    "fp32": Limits(score=1e-3, output=1e-3, correlation=0.9999, flips=0.0, auroc_drop=0.001, tie=1e-3),
    "fp16": Limits(score=None, output=None, correlation=0.999, flips=0.005, auroc_drop=0.002),
    "int8": Limits(score=None, output=None, correlation=0.98, flips=0.015, auroc_drop=0.005),
}

#: Share of integer outputs that may differ where outputs are limited
INDEX_SHARE = 0.01


@dataclass(frozen=True)
class Check:
    """One line of the verification: `ok` says whether `value` keeps `limit` (None: reported, not limited)."""

    subject: str
    what: str
    value: float
    limit: float | None
    ok: bool


def golden_size(bundle: Bundle, name: str = GOLDEN) -> int:
    """Number of frames in a golden or gate set; 0 if the bundle has none."""
    if name not in bundle.manifest.files:
        return 0
    return len(_read(bundle, name, ("class_ids",))["class_ids"])


def golden_frames(bundle: Bundle) -> tuple[Array, Array]:
    """The golden set's frames [n, h, w, 3] and class indices [n].

    Raises:
        BundleError: the bundle has no golden set.
    """
    data = _read(bundle, GOLDEN, ("frames", "class_ids"))
    return data["frames"], data["class_ids"]


def replay_golden(program: Program, step: Step | None = None, *, most: int | None = None) -> list[Check]:
    """Every stage output, map and score of the golden set against the recorded ones.

    Args:
        most: only so many frames, spread over the set; None: all of them.

    Raises:
        BundleError: the bundle has no golden set, or its shapes are not the program's.
        EngineError: a stage failed.
    """
    bundle, limits = program.bundle, LIMITS[program.variant]
    data = _read(bundle, GOLDEN)
    outputs = [name for name in data if "." in name]
    worst = dict.fromkeys(outputs, 0.0)
    score, correlation = 0.0, 1.0
    for i in _spread(len(data["frames"]), most):
        result = _judge(program, data["frames"][i], int(data["class_ids"][i]))
        for name in outputs:
            worst[name] = max(worst[name], difference(program.read(name), data[name][i]))
        error = abs(result[0] - float(data["score"][i])) / max(abs(float(data["score"][i])), 1e-12)
        score = float(np.maximum(score, error))  # unlike max(), keeps what is not a number
        correlation = min(correlation, _correlation(result[1], data["map"][i]))
        if step is not None:
            step(1)
    checks = []
    for name, value in worst.items():
        if data[name].dtype.kind == "f":
            checks.append(_upper(name, "largest relative difference", value, limits.output))
        else:  # an index may fall the other way on a near tie
            checks.append(_upper(name, "share of other values", value, limits.output and INDEX_SHARE))
    checks.append(_upper("score", "largest relative difference", score, limits.score))
    checks.append(Check("map", "least correlation", correlation, limits.correlation, correlation >= limits.correlation))
    return checks


def _spread(count: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `count` frames, the first and the last among them."""
    if most is None or most >= count:
        return list(range(count))
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, most)})


def replay_finite(program: Program, most: int) -> list[Check]:
    """Whether score and map are numbers, where there is nothing to compare with: other programs than the default, and
    bundles without a golden set, for which a grey frame of each product is judged.

    Raises:
        EngineError: a stage failed.
    """
    bundle = program.bundle
    if golden_size(bundle):
        frames, ids = golden_frames(bundle)
        chosen = [(frames[i], int(ids[i])) for i in _spread(len(ids), most)]
    else:
        chosen = [(np.full_like(program.frame, 128), i) for i in range(len(bundle.manifest.classes))]
    bad = 0
    for frame, class_id in chosen:
        score, found = _judge(program, frame, class_id)
        bad += not (np.isfinite(score) and np.isfinite(found).all())
    return [Check("score and map", "frames without a number", bad, 0, bad == 0)]


def gate_programs(bundle: Bundle, variant: Variant) -> list[str]:
    """The programs that the gate set can be replayed with: the default, and alternatives that kept export's gate."""
    if variant == "fp32" or not golden_size(bundle, GATE):
        return ["default"]
    known = _read(bundle, GATE)
    manifest = bundle.manifest
    return [
        "default",
        *(p for p in manifest.alternatives if f"score.{p}" in known and manifest.gated(variant, p)),
    ]


def replay_gate(program: Program, step: Step | None = None) -> list[Check]:
    """The decisions of export's gate: share of flips, and the drop of AUROC per product where labels are known.

    Raises:
        BundleError: the bundle has no gate set.
        EngineError: a stage failed.
    """
    bundle, limits = program.bundle, LIMITS[program.variant]
    other = "" if program.name == "default" else f".{program.name}"
    data = _read(bundle, GATE, ("frames", "class_ids", "labels", f"score{other}", f"threshold{other}"))
    full = data[f"score{other}"]
    scores = np.empty(len(full))
    for i, (frame, class_id) in enumerate(zip(data["frames"], data["class_ids"], strict=True)):
        scores[i] = _judge(program, frame, int(class_id))[0]
        if step is not None:
            step(1)
    threshold = data[f"threshold{other}"][data["class_ids"]]
    flips = float(np.mean(flipped(program.variant, scores, full, threshold)))
    allowed = max(limits.flips, 1 / len(scores)) if limits.flips else 0.0  # one frame is the least that can be seen
    of = f"{program.name}: " if other else ""
    checks = [_upper(f"{of}decisions", "share of flips", flips, allowed)]
    for index, product in enumerate(bundle.manifest.classes):
        mine = (data["class_ids"] == index) & (data["labels"] >= 0) & np.isfinite(scores)
        drop = _auroc_drop(full[mine], scores[mine], data["labels"][mine] == 1)
        if drop is not None:
            checks.append(_upper(f"{of}{product}", "AUROC drop", drop[0], limits.auroc_drop + 2 * drop[1]))
    return checks


def flipped(variant: Variant, scores: Array, reference: Array, threshold: Array) -> Array:
    """Which verdicts a variant changes: bool [n] of scores, reference scores and thresholds [n] of the same frames.

    Not the verdict of a frame whose reference score lies on its threshold (Limits.tie): that has none to keep. A score
    that is not a number is always a change.
    """
    # The floor is that of the scores' own comparison: a threshold of 0 has no scale to be near to.
    near = np.abs(reference - threshold) <= LIMITS[variant].tie * np.maximum(np.abs(threshold), 1e-6)
    return np.asarray(~np.isfinite(scores) | (~near & ((scores > threshold) != (reference > threshold))))


def _auroc_drop(before: Array, now: Array, defective: Array) -> tuple[float, float] | None:
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


def _judge(program: Program, frame: Array, class_id: int) -> tuple[float, Array]:
    program.reset()
    np.copyto(program.frame, frame)
    result = program.run(class_id)
    return result.score, result.map


def _correlation(value: Array, reference: Array) -> float:
    """Pearson correlation of two maps; 1 for two constant ones that agree."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (value, reference))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if scale == 0:
        return 1.0 if np.allclose(value, reference, rtol=1e-3) else 0.0
    return float((a * b).sum() / scale) if np.isfinite(scale) else 0.0


def _upper(subject: str, what: str, value: float, limit: float | None) -> Check:
    return Check(subject, what, value, limit, bool(np.isfinite(value)) and (limit is None or value <= limit))


def _read(bundle: Bundle, name: str, keys: tuple[str, ...] | None = None) -> dict[str, Array]:
    if name not in bundle.manifest.files:
        raise BundleError(
            f"the bundle has no {name}",
            found=", ".join(sorted(bundle.manifest.files)),
            expected=name,
            next_step="export the bundle again: andon export --method METHOD",
        )
    return read_npz(inside(bundle.root, name), keys, limit=MAX_FILE_BYTES)
