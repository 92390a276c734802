"""How good scores and maps are: the figures of the field, the same for the torch model and for the engines.

Scores: larger is more anomalous. An AUROC below 0.5 is reported as it is. Figures that are not defined (no defective
image, no mask) are None. A part without a score has no place in a figure made of scores, and one that was judged
UNKNOWN is neither a find nor a miss: both are left out, and `unknown_rate` says how much that is.

sklearn is imported when a figure needs it, so that the line device starts without it; the areas, which run over every
pixel of a test set, are rank sums of our own, tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Metrics = dict[str, float | None]
AUPRO_LIMIT = 0.3
#: Defective values that are looked up at a time.
_PIECE = 1 << 16
#: Figures whose name alone does not say what they are, as tables head them.
_HEADS = {"pixel_AUPRO": f"pixel_AUPRO@{AUPRO_LIMIT:g}"}


def auroc(scores: ArrayLike, defective: ArrayLike) -> float | None:
    """Area under the ROC curve of image or pixel scores; None unless both kinds are there.

    The share of (defective, good) pairs in the right order, ties counting half. Sorting only the good values takes a
    tenth of the time and memory of a whole curve where the scores are the pixels of a test set.

    scores, defective: any equal shape; `defective` is read as bool.
    """
    truth = np.asarray(defective, bool).ravel()
    values = np.asarray(scores).ravel()
    good, bad = np.sort(values[~truth]), values[truth]
    if good.size == 0 or bad.size == 0:
        return None
    return float(_below(good, bad).mean() / good.size)


def average_precision(scores: ArrayLike, defective: ArrayLike) -> float | None:
    """Area under the precision-recall curve as a step function (sklearn's average precision); None as `auroc`.

    The mean over the defective values of the precision that a threshold just below each of them has; what is equal is
    found together. Summed in pieces beside the two sorted halves: 10^8 pixels take no more memory than in `auroc`.

    scores, defective: any equal shape; `defective` is read as bool.
    """
    truth = np.asarray(defective, bool).ravel()
    values = np.asarray(scores).ravel()
    good, bad = values[~truth], values[truth]
    if good.size == 0 or bad.size == 0:
        return None
    good.sort()
    bad.sort()
    total = 0.0
    for start in range(0, bad.size, _PIECE):
        piece = bad[start : start + _PIECE]
        found = bad.size - np.searchsorted(bad, piece, "left")
        total += float((found / (found + good.size - np.searchsorted(good, piece, "left"))).sum())
    return total / bad.size


def aupro(maps: ArrayLike, masks: ArrayLike, limit: float = AUPRO_LIMIT) -> float | None:
    """Area under the per-region overlap curve up to a false positive rate, divided by it (Bergmann et al. 2021).

    The overlap is the mean over all defect regions (8-connected) of the share of the region above the threshold; the
    false positive rate is the share of good pixels of all images above it. Exact: every distinct value is a threshold,
    the curve is linear between them. Each defect pixel of weight w = 1 / (its region's area * number of regions) adds w
    for every good pixel below it (half for equal ones) that is among the `limit` highest: the area, summed by pixel.

    Args:
        maps: float [N, H, W]. masks: bool [N, H, W]; good images have an empty one.
        limit: largest false positive rate that counts, at most 1.
    """
    values = np.asarray(maps, np.float32)
    truth = np.asarray(masks, bool)
    weights, regions = _region_weights(truth)
    good, bad = values[~truth], values[truth]
    if regions == 0 or good.size == 0:
        return None
    counted = limit * good.size
    first = good.size - 1 - int(counted)
    # The curve ends inside the group of good pixels that equal `edge`; of that group it takes `rest`.
    edge = np.partition(good, first)[first] if first >= 0 else -np.inf
    above = np.sort(good[good > edge])
    rest = counted - above.size
    area = float(np.dot(weights[bad > edge], _below(above, bad[bad > edge]) + rest))
    group = np.count_nonzero(good == edge)
    if group:
        area += float(weights[bad == edge].sum(dtype=np.float64)) * rest * (rest / group) / 2
    return float(area / (regions * counted))


def _below(ordered: Array, values: Array) -> Array:
    """How many of the `ordered` values lie below each value, equal ones counting half; float64."""
    left = np.searchsorted(ordered, values, "left")
    return (left + np.searchsorted(ordered, values, "right")) / 2


def _region_weights(masks: Array) -> tuple[Array, int]:
    """1/area of its region for each defect pixel, float64 in the order of ``values[masks]``; the number of regions."""
    shares = []
    regions = 0
    for mask in masks:
        if mask.any():
            count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
            shares.append((1 / stats[:, cv2.CC_STAT_AREA].clip(1))[labels[mask]])  # no background: area 0
            regions += count - 1
    return np.concatenate(shares) if shares else np.empty(0), regions


def best_f1(scores: ArrayLike, defective: ArrayLike) -> tuple[float, float] | None:
    """Largest F1 over all thresholds and the threshold that reaches it; NG is a score *above* it. None as `auroc`.

    The threshold lies midway between the two neighbouring scores, so that rounding does not decide.
    """
    from sklearn.metrics import precision_recall_curve

    truth = np.asarray(defective, bool).ravel()
    values = np.asarray(scores, np.float64).ravel()
    if truth.all() or not truth.any():
        return None
    precision, recall, thresholds = precision_recall_curve(truth, values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    lowest_ng = float(thresholds[best])
    below = values[values < lowest_ng]
    threshold = (float(below.max()) + lowest_ng) / 2 if below.size else float(np.nextafter(lowest_ng, -np.inf))
    return float(f1[best]), threshold


def decisions(scores: ArrayLike, defective: ArrayLike, threshold: float) -> Metrics:
    """What a threshold does; see :func:`error_rates`."""
    return error_rates(np.asarray(scores).ravel() > threshold, defective)


def error_rates(ng: ArrayLike, defective: ArrayLike) -> Metrics:
    """F1, balanced_accuracy, false_alarm_rate (good parts NG), miss_rate (defective OK) of parts that are OK or NG.

    ng, defective: bool [N]; a figure of a kind of parts that is not there is None, and F1 without a defective part: it
    would be 0 after a single false alarm, whatever the model can find.
    """
    truth, ng = np.asarray(defective, bool).ravel(), np.asarray(ng, bool).ravel()
    false_alarm = float(ng[~truth].mean()) if (~truth).any() else None
    miss = float((~ng[truth]).mean()) if truth.any() else None
    hits = int((ng & truth).sum())
    both = int(ng.sum() + truth.sum())
    return {
        "F1": 2 * hits / both if truth.any() else None,
        "balanced_accuracy": None if false_alarm is None or miss is None else 1 - (false_alarm + miss) / 2,
        "false_alarm_rate": false_alarm,
        "miss_rate": miss,
    }


def summarize(
    scores: ArrayLike,
    defective: ArrayLike,
    *,
    threshold: float | None = None,
    labels: Sequence[str] | None = None,
    maps: ArrayLike | None = None,
    masks: ArrayLike | None = None,
) -> Metrics:
    """All figures of one product.

    Args:
        scores: float [N], not finite where a part has none. defective: bool [N].
        threshold: decision threshold of the error rates; the one of the best F1 if None (stated as `threshold`).
        labels: what was decided, OK, NG or UNKNOWN; with a `threshold` the error rates are those of the decided parts.
        maps, masks: float and bool [N, H, W] at one resolution, for the pixel figures; see :func:`map_at`, `mask_at`.

    Figures of scores and maps are over the parts that have a score; `good` and `defective` count all. With `labels`,
    `unknown_rate`, `unknown_rate_good` and `unknown_rate_defective` are the shares that were judged UNKNOWN.
    """
    values, truth = np.asarray(scores, np.float64).ravel(), np.asarray(defective, bool).ravel()
    scored = np.isfinite(values)
    if not scored.all() and maps is not None and masks is not None:
        maps, masks = np.asarray(maps)[scored], np.asarray(masks)[scored]
    best = best_f1(values[scored], truth[scored])
    used = threshold if threshold is not None else best[1] if best else None
    if used is None:
        errors: Metrics = {}
    elif threshold is None or labels is None:
        errors = decisions(values[scored], truth[scored], used)
    else:
        decided = np.array([label != "UNKNOWN" for label in labels], bool)
        errors = error_rates(np.array([label == "NG" for label in labels], bool)[decided], truth[decided])
    result: Metrics = {
        "image_AUROC": auroc(values[scored], truth[scored]),
        "pixel_AUROC": None if maps is None or masks is None else auroc(maps, masks),
        "pixel_AUPRO": None if maps is None or masks is None else aupro(maps, masks),
        "pixel_AP": None if maps is None or masks is None else average_precision(maps, masks),
        "F1_max": best[0] if best else None,
        "F1_threshold": best[1] if best else None,
        "threshold": used,
        **errors,
        **(_unknown_rates(labels, truth) if labels is not None else {}),
        "good": float(np.count_nonzero(~truth)),
        "defective": float(np.count_nonzero(truth)),
    }
    return result


def _unknown_rates(labels: Sequence[str], truth: Array) -> Metrics:
    unknown = np.array([label == "UNKNOWN" for label in labels], bool)
    kinds = {"": np.ones_like(truth), "_good": ~truth, "_defective": truth}
    return {f"unknown_rate{name}": float(unknown[of].mean()) if of.any() else None for name, of in kinds.items()}


def mean_metrics(products: Mapping[str, Metrics]) -> Metrics:
    """Mean over products of every figure that all of them have; counts are summed, thresholds left out."""
    names = [n for n in next(iter(products.values())) if n not in ("F1_threshold", "threshold")]
    result: Metrics = {}
    for name in names:
        values = [m.get(name) for m in products.values()]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            result[name] = None
        else:
            result[name] = float(np.sum(known)) if name in ("good", "defective") else float(np.mean(known))
    return result


def percent(rate: float) -> str:
    """A rate in words. What thousands of parts promise is less than a tenth of a percent: rounded to one it would be
    nothing."""
    return f"{100 * rate:.2g}%" if 0 < rate < 0.001 else f"{rate:.1%}"


def map_at(score_map: ArrayLike, size: tuple[int, int]) -> Array:
    """A score map [h, w] enlarged (bilinear) or reduced to `size` (H, W), float32."""
    array = np.asarray(score_map, np.float32)
    return array if array.shape == size else cv2.resize(array, size[::-1], interpolation=cv2.INTER_LINEAR)


def mask_at(mask: ArrayLike, size: tuple[int, int]) -> Array:
    """A mask [h, w] at `size` (H, W), bool; nearest pixel, as the benchmarks do it."""
    array = np.asarray(mask, np.uint8)
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0


def table(products: Mapping[str, Metrics], columns: Sequence[str] = (), title: str = "product") -> str:
    """Figures as text: a line per product, and their mean if there are several. columns: the main figures if empty."""
    if not columns:
        columns = ["image_AUROC", "pixel_AUROC", "pixel_AUPRO", "pixel_AP", "F1_max", "balanced_accuracy"]
        columns += ["good", "defective"]
        if any("unknown_rate" in metrics for metrics in products.values()):
            columns.insert(-2, "unknown_rate")
    rows = dict(products)
    if len(rows) > 1:
        rows["mean"] = mean_metrics(products)
    width = max(len(title), *(len(name) for name in rows))
    heads = [_HEADS.get(c, c).rjust(6) for c in columns]
    lines = ["  ".join([f"{title:<{width}}", *heads])]
    for name, metrics in rows.items():
        cells = [_cell(c, metrics.get(c)).rjust(len(head)) for c, head in zip(columns, heads, strict=True)]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name in ("good", "defective") else f"{value:.3f}"
