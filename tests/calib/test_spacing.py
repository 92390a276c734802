"""Scores of a camera that runs freely: those that count are of different parts, and what stands still counts once."""

from __future__ import annotations

import numpy as np
import pytest
from andon.calib.drift import DriftMonitor
from andon.calib.policies import DriftPolicy
from andon.calib.spacing import Spacing, neighbours


def pictures(rng, parts, each, level=0.0):
    """Scores of parts that are in view for `each` pictures: 1 apart from part to part, 0.1 from picture to picture."""
    return np.repeat(rng.normal(level, 1, parts), each) + rng.normal(0, 0.1, parts * each)


def watch(monitor, scores, apart=False):
    """Whether the monitor warned at any of these."""
    return any([monitor.observe(float(score), apart).warning for score in scores])


def started(rng, each, policy=None):
    """A monitor that has its reference."""
    monitor = DriftMonitor(policy or DriftPolicy())
    while not monitor.complete:
        watch(monitor, pictures(rng, 10, each))
    return monitor


@pytest.mark.parametrize("each", [1, 2, 5, 25, 50])
def test_what_is_picked_is_of_different_parts(each):
    rng, spacing = np.random.default_rng(each), Spacing()
    while not spacing.measured:
        for score in pictures(rng, 10, each):
            spacing.pick(float(score))
    assert each <= spacing.stride <= max(4, 8 * each)
    numbers = np.repeat(np.arange(400), each)
    picked = [number for number in numbers for _ in spacing.pick(float(number))]
    assert len(picked) > 25 and len(set(picked)) == len(picked)


def test_pauses_do_not_keep_step_with_a_machine():
    spacing = Spacing()
    spacing.measured, spacing.stride = True, 8
    places = [index for index in range(3000) for _ in spacing.pick(0.0)]
    assert min(np.diff(places)) >= 8 and max(np.diff(places)) < 16
    for tact in (8, 10, 12, 16):
        assert len({place % tact for place in places}) == tact, "each of its cavities is seen"


