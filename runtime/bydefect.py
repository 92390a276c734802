"""An evaluation by type of defect: which of them are found, and which pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .evaluation import Judged
from .quality import Metrics, auroc

#: By product, then by defect.
ByDefect = dict[str, dict[str, Metrics]]


def defect_metrics(judged: Sequence[Judged]) -> ByDefect:
    """Of each product's types of defects: images, missed (judged OK), unknown, miss_rate (of what was decided), and
    image_AUROC against all good images of the product."""
    found: ByDefect = {}
    for product in sorted({j.sample.product for j in judged}):
        mine = [j for j in judged if j.sample.product == product]
        good = [j for j in mine if j.sample.good]
        for defect in sorted({j.sample.label for j in mine if not j.sample.good}):
            found.setdefault(product, {})[defect] = _metrics(good, [j for j in mine if j.sample.label == defect])
    return found


def told(by_defect: ByDefect) -> ByDefect:
    """What the figures by product do not say already: products with several types of defects."""
    return {product: defects for product, defects in by_defect.items() if len(defects) > 1}


def defect_table(by_defect: Mapping[str, Mapping[str, Metrics]]) -> str:
    """The figures as text, a line for each type."""
    named = {f"{p} {d}": m for p, defects in by_defect.items() for d, m in defects.items()}
    width = max(len("by defect"), *map(len, named))
    lines = [f"{'by defect':<{width}}  {'images':>6}  {'missed':>6}  {'miss_rate':>9}  {'UNKNOWN':>7}  image_AUROC"]
    for name, m in named.items():
        rate, area = (f"{m[key]:.3f}" if m[key] is not None else "-" for key in ("miss_rate", "image_AUROC"))
        counts = f"{m['images']:>6.0f}  {m['missed']:>6.0f}  {rate:>9}  {m['unknown']:>7.0f}"
        lines.append(f"{name:<{width}}  {counts}  {area:>11}")
    return "\n".join(lines)


def _metrics(good: Sequence[Judged], bad: Sequence[Judged]) -> Metrics:
    labels = [j.label for j in bad]
    decided = len(labels) - labels.count("UNKNOWN")
    scores = np.array([j.score for j in (*good, *bad)], np.float64)
    scored, truth = np.isfinite(scores), np.arange(scores.size) >= len(good)
    return {
        "images": float(len(bad)),
        "missed": float(labels.count("OK")),
        "unknown": float(labels.count("UNKNOWN")),
        "miss_rate": labels.count("OK") / decided if decided else None,
        "image_AUROC": auroc(scores[scored], truth[scored]),
    }
