"""Whether a set seems to hold several pictures of each part, where nobody said which (`group_by`).

Such pictures are a handful that are nearer to each other than any of them is to a picture of another part. Nearness
alone does not tell: parts in a rigid fixture, and parts that are turned, are near to each other, too, but not in
handfuls. Frames of a video that go over into each other are no handfuls either, and are not found.

Share of images in such handfuls, edge presets: magnetic_tile, four to six exposures of a tile, .87 (knn), .77 (hgad).
One picture a part: screws .14 and .09, cookies .04 and .08, mono cells .17 and .20, poly cells .22 and .23, and at most
.52 in random choices of 110 of them. Four pictures of each part made by a slight shift, turn, noise and brightness (knn
on half the grid): screws .88, cookies 1.0, poly cells .72, mono cells .47. Fewer images leave too much to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .augment import View
from .features import FeatureSet

Array = NDArray[Any]
_FEWEST = 100
_SHARE = 0.6
_LOOKS = 100  # images that are looked at
_MOST = 12  # neighbours of a handful
_GAP = 1.05  # how much farther the next picture is
_GRID = 14
_MANY = 4000  # images, above which half that grid must do: the whole takes 120 KB an image in the edge presets


def group_warnings(data: FeatureSet, products: tuple[str, ...]) -> Iterator[str]:
    """What to say of products whose images seem to show the same parts several times.

    data: what is trained on; a method without a front end has no features to tell by, and nothing is said.
    """
    for index, product in enumerate(products if data.features else ()):
        mine = [i for i, s in enumerate(data.samples) if data.class_ids[i] == index and not isinstance(s, View)]
        if len(mine) < _FEWEST:
            continue
        share = handfuls(descriptors(data, np.array(mine)))
        if share >= _SHARE:
            yield (
                f"warning: {product}: {share:.0%} of the images lie in handfuls that are much alike, as where several "
                "pictures show one part (exposures, a burst). If they do, the images held out show parts that are "
                "trained on, and thresholds set on them promise too much: train again with --group-by, which says "
                "which images show one part. If every image shows another part, nothing is wrong"
            )


def handfuls(points: Tensor) -> float:
    """Share of images that lie in a handful: three or more, each the nearest of all others, and a gap around them.

    points: [n, d], n > 3.
    """
    count = len(points)
    most = min(_MOST, count - 2)
    looked = sorted({i * count // min(_LOOKS, count) for i in range(min(_LOOKS, count))})
    near, apart = _nearest(points, looked, most + 1)
    wanted = sorted({*looked, *near[:, :most].ravel().tolist()})
    theirs, _ = _nearest(points, wanted, most)
    of = {row: neighbours.tolist() for row, neighbours in zip(wanted, theirs, strict=True)}
    found = 0
    for row, distances in zip(looked, apart, strict=True):
        for size in range(2, most + 1):
            group = {row, *of[row][:size]}
            if distances[size] >= _GAP * distances[size - 1] and all({i, *of[i][:size]} == group for i in group):
                found += 1
                break
    return found / len(looked)


def descriptors(data: FeatureSet, indices: Array) -> Tensor:
    """[n, d] float32: each image's features on a coarse grid, every map of features with the same weight."""
    parts, grid = [], _GRID if len(indices) <= _MANY else _GRID // 2
    for array in data.features.values():
        maps = torch.cat([_coarse(torch.from_numpy(np.array(array[i : i + 1], np.float32)), grid) for i in indices])
        maps -= maps.mean(0)
        parts.append(maps / maps.square().sum(1).mean().sqrt().clamp(min=1e-12))
    return torch.cat(parts, 1)


def _coarse(value: Tensor, grid: int) -> Tensor:
    """[1, d] of [1, tokens of a square grid, c] or [1, ..., h, w], averaged down to a coarse grid; of others all."""
    if value.ndim == 3 and round(value.shape[1] ** 0.5) ** 2 == value.shape[1]:
        side = round(value.shape[1] ** 0.5)
        value = value.transpose(1, 2).unflatten(2, (side, side))
    if value.ndim < 4:
        return value.flatten(1)
    maps = value.flatten(0, -3)
    height, width = maps.shape[1:]
    return adaptive_avg_pool2d(maps, (min(grid, height), min(grid, width))).reshape(1, -1)


def _nearest(points: Tensor, rows: list[int], count: int) -> tuple[Array, Array]:
    """The `count` nearest others of these rows, nearest first, and how far they are: [rows, count] each."""
    squares = points.square().sum(1)
    found, apart = [], []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        distances = squares[part][:, None] + squares - 2 * points[part] @ points.T
        distances[torch.arange(len(part)), part] = torch.inf
        nearest = torch.topk(distances, count, largest=False)
        found.append(nearest.indices)
        apart.append(nearest.values.clamp(min=0).sqrt())
    return torch.cat(found).numpy(), torch.cat(apart).numpy()
