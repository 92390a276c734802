"""Regions of an anomaly map, and the region of interest."""

from __future__ import annotations

from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from andon.runtime import regions
from andon.runtime.regions import clip_roi, find_regions
from andon.runtime.types import Region
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


def every_region(anomaly_map: np.ndarray, threshold: float, box: tuple[int, int, int, int], area: int) -> list[Region]:
    """All of them, one after the other, by peak; of equal peaks the one that comes first in the map."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((anomaly_map > threshold).astype(np.uint8))
    found = []
    for index in range(1, count):
        left, top, width, height, cells = map(int, stats[index])
        rows, columns = anomaly_map.shape
        x, y = left * box[2] // columns, top * box[3] // rows
        right, bottom = -(-(left + width) * box[2] // columns), -(-(top + height) * box[3] // rows)
        bbox = (box[0] + x, box[1] + y, right - x, bottom - y)
        peak = max(float(value) for value in anomaly_map[labels == index])
        found.append(Region(bbox, round(cells * box[2] * box[3] / (rows * columns)), peak))
    return sorted((region for region in found if region.area >= area), key=lambda region: -region.peak)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    levels=st.sampled_from([2, 5, 2**20]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 2.0]),
    area=st.sampled_from([0, 1, 300, 5000]),
    limit=st.sampled_from([0, 1, 3, 16, 1000]),
)
def test_the_regions_are_the_first_of_all_of_them(
    seed: int, shape: tuple[int, int], levels: int, threshold: float, area: int, limit: int
) -> None:
    rng = np.random.default_rng(seed)
    anomaly_map = rng.integers(0, levels, shape).astype(np.float32) / np.float32(levels)
    box = (3, 4, 320, 180)
    expected = tuple(every_region(anomaly_map, threshold, box, area)[:limit])
    assert find_regions(anomaly_map, threshold, box, min_area=area, limit=limit) == expected


def test_of_thousands_of_specks_no_more_are_boxed_than_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NG verdict waits for it."""
    boxed = Mock(wraps=Region)
    monkeypatch.setattr(regions, "Region", boxed)
    noise = np.random.default_rng(0).random((224, 224), np.float32)
    assert len(find_regions(noise, 0.9, (0, 0, 1280, 720), limit=16)) == 16
    assert boxed.call_count == 16


def test_a_roi_lies_in_the_picture_or_the_picture_is_of_another_size() -> None:
    assert clip_roi(None, 40, 30) == (0, 0, 40, 30)
    assert clip_roi((10, 10, 30, 20), 40, 30) == (10, 10, 30, 20)
    assert clip_roi((10, 10, 32, 21), 40, 30) == (10, 10, 30, 20), "rounding"
    for roi in ((10, 10, 33, 5), (10, 10, 5, 23), (10, 10, 100, 100), (40, 0, 2, 5), (0, 30, 5, 1), (50, 50, 5, 5)):
        assert clip_roi(roi, 40, 30) is None, roi
