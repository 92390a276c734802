"""Which support images show something of their own: frames of a burst, copies and re-compressed copies do not.

Held against such a copy, an image is at no distance: the threshold would be that of the camera's noise, and every other
part NG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Distance to another image, as a share of the distance to the own mirror images, below which the two are one picture.
#: With the edge presets' features: a picture again with noise of 5 grey levels, as JPEG of quality 80 or 3 % brighter
#: is at .29 at most; of 3,000 pairs of different good parts (screw, cookie, elpv, tile) the nearest is at .37, half of
#: them beyond 1.08.
SAME = 1 / 3


def turns(frame: Array) -> Iterator[Array]:
    """The two mirror images and the half turn of a frame [h, w, 3]."""
    yield from (frame[:, ::-1], frame[::-1], frame[::-1, ::-1])


def distinct(frames: Array, patches: Sequence[Array], extract: Callable[[Array], Array]) -> list[int]:
    """Indices of the images that are not the same picture as an earlier one.

    frames: uint8 [k, h, w, 3]; patches: their features [m, c] each; extract: gives a frame's features.
    """
    if len(frames) == 1:
        return [0]
    kept: list[tuple[int, float]] = []
    for index, (frame, mine) in enumerate(zip(frames, patches, strict=True)):
        reach = SAME * max(_distance(extract(turned), mine) for turned in turns(frame))
        if not any(_same(mine, patches[other], min(reach, limit)) for other, limit in kept):
            kept.append((index, reach))
    return [index for index, _ in kept]


def _same(a: Array, b: Array, limit: float) -> bool:
    """Whether each patch of one is that near to one of the other, both ways; a few patches mostly tell that not."""
    return all(_distance(x, y) <= limit for x, y in ((a[::16], b), (a, b), (b, a)))


def _distance(patches: Array, others: Array) -> float:
    """Of the patch that is farthest from its nearest neighbour among the others."""
    squared = (others * others).sum(axis=1) - 2.0 * (patches @ others.T)
    nearest = squared.min(axis=1) + (patches * patches).sum(axis=1)
    return float(np.sqrt(max(float(nearest.max()), 0.0)))
