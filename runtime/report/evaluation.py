"""The report of an evaluation: metrics, distributions, ROC, confusion, latency and heatmaps, as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quality import AUPRO_LIMIT, percent
from ..tradeoff import OPTIMISTIC, PRESENT, Point, rows
from ..verdict import readable
from . import charts, page
from .gallery import pair

#: Figures of the decisions at the threshold, shown with their counts; what else there is shows how scores separate.
DECISIONS = (
    *("threshold", "false_alarm_rate", "false_alarm_rate_by_part", "promised_false_alarm_rate"),
    "calibration_samples",
    *("miss_rate", "F1", "balanced_accuracy"),
    *("unknown_rate", "unknown_rate_good", "unknown_rate_defective"),
)
PICTURES = (
    "Left the part, with the defect outlined in green where the data set marks it. Right the anomaly map over it: "
    "clear is usual, then violet, orange and yellow the more anomalous, on one scale for all pictures of a product."
)
_WIDE = "<style>.gallery.wide{grid-template-columns:repeat(auto-fill,minmax(250px,1fr));margin-bottom:18px}</style>"

#: Given a part, its image as uint8 [h, w, 3] RGB, its map as float [h', w'] and its mask (or None).
Look = Callable[["Part"], tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]]


@dataclass(frozen=True)
class Part:
    """One judged part of the evaluation."""

    key: str
    product: str
    defect: str
    score: float  # not finite where there is none
    label: str

    @property
    def good(self) -> bool:
        """Ground truth."""
        return self.defect == "good"


@dataclass(frozen=True)
class Choice:
    """What other thresholds would do to a product. good, bad: the scores that they are held against."""

    good: NDArray[np.float64]
    bad: NDArray[np.float64]
    points: Sequence[Point]


@dataclass(frozen=True)
class Evaluation:
    """All the report shows. `metrics` is product -> metric name -> value; `products` fixes the order.

    by_part: the same of figures that count parts, each once, where several images show one. by_defect: of each type of
    defects of a product. choices: by product.
    """

    title: str
    lead: str
    parts: Sequence[Part]
    metrics: Mapping[str, Mapping[str, float | None]]
    thresholds: Mapping[str, float]
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    tiles: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    by_part: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    by_defect: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    extra: Sequence[str] = ()

    @property
    def products(self) -> list[str]:
        """Products in order of first appearance."""
        return list(dict.fromkeys(p.product for p in self.parts))


def confusion(parts: Sequence[Part]) -> dict[str, int]:
    """Counts of good and defective parts by what was decided about them."""
    count = {f"{truth}_{label}": 0 for truth in ("good", "defective") for label in ("OK", "NG", "UNKNOWN")}
    for p in parts:
        count[f"{'good' if p.good else 'defective'}_{p.label}"] += 1
    return count


def _scores(parts: Sequence[Part]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    good = np.array([p.score for p in parts if p.good and np.isfinite(p.score)])
    bad = np.array([p.score for p in parts if not p.good and np.isfinite(p.score)])
    return good, bad


def _product(e: Evaluation, product: str) -> str:
    parts = [p for p in e.parts if p.product == product]
    good, bad = _scores(parts)
    threshold = e.thresholds.get(product)
    items = [(f"{product}: scores", page.LEGEND + charts.histogram(good, bad, threshold, f"scores of {product}"))]
    auroc = e.metrics.get(product, {}).get("image_AUROC")
    if auroc is not None:
        items.append((f"{product}: ROC", charts.roc(good, bad, auroc, threshold, f"ROC of {product}")))
    return page.cards(items)


def _confusion_table(e: Evaluation) -> str:
    rows = []
    for product in e.products:
        c = confusion([p for p in e.parts if p.product == product])
        rows.append([product, *(c[k] for k in c)])
    header = ["product", "good OK", "good NG", "good UNKNOWN", "defective OK", "defective NG", "defective UNKNOWN"]
    return page.table(header, rows)


def _metrics_table(products: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> str:
    """Of the figures that some product has; a product a line, as there may be many."""
    shown = [name for name in names if any(name in metrics for metrics in products.values())]
    rows = [[product, *(_cell(name, metrics.get(name)) for name in shown)] for product, metrics in products.items()]
    return page.table(["product", *(_head(name) for name in shown)], rows) if shown else ""


def _head(name: str) -> str:
    limit = f" (FPR ≤ {AUPRO_LIMIT:g})" if name == "pixel_AUPRO" else ""
    return name.replace("_", " ") + limit


def _cell(name: str, value: float | None) -> float | str | None:
    """As it is printed: a rate as a percentage, a promised one as the most that it may be, a measure with 3 digits."""
    words = set(name.split("_"))
    if value is not None and "threshold" not in words and words & {"AUROC", "AUPRO", "AP", "F1", "accuracy"}:
        return f"{value:.3f}"
    if value is not None and name == "calibration_samples":
        return f"{value:.0f}"
    if value is None or "rate" not in words:
        return value
    return f"{'≤ ' if name.startswith('promised') else ''}{percent(value)}"


def _defects_table(e: Evaluation) -> str:
    cells: list[list[object]] = []
    for product, defects in e.by_defect.items():
        for defect, m in defects.items():
            counts = (f"{m[name] or 0:.0f}" for name in ("images", "missed", "unknown"))
            cells.append([product, defect, *counts, *(_cell(name, m[name]) for name in ("miss_rate", "image_AUROC"))])
    return page.table(["product", "defect", "images", "missed", "UNKNOWN", "miss rate", "image AUROC"], cells)


def _choices(e: Evaluation) -> str:
    """Of each product both errors against the threshold, and the thresholds worth knowing."""
    cards = []
    for product, choice in e.choices.items():
        marks = {name: p.threshold for p in choice.points for name in p.names if name in PRESENT}
        chart = charts.errors(choice.good, choice.bad, marks, f"errors of {product} by threshold")
        head, *cells = rows(product, choice.points)
        cards.append((f"{product}: errors by threshold", page.ERRORS + chart))
        cards.append((f"{product}: thresholds", page.table(["threshold", *head[1:]], cells)))
    about = f"What other thresholds would do to these images; {OPTIMISTIC}."
    return page.section("Thresholds", page.note(about), page.cards(cards))


def choose(parts: Sequence[Part], threshold: float, each: int = 4) -> list[tuple[str, Part]]:
    """Parts worth looking at, each once: surest hits, misses, false alarms, good parts; then, of the others, what is
    nearest to the threshold."""

    def pick(name: str, chosen: list[Part], key: Callable[[Part], float]) -> list[tuple[str, Part]]:
        return [(name, p) for p in sorted(chosen, key=key)[:each]]

    finite = [p for p in parts if np.isfinite(p.score)]
    bad = [p for p in finite if not p.good]
    good = [p for p in finite if p.good]
    chosen = [
        *pick("defect found", [p for p in bad if p.label == "NG"], lambda p: -p.score),
        *pick("defect missed", [p for p in bad if p.label == "OK"], lambda p: p.score),
        *pick("false alarm", [p for p in good if p.label == "NG"], lambda p: -p.score),
        *pick("good", [p for p in good if p.label == "OK"], lambda p: p.score),
    ]
    shown = {p.key for _, p in chosen}
    others = [p for p in finite if p.key not in shown]
    return [*chosen, *pick("nearest to the threshold", others, lambda p: abs(p.score - threshold))]


def _gallery(e: Evaluation, look: Look, each: int) -> str:
    blocks = []
    for product in e.products:
        parts = [p for p in e.parts if p.product == product]
        scores = [p.score for p in parts if np.isfinite(p.score)]
        if not scores:
            continue  # every part UNKNOWN: there is no map to show either
        threshold = e.thresholds.get(product, float(np.median(scores)))
        chosen = choose(parts, threshold, each)
        blocks.append(f"<h3>{escape(product)}</h3>{figures(chosen, threshold, look)}")
    return f"{page.note(PICTURES)}{''.join(blocks)}" if blocks else ""


def figures(chosen: Sequence[tuple[str, Part]], threshold: float, look: Look) -> str:
    """Pictures of one product under their heatmaps, on one scale; each with what it is."""
    seen = {p.key: look(p) for _, p in chosen}
    low, high = _range([m for _, m, _ in seen.values()], threshold)
    shown = []
    for name, p in chosen:
        image, score_map, mask = seen[p.key]
        css = {"NG": "ng", "OK": "ok"}.get(p.label, "unknown")
        verdict = f'<b class="{css}">{p.label}</b> {escape(name)} · score&nbsp;{p.score:.4g}'
        caption = f"{verdict}<br>{escape(p.key)}{f' ({escape(p.defect)})' if p.defect else ''}"
        shown.append(page.figure(pair(image, score_map, low, high, mask), caption))
    return f'{_WIDE}<div class="gallery wide">{"".join(shown)}</div>'


def _range(maps: Sequence[NDArray[Any]], threshold: float) -> tuple[float, float]:
    """Colour range of one product, the same for all its pictures so that they can be compared."""
    values = np.concatenate([m.ravel() for m in maps])
    low = float(np.quantile(values, 0.6))
    high = float(np.quantile(values, 0.998))
    return low, max(high, low + 1e-9, threshold if threshold < high else low + 1e-9)


def render(e: Evaluation, look: Look | None = None, each: int = 4) -> str:
    """The report as an HTML document. `look` fetches pictures for the gallery; without it there is none."""
    body = [page.tiles(e.tiles)] if e.tiles else []
    others = [n for n in dict.fromkeys(n for m in e.metrics.values() for n in m) if n not in DECISIONS]
    body.append(page.section("Metrics", _metrics_table(e.metrics, others)))
    body.append(page.section("Decisions", _metrics_table(e.metrics, DECISIONS), _confusion_table(e)))
    if e.by_defect:
        body.append(page.section("By defect", _defects_table(e)))
    if e.by_part:
        names = list(dict.fromkeys(n for m in e.by_part.values() for n in m))
        about = '<p class="lead">Each part counts once, with the share of its images; good and defective are parts.</p>'
        body.append(page.section("By part", about, _metrics_table(e.by_part, names)))
    body.append(page.section("Scores", *(_product(e, p) for p in e.products)))
    if e.choices:
        body.append(_choices(e))
    if e.stage_ms:
        body.append(
            page.section("Latency", page.cards([("median per stage", charts.bars(dict(e.stage_ms), "ms", "latency"))]))
        )
    body.extend(e.extra)
    if look is not None:
        body.append(page.section("Parts worth looking at", _gallery(e, look, each)))
    if e.facts:
        body.append(page.section("Provenance", page.facts(e.facts)))
    return page.page(e.title, e.lead, body)


def write(e: Evaluation, path: Path, look: Look | None = None, each: int = 4) -> Path:
    """Render and write the report; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(readable(render(e, look, each)), encoding="utf-8")
    return path
