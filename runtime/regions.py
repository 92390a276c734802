"""From an anomaly map to the places on the picture where the defect is."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .types import Region

Array = NDArray[Any]
Box = tuple[int, int, int, int]
#: Pixels by which a region of interest may end outside the picture; more of it means a picture of another size.
ROUNDING = 2


def find_regions(
    anomaly_map: NDArray[Any], threshold: float, box: Box, *, min_area: int = 1, limit: int = 16
) -> tuple[Region, ...]:
    """Connected components (8 neighbours) of the map above the threshold, in camera pixels, largest peak first.

    Args:
        anomaly_map: float32 [h, w]; it covers `box` of the picture.
        threshold: a pixel of the map belongs to a region when it is above.
        box: x, y, width, height of the region of interest in the picture, in pixels.
        min_area: regions of fewer camera pixels are left out.
        limit: so many regions at most.
    """
    above = (anomaly_map > threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    if count < 2:
        return ()
    peaks = np.full(count, -np.inf, anomaly_map.dtype)  # of another type numpy would convert cell by cell, slowly
    inside = labels > 0
    np.maximum.at(peaks, labels[inside].astype(np.intp), anomaly_map[inside])
    rows, columns = anomaly_map.shape
    regions: list[Region] = []
    for index in np.argsort(-peaks[1:], kind="stable") + 1:
        if len(regions) == limit:  # of noise, or in the wrong light, there are thousands of specks
            break
        left, top, width, height, cells = (int(value) for value in stats[index])
        area = round(cells * box[2] * box[3] / (rows * columns))
        if area >= min_area:  # whole pixels outwards, in integers: floats would step over the edge
            x, y = left * box[2] // columns, top * box[3] // rows
            right, bottom = -(-(left + width) * box[2] // columns), -(-(top + height) * box[3] // rows)
            regions.append(Region((box[0] + x, box[1] + y, right - x, bottom - y), area, float(peaks[index])))
    return tuple(regions)


def clip_roi(roi: Box | None, width: int, height: int) -> Box | None:
    """The region of interest in a picture of this size, or None where it does not lie in it; without one all of it.

    What ends up to ROUNDING pixels outside is cut off.
    """
    if roi is None:
        return (0, 0, width, height)
    x, y = roi[:2]
    clipped = (x, y, min(roi[2], width - x), min(roi[3], height - y))
    whole = clipped[2] >= roi[2] - ROUNDING and clipped[3] >= roi[3] - ROUNDING
    return clipped if whole and clipped[2] > 0 and clipped[3] > 0 else None


def cut_out(image: Array, box: Box) -> Array:
    """The box of a picture [h, w] or [h, w, 3], in pixels: a view of it. The line's crop, and everybody else's."""
    x, y, width, height = box
    return image[y : y + height, x : x + width]
