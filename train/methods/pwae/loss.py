"""Losses of P-WAE: sliced Wasserstein distance to Student-t priors and normalised HSIC (METHODS.md 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def student_t(samples: int, dim: int, nu: float, like: Tensor) -> Tensor:
    """Independent Student-t coordinates with nu degrees of freedom, [samples, dim]."""
    normal = torch.randn(samples, dim, device=like.device)
    chi = torch.distributions.Chi2(torch.tensor(nu, device=like.device)).sample((samples, dim))
    return normal * (nu / chi).sqrt()


def directions(number: int, dim: int, like: Tensor) -> Tensor:
    """Random unit vectors, [dim, number]."""
    return torch.nn.functional.normalize(torch.randn(dim, number, device=like.device), dim=0)


def quantiles(projected: Tensor, number: int) -> Tensor:
    """Quantiles at (i - 0.5) / number of each column: [samples, L] -> [number, L]."""
    ordered = projected.sort(dim=0).values
    levels = (torch.arange(number, device=projected.device) + 0.5) / number
    return ordered[(levels * len(ordered)).long()]


def sliced_wasserstein(codes: Tensor, prior: Tensor, shifts: Tensor, theta: Tensor) -> Tensor:
    """Squared sliced Wasserstein distance of each tile's codes to its prior, summed over tiles (eq. 18, p = 2).

    codes: [B, T, d]; prior: [samples, d], common to the tiles; shifts: [T, d], the prior centre of each tile;
    theta: [d, L] unit directions. The prior is taken at its quantiles, because single heavy-tailed draws would
    dominate a small batch.
    """
    projected = (codes @ theta).sort(dim=0).values
    target = quantiles(prior @ theta, len(codes))[:, None] + shifts @ theta
    return (projected - target).square().mean(dim=(0, 2)).sum()


def normalised_gram(values: Tensor, sigma: float = 5.0, epsilon: float = 1e-5) -> Tensor:
    """K H (K H + eps m I)^-1 for a Gaussian kernel of variance 2 sigma^2 d. values: [m, d]; returns [m, m] float64."""
    x = values.double()
    m = len(x)
    squared = (x[:, None] - x[None]).square().sum(dim=-1)
    kernel = torch.exp(-squared / (2 * sigma**2 * x.shape[1]))
    centred = kernel - kernel.mean(dim=1, keepdim=True)
    regular = centred + epsilon * m * torch.eye(m, dtype=x.dtype, device=x.device)
    return torch.linalg.solve(regular.T, centred.T).T


def normalised_hsic(first: Tensor, second: Tensor) -> Tensor:
    """tr(K~_first K~_second) of two :func:`normalised_gram`."""
    return (first * second.T).sum()
