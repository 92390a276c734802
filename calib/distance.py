"""Euclidean distances in MatMul form (METHODS.md 6.2), the same formula that the stages use. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def squared_distances(a: Array, b: Array) -> Array:
    """max(|a|^2 + |b|^2 - 2 a b^T, 0).

    a: [m, d] float32, b: [n, d] float32, both in the same (preferably centred) space; returns [m, n] float32.
    """
    product = a @ b.T
    product *= -2.0
    product += np.einsum("md,md->m", a, a)[:, None]
    product += np.einsum("nd,nd->n", b, b)[None, :]
    return np.maximum(product, 0.0, out=product)


def nearest(queries: Array, bank: Array, block: int = 2048) -> tuple[Array, Array]:
    """Distance to the nearest bank row and its index.

    queries: [m, d] float32, bank: [n, d] float32 with n >= 1; returns ([m] float32, [m] int32).
    """
    distance = np.empty(len(queries), np.float32)
    index = np.empty(len(queries), np.int32)
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        squared = squared_distances(queries[rows], bank)
        index[rows] = squared.argmin(axis=1)
        distance[rows] = np.sqrt(squared.min(axis=1))
    return distance, index
