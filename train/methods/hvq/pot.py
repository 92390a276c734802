"""Prototype-oriented optimal transport between tokens and codes (HVQ-Trans eq. 4, METHODS.md 1.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def conditional_transport(tokens: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    """sum_k p_k (1 - cos(x, e_k)) with p = softmax_k(<x, e_k> / K): the released code's test term.

    tokens: [..., N, D]; codes: [..., K, D], any common shift of all codes cancels in the softmax;
    unit: [..., K, D], the uncentred codes at unit length. Returns [..., N].
    """
    plan = (tokens @ codes.transpose(-1, -2) / codes.shape[-2]).softmax(dim=-1)
    direction = tokens / tokens.square().sum(dim=-1, keepdim=True).clamp_min(1e-12).sqrt()
    return 1.0 - (plan * (direction @ unit.transpose(-1, -2))).sum(dim=-1)


def distances(tokens: Tensor, codes: Tensor) -> Tensor:
    """Euclidean distances [..., N, K], without cdist."""
    mean = codes.mean(dim=-2, keepdim=True)
    x, e = tokens - mean, codes - mean
    squared = x.square().sum(-1, keepdim=True) + e.square().sum(-1).unsqueeze(-2) - 2.0 * x @ e.transpose(-1, -2)
    return (squared.clamp_min(0.0) + 1e-12).sqrt()


def log_plan(cost: Tensor, epsilon: Tensor, iterations: int) -> Tensor:
    """Log-domain Sinkhorn with uniform marginals.

    The marginals' values 1/N and 1/K only shift both potentials, which the row normalisation at the end undoes.
    cost: [..., N, K]; epsilon: broadcastable to it. Returns log(N * T), rows normalised, [..., N, K].
    """
    kernel = -cost / epsilon
    column = torch.zeros_like(cost[..., :1, :])
    for _ in range(iterations):
        row = -torch.logsumexp(kernel + column, dim=-1, keepdim=True)
        column = -torch.logsumexp(kernel + row, dim=-2, keepdim=True)
    return torch.log_softmax(kernel + column, dim=-1)


def sinkhorn(tokens: Tensor, codes: Tensor, epsilon: Tensor, iterations: int, detach_plan: bool = False) -> Tensor:
    """sum_k N T_ik C_ik with C the Euclidean distance: the paper's score of one level.

    detach_plan: the gradient reaches the codes through C only. Returns [..., N].
    """
    cost = distances(tokens, codes)
    plan = log_plan(cost.detach() if detach_plan else cost, epsilon, iterations).exp()
    return (plan * cost).sum(dim=-1)
