"""The page about the memory: what it holds, how it grew along a stream, and what that did to the scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, lines
from .page import cards, page, section, table, tiles

Array = NDArray[Any]


@dataclass(frozen=True)
class MemoryView:
    """One stream through one memory.

    support [n, d], admitted [k, d]: rows at the end; anomalous_row [k]: came from an anomalous frame.
    frozen, online [t]: image scores along the stream; anomalous [t]; level [t]: median distance of a frame to the
    support; rows [t]: episodic rows after each frame; reasons [t]: what the guard said.
    """

    title: str
    support: Array
    admitted: Array
    anomalous_row: Array
    frozen: Array
    online: Array
    anomalous: Array
    level: Array
    rows: Array
    reasons: Sequence[str]
    figures: dict[str, float] = field(default_factory=dict)


def projection(support: Array, admitted: Array) -> tuple[Array, Array]:
    """Both on the two principal axes of all rows: [n, 2], [k, 2]; signs are fixed, so the picture does not flip."""
    everything = np.concatenate([support, admitted]).astype(np.float64)
    centred = everything - everything.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2][np.arange(len(axes[:2])), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    flat = centred @ axes.T
    if flat.shape[1] == 1:
        flat = np.concatenate([flat, np.zeros_like(flat)], axis=1)
    return flat[: len(support)], flat[len(support) :]


def scatter(groups: Sequence[tuple[str, Array]], x: str, y: str, title: str) -> str:
    """Dots of several groups (CSS colour variable, [n, 2]) on common axes, as inline SVG."""
    points = np.concatenate([p for _, p in groups if len(p)])
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    bottom = HEIGHT - 36
    across, up = Axis(left, right, LEFT, WIDTH - RIGHT, x), Axis(low, high, bottom, TOP, y)
    dots = []
    for colour, group in groups:
        marks = "".join(f"M{across.at(a):.1f},{up.at(b):.1f}h0" for a, b in group)
        stroke = f'stroke="var({colour})" stroke-width="4" stroke-linecap="round" stroke-opacity=".6"'
        dots.append(f'<path d="{marks}" {stroke} fill="none"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" class="chart"><title>{title}</title>'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>{"".join(dots)}'
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{x}</text>'
        f'<text class="label" x="11" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 11 {HEIGHT / 2})">{y}</text></svg>'
    )


def legend(items: Sequence[tuple[str, str]]) -> str:
    """(CSS colour variable, text) pairs."""
    return '<p class="legend">' + "".join(f'<i style="background:var({c})"></i>{t}' for c, t in items) + "</p>"


def _along(values: Array, anomalous: Array) -> list[tuple[str, Array]]:
    frames = np.arange(len(values))
    both = np.stack([frames, values], axis=1)
    return [("--good", both[~anomalous]), ("--bad", both[anomalous])]


def view_section(view: MemoryView) -> str:
    """The HTML of one memory."""
    support, admitted = projection(view.support, view.admitted)
    wrong = view.anomalous_row.astype(bool)
    space = scatter(
        [("--good", support), ("--s2", admitted[~wrong]), ("--bad", admitted[wrong])],
        "first principal axis",
        "second",
        "memory rows",
    )
    colours = [("--good", "support"), ("--s2", "admitted, good frame"), ("--bad", "admitted, anomalous frame")]
    frames = list(range(len(view.rows)))
    kinds = legend([("--good", "good part"), ("--bad", "anomalous part")])
    counted = Counter(view.reasons)
    boxes = [
        ("Memory rows on their principal axes", space + legend(colours)),
        (
            "Scores with the memory as enrolled",
            scatter(_along(view.frozen, view.anomalous), "frame", "score", "frozen") + kinds,
        ),
        (
            "Scores with the calibrated memory",
            scatter(_along(view.online, view.anomalous), "frame", "score", "online") + kinds,
        ),
        (
            "Distance to the support (what the anchors watch)",
            scatter(_along(view.level, view.anomalous), "frame", "median distance", "drift") + kinds,
        ),
        ("Episodic rows", lines({"rows": (frames, [float(v) for v in view.rows])}, "frame", "rows", "episodic rows")),
        ("What the guard said", table(("reason", "frames"), counted.most_common())),
    ]
    figures = tiles([(f"{value:.3f}", name) for name, value in view.figures.items()])
    return section(view.title, figures, cards(boxes))


def write_memory_report(path: Path, views: Sequence[MemoryView], rows: Sequence[Sequence[object]]) -> Path:
    """Write the page: a table (product, shots, method, setting, metric, mean, sd) and a section per view."""
    header = ("product", "shots", "method", "setting", "metric", "mean", "sd")
    body = [view_section(view) for view in views]
    body.append(section("All figures", table(header, rows)))
    lead = "What a memory of normal holds after a stream of unlabelled frames, and what calibration did to the scores."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("Memory and few-shot evaluation", lead, body), encoding="utf-8")
    return path
