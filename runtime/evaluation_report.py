"""An evaluation as one HTML file: metrics, decisions, distributions, and heatmaps of the parts worth looking at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .bydefect import defect_metrics, told
from .crop import read_pair
from .dataset import Dataset
from .detector import Detector
from .evaluation import Array, Evaluated
from .provenance import made_here
from .quality import AUPRO_LIMIT, Metrics
from .recorded import Origin
from .report.evaluation import Choice, Evaluation, Part, write
from .tradeoff import Point, scores_of
from .unlike import Held


def write_report(
    path: Path,
    detector: Detector,
    dataset: Dataset,
    evaluated: Evaluated,
    promises: Mapping[str, Held],
    by_part: Mapping[str, Metrics],
    points: Mapping[str, Sequence[Point]],
    remarks: Sequence[tuple[str, str]] = (),
    remark: str = "",
    whose: Origin | None = None,
) -> Path:
    """Write the report; pictures are judged once more, with the product they were judged as.

    promises: by product, beside the rates; by_part: figures that count parts, or none; points: what other thresholds
    would do; remarks: with their product; remark: on the whole; whose: where the verdicts were recorded; None: judged
    here.
    """
    manifest = detector.bundle.manifest
    samples = {j.sample.key: j for j in evaluated.judged}
    parts = [Part(j.sample.key, j.sample.product, j.sample.label, j.score, j.label) for j in evaluated.judged]
    stages = {k: float(np.median(v)) for k, v in evaluated.latency_ms.items() if k != "total"}
    thresholds = {p: t for p, m in evaluated.products.items() if (t := m.get("threshold")) is not None}
    total = evaluated.latency_ms.get("total")
    unknown = sum(p.label == "UNKNOWN" for p in parts)
    aupro = evaluated.mean.get("pixel_AUPRO")

    def look(part: Part) -> tuple[Array, Array, Array | None]:
        judged = samples[part.key]
        image, mask = read_pair(judged.sample)
        result = detector.judge_image(image, judged.product)
        empty = np.zeros(image.shape[:2], np.float32)
        found = empty if result.map is None else result.map.copy()
        return image, found, mask

    here = "" if whose is None else ", of the anomaly maps alone"
    facts = {**({} if whose is None else {"verdicts": str(whose)}), **facts_of(detector, dataset, here)}
    tiles = [
        (_figure(evaluated.mean.get("image_AUROC")), "image AUROC, mean over products"),
        *([] if aupro is None else [(_figure(aupro), f"pixel AUPRO (FPR ≤ {AUPRO_LIMIT:g})")]),
        (str(len(parts)), "images"),
        (f"{unknown / len(parts):.1%}", "UNKNOWN"),
        (f"{len(parts) / evaluated.seconds:.0f}", "images a second"),
        *([] if total is None else [(f"{np.median(total):.1f} ms", "median per image")]),
        *([] if total is None else [(f"{np.percentile(total, 99):.1f} ms", "99% of images within")]),
    ]
    lead = f"{len(parts)} images of {dataset.spec}, {whose or 'judged by the engines of this machine'}."
    if whose is not None and (unlike := whose.unlike(detector.bundle)):
        lead += f" Warning: {unlike}."
    said = [*evaluated.unknown().items(), *remarks]
    lead = " ".join([lead, *([f"{remark}."] if remark else []), *(f"{product}: {text}." for product, text in said)])
    title = f"{manifest.name if whose is None else whose.file.name}: {manifest.method}"
    metrics = {p: {**m, **_promised(promises.get(p))} for p, m in evaluated.products.items()}
    by_defect = told(defect_metrics(evaluated.judged))
    choices = {p: Choice(*scores_of(evaluated.judged, p), found) for p, found in points.items() if found}
    about = list(facts.items())
    shown = Evaluation(title, lead, parts, metrics, thresholds, stages, tiles, about, by_part, by_defect, choices)
    return write(shown, path, look)


def facts_of(detector: Detector, dataset: Dataset, here: str = "") -> dict[str, str]:
    """What a report says of its model, engines, pictures and machine. here: a word behind the bundle and the engine."""
    manifest = detector.bundle.manifest
    return {
        "bundle": f"{manifest.name} ({detector.bundle.id}){here}",
        "method": manifest.method,
        "engine": f"{detector.backend.name}, {detector.program.variant}, program {detector.program_name}{here}",
        "backbone": f"{manifest.backbone.id}, {manifest.backbone.weights}",
        "data": f"{dataset.spec} {dataset.license}".strip(),
        **made_here(),
    }


def _promised(found: Held | None) -> dict[str, float]:
    """What stands beside a product's rates in the report."""
    if found is None:
        return {}
    by_part = {"false_alarm_rate_by_part": found.rate} if found.grouped else {}
    return {**by_part, "promised_false_alarm_rate": found.promise, "calibration_samples": float(found.samples)}


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
