"""The page about the memory: few-shot figures, how a memory grew along a stream, and what that did to the scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..verdict import readable
from .charts import lines, scatter, span
from .page import cards, facts, legend, note, page, section, table, tiles

Array = NDArray[Any]


@dataclass(frozen=True)
class MemoryView:
    """One stream through one memory.

    support [n, d], admitted [k, d]: rows at the end; anomalous_row [k]: came from an anomalous frame.
    frozen, online [t]: image scores along the stream; anomalous [t]; level [t]: median distance of a frame to the
    support; rows [t]: episodic rows after each frame; reasons [t]: what the guard said.
    figures: (value, caption); about: which draw, stream and images all that is of.
    """

    title: str
    about: str
    support: Array
    admitted: Array
    anomalous_row: Array
    frozen: Array
    online: Array
    anomalous: Array
    level: Array
    rows: Array
    reasons: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figures:
    """A table of the page; about: what its figures are of."""

    title: str
    about: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


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


def _along(values: Array, anomalous: Array) -> list[tuple[str, Array]]:
    frames = np.arange(len(values))
    both = np.stack([frames, values], axis=1)
    return [("--good", both[~anomalous]), ("--bad", both[anomalous])]


def view_section(view: MemoryView) -> str:
    """The HTML of one memory. Both charts of scores have one range, so that they can be compared."""
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
    scores = span(view.frozen, view.online)

    def along(values: Array, label: str, title: str, y_span: tuple[float, float] | None = None) -> str:
        return scatter(_along(values, view.anomalous), "frame", label, title, y_span) + kinds

    boxes = [
        ("Scores with the memory as enrolled", along(view.frozen, "score", "frozen", scores)),
        ("Scores with the memory as it had become", along(view.online, "score", "online", scores)),
        ("Distance to the support (what the anchors watch)", along(view.level, "median distance", "drift")),
        ("Memory rows on their principal axes", space + legend(colours)),
        ("Episodic rows", lines({"rows": (frames, [float(v) for v in view.rows])}, "frame", "rows", "episodic rows")),
        ("What the guard said", table(("reason", "frames"), Counter(view.reasons).most_common())),
    ]
    return section(view.title, note(view.about), tiles(view.figures), cards(boxes))


def write_memory_report(
    path: Path,
    title: str,
    lead: str,
    tables: Sequence[Figures],
    views: Sequence[MemoryView],
    provenance: Sequence[tuple[str, str]],
) -> Path:
    """Write the page: the tables, a section per view, and what it was made of; returns the path."""
    body = [section(t.title, note(t.about), table(t.header, t.rows)) for t in tables]
    body += [view_section(view) for view in views]
    body.append(section("Provenance", facts(provenance)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(readable(page(title, lead, body)), encoding="utf-8")
    return path
