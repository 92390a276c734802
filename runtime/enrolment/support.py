"""The support: the few good images that a product is enrolled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..crop import cut
from ..errors import ConfigError
from ..images import on_disk, read_rgb
from ..manifest import Crop, Preprocess
from ..preprocess import resize
from .foreground import Foreground, UserMask, to_grid

Array = NDArray[Any]


@dataclass(frozen=True)
class Support:
    """frames: uint8 [k, H, W, 3] at network size; masks: [k, grid * grid] bool, True where the part is.

    crop: what was cut out of the pictures. picture: their width and height, if they are of one size.
    """

    paths: tuple[Path, ...]
    frames: Array
    masks: Array
    crop: Crop | None = None
    picture: tuple[int, int] | None = None

    @property
    def foreground(self) -> float:
        """Share of foreground patches."""
        return float(self.masks.mean())

    def only(self, indices: Sequence[int]) -> Support:
        """These images of it."""
        paths = tuple(self.paths[i] for i in indices)
        return replace(self, paths=paths, frames=self.frames[indices], masks=self.masks[indices])


def support_paths(folder: Path, shots: int, seed: int | None = None) -> list[Path]:
    """The first `shots` images of a folder by name, or with a seed as many at random; none is read.

    Raises:
        ConfigError: no such folder, or fewer images than shots.
    """
    paths = sorted(p for p in folder.iterdir() if on_disk(p)) if folder.is_dir() else []
    if len(paths) < shots or shots < 1:
        raise ConfigError(
            f"not enough images of good parts in {folder}",
            found=f"{len(paths)} images" if folder.is_dir() else "no such folder",
            expected=f"at least {max(shots, 1)} images in the folder itself",
            next_step="add images, or lower --shots",
        )
    if seed is not None:
        paths = sorted(paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:shots])
    return paths[:shots]


def picture_sizes(paths: Sequence[Path]) -> dict[tuple[int, int], Path]:
    """The sizes (width, height) of these pictures, and one picture of each.

    Raises:
        SourceError: an image cannot be read.
    """
    sizes: dict[tuple[int, int], Path] = {}
    for path in paths:
        height, width = read_rgb(path).shape[:2]
        sizes.setdefault((width, height), path)
    return sizes


def read_part(path: Path, crop: Crop | None, foreground: Foreground) -> tuple[Array, Array | None]:
    """What is judged of a picture, uint8 [h, w, 3], and where the part is in it, bool [h, w].

    A person's mask is of the picture as the file has it and cut out with it; whatever else looks for the part sees what
    the line sees.

    Raises:
        SourceError: the image or its mask cannot be read, or is of a size of which the crop does not say what to take.
    """
    return _part(read_rgb(path), path, crop, foreground)


def _part(whole: Array, path: Path, crop: Crop | None, foreground: Foreground) -> tuple[Array, Array | None]:
    image = cut(whole, crop, path)
    if isinstance(foreground, UserMask):
        return image, cut(foreground(whole, path), crop, path)
    return image, foreground(image, path)


def read_support(
    folder: Path,
    shots: int,
    preprocess: Preprocess,
    grid: int,
    foreground: Foreground,
    seed: int | None = None,
    crop: Crop | None = None,
) -> Support:
    """The images of :func:`support_paths` with their foreground. crop: what to cut out of them.

    Raises:
        ConfigError: no such folder, or fewer images than shots.
        SourceError: an image or mask cannot be read, or is of a size of which the crop does not say what to take.
    """
    paths = support_paths(folder, shots, seed)
    frames, masks, sizes = [], [], set()
    for path in paths:
        whole = read_rgb(path)
        sizes.add((whole.shape[1], whole.shape[0]))
        image, mask = _part(whole, path, crop, foreground)
        frames.append(resize(image, preprocess))
        masks.append(to_grid(mask, grid))
    picture = sizes.pop() if len(sizes) == 1 else None
    return Support(tuple(paths), np.stack(frames), np.stack(masks), crop, picture)
