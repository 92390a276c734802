"""Heatmap pictures for reports: the part, and the part under its anomaly map."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..heatmap import overlay

SIDE = 256


def data_uri(image: NDArray[Any], side: int = SIDE, quality: int = 82) -> str:
    """JPEG data URI of an RGB image, scaled so that its longer side is `side` pixels."""
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    ok, code = cv2.imencode(".jpg", np.ascontiguousarray(small[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"JPEG encoding failed for an image of shape {image.shape} and type {image.dtype}")
    return "data:image/jpeg;base64," + base64.b64encode(code.tobytes()).decode()


def outline(image: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """Draw the border of a ground-truth mask (uint8 [h, w], above 0 is defect) on a copy of an RGB image."""
    shape = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours((shape > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(image.copy(), contours, -1, (0, 255, 120), max(1, image.shape[0] // 160)))


def pair(image: NDArray[Any], score_map: NDArray[Any], low: float, high: float, mask: NDArray[Any] | None) -> str:
    """Data URI of image (with the ground-truth border where there is one) and heatmap side by side."""
    left = image if mask is None else outline(image, mask)
    seam = np.full((image.shape[0], max(1, image.shape[1] // 64), 3), 255, np.uint8)  # dark pictures would run together
    return data_uri(np.concatenate([left, seam, overlay(image, score_map, low, high)], axis=1), side=2 * SIDE)
