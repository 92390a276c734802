"""Which images make up each step: every product equally often, shuffled by a seed, addressable by step number."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class BalancedSampler:
    """Product-balanced batches without state: step k is a function of the seed, so resuming needs nothing saved.

    Position p of the stream belongs to round p // products; a round visits every product once in random order, and a
    product's images come in passes, each pass a new permutation of all of them. Over several processes a step's batch
    is the concatenation of theirs: one process with the whole batch sees the same images.

    Args:
        class_ids: int64 [N], product of each image.
        batch: images per step over all processes.
        seed: of the shuffling.
    """

    def __init__(self, class_ids: Array, batch: int, seed: int):
        self._members = [np.flatnonzero(class_ids == c) for c in np.unique(class_ids)]
        self._batch = batch
        self._seed = seed
        self._passes: dict[int, tuple[int, Array]] = {}

    def indices(self, step: int) -> Array:
        """Positions in the set of the images of a step, int64 [batch]."""
        products = len(self._members)
        start = step * self._batch
        rounds = range(start // products, (start + self._batch - 1) // products + 1)
        stream = np.concatenate([self._round(r) for r in rounds])
        offset = start - rounds[0] * products
        return stream[offset : offset + self._batch]

    def _round(self, number: int) -> Array:
        order = np.random.default_rng((self._seed, 0, number)).permutation(len(self._members))
        return np.array([self._item(int(c), number) for c in order], np.int64)

    def _item(self, product: int, number: int) -> int:
        members = self._members[product]
        turn, position = divmod(number, len(members))
        cached = self._passes.get(product)
        if cached is None or cached[0] != turn:
            rng = np.random.default_rng((self._seed, 1, product, turn))
            cached = self._passes[product] = (turn, rng.permutation(members))
        return int(cached[1][position])
