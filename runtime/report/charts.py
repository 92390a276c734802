"""Charts as inline SVG, no library: they scale, print, and carry no script. Colours follow the page's CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 38


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` in data units, drawn between two pixel positions."""

    low: float
    high: float
    start: float
    end: float
    label: str

    def at(self, value: float) -> float:
        """Pixel position of a data value."""
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis."""
        span = (self.high - self.low) or 1.0
        raw = span / count
        power = 10.0 ** np.floor(np.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = np.ceil(self.low / step - 1e-9) * step
        return [float(v) + 0.0 for v in np.arange(first, self.high + step * 1e-6, step)]  # + 0.0: no "-0"


def _axes(low_x: float, high_x: float, low_y: float, high_y: float, x: str, y: str) -> tuple[Axis, Axis]:
    return Axis(low_x, high_x, LEFT, WIDTH - RIGHT, x), Axis(low_y, high_y, HEIGHT - BOTTOM, TOP, y)


def _open(height: int, title: str, style: str = "") -> str:
    name = escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}" class="chart" style="{style}">'
    return f"{head}<title>{name}</title>"


def _frame(x: Axis, y: Axis, body: Sequence[str], title: str) -> str:
    parts = [_open(HEIGHT, title)]
    for v in y.ticks(4):
        p = y.at(v)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{p:.1f}" y2="{p:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{p + 3.5:.1f}" text-anchor="end">{v:g}</text>')
    for v in x.ticks(5):
        parts.append(
            f'<text class="tick" x="{x.at(v):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{v:g}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.start}" y2="{y.start}"/>')
    parts.extend(body)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="11" y="{height}" text-anchor="middle" transform="rotate(-90 11 {height})">'
        f"{escape(y.label)}</text></svg>"
    )
    return "".join(parts)


def _path(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + "L".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(xs, ys, strict=True))


def histogram(good: NDArray[np.float64], bad: NDArray[np.float64], threshold: float | None, title: str) -> str:
    """Score distributions of good and defective parts as overlaid bars, with the threshold as a line.

    good, bad: scores, shapes [n] and [m]; either may be empty. Bars are shares of their own group.
    """
    both = np.concatenate([good, bad, [] if threshold is None else [threshold]])
    low, high = (float(both.min()), float(np.quantile(both, 0.995))) if both.size else (0.0, 1.0)
    if threshold is not None:
        high = max(high, threshold)
    edges = np.linspace(low, high if high > low else low + 1.0, 31)
    shares = [np.histogram(np.clip(g, low, high), edges)[0] / max(g.size, 1) for g in (good, bad)]
    top = max(float(s.max()) for s in shares) or 1.0
    x, y = _axes(float(edges[0]), float(edges[-1]), 0.0, top * 1.08, "score", "share of parts")
    body = []
    for share, style in zip(shares, ("good", "bad"), strict=True):
        for left, right, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value:
                height = y.start - y.at(float(value))
                body.append(
                    f'<rect class="{style}" x="{x.at(left) + 0.5:.1f}" y="{y.at(float(value)):.1f}" '
                    f'width="{x.at(right) - x.at(left) - 1:.1f}" height="{height:.1f}"/>'
                )
    if threshold is not None:
        p = x.at(threshold)
        body.append(f'<line class="threshold" x1="{p:.1f}" x2="{p:.1f}" y1="{TOP}" y2="{y.start}"/>')
        anchor, offset = ("end", -4) if p > WIDTH * 0.7 else ("start", 4)
        text = f"threshold {threshold:.4g}"
        body.append(f'<text class="mark" x="{p + offset:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{text}</text>')
    return _frame(x, y, body, title)


def roc_points(good: NDArray[np.float64], bad: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False-alarm rate and detection rate at every threshold, both from 0 to 1."""
    cuts = np.unique(np.concatenate([good, bad]))[::-1]
    g, b = np.sort(good), np.sort(bad)
    false_alarms = g.size - np.searchsorted(g, cuts, side="left")
    hits = b.size - np.searchsorted(b, cuts, side="left")
    fpr = np.concatenate([[0.0], false_alarms / max(g.size, 1)])
    tpr = np.concatenate([[0.0], hits / max(b.size, 1)])
    return fpr, tpr


def roc(good: NDArray[np.float64], bad: NDArray[np.float64], auroc: float, at: float | None, title: str) -> str:
    """ROC curve; `at` is the threshold whose operating point is marked."""
    x, y = _axes(0.0, 1.0, 0.0, 1.0, "false alarms (share of good parts)", "detected defects")
    fpr, tpr = roc_points(good, bad)
    body = [
        f'<line class="chance" x1="{x.at(0)}" y1="{y.at(0)}" x2="{x.at(1)}" y2="{y.at(1)}"/>',
        f'<path class="curve" d="{_path(x, y, [float(v) for v in fpr], [float(v) for v in tpr])}"/>',
        f'<text class="mark" x="{x.at(0.97):.0f}" y="{y.at(0.06):.0f}" text-anchor="end">AUROC {auroc:.3f}</text>',
    ]
    if at is not None and good.size and bad.size:
        px, py = float((good > at).mean()), float((bad > at).mean())
        body.append(f'<circle class="point" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="4.5"/>')
    return _frame(x, y, body, title)


