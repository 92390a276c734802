"""Greedy k-centre: deterministic, nested, covering; distances in MatMul form."""

from __future__ import annotations

import numpy as np
import pytest
from andon.calib.coreset import greedy_k_center, project
from andon.calib.distance import nearest, squared_distances
from andon.calib.errors import CalibrationError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 6)), elements=st.integers(-50, 50))


def reference(rows, count):
    """The textbook loop in float64."""
    points = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    chosen = [int((points**2).sum(1).argmax())]
    gap = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        gap[chosen] = -1
        chosen.append(int(gap.argmax()))
        gap = np.minimum(gap, ((points - points[chosen[-1]]) ** 2).sum(1))
    return chosen


def test_equals_the_textbook_loop():
    rows = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32)
    assert greedy_k_center(rows, 60).tolist() == reference(rows, 60)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 50))
def test_distinct_in_range_deterministic_and_nested(rows, count):
    chosen = greedy_k_center(rows, count)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(rows))
    assert (chosen >= 0).all() and (chosen < len(rows)).all()
    assert (greedy_k_center(rows, count) == chosen).all()
    assert (greedy_k_center(rows, max(1, count // 2))[: max(1, count // 2)] == chosen[: max(1, count // 2)]).all()


def test_covers_better_than_chance():
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.normal(0, 0.1, (500, 4)), rng.normal(9, 0.1, (3, 4))]).astype(np.float32)
    greedy = nearest(rows, rows[greedy_k_center(rows, 10)])[0].max()
    chance = nearest(rows, rows[rng.permutation(len(rows))[:10]])[0].max()
    assert greedy < 0.5 < chance


def test_projection_keeps_distances_and_is_fixed():
    rows = np.random.default_rng(2).standard_normal((50, 400)).astype(np.float32)
    low = project(rows, 128)
    assert low.shape == (50, 128)
    assert (low == project(rows, 128)).all()
    ratio = np.sqrt(squared_distances(low, low)[~np.eye(50, dtype=bool)]) / np.sqrt(
        squared_distances(rows, rows)[~np.eye(50, dtype=bool)]
    )
    assert ratio.min() > 0.7 and ratio.max() < 1.3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 8), st.integers(0, 99))
def test_nearest_equals_brute_force(m, n, d, seed):
    rng = np.random.default_rng(seed)
    queries, bank = rng.standard_normal((m, d)).astype(np.float32), rng.standard_normal((n, d)).astype(np.float32)
    distance, index = nearest(queries, bank, block=7)
    brute = np.linalg.norm(queries[:, None].astype(np.float64) - bank[None], axis=2)
    np.testing.assert_allclose(distance, brute.min(1), atol=2e-3)
    np.testing.assert_allclose(brute[np.arange(m), index], brute.min(1), atol=2e-3)


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_refuses_what_has_no_coreset(rows):
    with pytest.raises(CalibrationError, match="coreset"):
        greedy_k_center(rows.astype(np.float32), 1)


@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_no_row_is_chosen_twice_among_duplicates_however_large_they_are(scale):
    rows = np.repeat(np.random.default_rng(0).standard_normal((5, 1024)).astype(np.float32) * np.float32(scale), 20, 0)
    assert len(set(greedy_k_center(rows, 50).tolist())) == 50
