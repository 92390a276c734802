"""The few-shot evaluation as one HTML file: what each figure is of, and what all of it was measured with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .enrolment.fewshot import FeatureCache
from .enrolment.stream import HELD_OUT
from .provenance import made_here
from .report.memory import Figures, MemoryView, write_memory_report

Record = Mapping[str, Any]
#: Metrics of a stream in the order of their columns, as the records name them.
_ONLINE = ("image_AUROC_frozen", "image_AUROC", "gain", "stream_gain", "admitted", "bad_insertions")


@dataclass(frozen=True)
class Drawn:
    """How support sets and streams were drawn: support sizes, draws of each, orders of a stream, CT steps a frame."""

    shots: Sequence[int]
    seeds: int
    orders: int
    ct_steps: Sequence[int]
    foreground: str


def write_fewshot_report(
    path: Path,
    cache: FeatureCache,
    bundle_id: str,
    drawn: Drawn,
    command: str,
    means: Sequence[Record],
    views: Sequence[MemoryView],
) -> Path:
    """Write the page; returns its path. means: records over all draws; views: the streams that are shown."""
    manifest, dataset = cache.manifest, cache.dataset
    tables = [_frozen(cache, drawn, [r for r in means if r["setting"].startswith("frozen")])]
    if online := [r for r in means if r["setting"].startswith("online")]:
        tables.append(_online(drawn, online))
    provenance = {
        "bundle": f"{manifest.name} ({bundle_id})",
        "method": f"{manifest.method}, and knn (plain distance) on the same memory",
        "engine": "onnxruntime, fp32, for the features; scores by the formulas of the stages, in numpy",
        "backbone": f"{manifest.backbone.id}, {manifest.backbone.weights}",
        "data": f"{dataset.spec} {dataset.license}".strip() + f", {len(dataset)} images",
        "support": f"{_images(drawn.shots)}; {_range('seed', drawn.seeds)}",
        "orders": f"{_range('order', drawn.orders)}, of streams and of test images where CT steps go on between them",
        "CT steps": _and(drawn.ct_steps),
        "foreground": drawn.foreground,
        **made_here(),
        "command": command,
    }
    lead = (
        f"{manifest.method} enrolled anew from {_images(drawn.shots)} of each product of "
        f"{dataset.spec}, {_times(drawn.seeds, 'draw')} each."
    )
    title = f"{manifest.name}: few-shot evaluation"
    return write_memory_report(path, title, lead, tables, views, list(provenance.items()))


def _frozen(cache: FeatureCache, drawn: Drawn, means: Iterable[Record]) -> Figures:
    """The means of the memory as enrolled, with the test images that they are of."""
    rows = []
    for r in means:
        good = len(cache.select(r["product"], split="test", good=True))
        bad = len(cache.select(r["product"], split="test", good=False))
        rows.append([r["product"], r["shots"], *_score(r), _spread(f"{r['value']:.3f}", r, drawn), good, bad])
    about = (
        "Image AUROC of the whole test split with the memory as enrolled, scored by foct or, on the same memory, by "
        "plain distance (knn): the mean over "
        f"{_times(drawn.seeds, 'support draw')}" + (" ± the standard deviation." if drawn.seeds > 1 else ".")
    )
    header = ["product", "shots", "scored by", "CT steps", "image AUROC", "good", "defective"]
    return Figures("Memory as enrolled", about, header, rows)


def _online(drawn: Drawn, means: Iterable[Record]) -> Figures:
    """The means of what streams taught, one row a rule."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in means:
        rule, share = r["setting"].removeprefix("online, ").rsplit(", ", 1)
        key = (r["product"], r["shots"], r["method"], rule, share.removesuffix(" anomalies"))
        groups.setdefault(key, {})[r["metric"]] = r
    rows = []
    for key, by_metric in groups.items():
        values = {name: _value(by_metric.get(name)) for name in _ONLINE}
        cells: list[object] = [f"{values[n]:.3f}" for n in _ONLINE[:2]]
        gain = _spread(f"{values['gain']:+.3f}", by_metric["gain"], drawn)
        cells += [gain, _signed(values["stream_gain"])]
        cells += [f"{values[n]:.1%}" for n in _ONLINE[4:]]
        rows.append([*key, *cells])
    about = (
        "Image AUROC before and after a stream of unlabelled frames has taught the memory. Streams are good training "
        "images and up to half of the defective test images. Before and after are of held-out images alone, the same "
        f"for both: good test images and the other half of the defective ones, at most {HELD_OUT // 2} of each. "
        'So "before" is not the figure of the table above, which is of the whole test split. The stream\'s gain is of '
        f"its own frames, each scored as it came. Means over {_times(drawn.seeds, 'support draw')} of "
        f"{_times(drawn.orders, 'order')} each; ± is the standard deviation of the gain between draws."
    )
    header = ["product", "shots", "scored by", "rule", "anomalies", "before", "after", "gain", "stream's gain"]
    return Figures("Calibrated on a stream", about, [*header, "frames that taught", "rows from anomalous"], rows)


def _score(r: Record) -> tuple[str, str]:
    """The method and its CT steps."""
    return r["method"], r["setting"].rpartition("ct.steps ")[2] if "ct.steps" in r["setting"] else "–"


def _spread(value: str, r: Record, drawn: Drawn) -> str:
    """The value with its standard deviation, where there is more than one draw."""
    return f"{value} ± {r['sd']:.3f}" if drawn.seeds > 1 else value


def _value(record: Record | None) -> float:
    return float("nan") if record is None else float(record["value"])


def _signed(value: float) -> str | None:
    return f"{value:+.3f}" if value == value else None


def _and(values: Sequence[object]) -> str:
    """1, 2 and 4."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


def _images(shots: Sequence[int]) -> str:
    """1 good training image."""
    return f"{_and(shots)} good training image{'' if tuple(shots) == (1,) else 's'}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _range(what: str, count: int) -> str:
    """seeds 0 to 4."""
    return f"{what} 0" if count == 1 else f"{what}s 0 to {count - 1}"
