"""Conditional transport as stage modules: cost, one Adam step with hand-derived gradients, score (METHODS.md 5.3-5.7).

Shapes: m queries, q of them in CT steps, n memory rows, r of them in CT steps, d features, p projected, h hidden.
Queries are rows and memory columns, so the forward map is a softmax over the last axis; the backward map works on its
own transposed product, so no large matrix is transposed. Empty memory rows have mask -1e4 in the forward map and weight
0 in the backward one.

The logits of a pair come straight from one MatMul of augmented vectors: terms that are constant along the softmax
drop out, |u - v|^2 = |u|^2 + |v|^2 - 2 u.v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...scoremap import ScoreMap
from ..knn.features import squared_distances

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
MASK = -1e4
#: w1, b1, w2, then Adam's first and second moments of each: what a step carries, in the order of its outputs.
CARRIED = ("w1", "b1", "w2", "m_w1", "m_b1", "m_w2", "v_w1", "v_b1", "v_w2")


class CtCost(nn.Module):
    """Once a frame: distances, and the parts of CT steps that do not change with phi.

    patches [m, d], bank [n, d], valid [n], projection [p, d] -> cost [m, n], mask [n], bank_r [n, p]; and for the
    steps some [q, d], some_r [q, p], rows [r, d], rows_r [r, p], rows_mask [r], weight [r] (1 / number of valid rows,
    or 0), some_cost [q, r], some_cost_t [r, q].

    Args:
        grid: side of the patch grid.
        stride: steps see every stride-th row and column of it.
        semantic: memory rows that steps see all of; of those behind them every `thin`-th.
    """

    def __init__(self, grid: int, stride: int, semantic: int = 0, thin: int = 1) -> None:
        super().__init__()
        self.grid, self.stride, self.semantic, self.thin = grid, stride, semantic, thin

    def forward(self, patches: Tensor, bank: Tensor, valid: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        cost = torch.sqrt(squared_distances(patches, bank) + 1e-12)
        mask, bank_r = (1.0 - valid) * MASK, torch.matmul(bank, projection.T)
        some = self._every(patches)
        rows, rows_valid = self._rows(bank), self._rows(valid)
        some_cost = torch.sqrt(squared_distances(some, rows) + 1e-12)
        return (
            cost,
            mask,
            bank_r,
            some,
            torch.matmul(some, projection.T),
            rows,
            torch.matmul(rows, projection.T),
            (1.0 - rows_valid) * MASK,
            rows_valid / torch.sum(rows_valid),
            some_cost,
            some_cost.T.contiguous(),
        )

    def _every(self, patches: Tensor) -> Tensor:
        """Every stride-th row and column of the patch grid: [m, d] -> [q, d]."""
        first = self.stride // 2
        grid = patches.reshape(self.grid, self.grid, patches.shape[1])
        return grid[first :: self.stride, first :: self.stride].reshape(-1, patches.shape[1])

    def _rows(self, memory: Tensor) -> Tensor:
        """The memory rows that steps see: [n, ...] -> [r, ...]."""
        if self.thin == 1:
            return memory
        return torch.cat([memory[: self.semantic], memory[self.semantic :: self.thin]])


class Siamese(nn.Module):
    """d(u, v) = |g(u) - g(v)|^2 inv_tau, g(x) = R x + W2 relu(W1 x + b1)."""

    def embed(self, rows: Tensor, rows_r: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows [k, d], rows_r = R rows [k, p] -> g [k, p], hidden [k, h], where the ReLU is open [k, h]."""
        pre = torch.matmul(rows, w1.T) + b1
        hidden = torch.relu(pre)
        return rows_r + torch.matmul(hidden, w2.T), hidden, (pre > 0).to(rows.dtype)

    @staticmethod
    def logits(of: Tensor, over: Tensor, inv_tau: Tensor, mask: Tensor | None = None) -> Tensor:
        """-d up to a constant per row: of [a, p], over [b, p] -> [a, b]; mask [b] is added."""
        offset = torch.sum(over * over, dim=1) * -inv_tau
        if mask is not None:
            offset = offset + mask
        right = torch.cat([over * (2.0 * inv_tau), offset[:, None]], dim=1)
        left = torch.cat([of, torch.ones_like(of[:, :1])], dim=1)
        return torch.matmul(left, right.T)


