"""Drift monitor: quiet while nothing moves, warns when scores rise, clears, survives a restart."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
from andon.calib.drift import DriftMonitor
from andon.calib.errors import CalibrationError
from andon.calib.policies import DriftPolicy
from scipy.stats import ks_2samp


def feed(monitor, scores):
    return [monitor.observe(float(s)) for s in scores]


def test_quiet_on_a_steady_line_and_on_falling_scores():
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(DriftPolicy())
    assert not any(d.warning for d in feed(monitor, rng.normal(10, 1, 5000)))
    assert not any(d.warning for d in feed(monitor, rng.normal(5, 1, 500)))


def test_warns_once_when_scores_rise_and_clears_when_they_return():
    rng = np.random.default_rng(1)
    monitor = DriftMonitor(DriftPolicy())
    feed(monitor, rng.normal(10, 1, 300))
    risen = feed(monitor, rng.normal(11.4, 1, 200))
    assert [d.warning for d in risen if d.changed] == [True]
    back = feed(monitor, rng.normal(10, 1, 300))
    assert [d.warning for d in back if d.changed] == [False]


def test_statistic_equals_scipy():
    rng = np.random.default_rng(2)
    monitor = DriftMonitor(DriftPolicy())
    reference, recent = rng.normal(0, 1, 100), rng.normal(0.5, 1, 100)
    feed(monitor, np.concatenate([reference, recent]))
    expected = ks_2samp(reference, recent, alternative="greater")
    assert monitor.statistic() == pytest.approx(expected.statistic)


def test_the_statistic_is_that_of_the_samples_whenever_it_is_asked_for_and_taken_once(monkeypatch):
    """The line asks each second for each camera and product, on the thread that judges."""
    rng = np.random.default_rng(5)
    monitor = DriftMonitor(DriftPolicy(reference=20, window=20, alpha=1e-3))

    def expected():
        reference, recent = (monitor.state()[name] for name in ("reference", "recent"))
        if not len(reference) or not len(recent):
            return 0.0
        points = np.concatenate([reference, recent])
        return max(0.0, max((reference <= x).mean() - (recent <= x).mean() for x in points))

    for step in range(400):
        apart = bool(rng.random() < 0.5) if step < 200 else False
        score = 9.0 if 250 < step < 300 else float(rng.normal(step / 100))  # a scene that stays in view
        monitor.observe(score, apart)
        if step % 50 == 49:
            monitor.restore(monitor.state())
        if step == 120:
            monitor.reset()
        assert monitor.statistic() == pytest.approx(expected())
    sorts = Mock(wraps=np.sort)
    monkeypatch.setattr(np, "sort", sorts)
    monitor.observe(1.0)
    sorts.reset_mock()
    for _ in range(10):
        monitor.statistic()
    assert sorts.call_count <= 2


def test_critical_value_means_alpha():
    """By simulation at an alpha that can be simulated."""
    policy = DriftPolicy(alpha=0.05)
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        monitor = DriftMonitor(policy)
        hits += feed(monitor, rng.normal(size=200))[-1].warning
    assert hits / 400 < 0.08


@pytest.mark.parametrize(("reference", "window", "needed"), [(100, 100, 38), (50, 200, 84), (200, 50, 21)])
def test_the_score_that_warns_and_the_one_that_ends_it(reference, window, needed):
    """Of `window` scores `needed` lie above all of the reference: by exp(-2 D^2 n m / (n + m)) one in a million."""
    policy = DriftPolicy(reference, window)
    assert np.exp(-2 * policy.critical**2 * reference * window / (reference + window)) == pytest.approx(1e-6)
    for above in (needed - 1, needed):
        monitor = DriftMonitor(policy)
        seen = feed(monitor, [*range(reference), *[-1] * (window - above), *[1000] * above])
        assert seen[-1].statistic == pytest.approx(above / window)
        assert [d.warning for d in seen] == [False] * (reference + window - 1) + [above == needed]
    left = [d.statistic for d in feed(monitor, [-1] * window) if d.warning]
    assert min(left) > 0.8 * policy.critical >= min(left) - 1 / window, "one near the bound does not flicker"


def test_a_restart_changes_nothing():
    rng = np.random.default_rng(4)
    a, b = DriftMonitor(DriftPolicy()), DriftMonitor(DriftPolicy())
    feed(a, rng.normal(10, 1, 250))
    b.restore(a.state())
    later = rng.normal(11.5, 1, 150)
    assert feed(a, later) == feed(b, later)
    a.reset()
    assert not a.warning and a.statistic() == 0


@pytest.mark.parametrize("changed", [{"window": 200}, {"reference": 200}, {"window": 50}, {"reference": 50}])
def test_a_restart_under_another_policy_does_not_take_what_has_drifted_for_usual(changed):
    rng = np.random.default_rng(5)
    before = DriftMonitor(DriftPolicy())
    feed(before, [*rng.normal(0, 1, 100), *rng.normal(3, 1, 100)])
    assert before.warning
    after = DriftMonitor(DriftPolicy(**changed))
    after.restore(before.state())
    assert all(d.warning for d in feed(after, rng.normal(3, 1, 400)))
    assert after.state()["reference"].tolist() == before.state()["reference"][: after.policy.reference].tolist()
    assert [d.warning for d in feed(after, rng.normal(0, 1, 400)) if d.changed] == [False]


def test_a_shorter_reference_has_the_bound_of_its_size():
    after = DriftMonitor(DriftPolicy(reference=200))
    before = DriftMonitor(DriftPolicy(reference=50))
    feed(before, np.arange(60))
    after.restore(before.state())
    assert after.critical == DriftPolicy(reference=50).critical > after.policy.critical


def test_a_reference_too_short_to_warn_at_all_is_made_up():
    before = DriftMonitor(DriftPolicy(reference=5, window=5, alpha=0.01))
    feed(before, np.arange(10))
    after = DriftMonitor(DriftPolicy())
    after.restore(before.state())
    assert not after.complete
    feed(after, np.arange(95))
    assert after.complete and len(after.state()["recent"]) == 0


def test_scores_that_are_not_finite_do_not_count():
    monitor = DriftMonitor(DriftPolicy(reference=5, window=5, alpha=0.01))
    feed(monitor, [1, 2, 3, 4, 5, float("nan"), float("inf")])
    assert len(monitor.state()["recent"]) == 0
    with pytest.raises(CalibrationError, match="drift policy"):
        DriftPolicy(window=1)


@pytest.mark.parametrize("sizes", [{"window": 7}, {"reference": 10, "window": 10}, {"reference": 5, "window": 5}])
def test_samples_that_no_score_could_make_warn_are_refused(sizes):
    with pytest.raises(CalibrationError, match="never be warned of"):
        DriftPolicy(**sizes)


@pytest.mark.parametrize("policy", [DriftPolicy(window=8), DriftPolicy(14, 14), DriftPolicy(5, 5, 0.01)])
def test_the_smallest_samples_that_are_taken_can_warn(policy):
    monitor = DriftMonitor(policy)
    assert any(d.warning for d in feed(monitor, [1.0] * policy.reference + [2.0] * policy.window))
