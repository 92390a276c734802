"""What other thresholds would do: the few that are worth knowing, and that what is printed may be copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from andon.runtime.dataset import Sample
from andon.runtime.evaluation import Judged
from andon.runtime.quality import best_f1, decisions
from andon.runtime.tradeoff import Point, better, block, scores_of, trade_off
from hypothesis import given
from hypothesis import strategies as st

SCORES = st.lists(st.integers(-30, 30), min_size=1, max_size=40)


def named(points: list[Point], name: str) -> Point:
    return next(p for p in points if name in p.names)


@given(SCORES, SCORES, st.sampled_from([1.0, 1e-6, 0.1, 1234.5]), st.integers(-40, 40))
def test_each_does_what_it_is_called_and_what_is_printed_does_the_same(
    good: list[int], bad: list[int], scale: float, now: int
) -> None:
    g, b = np.array(good, np.float32) * np.float32(scale), np.array(bad, np.float32) * np.float32(scale)
    g, b = g.astype(np.float64), b.astype(np.float64)
    points = trade_off(g, b, {"now": now * scale})
    scores, truth = np.concatenate([g, b]), np.arange(len(g) + len(b)) >= len(g)
    for p in points:
        assert (p.false_alarms, p.missed) == (int((g > p.threshold).sum()), int((b <= p.threshold).sum()))
        assert p.f1 == decisions(scores, truth, p.threshold)["F1"]
        if "now" not in p.names:
            assert float(p.shown) == p.threshold, "copied from the screen it decides the same"
            assert not np.isin(p.threshold, scores), "clear of every score: rounding must not decide"
    best = best_f1(scores, truth)
    assert best is not None and named(points, "best F1").f1 == pytest.approx(best[0])
    none = named(points, "no miss")
    assert none.missed == 0 and not any(p.missed == 0 and p.false_alarms < none.false_alarms for p in points)
    for share in (0.01, 0.05, 0.1):
        p = named(points, f"good NG <= {share:.0%}")
        assert p.false_alarms <= share * len(g) + 1e-9
        lower = np.unique(scores[scores < p.threshold])
        fewer = [t for t in lower - 1e-9 * scale if (g > t).sum() <= share * len(g) + 1e-9]
        assert all((b <= t).sum() >= p.missed for t in fewer), "a lower one that is allowed would miss fewer"
    assert len(points) <= 6 and points == sorted(points, key=lambda p: -p.threshold)


def test_thresholds_that_decide_alike_are_one_line() -> None:
    good, bad = np.arange(14) / 10 + 30, np.array([*np.arange(31) / 10 + 40, 31.25])
    points = trade_off(good, bad, {"now": 39.0})
    assert block("cookie", points).splitlines() == [
        "cookie   good NG    missed     F1",
        "    39  0 (0.0%)  1 (3.1%)  0.984  now, good NG <= 1%, 5%",
        " 31.23  1 (7.1%)  0 (0.0%)  0.985  best F1, no miss, good NG <= 10%",
    ]
    assert points[0].as_dict()["names"] == ["now", "good NG <= 1%", "good NG <= 5%"]
    assert trade_off(good, np.empty(0), {"now": 1.0}) == trade_off(np.empty(0), bad, {}) == []


def test_a_better_one_is_named_only_where_many_defects_are_missed_and_within_the_promise() -> None:
    good, bad = np.linspace(0, 1, 50), np.linspace(2, 3, 50)

    def found(good: np.ndarray, bad: np.ndarray, now: float | None, allowed: float = 0.05) -> Point | None:
        return better(trade_off(good, bad, {} if now is None else {"now": now}), allowed)

    point = found(good, bad, 2.5)
    assert point is not None and 1 < point.threshold < 2
    assert found(good, bad, 2.05) is None, "hardly any is missed"
    assert found(good, bad, 0.5) is None, "none is missed: that is no matter of misses"
    assert found(good, bad, None) is None, "there is no threshold yet"
    assert found(bad, good, 2.5) is None, "to call every part NG is no advice"
    both = np.linspace(0.9, 3, 500)  # most images are defective, and F1 is best where a tenth of the good ones are NG
    point, more = found(good, both, 2.5), found(good, both, 2.5, 0.5)
    assert point is not None and more is not None
    assert point.false_alarms <= 2 < more.false_alarms and more.missed < point.missed, "what was promised decides"


def test_scores_of_what_was_judged_as_another_product_are_of_another_scale() -> None:
    def one(label: str, score: float, product: str | None = "a") -> Judged:
        return Judged(Sample(Path("x"), "x", "a", label, "test"), "OK", score, product, None)

    judged = [
        one("good", 1.0),
        one("good", float("nan")),
        one("good", 9.0, "b"),
        one("crack", 2.0),
        one("crack", 9, None),
    ]
    good, bad = scores_of(judged, "a")
    assert good.tolist() == [1.0] and bad.tolist() == [2.0]
