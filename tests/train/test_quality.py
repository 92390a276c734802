"""runtime/quality.py against slow definitions."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from andon.runtime import quality
from andon.runtime.quality import (
    aupro,
    auroc,
    average_precision,
    best_f1,
    decisions,
    map_at,
    mask_at,
    mean_metrics,
    summarize,
    table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Every distinct value as threshold, every region on its own, trapezia up to the limit."""
    regions = []
    for i, mask in enumerate(masks):
        labels, count = label(mask, np.ones((3, 3)))
        regions += [(i, labels == k) for k in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        above = maps >= threshold
        rate = (above & ~masks).sum() / (~masks).sum()
        points.append((rate, float(np.mean([above[i][region].mean() for i, region in regions]))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@given(st.integers(0, 10_000), st.sampled_from([3, 8, 1000]), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_aupro_equals_its_definition(seed: int, levels: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 11)) < 0.2
    masks[0] = False
    masks[1, 2, 2] = True
    maps = rng.integers(0, levels, masks.shape).astype(np.float32) + masks * rng.random()
    assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-6)


def test_aupro_of_a_perfect_and_an_inverted_map() -> None:
    masks = np.zeros((2, 20, 20), bool)
    masks[1, 3:6, 3:6] = masks[1, 12:18, 12:18] = True
    noise = np.random.default_rng(0).random(masks.shape)
    assert aupro(masks + 0.5 * noise, masks) == pytest.approx(1.0)
    assert aupro(0.5 * noise - masks, masks) == 0.0
    assert aupro(noise, np.zeros_like(masks)) is None


@pytest.mark.filterwarnings("error")
def test_a_mask_of_the_whole_picture_is_one_region_and_no_warning() -> None:
    maps = np.random.default_rng(0).random((2, 8, 8)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[0] = True
    assert aupro(maps, masks) == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-6)


def test_small_regions_count_as_much_as_large_ones() -> None:
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 0, 0] = True
    masks[0, 10:20, 10:20] = True
    maps = np.zeros(masks.shape, np.float32)
    maps[0, 10:20, 10:20] = 1  # the large one found, the small one not: half of the overlap, and ties beyond
    assert aupro(maps, masks, 1e-6) == pytest.approx(0.5, abs=1e-3)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=60))
@settings(deadline=None)
def test_auroc_equals_the_library(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = [p[0] for p in pairs], [p[1] for p in pairs]
    if len(set(truth)) == 1:
        assert auroc(scores, truth) is None
    else:
        assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=60), st.sampled_from([1, 7, 1 << 20]))
@settings(deadline=None)
def test_average_precision_equals_the_library(pairs: list[tuple[int, bool]], piece: int) -> None:
    scores, truth = np.array([p[0] for p in pairs], np.float32), [p[1] for p in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_PIECE", piece)
        found = average_precision(scores, truth)
    if len(set(truth)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(average_precision_score(truth, scores))


def test_average_precision_of_all_pixels_takes_no_more_memory_than_their_auroc() -> None:
    """A test set has 10^8 of them: a curve of thresholds would not fit beside the maps."""
    rng = np.random.default_rng(0)
    maps, masks = rng.random((40, 256, 256), np.float32), rng.random((40, 256, 256)) < 0.2

    def peak(figure: Callable[..., float | None]) -> int:
        tracemalloc.start()
        figure(maps, masks)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    assert peak(average_precision) <= peak(auroc)


def test_auroc_is_not_flipped() -> None:
    assert auroc([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1]) == 0.0
    assert auroc([0.0, 1.0], [0, 1]) == 1.0
    assert auroc([0.0, 1.0], [1, 1]) is None


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None)
def test_best_f1_is_the_best_and_its_threshold_reaches_it(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([p[0] for p in pairs], float)
    truth = np.array([p[1] for p in pairs])
    best = best_f1(scores, truth)
    if truth.all() or not truth.any():
        assert best is None
        return
    assert best is not None
    candidates = [decisions(scores, truth, t)["F1"] or 0.0 for t in [-1.0, *np.unique(scores)]]
    assert best[0] == pytest.approx(max(candidates))
    assert decisions(scores, truth, best[1])["F1"] == pytest.approx(best[0])


def test_decisions_at_a_threshold() -> None:
    result = decisions([1, 2, 3, 4, 5.0], [0, 0, 0, 1, 1], 2.5)
    assert result == {
        "F1": pytest.approx(4 / 5),
        "balanced_accuracy": pytest.approx(1 - 1 / 6),
        "false_alarm_rate": pytest.approx(1 / 3),
        "miss_rate": 0.0,
    }
    assert decisions([2.5], [True], 2.5)["miss_rate"] == 1.0, "a score on the threshold is not above it"
    only_good = decisions([1.0, 2.0], [0, 0], 1.5)
    assert only_good["miss_rate"] is None and only_good["balanced_accuracy"] is None
    for threshold in (1.5, 3.0):
        f1 = decisions([1.0, 2.0], [0, 0], threshold)["F1"]
        assert f1 is None, "without a defective part, with a false alarm or without"


def test_summary_mean_and_table() -> None:
    masks = np.zeros((4, 6, 6), bool)
    masks[2:, 1:3, 1:3] = True
    maps = masks.astype(np.float32)
    masked = summarize([0, 1, 2, 3.0], [0, 0, 1, 1], maps=maps, masks=masks)
    plain = summarize([0, 2, 1, 3.0], [0, 0, 1, 1], threshold=0.5)
    pixels = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "pixel_AP")
    assert [masked[k] for k in pixels] == pytest.approx([1.0] * 4) and plain["pixel_AP"] is None
    assert plain["pixel_AUROC"] is None and plain["threshold"] == 0.5 and plain["false_alarm_rate"] == 0.5
    mean = mean_metrics({"a": masked, "b": plain})
    assert mean["image_AUROC"] == pytest.approx(0.875) and mean["pixel_AUROC"] is None and mean["good"] == 4
    lines = table({"a": masked, "b": plain}).splitlines()
    assert "pixel_AUPRO@0.3  pixel_AP" in lines[0] and len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("mean") and "0.875" in lines[-1] and "-" in lines[-1]


def test_a_part_without_a_score_is_in_no_figure_but_the_counts() -> None:
    maps = np.zeros((5, 6, 6), np.float32)
    masks = np.zeros(maps.shape, bool)
    maps[3, 1, 1] = 1
    masks[3:, 1, 1] = True  # the last one was not judged, so its empty map is no miss
    scores, truth = np.array([1, 3, np.nan, 2.0, np.inf]), [0, 0, 0, 1, 1]
    labels = ["OK", "NG", "UNKNOWN", "NG", "UNKNOWN"]
    result = summarize(scores, truth, threshold=1.5, labels=labels, maps=maps, masks=masks)
    assert [result[k] for k in ("image_AUROC", "pixel_AUROC")] == [0.5, 1.0]
    assert [result[k] for k in ("F1", "balanced_accuracy", "miss_rate")] == pytest.approx([2 / 3, 0.75, 0.0])
    rates = [result[f"unknown_rate{kind}"] for kind in ("", "_good", "_defective")]
    assert rates == pytest.approx([2 / 5, 1 / 3, 1 / 2]) and (result["good"], result["defective"]) == (3, 2)
    assert best_f1([1, 3, 2.0], [0, 0, 1]) == (result["F1_max"], result["F1_threshold"])


def test_maps_and_masks_at_another_size() -> None:
    assert map_at([[0.0, 1.0]], (2, 4)).shape == (2, 4)
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    assert mask_at(mask, (4, 4)).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
