"""Vague prototypes: low-passed normal images, mixed into a condition by transport (METHODS.md 2.3)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from .config import PrototypeConfig


def rms_distance(rows: Tensor, prototypes: Tensor, square: Tensor) -> Tensor:
    """||f - beta|| / sqrt(d) through one product. rows: [R, d]; prototypes: [K, d]; square: [K] (|beta|^2); [R, K]."""
    squared = (rows * rows).sum(1, keepdim=True) - 2 * rows @ prototypes.T + square
    return (squared.clamp_min(0) / rows.shape[1] + 1e-12).sqrt()


def sinkhorn(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """Balanced entropic transport plan with uniform marginals, in the log domain. cost: [R, K]; returns [R, K]."""
    rows, columns = cost.shape
    log_rows, log_columns = -math.log(rows), -math.log(columns)
    kernel = -cost / eps
    v = torch.zeros(columns, dtype=cost.dtype, device=cost.device)
    u = torch.zeros(rows, dtype=cost.dtype, device=cost.device)
    for _ in range(iterations):
        u = log_rows - torch.logsumexp(kernel + v, dim=1)
        v = log_columns - torch.logsumexp(kernel + u[:, None], dim=0)
    return (kernel + u[:, None] + v).exp()


class Condition(nn.Module):
    """Semi-relaxed transport: every image (or position) is its own convex mix of prototypes, whatever the batch.

    Balanced transport of one query is the uniform plan, so it cannot condition anything (METHODS.md 2.3).
    x0: [B, C, g, g] standardised -> yhat [B, C, g, g], weights [B * rows, K]. FP32 island.
    """

    def __init__(self, config: PrototypeConfig, channels: int, grid: int) -> None:
        super().__init__()
        self.config, self.channels, self.grid = config, channels, grid
        self.factor = grid // config.grid
        image = config.whole
        self.dimension = channels * config.grid**2 if image else channels

    def rows(self, x0: Tensor) -> Tensor:
        """T_down: low-passed features as rows [R, d]; one row an image, or one a position."""
        down = F.avg_pool2d(x0, self.factor)
        return down.flatten(1) if self.config.whole else down.permute(0, 2, 3, 1).reshape(-1, self.channels)

    def forward(self, x0: Tensor, prototypes: Tensor, square: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.softmax(-rms_distance(self.rows(x0), prototypes, square) / temperature, dim=1)
        return self.up(weights @ prototypes), weights

    def up(self, rows: Tensor) -> Tensor:
        """T_up: rows [R, d] as maps [B, C, g, g], bilinear."""
        side = self.config.grid
        if self.config.whole:
            maps = rows.reshape(-1, self.channels, side, side)
        else:
            maps = rows.reshape(-1, side, side, self.channels).permute(0, 3, 1, 2)
        return F.interpolate(maps, size=(self.grid, self.grid), mode="bilinear", align_corners=False)


def initial_prototypes(rows: Tensor, count: int, seed: int) -> Tensor:
    """k-means centres [count, d] of rows [R, d]; when R < count, pairwise means of rows fill up.

    Random initialisation leaves most prototypes dead (METHODS.md 2.3).
    """
    clusters = min(count, len(rows))
    centres = KMeans(clusters, n_init=1, random_state=seed).fit(rows.double().numpy()).cluster_centers_
    generator = np.random.default_rng(seed)
    pairs = generator.integers(len(rows), size=(count - clusters, 2))
    filled = rows.numpy()[pairs].mean(1).reshape(-1, rows.shape[1])
    return torch.from_numpy(np.concatenate((centres, filled))).float()


def temperature_for(distance: Tensor, perplexity: float) -> float:
    """The temperature at which softmax(-distance / temperature) has this mean perplexity. distance: [R, K]."""
    low, high = 1e-5, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        log_p = F.log_softmax(-distance.double() / middle, dim=1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        low, high = (middle, high) if entropy < math.log(perplexity) else (low, middle)
    return math.sqrt(low * high)
