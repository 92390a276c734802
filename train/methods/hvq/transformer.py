"""Encoder and decoder layers with explicit attention (METHODS.md 1.1).

Attention is MatMul and Softmax: the fused kernels have a slow CPU backward and no ONNX form. Positions enter queries
and keys only; since that is linear, their projection is one [N, 3 * dim] bias, which an exporter folds into a constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Positions(nn.Module):
    """Learned positions: a column and a row vector of dim / 2 each, concatenated, columns first."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.rand(grid, dim // 2))
        self.row = nn.Parameter(torch.rand(grid, dim // 2))

    def forward(self) -> Tensor:
        """[grid * grid, dim], row-major."""
        grid, half = self.column.shape
        column = self.column[None].expand(grid, grid, half)
        row = self.row[:, None].expand(grid, grid, half)
        return torch.cat([column, row], dim=-1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention on [B, N, dim] with Q, K and V projections in one weight [3 * dim, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.weight)
        self.out = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, source: Tensor, positions: Tensor) -> Tensor:
        """Queries from `query`, keys and values from `source` (self attention when they are one tensor).

        query, source: [B, N, dim]; positions: [N, dim], added to what queries and keys are made of.
        """
        dim = self.dim
        shift_q, shift_k = F.linear(positions, self.weight[: 2 * dim], self.bias[: 2 * dim]).split(dim, dim=1)
        if query is source:
            shift = torch.cat([shift_q, shift_k, self.bias[2 * dim :].expand_as(shift_q)], dim=1)
            q, k, v = (F.linear(query, self.weight) + shift).split(dim, dim=2)
        else:
            q = F.linear(query, self.weight[:dim]) + shift_q
            shift = torch.cat([shift_k, self.bias[2 * dim :].expand_as(shift_k)], dim=1)
            k, v = (F.linear(source, self.weight[dim:]) + shift).split(dim, dim=2)
        return self.out(self._attend(q, k, v))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, dim = q.shape
        width = dim // self.heads
        split = (batch, tokens, self.heads, width)
        query = (q * width**-0.5).reshape(split).transpose(1, 2)
        key = k.reshape(split).permute(0, 2, 3, 1)
        value = v.reshape(split).transpose(1, 2)
        weights = self.dropout(self.softmax(query @ key))
        return (weights @ value).transpose(1, 2).reshape(batch, tokens, dim)


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """Post-norm: self attention with q = k = h + pos and v = h, then feed-forward."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, ffn, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, N, dim], positions [N, dim] -> [B, N, dim]."""
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens, tokens, positions)))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class DecoderLayer(nn.Module):
    """Post-norm: self attention, cross attention to the level's quantised tokens, feed-forward."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.cross = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, ffn, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """tokens, memory [B, N, dim], positions [N, dim] -> [B, N, dim]."""
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens, tokens, positions)))
        tokens = self.norm2(tokens + self.dropout(self.cross(tokens, memory, positions)))
        return self.norm3(tokens + self.dropout(self.feed_forward(tokens)))
