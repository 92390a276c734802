"""What other thresholds would do to the images of an evaluation: good ones called NG against defects missed.

A threshold that is chosen on these images looks better on them than it is on new ones; calibration's, from good images
alone, does not, but knows nothing of defects. Which of the two errors costs more only the operator knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .evaluation import Evaluated, Judged
from .quality import best_f1, error_rates

Array = NDArray[np.float64]
#: Shares of the good images that may be called NG.
SHARES = (0.01, 0.05, 0.1)
_BOUND = "good NG <= "
#: Other thresholds are worth a word where more than this of the defects are missed, and F1 could be so much better.
_MISSED, _BETTER = 0.1, 0.05
#: Room beyond the outermost scores, as a share of their range.
_ROOM = 0.05
#: Names of thresholds in force: the one that was judged with, one that is tried, and what that is tried in place of.
NOW, TRIED, BUNDLES, LINES = PRESENT = ("now", "tried", "bundle's", "line's")
OPTIMISTIC = "a value chosen on them looks better on them than it is on new ones"


@dataclass(frozen=True)
class Point:
    """What one threshold does to the images of a product that have a score.

    shown: the threshold as it is printed. names: what it is, e.g. `now`, `best F1`. false_alarms of `good` images are
    NG, `missed` of the `defective` OK.
    """

    threshold: float
    shown: str
    names: tuple[str, ...]
    false_alarms: int
    good: int
    missed: int
    defective: int
    f1: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "names": list(self.names),
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "false_alarm_rate": self.false_alarms / self.good,
            "missed": self.missed,
            "miss_rate": self.missed / self.defective,
            "F1": self.f1,
        }


def scores_of(judged: Sequence[Judged], product: str) -> tuple[Array, Array]:
    """Scores of a product's good and of its defective images: those that have one and were judged as that product."""
    mine = [j for j in judged if j.sample.product == product == j.product and np.isfinite(j.score)]
    good, bad = ([j.score for j in mine if j.sample.good == kind] for kind in (True, False))
    return np.array(good, np.float64), np.array(bad, np.float64)


def trade_off(good: Array, bad: Array, present: Mapping[str, float]) -> list[Point]:
    """The present thresholds (by what they are) and those worth knowing, highest first; none without both kinds.

    Those: the best F1, the highest that misses nothing, the lowest that calls at most 1, 5, 10 % of the good images NG.
    They have as few digits as decide these images so, clear of the scores beside them: what is shown may be copied.
    Those that decide every image alike are one, the present one if it is among them.
    """
    best = best_f1(np.concatenate([good, bad]), np.arange(good.size + bad.size) >= good.size)
    if best is None:
        return []
    highest = np.sort(good)[::-1]
    wanted = [("best F1", best[1]), ("no miss", float(np.nextafter(bad.min(), -np.inf)))]
    for share in SHARES:
        allowed = int(share * good.size + 1e-9)
        wanted.append((f"{_BOUND}{share:.0%}", float(highest[allowed])))
    every = np.unique(np.concatenate([good, bad]))
    found = [(value, f"{value:.6g}", [name]) for name, value in present.items()]
    for name, value in wanted:
        same = (names for other, _, names in found if _rank(every, other) == _rank(every, value))
        if (names := next(same, None)) is not None:
            names.append(name)
        else:
            handy = _handy(every, value)
            found.append((handy, repr(handy), [name]))
    found.sort(key=lambda each: -each[0])
    return [_point(good, bad, *each) for each in found]


def trade_offs(evaluated: Evaluated, before: Mapping[str, float | None], own: str = BUNDLES) -> dict[str, list[Point]]:
    """Of each product; what it was judged with is `now`, or `tried` beside its `own` where that is in `before`."""
    found = {}
    for product, metrics in evaluated.products.items():
        present = {}
        if (value := metrics.get("threshold")) is not None and product not in evaluated.uncalibrated:
            present[TRIED if product in before else NOW] = value
        if (value := before.get(product)) is not None:
            present[own] = value
        found[product] = trade_off(*scores_of(evaluated.judged, product), present)
    return found


def better(points: Sequence[Point], allowed: float) -> Point | None:
    """A threshold that misses fewer of these defects, where the present one misses many; else None.

    Of those that call at most the `allowed` share of the good images NG it misses the fewest: whoever was promised that
    much of false alarms may have set the threshold higher than need be.
    """
    now = next((p for p in points if NOW in p.names), None)
    able = [p for p in points if p.false_alarms <= allowed * p.good + 1e-9]
    if now is None or not able or now.missed <= _MISSED * now.defective:
        return None
    best = min(able, key=lambda p: (p.missed, p.false_alarms))
    return best if best.missed < now.missed and best.f1 >= now.f1 + _BETTER else None


def rows(product: str, points: Sequence[Point]) -> list[list[str]]:
    """A product's points as cells: threshold, false alarms, missed, F1 and what each is, the first row headed."""
    cells = [[product, "good NG", "missed", "F1", ""]]
    for p in points:
        shares = ((p.false_alarms, p.good), (p.missed, p.defective))
        cells.append([p.shown, *(f"{n} ({n / of:.1%})" for n, of in shares), f"{p.f1:.3f}", _named(p.names)])
    return cells


def _named(names: Sequence[str]) -> str:
    """All names of a threshold; what the bounds on false alarms have in common is said once."""
    bounds = ", ".join(name.removeprefix(_BOUND) for name in names if name.startswith(_BOUND))
    return ", ".join([*(n for n in names if not n.startswith(_BOUND)), *([_BOUND + bounds] if bounds else [])])


def block(product: str, points: Sequence[Point]) -> str:
    """The same as text, in columns."""
    cells = rows(product, points)
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0]) if row is cells[0] else row[0].rjust(widths[0])
        shown = [first, *(cell.rjust(width) for cell, width in zip(row[1:4], widths[1:], strict=True)), row[4]]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def _point(good: Array, bad: Array, threshold: float, shown: str, names: Sequence[str]) -> Point:
    ng = np.concatenate([good, bad]) > threshold
    rates = error_rates(ng, np.arange(ng.size) >= good.size)
    false_alarms, missed = int(ng[: good.size].sum()), int((~ng[good.size :]).sum())
    return Point(threshold, shown, tuple(names), false_alarms, good.size, missed, bad.size, rates["F1"] or 0.0)


def _rank(every: Array, threshold: float) -> int:
    """How many of the sorted, distinct scores are OK by the threshold."""
    return int(np.searchsorted(every, threshold, "right"))


def _handy(every: Array, value: float) -> float:
    """The number of fewest digits, from 3, that decides the scores as `value` does, clear of the two next to it."""
    at = _rank(every, value)
    room = float(every[-1] - every[0]) * _ROOM or max(abs(float(every[0])) * _ROOM, 1e-6)
    low = float(every[at - 1]) if at else float(every[0]) - room
    high = float(every[at]) if at < every.size else float(every[-1]) + room
    middle, slack = (low + high) / 2, (high - low) / 4
    for digits in range(3, 17):
        shown = float(f"{middle:.{digits}g}")
        if low + slack <= shown <= high - slack:
            return shown
    return middle