def test_a_steady_camera_that_runs_freely_raises_no_warning():
    """The figures of docs/memory.md. Counting every picture, as a trigger's parts are, warns of nothing at all."""
    for each in (5, 10, 25):
        rng = np.random.default_rng(each)
        monitors = [started(rng, each) for _ in range(4)]
        assert not any([watch(m, pictures(rng, 1200, each)) for m in monitors]), each
        monitors = [DriftMonitor(DriftPolicy()) for _ in range(4)]
        assert any([watch(m, pictures(rng, 4000 // each, each), apart=True) for m in monitors]), each


@pytest.mark.parametrize(("shift", "parts"), [(1.5, 362), (2, 264)])
def test_a_drift_is_seen_within_the_parts_that_docs_memory_md_states(shift, parts):
    rng = np.random.default_rng(int(10 * shift))
    for each in (1, 5, 25):
        monitor = started(rng, each)
        assert not watch(monitor, pictures(rng, 300, each))
        assert watch(monitor, pictures(rng, parts, each, level=shift))


def test_a_stopped_line_raises_no_warning_and_hides_no_drift():
    rng = np.random.default_rng(0)
    monitor = started(rng, 5)
    watch(monitor, pictures(rng, 400, 5))
    for _ in range(6):
        stopped = rng.normal(1.5, 0.1, 3000)  # a part that is higher than most stays in view
        assert not watch(monitor, stopped) and not watch(monitor, pictures(rng, 50, 5))
    assert watch(monitor, pictures(rng, 600, 5, level=2))
    watch(monitor, rng.normal(0, 0.1, 3000))
    assert monitor.warning, "nor does it end one"


def test_of_a_part_that_stays_in_view_one_score_counts():
    rng = np.random.default_rng(0)
    monitor = started(rng, 1, DriftPolicy(window=300))
    watch(monitor, pictures(rng, 20, 1))
    before = monitor.state()["recent"].tolist()
    watch(monitor, rng.normal(9, 0.001, 40))
    during = monitor.state()["recent"].tolist()
    assert during[:-1] == before and during[-1] == pytest.approx(9, abs=0.01)
    watch(monitor, [3.0, 6.0])
    assert monitor.state()["recent"].tolist() == [*during, 3.0, 6.0]


def test_the_smallest_reference_is_enough_for_a_camera_that_runs_freely():
    """Of fewer than ten scores it is not known how little one scene differs."""
    monitor = started(np.random.default_rng(0), 1, DriftPolicy(5, 5, 0.01))
    assert watch(monitor, [50.0] * 5)


def test_a_measurement_ends_though_neighbours_always_resemble_each_other(monkeypatch):
    """Or a camera whose light goes with the hour would never be watched."""
    monkeypatch.setattr("andon.calib.spacing._LONGEST", 16)
    spacing = Spacing()
    counted = [score for score in range(10_000) for score in spacing.pick(float(score))]
    assert spacing.measured and spacing.stride == 32 and len(counted) > 200


def test_a_measurement_that_another_version_began_on_more_scores_ends():
    spacing = Spacing()
    spacing.restore(spacing.state() | {"measuring": np.random.default_rng(0).normal(size=400)})
    assert len(spacing.pick(0.0)) == 200 and spacing.measured


def test_a_first_measurement_replaces_nothing():
    rng, monitor = np.random.default_rng(0), DriftMonitor(DriftPolicy())
    seen = [monitor.observe(float(score), apart=False) for score in pictures(rng, 400, 5)]
    assert monitor.complete and monitor.spacing.stride > 1 and not any(drift.renewed for drift in seen)


def test_a_camera_whose_scores_are_all_equal_raises_none():
    assert neighbours([3.0] * 50) == 0
    monitor = DriftMonitor(DriftPolicy())
    assert not watch(monitor, [3.0] * 2000) and monitor.complete and monitor.spacing.stride == 1
    assert watch(monitor, [3.5] * 100)


def test_ranks_of_neighbours():
    rng = np.random.default_rng(0)
    assert neighbours(range(100)) == pytest.approx(1, abs=0.05)
    assert abs(neighbours(rng.normal(size=2000))) < 0.07
    assert neighbours(pictures(rng, 500, 4)) == pytest.approx(0.75, abs=0.06)
    assert neighbours([*pictures(rng, 50, 4), 1e9]) > 0.6, "one huge score hides nothing"


def test_a_restart_goes_on_measuring_and_picking():
    rng = np.random.default_rng(0)
    before, after = DriftMonitor(DriftPolicy()), DriftMonitor(DriftPolicy())
    watch(before, pictures(rng, 100, 5))
    assert not before.spacing.measured and before.spacing.stride > 1
    after.restore(before.state())
    assert after.spacing.state().keys() == before.spacing.state().keys()
    assert all((after.spacing.state()[key] == value).all() for key, value in before.spacing.state().items())
    watch(after, pictures(rng, 1200, 5))
    again = DriftMonitor(DriftPolicy())
    again.restore(after.state())
    assert after.complete and again.complete and again.spacing.stride == after.spacing.stride >= 5
    again.reset()
    assert not again.spacing.measured and again.spacing.stride == 1


def as_before(monitor):
    """What the version before this test saved of a monitor."""
    return {key: value for key, value in monitor.state().items() if key in ("reference", "recent", "warning")}


def test_a_reference_of_pictures_that_an_earlier_version_took_for_parts_is_replaced():
    rng = np.random.default_rng(1)
    old = DriftMonitor(DriftPolicy())
    assert watch(old, pictures(rng, 200, 25), apart=True), "a false warning"
    new = DriftMonitor(DriftPolicy())
    new.restore(as_before(old))
    new.restore(new.state())  # a second restart, before it is measured
    seen = [new.observe(float(score), apart=False) for score in pictures(rng, 1500, 25)]
    assert sum(drift.renewed for drift in seen) == 1
    at = next(index for index, drift in enumerate(seen) if drift.renewed)
    assert new.complete and not any(drift.warning for drift in seen[at:])
    new.restore(new.state())
    assert new.complete


@pytest.mark.parametrize("apart", [True, False])
def test_a_reference_of_parts_that_an_earlier_version_took_is_kept(apart):
    rng = np.random.default_rng(2)
    old = DriftMonitor(DriftPolicy())
    watch(old, pictures(rng, 150, 1), apart=True)
    new = DriftMonitor(DriftPolicy())
    new.restore(as_before(old))
    assert not watch(new, pictures(rng, 250, 1), apart)
    assert new.state()["reference"].tolist() == old.state()["reference"].tolist()
    assert watch(new, pictures(rng, 100, 1, level=2), apart)


@pytest.mark.parametrize("stood, each", [(1000, 25), (0, 400)])
def test_a_measurement_of_one_part_alone_is_made_again(stood, each):
    """The line stood when the station was started, or its first part was in view throughout: only noise was measured,
    and every picture taken for a part."""
    rng = np.random.default_rng(3)
    monitor = DriftMonitor(DriftPolicy())
    watch(monitor, pictures(rng, 1, stood or each))
    assert monitor.spacing.measured and monitor.spacing.stride == 1
    seen = [monitor.observe(float(score), apart=False) for score in pictures(rng, 64_000 // each, each)]
    assert each / 2 <= monitor.spacing.stride <= 8 * each
    at = max(index for index, drift in enumerate(seen) if drift.renewed)
    assert at < 100 * each and not any(drift.warning for drift in seen[at:])


@pytest.mark.parametrize("each", [1, 25])
@pytest.mark.parametrize("level", [2, 50])
def test_what_drifts_is_not_taken_for_a_slower_line(each, level):
    rng = np.random.default_rng(4)
    monitor = started(rng, each)
    watch(monitor, pictures(rng, 300, each))
    seen = [monitor.observe(float(score), apart=False) for score in pictures(rng, 1000, each, level)]
    assert not any(drift.renewed for drift in seen)
    assert monitor.warning and sum(drift.changed for drift in seen) == 1
