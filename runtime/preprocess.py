"""The one place where images are resized. Training imports this too, so both sides see the same pixels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import SourceError
from .manifest import Preprocess

Image = NDArray[Any]


def resize(image: Image, preprocess: Preprocess, out: Image | None = None) -> Image:
    """Resize a camera image to network size with an antialiasing filter (METHODS.md 0.2).

    Shrinking averages areas (cv2.INTER_AREA), enlarging is bilinear, an axis each where the two differ; the whole image
    is stretched. Grey is resized first and then replicated to three channels.

    Args:
        image: uint8 [h, w, 3] RGB, [h, w, 1] or [h, w] grey.
        preprocess: network size.
        out: uint8 [height, width, 3], C-contiguous, filled and returned; allocated if None.

    Raises:
        SourceError: the image is empty, not uint8 or has another number of channels.
    """
    grey = _is_grey(image)
    if out is None:
        out = np.empty((preprocess.height, preprocess.width, 3), np.uint8)
    if grey:
        plane = _scale(image.reshape(image.shape[:2]), preprocess.width, preprocess.height, None)
        cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB, dst=out)
    else:
        _scale(image, preprocess.width, preprocess.height, out)
    return out


def _is_grey(image: Image) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        found = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise SourceError("the image cannot be used", found=found, expected="uint8 [h, w, 3] RGB or [h, w] grey")
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        return True
    if image.ndim == 3 and image.shape[2] == 3:
        return False
    raise SourceError("the image has the wrong shape", found=list(image.shape), expected="[h, w, 3] RGB or [h, w] grey")


def _scale(image: Image, width: int, height: int, out: Image | None) -> Image:
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        if out is None:
            return np.ascontiguousarray(image)
        np.copyto(out, image)
        return out
    if h >= height and w >= width:
        return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_AREA)
    # INTER_AREA is nearest-like as soon as one axis grows: shrink the one axis first, then enlarge the other.
    smaller = (min(w, width), min(h, height))
    if smaller != (w, h):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
