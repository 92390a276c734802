"""The heat map over a picture: the same pixels as blending all of it at once, in a fraction of the memory."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from andon.runtime import heatmap
from hypothesis import given, settings
from hypothesis import strategies as st


def blended_at_once(image: np.ndarray, score_map: np.ndarray, low: float, high: float) -> np.ndarray:
    """The formula over the whole picture."""
    heat = cv2.resize(score_map, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    alpha = (0.8 * heat**0.8)[..., None]
    return np.asarray(image * (1 - alpha) + colours * alpha, np.uint8)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    cells=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    low=st.floats(-0.1, 1.1),
    span=st.sampled_from([0.0, 1e-9, 0.01, 0.5, 3.0]),
    spots=st.booleans(),
)
def test_the_overlay_is_the_formula_over_the_whole_picture(
    seed: int, size: tuple[int, int], cells: tuple[int, int], low: float, span: float, spots: bool
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    score_map = rng.random(cells, np.float32)
    if spots:
        score_map *= rng.random(cells) < 0.05
    before = image.copy()
    assert np.array_equal(
        heatmap.overlay(image, score_map, low, low + span), blended_at_once(image, score_map, low, low + span)
    )
    assert np.array_equal(image, before), "the picture that was given stays"


@pytest.mark.parametrize("where", ["a spot", "everywhere"])
def test_drawing_takes_little_more_memory_than_the_picture(where: str) -> None:
    """A 12 MP camera's heat map must not take most of a gigabyte beside the engines."""
    image = np.zeros((1500, 2000, 3), np.uint8)
    score_map = np.full((64, 64), float(where == "everywhere"), np.float32)
    score_map[20:24, 30:34] = 1
    tracemalloc.start()
    try:
        drawn = heatmap.overlay(image, score_map, 0.5, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (drawn != image).any()
    assert peak < 4 * image.nbytes, f"{peak / image.nbytes:.1f} times the picture"
