"""Anomaly maps drawn over pictures: in reports, in evidence and on the live page, the same everywhere."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

#: Rows blended at a time: their float32 copies stay small beside the picture, and in the processor's cache.
_STRIP = 32


def overlay(image: NDArray[Any], score_map: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Blend an anomaly map over an image.

    Args:
        image: uint8 [h, w, 3] RGB.
        score_map: float [h', w'], any resolution.
        low: map value shown as transparent (typical of good parts).
        high: map value shown as fully hot.

    Returns:
        uint8 [h, w, 3] RGB. Values at or below `low` leave the image as it is, so that heat always means evidence.
    """
    drawn = image.copy()
    draw(drawn, score_map, low, high)
    return drawn


def draw(image: NDArray[Any], score_map: NDArray[Any], low: float, high: float) -> None:
    """As :func:`overlay`, onto the picture itself, which may be a view of a larger one.

    Blending works in float32, a dozen times the picture's bytes if all of it were done at once, and nearly all of a
    picture is not hot: only the rows and columns that hold heat are blended, in strips.
    """
    heat = cv2.resize(np.asarray(score_map, np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    hot = heat > low
    columns, rows = np.flatnonzero(hot.any(axis=0)), np.flatnonzero(hot.any(axis=1))
    if not len(rows):
        return
    across, end = slice(int(columns[0]), int(columns[-1]) + 1), int(rows[-1]) + 1
    for start in range(int(rows[0]), end, _STRIP):
        strip = slice(start, min(start + _STRIP, end)), across
        share = np.clip((heat[strip] - low) / max(high - low, 1e-12), 0, 1)
        colours = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
        alpha = (0.8 * share**0.8)[..., None]
        image[strip] = np.asarray(image[strip] * (1 - alpha) + colours * alpha, np.uint8)


def scale(score_map: NDArray[Any], threshold: float | None) -> tuple[float, float]:
    """Map values shown as transparent and as fully hot, for a picture that stands alone.

    With a pixel threshold heat begins a little below it, so that an unremarkable part does not glow; without one the
    upper half of the map's own range is shown.
    """
    low, high = float(np.min(score_map)), float(np.max(score_map))
    if threshold is None:
        return (low + high) / 2, max(high, low + 1e-9)
    span = max(threshold - low, 1e-9)
    return threshold - 0.3 * span, max(threshold + 0.7 * span, high if high > threshold else threshold)
