"""Constants of the score from held-out good images (METHODS.md 0.6 and 1.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_deviation(errors: Tensor, terms: Tensor) -> float:
    """lambda at which lambda * terms has the standard deviation of errors; 0 for terms that are the same everywhere.

    Those tell nothing of good images, and a lambda that made their rounding as large as the errors would be all that a
    map shows.
    """
    spread = terms.double().std()
    if not spread > 1e-6 * terms.abs().max():
        return 0.0
    return float(errors.double().std() / spread)


def position_statistics(maps: Tensor, class_ids: Tensor, classes: int, prior: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of good images' maps per product and position, each [classes, N].

    A camera over a station sees the same part of the product at the same place: where good parts vary (an edge, a bus
    bar) a large error means little. The product's mean and variance over all positions count for `prior` more images,
    so that a few held-out images do not make a position overconfident. hgad and vpdm have statistics of their own
    (train/byposition.py), with a blur over neighbours; here those were no better on validation.

    maps: [n, N]; class_ids: [n]. A product without held-out images gets the statistics of all products.
    """
    means, deviations = [], []
    for class_id in range(classes):
        own = maps[class_ids == class_id].double()
        pooled = own if len(own) else maps.double()
        weight = prior if len(own) else 1.0
        total = len(own) + weight
        mean = (own.sum(dim=0) + weight * pooled.mean()) / total
        spread = (own - own.mean(dim=0)).square().sum(dim=0) if len(own) else torch.zeros_like(mean)
        variance = (spread + weight * pooled.var(correction=0)) / total
        means.append(mean)
        deviations.append(variance.sqrt().clamp_min(1e-6))
    return torch.stack(means).float(), torch.stack(deviations).float()
