"""What the support images have to say of how parts differ: copies say nothing, a burst or a rigid fixture says little.

Only exact copies are left out. Features do not tell a burst of one part from different parts in a fixture: boards that
are laid down to 1.5 of 512 pixels are nearer to each other than an image is to itself with noise of one grey level
(knn's edge preset). Taken for copies, all but one would go, and a threshold from that one's mirror images passes
defects. One from pictures that are alike is too strict instead, which is safe, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Standard deviation, in grey levels at network size, of what a camera alone may make of one picture taken twice.
NOISE = 5.0


def distinct(frames: Array) -> list[int]:
    """Indices of the images that are not exact copies of an earlier one; of copies of one image alone, all.

    frames: uint8 [k, h, w, 3], at network size: a file that was copied or stored again without loss is the same.
    """
    first = {frame.tobytes(): index for index, frame in reversed(list(enumerate(frames)))}
    return sorted(first.values()) if len(first) > 1 else list(range(len(frames)))


def alike(frames: Array, patches: Sequence[Array], extract: Callable[[Array], Array]) -> bool:
    """Whether each of several images is as near to another as to itself with the camera's noise.

    frames: uint8 [k, h, w, 3]; patches: their features [m, c] each; extract: gives a frame's features.
    """
    noise = np.random.default_rng(0).normal(0.0, NOISE, frames.shape[1:])
    for index, (frame, mine) in enumerate(zip(frames, patches, strict=True)):
        reach = _distance(extract(np.clip(np.rint(frame + noise), 0, 255).astype(np.uint8)), mine)
        if not any(_distance(mine, other) <= reach for k, other in enumerate(patches) if k != index):
            return False
    return True


def _distance(patches: Array, others: Array) -> float:
    """Of the patch that is farthest from its nearest neighbour among the others."""
    squared = (others * others).sum(axis=1) - 2.0 * (patches @ others.T)
    nearest = squared.min(axis=1) + (patches * patches).sum(axis=1)
    return float(np.sqrt(max(float(nearest.max()), 0.0)))
