"""Conditional transport with the siamese navigator, in numpy (METHODS.md 5.3, 5.7).

The same formulas as the ct_* stages (train/methods/foct/transport.py), which tests hold against each other: enrolment
needs them where there is no torch, and the few-shot evaluation where running every draw through engines is too slow.

Layout: queries in rows, memory in columns, so that the forward map is over the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calib.distance import squared_distances
from ...calib.errors import CalibrationError

Array = NDArray[Any]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Navigator:
    """d(u, v) = |g(u) - g(v)|^2 * inv_tau with g(x) = R x + W2 relu(W1 x + b1).

    projection: R [p, d]; w1 [h, d], b1 [h], w2 [p, h]; inv_tau: 1 / temperature. All float32.
    """

    projection: Array
    w1: Array
    b1: Array
    w2: Array
    inv_tau: float

    @classmethod
    def create(cls, rows: Array, dims: int, hidden: int, seed: int) -> Navigator:
        """R: the principal directions of `rows` [n, d] (centred), completed to an orthonormal set; W2 zero.

        Raises:
            CalibrationError: more projected dimensions than there are.
        """
        d = rows.shape[1]
        if not 0 < dims <= d:
            raise CalibrationError(
                "the navigator cannot project to more dimensions than features have",
                found=dims,
                expected=f"1 to {d}",
                next_step="correct navigator.dims",
            )
        rng = np.random.default_rng(seed)
        centred = (rows - rows.mean(axis=0)).astype(np.float64)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        projection = vectors[:, np.argsort(-values, kind="stable")[:dims]].T
        signs = np.sign(projection[np.arange(dims), np.abs(projection).argmax(axis=1)])
        w1 = rng.standard_normal((hidden, d)) / np.sqrt(d)
        return cls(
            np.ascontiguousarray(projection * signs[:, None], np.float32),
            w1.astype(np.float32),
            np.zeros(hidden, np.float32),
            np.zeros((dims, hidden), np.float32),
            1.0,
        )

    def embed(self, rows: Array) -> Array:
        """g(rows): [n, d] -> [n, p]."""
        hidden = np.maximum(rows @ self.w1.T + self.b1, 0.0)
        return rows @ self.projection.T + hidden @ self.w2.T

    def calibrate(self, queries: Array, bank: Array, perplexity: float, own: Array | None = None) -> Navigator:
        """The same with the temperature at which queries spread over `perplexity` rows of the bank in the mean.

        own: [q, n] bool, pairs to leave out (rows of the query's own image). Rows at (nearly) no distance are left out
        too: they are the query itself (METHODS.md F.3; nearly: below 1/1000 of the median distance).
        """
        squared = squared_distances(self.embed(queries), self.embed(bank)).astype(np.float64)
        masked = np.sqrt(squared) < 1e-3 * np.sqrt(np.median(squared))
        if own is not None:
            masked |= own
        squared[masked] = np.inf
        squared = squared[np.isfinite(squared).sum(axis=1) > 1]
        if not len(squared):
            return self
        target = min(perplexity, 0.5 * float(np.isfinite(squared).sum(axis=1).mean()))
        low, high = 1e-8, 1e8
        for _ in range(60):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if _perplexity(squared, middle) < target else (low, middle)
        return replace(self, inv_tau=float(1.0 / np.sqrt(low * high)))


def _perplexity(squared: Array, tau: float) -> float:
    """Mean over rows of exp(entropy) of softmax(-squared / tau)."""
    logits = -(squared - squared.min(axis=1, keepdims=True)) / tau
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
    return float(np.exp(entropy).mean())


@dataclass(frozen=True)
class Moments:
    """Adam's state: first and second moments of (w1, b1, w2) and the number of steps done."""

    first: tuple[Array, ...]
    second: tuple[Array, ...]
    steps: int = 0

    @classmethod
    def zeros(cls, navigator: Navigator) -> Moments:
        """Before the first step."""
        like = tuple(np.zeros_like(a) for a in (navigator.w1, navigator.b1, navigator.w2))
        return cls(like, tuple(np.zeros_like(a) for a in like))


def costs(queries: Array, bank: Array) -> Array:
    """c = Euclidean distance, [m, n]."""
    return np.sqrt(squared_distances(queries, bank) + 1e-12)


def _softmax(logits: Array) -> Array:
    logits = logits - logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def gradients(
    navigator: Navigator, queries: Array, bank: Array, cost: Array, rho: float
) -> tuple[float, tuple[Array, Array, Array]]:
    """Loss and its gradient by (w1, b1, w2), hand-derived (METHODS.md 5.7). cost: [m, n]."""
    (m, n), it = cost.shape, np.float32(navigator.inv_tau)
    pre_bank, pre_query = bank @ navigator.w1.T + navigator.b1, queries @ navigator.w1.T + navigator.b1
    hid_bank, hid_query = np.maximum(pre_bank, 0), np.maximum(pre_query, 0)
    a = bank @ navigator.projection.T + hid_bank @ navigator.w2.T
    b = queries @ navigator.projection.T + hid_query @ navigator.w2.T
    inner = (b @ a.T) * (2 * it)
    p = _softmax(inner - it * (a * a).sum(axis=1))
    q = _softmax(inner.T - it * (b * b).sum(axis=1))
    s = (p * cost).sum(axis=1)
    r = (q * cost.T).sum(axis=1)
    loss = rho / m * float(s.sum()) + (1 - rho) / n * float(r.sum())
    p *= cost - s[:, None]
    q *= cost.T - r[:, None]
    p *= np.float32(rho / m)
    q *= np.float32((1 - rho) / n)
    g = p.T + q  # dL/dS [n, m]
    da = (2 * it) * (g @ b - a * g.sum(axis=1, keepdims=True))
    db = (2 * it) * (g.T @ a - b * g.sum(axis=0)[:, None])
    g_w2 = da.T @ hid_bank + db.T @ hid_query
    d_bank, d_query = (da @ navigator.w2) * (pre_bank > 0), (db @ navigator.w2) * (pre_query > 0)
    return loss, (d_bank.T @ bank + d_query.T @ queries, d_bank.sum(axis=0) + d_query.sum(axis=0), g_w2)


def step(
    navigator: Navigator, moments: Moments, queries: Array, bank: Array, cost: Array, lr: float, rho: float = 0.5
) -> tuple[Navigator, Moments, float]:
    """One Adam step of the CT objective; returns the loss before it. All bank rows are valid ones."""
    loss, gradient = gradients(navigator, queries, bank, cost, rho)
    count = moments.steps + 1
    first = tuple(BETA1 * m + (1 - BETA1) * g for m, g in zip(moments.first, gradient, strict=True))
    second = tuple(BETA2 * v + (1 - BETA2) * g * g for v, g in zip(moments.second, gradient, strict=True))
    c1, c2 = np.float32(1 / (1 - BETA1**count)), np.float32(1 / (1 - BETA2**count))
    new = [
        w - np.float32(lr) * (m * c1) / (np.sqrt(v * c2) + np.float32(EPSILON))
        for w, m, v in zip((navigator.w1, navigator.b1, navigator.w2), first, second, strict=True)
    ]
    return replace(navigator, w1=new[0], b1=new[1], w2=new[2]), Moments(first, second, count), loss


@dataclass(frozen=True)
class PatchScores:
    """score: [m] s_j = sum_i P_ij c_ij; transport: [m] max_i P_ij; matched: [m] int32, the row of that maximum;
    nearest: [m] smallest distance, for reference."""

    score: Array
    transport: Array
    matched: Array
    nearest: Array


def score(navigator: Navigator, queries: Array, bank: Array, cost: Array | None = None) -> PatchScores:
    """Patch scores of one frame against the bank's valid rows."""
    cost = costs(queries, bank) if cost is None else cost
    a, b, it = navigator.embed(bank), navigator.embed(queries), np.float32(navigator.inv_tau)
    p = _softmax((b @ a.T) * (2 * it) - it * (a * a).sum(axis=1))
    matched = p.argmax(axis=1)
    transport = np.take_along_axis(p, matched[:, None], axis=1)[:, 0]
    return PatchScores((p * cost).sum(axis=1), transport, matched.astype(np.int32), cost.min(axis=1))