class SiameseStep(Siamese):
    """One Adam step of the CT objective for the siamese navigator, gradients by hand (METHODS.md 5.7).

    adam [3]: bias corrections 1 / (1 - 0.9^t), 1 / (1 - 0.999^t) and the learning rate. Returns the nine carried
    tensors, updated, and the loss [1] before the step.
    """

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho

    def forward(  # one argument per stage input
        self,
        some: Tensor,
        some_r: Tensor,
        rows: Tensor,
        rows_r: Tensor,
        rows_mask: Tensor,
        weight: Tensor,
        some_cost: Tensor,
        some_cost_t: Tensor,
        inv_tau: Tensor,
        adam: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        *moments: Tensor,
    ) -> tuple[Tensor, ...]:
        queries = some.shape[0]
        a, hid_rows, open_rows = self.embed(rows, rows_r, w1, b1, w2)
        b, hid_some, open_some = self.embed(some, some_r, w1, b1, w2)
        p = torch.softmax(self.logits(b, a, inv_tau, rows_mask), dim=1)
        q = torch.softmax(self.logits(a, b, inv_tau), dim=1)
        s = torch.sum(p * some_cost, dim=1, keepdim=True)
        r = torch.sum(q * some_cost_t, dim=1, keepdim=True)
        loss = self.rho / queries * torch.sum(s) + (1 - self.rho) * torch.sum(weight[:, None] * r)
        # dL/dS of each map; each softmax contributes probability * (cost - its mean cost)
        forward_map = p * (some_cost - s)
        backward_map = q * (some_cost_t - r)
        scale = 2.0 * inv_tau
        front, back = self.rho / queries * scale, (1 - self.rho) * scale * weight[:, None]
        # Rows of each G sum to zero along its own softmax, so of |a|^2 and |b|^2 only the other side's sum is left.
        da = front * (torch.matmul(forward_map.T, b) - a * torch.sum(forward_map, dim=0)[:, None])
        da = da + back * torch.matmul(backward_map, b)
        weighted = back * a
        db = front * torch.matmul(forward_map, a) + torch.matmul(backward_map.T, weighted)
        db = db - b * torch.matmul(backward_map.T, back)
        g_w2 = torch.matmul(da.T, hid_rows) + torch.matmul(db.T, hid_some)
        d_rows, d_some = torch.matmul(da, w2) * open_rows, torch.matmul(db, w2) * open_some
        g_w1 = torch.matmul(d_rows.T, rows) + torch.matmul(d_some.T, some)
        g_b1 = torch.sum(d_rows, dim=0) + torch.sum(d_some, dim=0)
        return (*adam_update((w1, b1, w2), (g_w1, g_b1, g_w2), moments, adam), loss.reshape(1))


