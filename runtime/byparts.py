"""An evaluation counted by part, where several test pictures show one: what a threshold's promise is about.

Each part weighs one, its pictures share that (calib/threshold.py counts a calibration's the same way): ten pictures of
a part that is called NG are one part's false alarm, and figures by picture would say it ten times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .evaluation import Judged
from .quality import Metrics, table

Array = NDArray[np.float64]
_COLUMNS = ("image_AUROC", "false_alarm_rate", "miss_rate", "unknown_rate", "good", "defective")


def part_metrics(judged: Sequence[Judged], parts: Mapping[str, str]) -> dict[str, Metrics]:
    """By product: image_AUROC, false_alarm_rate, miss_rate and unknown_rate with parts for images, and how many good
    and defective parts there are.

    parts: by the key of each judged sample. Pictures of one part with different labels count as different parts.

    A rate is the mean over parts of the share of each one's images; as by image, UNKNOWN is neither a false alarm nor a
    miss, and error rates are there only for what was decided.
    """
    return {
        product: _product([j for j in judged if j.sample.product == product], parts)
        for product in sorted({j.sample.product for j in judged})
    }


def part_shares(judged: Sequence[Judged], parts: Mapping[str, str], label: str) -> Array:
    """[parts] of each part the share of its images that were given this label."""
    if not judged:
        return np.empty(0)
    which = _which(judged, parts)
    return np.bincount(which, [j.label == label for j in judged]) / np.bincount(which)


def part_table(metrics: Mapping[str, Metrics]) -> str:
    """The figures as text, a line per product; good and defective are numbers of parts."""
    return table(metrics, _COLUMNS, "by part")


def _product(judged: Sequence[Judged], parts: Mapping[str, str]) -> Metrics:
    good, bad = ([j for j in judged if j.sample.good == kind] for kind in (True, False))

    def rate(of: Sequence[Judged], label: str) -> float | None:
        return float(part_shares(of, parts, label).mean()) if of else None

    def decided(of: Sequence[Judged]) -> list[Judged]:
        return [j for j in of if j.label != "UNKNOWN"]

    return {
        "image_AUROC": _auroc([j for j in judged if np.isfinite(j.score)], parts),
        "false_alarm_rate": rate(decided(good), "NG"),
        "miss_rate": rate(decided(bad), "OK"),
        "unknown_rate": rate(judged, "UNKNOWN"),
        "good": float(len(part_shares(good, parts, "NG"))),
        "defective": float(len(part_shares(bad, parts, "NG"))),
    }


def _auroc(scored: Sequence[Judged], parts: Mapping[str, str]) -> float | None:
    """The mean over (defective, good) pairs of parts of the share of their images' pairs in the right order."""
    good, bad = ([j for j in scored if j.sample.good == kind] for kind in (True, False))
    if not good or not bad:
        return None
    scores = np.array([j.score for j in good])
    order = np.argsort(scores)
    below = np.concatenate([[0.0], np.cumsum(_weights(good, parts)[order])])
    values = np.array([j.score for j in bad])
    left, right = (below[np.searchsorted(scores[order], values, side)] for side in ("left", "right"))
    return float(np.average((left + right) / 2 / below[-1], weights=_weights(bad, parts)))


def _weights(judged: Sequence[Judged], parts: Mapping[str, str]) -> Array:
    """[images] one over the number of images of the part."""
    which = _which(judged, parts)
    return np.asarray((1 / np.bincount(which))[which])


def _which(judged: Sequence[Judged], parts: Mapping[str, str]) -> NDArray[np.intp]:
    """[images] the number of the part."""
    numbers: dict[tuple[str, str], int] = {}
    labels = ((j.sample.label, parts[j.sample.key]) for j in judged)
    return np.array([numbers.setdefault(each, len(numbers)) for each in labels], np.intp)