def errors(good: NDArray[np.float64], bad: NDArray[np.float64], marks: dict[str, float], title: str) -> str:
    """Shares of good parts called NG and of defects missed against the threshold; `marks` are named vertical lines.

    good, bad: scores, shapes [n] and [m], neither empty. The axis leaves out the outermost hundredth of each.
    """
    both = np.concatenate([good, bad])
    inside = [float(v) for g in (good, bad) for v in np.quantile(g, [0.01, 0.99])]
    low, high = min(*inside, *marks.values()), max(*inside, *marks.values())
    room = (high - low or abs(high) or 1.0) * 0.05
    x, y = _axes(low - room, high + room, 0.0, 1.0, "threshold", "share of parts")
    cuts = np.unique(np.concatenate([both, [low - room, high + room]]))
    cuts = cuts[(cuts >= low - room) & (cuts <= high + room)]
    alarms = 1 - np.searchsorted(np.sort(good), cuts, "right") / good.size
    missed = np.searchsorted(np.sort(bad), cuts, "right") / bad.size
    body = []
    for i, share in enumerate((alarms, missed)):  # between two scores nothing changes: steps
        steps = _path(x, y, np.repeat(cuts, 2)[1:].tolist(), np.repeat(share, 2)[:-1].tolist())
        body.append(f'<path class="series s{i}" d="{steps}"/>')
    for i, (name, value) in enumerate(marks.items()):
        p = x.at(value)
        anchor, offset = ("end", -4) if p > WIDTH * 0.7 else ("start", 4)
        body.append(f'<line class="threshold" x1="{p:.1f}" x2="{p:.1f}" y1="{TOP}" y2="{y.start}"/>')
        text = f'x="{p + offset:.1f}" y="{TOP + 10 + 14 * i}" text-anchor="{anchor}">{escape(name)} {value:.4g}</text>'
        body.append(f'<text class="mark" {text}')
    return _frame(x, y, body, title)


def lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str,
    limit: float | None = None,
) -> str:
    """Line chart of up to four named series of (x, y); `limit` is drawn as a dashed line."""
    xs = [v for s in series.values() for v in s[0]] or [0.0, 1.0]
    ys = [v for s in series.values() for v in s[1] if np.isfinite(v)] + ([] if limit is None else [limit]) or [0.0, 1.0]
    pad = (max(ys) - min(ys)) * 0.06 or 0.5
    x, y = _axes(min(xs), max(xs), min(ys) - pad, max(ys) + pad, x_label, y_label)
    body = []
    for i, (name, (a, b)) in enumerate(series.items()):
        body.append(f'<path class="series s{i % 4}" d="{_path(x, y, list(a), list(b))}"/>')
        if len(series) > 1:  # one alone is named by the axis
            body.append(f'<text class="mark s{i % 4}" x="{LEFT + 6}" y="{TOP + 12 + 14 * i}">{escape(name)}</text>')
    if limit is not None:
        body.append(
            f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.at(limit):.1f}" y2="{y.at(limit):.1f}"/>'
        )
    return _frame(x, y, body, title)


def span(*values: NDArray[np.float64]) -> tuple[float, float]:
    """A range that holds all finite values with some room; of several arrays for charts that are to be compared."""
    known = np.concatenate([np.ravel(v) for v in values]) if values else np.zeros(0)
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    pad = (high - low) * 0.06 or 0.5
    return low - pad, high + pad


def scatter(
    groups: Sequence[tuple[str, NDArray[np.float64]]],
    x_label: str,
    y_label: str,
    title: str,
    y_span: tuple[float, float] | None = None,
) -> str:
    """Dots of several groups (CSS colour variable, [n, 2]) on common axes, clear of the frame.

    y_span: lowest and highest y (`span` gives it), so that several charts have the same; None: of these dots.
    """
    points = np.concatenate([p for _, p in groups if len(p)] or [np.zeros((0, 2))])
    x, y = _axes(*span(points[:, 0]), *(y_span or span(points[:, 1])), x_label, y_label)
    body = []
    for colour, group in groups:
        marks = "".join(f"M{x.at(a):.1f},{y.at(b):.1f}h0" for a, b in group)
        body.append(f'<path class="dots" d="{marks}" style="stroke:var({colour})"/>' if marks else "")
    return _frame(x, y, body, title)


def bars(values: dict[str, float], unit: str, title: str) -> str:
    """Horizontal bars with their value written at the end (stage latencies)."""
    rows = list(values.items())
    height = 26 * len(rows) + 10
    top = max(values.values(), default=0.0) or 1.0
    parts = [_open(height, title, "max-width:560px")]
    for i, (name, value) in enumerate(rows):
        width = (WIDTH - 210) * value / top
        parts.append(f'<text class="tick" x="110" y="{26 * i + 20}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="good" x="118" y="{26 * i + 8}" width="{max(width, 1):.1f}" height="16" rx="2"/>')
        parts.append(f'<text class="tick" x="{124 + width:.1f}" y="{26 * i + 20}">{value:.2f} {escape(unit)}</text>')
    return "".join(parts) + "</svg>"