class PairStep(nn.Module):
    """The same for the paper's navigator d(u, v) = w2 . relu(W1 (u - v)^2 + b1), on projected features.

    W1 (u - v)^2 = W1 u^2 + W1 v^2 - 2 (W1[h] * u) . v for each hidden unit h: one batched MatMul, and no tensor of
    n * q * d numbers (METHODS.md 5.3).
    """

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho

    @staticmethod
    def hidden(of: Tensor, over: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        """Pre-activations of all pairs: of [a, d], over [b, d] -> [h, a, b]."""
        left, right = torch.matmul(of * of, w1.T), torch.matmul(over * over, w1.T)
        product = torch.matmul(of[None] * w1[:, None, :], over.T[None])
        return left.T[:, :, None] + right.T[:, None, :] - 2.0 * product + b1[:, None, None]

    def forward(
        self,
        some_r: Tensor,
        rows_r: Tensor,
        rows_mask: Tensor,
        weight: Tensor,
        some_cost: Tensor,
        adam: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        *moments: Tensor,
    ) -> tuple[Tensor, ...]:
        queries, memory = some_cost.shape
        pre = self.hidden(some_r, rows_r, w1, b1)
        active = torch.relu(pre)
        negative = -torch.matmul(w2, active.reshape(w2.shape[1], -1)).reshape(queries, memory)
        p = torch.softmax(negative + rows_mask, dim=1)
        q = torch.softmax(negative, dim=0)
        s = torch.sum(p * some_cost, dim=1, keepdim=True)
        r = torch.sum(q * some_cost, dim=0, keepdim=True)
        loss = self.rho / queries * torch.sum(s) + (1 - self.rho) * torch.sum(weight * r[0])
        g = self.rho / queries * p * (some_cost - s) + (1 - self.rho) * weight * q * (some_cost - r)
        g_w2 = -torch.matmul(active.reshape(w2.shape[1], -1), g.reshape(-1, 1)).T
        d_pre = -g[None] * w2[0, :, None, None] * (pre > 0).to(g.dtype)
        by_query, by_memory = torch.sum(d_pre, dim=2), torch.sum(d_pre, dim=1)
        g_w1 = torch.matmul(by_query, some_r * some_r) + torch.matmul(by_memory, rows_r * rows_r)
        g_w1 = g_w1 - 2.0 * torch.sum(torch.matmul(d_pre, rows_r) * some_r[None], dim=1)
        g_b1 = torch.sum(by_query, dim=1)
        return (*adam_update((w1, b1, w2), (g_w1, g_b1, g_w2), moments, adam), loss.reshape(1))


def adam_update(
    weights: tuple[Tensor, ...], gradients: tuple[Tensor, ...], moments: tuple[Tensor, ...], adam: Tensor
) -> tuple[Tensor, ...]:
    """Adam with bias corrections and rate from `adam` [3]; returns weights, first moments, second moments."""
    count = len(weights)
    first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(moments[:count], gradients, strict=True)]
    second = [BETA2 * v + (1 - BETA2) * (g * g) for v, g in zip(moments[count:], gradients, strict=True)]
    new = [
        w - adam[2] * (m * adam[0]) / (torch.sqrt(v * adam[1]) + EPSILON)
        for w, m, v in zip(weights, first, second, strict=True)
    ]
    return (*new, *first, *second)


class CtScore(nn.Module):
    """s_j = sum_i P_ij c_ij for every patch, with the transport probabilities and the plain nearest distance.

    Returns map [1, 1, size, size], score [1], patch_score [m], transport [m] (largest P), matched [m] int32 (its row),
    nearest [m] (smallest distance, for reference).
    """

    def __init__(self, grid: int, size: int, sigma: float) -> None:
        super().__init__()
        self.grid = grid
        self.score_map = ScoreMap(grid, size, align_corners=False, sigma=sigma)

    def finish(self, logits: Tensor, cost: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """logits, cost [m, n]; mask [n]."""
        p = torch.softmax(logits, dim=1)
        patch_score = torch.sum(p * cost, dim=1)
        transport, matched = torch.max(p, dim=1)
        nearest = torch.amin(cost - mask, dim=1)
        pixel_map, score = self.score_map(patch_score.reshape(1, 1, self.grid, self.grid))
        return pixel_map, score, patch_score, transport, matched.to(torch.int32), nearest


class SiameseScore(CtScore):
    """See :class:`CtScore`."""

    def __init__(self, grid: int, size: int, sigma: float) -> None:
        super().__init__(grid, size, sigma)
        self.navigator = Siamese()

    def forward(
        self,
        patches: Tensor,
        bank: Tensor,
        bank_r: Tensor,
        cost: Tensor,
        mask: Tensor,
        projection: Tensor,
        inv_tau: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
    ) -> tuple[Tensor, ...]:
        a, _, _ = self.navigator.embed(bank, bank_r, w1, b1, w2)
        b, _, _ = self.navigator.embed(patches, torch.matmul(patches, projection.T), w1, b1, w2)
        return self.finish(self.navigator.logits(b, a, inv_tau, mask), cost, mask)


class PairScore(CtScore):
    """See :class:`CtScore`."""

    def forward(
        self,
        patches: Tensor,
        bank_r: Tensor,
        cost: Tensor,
        mask: Tensor,
        projection: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
    ) -> tuple[Tensor, ...]:
        pre = PairStep.hidden(torch.matmul(patches, projection.T), bank_r, w1, b1)
        negative = -torch.matmul(w2, torch.relu(pre).reshape(w2.shape[1], -1)).reshape(cost.shape)
        return self.finish(negative + mask, cost, mask)
