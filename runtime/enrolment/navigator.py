"""The siamese navigator of a new product: projection, temperature, and phi_0 after CT steps on the support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bank import Bank
from .transport import Moments, Navigator, costs, step

Array = NDArray[Any]


@dataclass(frozen=True)
class NavigatorSettings:
    """dims: p; hidden: h; perplexity: rows that P spreads over in the mean; steps, lr, rho: of phi_0's CT steps;
    stride: every how many-th row and column of the grid takes part in CT steps; seed: of W1."""

    dims: int
    hidden: int
    perplexity: float = 3.0
    steps: int = 100
    lr: float = 1e-4
    rho: float = 0.5
    stride: int = 3
    seed: int = 0


def subsample(patches: Array, stride: int) -> Array:
    """The patches that CT steps see: every `stride`-th row and column of the square grid, from the middle of the first
    stride on. patches: [m, d]; returns [ceil((side - stride // 2) / stride) ** 2, d]."""
    side = int(np.sqrt(len(patches)))
    grid = patches.reshape(side, side, -1)
    return np.ascontiguousarray(grid[stride // 2 :: stride, stride // 2 :: stride].reshape(-1, patches.shape[1]))


def enroll_navigator(bank: Bank, patches: Sequence[Array], settings: NavigatorSettings) -> Navigator:
    """Temperature and phi_0 of a product (METHODS.md 5.3, B.5).

    patches: per support image [m, d], raw. Support is held against support: each image against the rows of the others;
    of a single image each half against the rows of the other half.
    """
    queries, own = _leave_out(bank, patches, settings.stride)
    navigator = Navigator.create(bank.rows, settings.dims, settings.hidden, settings.seed)
    navigator = navigator.calibrate(np.concatenate(queries), bank.rows, settings.perplexity, np.concatenate(own))
    parts = []
    for query, mask in zip(queries, own, strict=True):
        kept = bank.rows[~mask[0]]
        if len(kept) > 1:
            parts.append((query, kept, costs(query, kept)))
    moments = Moments.zeros(navigator)
    for k in range(settings.steps if parts else 0):
        query, kept, cost = parts[k % len(parts)]
        navigator, moments, _ = step(navigator, moments, query, kept, cost, settings.lr, settings.rho)
    return navigator


def _leave_out(bank: Bank, patches: Sequence[Array], stride: int) -> tuple[list[Array], list[Array]]:
    """Queries [q, d] and, for each group, which bank rows are its own [q, n] (the same in every row of a group)."""
    queries, own = [], []
    for index, each in enumerate(patches):
        places = subsample(np.arange(len(each))[:, None], stride)[:, 0]
        if len(patches) > 1:
            queries.append(each[places] - bank.center)
            own.append(np.broadcast_to(bank.image == index, (len(places), len(bank.rows))))
            continue
        side = int(np.sqrt(len(each)))
        for half in (False, True):
            mine = places[(places % side >= side // 2) == half]
            rows = (bank.place % side >= side // 2) == half
            queries.append(each[mine] - bank.center)
            own.append(np.broadcast_to(rows, (len(mine), len(rows))))
    return queries, own
