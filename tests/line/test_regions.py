"""Regions of an anomaly map, and the region of interest."""

from __future__ import annotations

import numpy as np
import pytest
from andon.runtime.regions import clip_roi, find_regions
from hypothesis import given, settings
from hypothesis import strategies as st


def test_regions_are_sorted_by_peak_and_bounded() -> None:
    anomaly_map = np.zeros((20, 20), np.float32)
    for index in range(5):
        anomaly_map[4 * index, 4 * index : 4 * index + 2] = 1 + index
    found = find_regions(anomaly_map, 0.5, (0, 0, 40, 80), limit=3)
    assert [region.peak for region in found] == [5, 4, 3]
    assert found[0].bbox == (32, 64, 4, 4) and found[0].area == 16
    assert find_regions(anomaly_map, 9, (0, 0, 40, 80)) == ()
    assert len(find_regions(anomaly_map, 0.5, (0, 0, 40, 80), min_area=17)) == 0


@settings(deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), min_size=1, max_size=40),
    box=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 300), st.integers(1, 300)),
)
def test_regions_cover_every_cell_above_the_threshold_and_stay_in_the_box(
    cells: list[tuple[int, int]], box: tuple[int, int, int, int]
) -> None:
    anomaly_map = np.zeros((14, 14), np.float32)
    for row, column in cells:
        anomaly_map[row, column] = 1 + row + column / 100
    found = find_regions(anomaly_map, 0.5, box, min_area=0, limit=1000)
    x, y, width, height = box
    for left, top, wide, high in (region.bbox for region in found):
        assert x <= left and y <= top and left + wide <= x + width and top + high <= y + height
    for row, column in set(cells):
        middle_x, middle_y = x + (column + 0.5) * width / 14, y + (row + 0.5) * height / 14
        assert any(
            left <= middle_x <= left + wide and top <= middle_y <= top + high
            for left, top, wide, high in (region.bbox for region in found)
        )
    assert sum(region.area for region in found) == pytest.approx(len(set(cells)) * width * height / 196, abs=len(found))
    assert max(region.peak for region in found) == anomaly_map.max()


def test_a_roi_lies_in_the_picture_or_the_picture_is_of_another_size() -> None:
    assert clip_roi(None, 40, 30) == (0, 0, 40, 30)
    assert clip_roi((10, 10, 30, 20), 40, 30) == (10, 10, 30, 20)
    assert clip_roi((10, 10, 32, 21), 40, 30) == (10, 10, 30, 20), "rounding"
    for roi in ((10, 10, 33, 5), (10, 10, 5, 23), (10, 10, 100, 100), (40, 0, 2, 5), (0, 30, 5, 1), (50, 50, 5, 5)):
        assert clip_roi(roi, 40, 30) is None, roi
