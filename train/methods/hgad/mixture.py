"""The hierarchical Gaussian mixture in latent space: one main centre per class, further centres around it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LossConfig


def log_sum_exp(x: Tensor) -> Tensor:
    """Over the last axis, with an explicit shift by the maximum (FP32 island, METHODS.md 6.2)."""
    top = x.amax(-1, keepdim=True)
    return (x - top).exp().sum(-1).log() + top.squeeze(-1)


def squared_distance(z: Tensor, centres: Tensor) -> Tensor:
    """||z - mu||^2 through one product. z: [..., N, d]; centres: [..., M, d]; returns [..., N, M]."""
    product = z @ centres.transpose(-1, -2)
    square = (centres * centres).sum(-1).unsqueeze(-2)
    return ((z * z).sum(-1, keepdim=True) + square - 2 * product).clamp_min(0)


def intra_density(z: Tensor, log_det: Tensor | float, centres: Tensor, log_weights: Tensor) -> Tensor:
    """Log-likelihood per dimension under one class's mixture.

    z: [..., N, d]; log_det: [..., N], or 0 for the likelihood in latent space; centres: [..., M, d]; log_weights:
    [..., M] (log-softmaxed); returns [..., N].
    """
    d = z.shape[-1]
    mixture = log_sum_exp(log_weights.unsqueeze(-2) - 0.5 * squared_distance(z, centres))
    return (mixture + log_det - 0.5 * d * math.log(2 * math.pi)) / d


def negative_entropy(z: Tensor, main: Tensor) -> Tensor:
    """sum_y p log p of the class posterior from the main centres [Y, d]; [..., N], <= 0, and 0 for one class."""
    log_p = F.log_softmax(-0.5 * squared_distance(z, main), dim=-1)
    return (log_p.exp() * log_p).sum(-1)


class Mixture(nn.Module):
    """Centres and weights of one level (METHODS.md 4.1, 4.3).

    main: [Y, d] class centres; class_logit: [Y]; deltas: [Y, M-1, d] further centres relative to the main one;
    weight_logit: [Y, M].
    """

    def __init__(self, classes: int, centres: int, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        spread = 5.0 / math.sqrt(max(2 * channels // classes, 1))
        own = torch.arange(channels)[None, :] % classes == torch.arange(classes)[:, None]
        self.main = nn.Parameter(spread * own.float())
        self.class_logit = nn.Parameter(torch.zeros(classes))
        self.deltas = nn.Parameter(torch.randn(classes, centres - 1, channels, generator=generator))
        self.weight_logit = nn.Parameter(torch.zeros(classes, centres))

    def centres(self) -> Tensor:
        """All centres [Y, M, d]; row 0 is the main centre. No gradient reaches the main centres through it."""
        main = self.main.detach()[:, None]
        return torch.cat((main, main + self.deltas), dim=1)

    def log_weights(self) -> Tensor:
        """[Y, M], log-softmaxed."""
        return F.log_softmax(self.weight_logit, dim=-1)

    def losses(
        self, z: Tensor, log_det: Tensor, class_ids: Tensor, config: LossConfig, intra: bool
    ) -> dict[str, Tensor]:
        """Loss terms of a batch (HGAD eq. 6-11 as METHODS.md 4.3 settles them).

        z: [B, N, d]; log_det: [B, N]; class_ids: [B] int64; intra: False in the first phase.
        """
        d = z.shape[-1]
        logits = -0.5 * squared_distance(z, self.main)
        log_class = F.log_softmax(self.class_logit, dim=-1)
        likelihood = -(torch.logsumexp(logits + log_class, -1) + log_det).mean() / d
        terms = {"likelihood": likelihood}
        total = config.likelihood * likelihood
        if len(self.main) > 1:
            information = self._information(logits, log_class.detach(), class_ids, config.smoothing)
            log_p = F.log_softmax(logits, dim=-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            terms |= {"information": information, "entropy": entropy}
            total = total - config.information * information + entropy
        if intra:
            density = intra_density(z, log_det, self.centres()[class_ids], self.log_weights()[class_ids])
            terms["intra"] = -(density.mean() + 0.5 * math.log(2 * math.pi))
            total = total + terms["intra"]
            if config.use_lz:
                terms["lz"] = -F.logsigmoid(density).mean()
                total = total + terms["lz"]
        return terms | {"loss": total}

    def _information(self, logits: Tensor, log_class: Tensor, class_ids: Tensor, smoothing: float) -> Tensor:
        """Mutual information of latent and class, sum_y t_y (log softmax_y - c_y) with smoothed targets t."""
        count = len(self.main)
        target = torch.full((len(class_ids), count), smoothing / count, device=logits.device)
        target.scatter_(1, class_ids[:, None], 1 - smoothing + smoothing / count)
        gain = F.log_softmax(logits + log_class, dim=-1) - log_class
        return (target[:, None] * gain).sum(-1).mean()
