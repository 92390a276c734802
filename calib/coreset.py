"""Greedy k-centre coreset: the few patches that cover the many (PatchCore's subsampling, made deterministic)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[Any]


def project(rows: Array, dims: int, seed: int = 0) -> Array:
    """Johnson-Lindenstrauss projection by a fixed Gaussian matrix; distances are kept to about 1/sqrt(dims).

    rows: [n, d] float32; returns [n, dims] float32, or the rows themselves where d <= dims.
    """
    if rows.shape[1] <= dims:
        return np.ascontiguousarray(rows, np.float32)
    matrix = np.random.default_rng(seed).standard_normal((rows.shape[1], dims)) / np.sqrt(dims)
    return np.ascontiguousarray(rows @ matrix.astype(np.float32))


def greedy_k_center(rows: Array, count: int, *, dims: int | None = None, seed: int = 0) -> Array:
    """Indices of `count` rows, each the farthest from those chosen before it.

    The first is the row farthest from the mean and ties go to the lower index, so the result depends on nothing but
    the rows (PatchCore's sampler starts at random). Choosing more rows only adds to the choice of fewer.

    rows: [n, d] float32, finite. count: clipped to n. dims: choose in a JL projection of that many dimensions.
    Returns [count] int64 in the order chosen.

    Raises:
        CalibrationError: rows are not a finite [n >= 1, d] array, or count < 1.
    """
    if rows.ndim != 2 or not len(rows) or count < 1 or not np.isfinite(rows).all():
        raise CalibrationError(
            "cannot choose a coreset",
            found=f"rows {rows.shape}, count {count}, finite {bool(np.isfinite(rows).all())}",
            expected="at least one finite row and a count of at least 1",
            next_step="check the images that the features came from",
        )
    count = min(count, len(rows))
    points = project(rows, dims, seed) if dims is not None else np.ascontiguousarray(rows, np.float32)
    points = points - points.mean(axis=0)
    norms = np.einsum("nd,nd->n", points, points)
    chosen = np.empty(count, np.int64)
    chosen[0] = int(norms.argmax())
    gap = np.full(len(points), np.inf, np.float32)
    buffer = np.empty(len(points), np.float32)
    for k in range(count):
        if k:
            chosen[k] = int(gap.argmax())
        center = points[chosen[k]]
        np.dot(points, center * -2.0, out=buffer)
        buffer += norms
        buffer += norms[chosen[k]]
        np.minimum(gap, buffer, out=gap)
        # Below what rounding makes of a distance of zero, which may be far below zero where rows are large.
        gap[chosen[k]] = -np.inf  # never chosen twice, also not among duplicates
    return chosen
