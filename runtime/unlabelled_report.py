"""Pictures that nobody has labelled as one HTML file: what was decided, the scores, and heatmaps of the highest."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from .crop import read_image
from .dataset import Dataset
from .detector import Detector
from .evaluation import Array, Judged
from .evaluation_report import facts_of
from .report import charts, page
from .report.evaluation import Part, figures
from .unlabelled import Scored
from .verdict import readable

#: So many pictures are shown, and no longer side is kept of them.
SHOWN, _SIDE = 48, 1024
_PICTURES = (
    "Left the part, right the anomaly map over it: clear is usual, then violet, orange and yellow the more anomalous, "
    "on one scale for all pictures. Highest score first"
)


def write_report(
    path: Path, detector: Detector, dataset: Dataset, product: str, scored: Scored, remark: str = ""
) -> Path:
    """Write the report; the pictures that it shows are judged once more. remark: on the whole."""
    threshold = detector.threshold(product)
    value = threshold.value if threshold else None
    scores = np.array([j.score for j in scored.judged if np.isfinite(j.score)])
    judged = {j.sample.key: j for j in scored.highest_first()[:SHOWN] if np.isfinite(j.score)}
    parts = [("", Part(key, product, "", j.score, j.label)) for key, j in judged.items()]

    def look(part: Part) -> tuple[Array, Array, None]:
        return _looked(detector, judged[part.key])

    count = len(scored.judged)
    tiles = [(str(count), "pictures"), *((str(scored.count(label)), label) for label in ("OK", "NG", "UNKNOWN"))]
    stages = {k: float(np.median(v)) for k, v in scored.latency_ms.items() if k != "total"}
    charted = [
        (f"{product}: scores", charts.histogram(scores, np.empty(0), value, f"scores of {product}")),
        ("median per stage", charts.bars(stages, "ms", "latency")),
    ]
    body = [page.tiles(tiles), page.section("Scores and latency", page.cards(charted))]
    if parts:
        middle = float(np.median(scores)) if value is None else value
        told = _PICTURES + (f"; {len(parts)} of {count}." if len(parts) < count else ".")
        body.append(page.section("Pictures", page.note(told), figures(parts, middle, look)))
    body.append(page.section("Provenance", page.facts(facts_of(detector, dataset).items())))
    lead = (
        f"{count} pictures of {dataset.spec} that nobody has labelled, judged as {product} by the engines of this "
        "machine: how good these decisions are, nothing here says."
    ) + (f" {remark[0].upper()}{remark[1:]}." if remark else "")
    manifest = detector.bundle.manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(readable(page.page(f"{manifest.name}: {manifest.method}", lead, body)), encoding="utf-8")
    return path


def _looked(detector: Detector, judged: Judged) -> tuple[Array, Array, None]:
    """The picture, no larger than a page shows, and its map."""
    image = read_image(judged.sample)
    result = detector.judge_image(image, judged.product)
    found = np.zeros(image.shape[:2], np.float32) if result.map is None else result.map.copy()
    if (scale := _SIDE / max(image.shape[:2])) < 1:
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, found, None
