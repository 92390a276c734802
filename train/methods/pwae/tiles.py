"""Tiles of an image and the permutations of the jigsaw task (METHODS.md 3.1)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


def split(images: Tensor, grid: int) -> Tensor:
    """[B, C, H, W] -> tiles [B, grid * grid, C, H / grid, W / grid], row-major."""
    batch, channels = images.shape[:2]
    height, width = int(images.shape[2]) // grid, int(images.shape[3]) // grid
    blocks = images.reshape(batch, channels, grid, height, grid, width)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, channels, height, width)


def assemble(tiles: Tensor, grid: int) -> Tensor:
    """Inverse of :func:`split`: [B, grid * grid, C, h, w] -> [B, C, grid * h, grid * w]."""
    batch, _, channels, height, width = tiles.shape
    blocks = tiles.reshape(batch, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, channels, grid * height, grid * width)


def reorder(tiles: Tensor, order: Tensor) -> Tensor:
    """Position i gets tile order[b, i]. tiles: [B, T, ...]; order: [B, T] int64."""
    index = order.reshape(*order.shape, *[1] * (tiles.dim() - 2)).expand_as(tiles)
    return torch.gather(tiles, 1, index)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes `order`, [B, T]."""
    return order.argsort(dim=1)


def permutations(tiles: int, number: int, seed: int) -> Tensor:
    """[number + 1, tiles] int64: identity, then orders chosen greedily for the largest Hamming distance so far.

    As in context-free networks (Noroozi and Favaro 2016). With more than eight tiles the candidates are a random draw.
    """
    rng = np.random.default_rng(seed)
    if tiles <= 8:
        candidates = np.array(list(itertools.permutations(range(tiles))))
    else:
        candidates = np.unique(rng.permuted(np.tile(np.arange(tiles), (20 * number, 1)), axis=1), axis=0)
    chosen = [np.arange(tiles)]
    nearest = (candidates != chosen[0]).sum(axis=1)
    for _ in range(min(number, int((nearest > 0).sum()))):
        best = int(rng.choice(np.flatnonzero(nearest == nearest.max())))
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, (candidates != candidates[best]).sum(axis=1))
    return torch.from_numpy(np.stack(chosen)).long()
