"""The support: the few good images that a product is enrolled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..images import on_disk, read_rgb
from ..manifest import Preprocess
from ..preprocess import resize
from .foreground import Foreground, to_grid

Array = NDArray[Any]


@dataclass(frozen=True)
class Support:
    """frames: uint8 [k, H, W, 3] at network size; masks: [k, grid * grid] bool, True where the part is."""

    paths: tuple[Path, ...]
    frames: Array
    masks: Array

    @property
    def foreground(self) -> float:
        """Share of foreground patches."""
        return float(self.masks.mean())

    def only(self, indices: Sequence[int]) -> Support:
        """These images of it."""
        return Support(tuple(self.paths[i] for i in indices), self.frames[indices], self.masks[indices])


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


def read_support(
    folder: Path, shots: int, preprocess: Preprocess, grid: int, foreground: Foreground, seed: int | None = None
) -> Support:
    """The images of :func:`support_paths` with their foreground.

    Raises:
        ConfigError: no such folder, or fewer images than shots.
        SourceError: an image or mask cannot be read.
    """
    chosen = support_paths(folder, shots, seed)
    frames, masks = [], []
    for path in chosen:
        image = read_rgb(path)
        frames.append(resize(image, preprocess))
        masks.append(to_grid(foreground(image, path), grid))
    return Support(tuple(chosen), np.stack(frames), np.stack(masks))
