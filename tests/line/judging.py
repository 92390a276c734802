"""Frames of the parts that the bundle of conftest.py judges: the score is the brightest pixel's."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

import numpy as np
from andon.runtime.types import Frame


def picture(shade: int, spot: tuple[int, int, int, int] | None = None, size: tuple[int, int] = (64, 64)) -> Any:
    image = np.full((size[1], size[0], 3), shade, np.uint8)
    if spot:
        x, y, width, height = spot
        image[y : y + height, x : x + width] = 255
    return image


def frame(image: Any, camera: str = "cam", **fields: Any) -> Frame:
    now = time.monotonic()
    return Frame(camera, 7, datetime.now(timezone.utc), now, image, **{"product": "mono", **fields})
