"""Per-class vector quantiser (METHODS.md 1.2): nearest code, straight-through, EMA codes, revival of dead codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import distributed
from .config import CodebookConfig


class Quantized(NamedTuple):
    """tokens: [B, N, D], the code's value with the input's gradient; indices: [B, N]; commitment, codebook: losses."""

    tokens: Tensor
    indices: Tensor
    commitment: Tensor
    codebook: Tensor


def nearest_code(tokens: Tensor, codes: Tensor, mean: Tensor, half_square: Tensor) -> Tensor:
    """Index of the code with the smallest squared distance, as argmax(<x - c, e - c> - |e - c|^2 / 2) in FP32.

    Both sides are centred by the codebook mean, under which distances do not change; uncentred, a tight codebook far
    from the origin loses the right code to rounding (METHODS.md 1.7).

    tokens: [..., N, D]; codes: [..., K, D] centred; mean: [..., 1, D]; half_square: [..., 1, K]. Returns [..., N].
    """
    return ((tokens - mean) @ codes.transpose(-1, -2) - half_square).argmax(dim=-1)


def centre(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., K, D] -> (centred codes, mean [..., 1, D], half squared norms [..., 1, K])."""
    mean = codes.mean(dim=-2, keepdim=True)
    centred = codes - mean
    return centred, mean, 0.5 * centred.square().sum(dim=-1).unsqueeze(-2)


class ClassCodebooks(nn.Module):
    """The codebooks of one level, one per class.

    Under DistributedDataParallel the statistics are all-reduced per class, so every rank holds the same codes.
    """

    codes: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, classes: int, dim: int, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        codes = torch.randn(classes, config.size, dim)
        if config.learn == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.register_buffer("count", torch.ones(classes, config.size))
        self.register_buffer("total", codes.clone())
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Quantized:
        """tokens: [B, N, D] of images of the classes class_ids [B]."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            codes = self.codes[class_ids]
            with torch.no_grad():
                indices = nearest_code(tokens, *centre(codes))
            chosen = torch.gather(codes, 1, indices[..., None].expand_as(tokens))
            if self.training:
                self._seen.append((tokens.detach(), indices, class_ids))
            commitment = (chosen.detach() - tokens).square().mean()
            codebook = (chosen - tokens.detach()).square().mean()
            return Quantized(tokens + (chosen - tokens).detach(), indices, commitment, codebook)

    @torch.no_grad()
    def seed(self, class_id: int, tokens: Tensor) -> None:
        """Start the codes of a class from tokens [T, D] of its good images, or keep N(0,1) with `init: normal`."""
        if self.config.init == "normal":
            return
        size = self.config.size
        chosen = kmeans_plus_plus(tokens, size) if self.config.init == "kmeans++" else pick(tokens, size)
        self.codes[class_id] = chosen
        self.total[class_id] = chosen
        self.count[class_id] = 1.0

    @torch.no_grad()
    def update(self, step: int) -> dict[str, float]:
        """One EMA update per class present since the last call, then revival; returns usage numbers to log."""
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        counts, sums = self._statistics(seen)
        distributed.all_reduce_sum(counts)
        distributed.all_reduce_sum(sums)
        present = counts.sum(dim=1) > 0
        decay = torch.where(present, self.config.decay, 1.0)[:, None]
        self.count.mul_(decay).add_((1 - decay) * counts)
        revived = 0
        if self.config.learn == "ema":
            self.total.mul_(decay[..., None]).add_((1 - decay)[..., None] * sums)
            self._recompute(present)
            if (step + 1) % self.config.revive_every == 0:
                revived = self._revive(seen[-1], present)
        return {"perplexity": float(self.perplexity()[present].mean()), "revived": float(revived)}

    def perplexity(self) -> Tensor:
        """Effective number of codes in use, per class: exp of the entropy of the usage averages. [classes]"""
        share = self.count / self.count.sum(dim=1, keepdim=True)
        return torch.special.entr(share).sum(dim=1).exp()

    def _statistics(self, seen: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        counts, sums = torch.zeros_like(self.count), torch.zeros_like(self.total)
        for tokens, indices, class_ids in seen:
            rows = (indices + class_ids[:, None] * self.config.size).flatten()
            counts.view(-1).index_add_(0, rows, torch.ones_like(rows, dtype=counts.dtype))
            sums.view(-1, sums.shape[-1]).index_add_(0, rows, tokens.flatten(0, 1))
        return counts, sums

    def _recompute(self, present: Tensor, eps: float = 1e-5) -> None:
        count, total = self.count[present], self.total[present]
        mass = count.sum(dim=1, keepdim=True)
        smoothed = (count + eps) / (mass + count.shape[1] * eps) * mass
        self.codes[present] = total / smoothed[..., None]

    def _revive(self, last: tuple[Tensor, Tensor, Tensor], present: Tensor) -> int:
        """Re-seed codes that are hardly used from the last batch's tokens of the same class."""
        tokens, _, class_ids = last
        mean = self.count.mean(dim=1, keepdim=True)
        dead = (self.count < self.config.revive_below * mean) & present[:, None]
        for class_id in dead.any(dim=1).nonzero().flatten().tolist():
            rows = dead[class_id].nonzero().flatten()
            own = tokens[class_ids == class_id].flatten(0, 1)
            fresh = _from_owner(own, len(rows), self.codes)
            if fresh is None:
                continue
            self.codes[class_id, rows] = fresh
            self.count[class_id, rows] = mean[class_id]
            self.total[class_id, rows] = fresh * mean[class_id]
        return int(dead.sum())


def _from_owner(tokens: Tensor, number: int, like: Tensor) -> Tensor | None:
    """`number` random rows of tokens [T, D]; over ranks those of the first rank that has any, the same on all."""
    has = torch.zeros(distributed.world(), device=like.device)
    has[distributed.rank()] = float(len(tokens) > 0)
    distributed.all_reduce_sum(has)
    if not bool(has.any()):
        return None
    owner = int(has.argmax())
    mine = owner == distributed.rank()
    return distributed.all_reduce_sum(pick(tokens, number) if mine else like.new_zeros(number, like.shape[-1]))


def pick(tokens: Tensor, number: int) -> Tensor:
    """`number` random rows of tokens [T, D], without repetition where there are enough."""
    if len(tokens) >= number:
        return tokens[torch.randperm(len(tokens), device=tokens.device)[:number]]
    return tokens[torch.randint(len(tokens), (number,), device=tokens.device)]


def kmeans_plus_plus(tokens: Tensor, number: int) -> Tensor:
    """k-means++ seeding: each next row is drawn in proportion to its squared distance to the rows chosen before."""
    chosen = tokens[torch.randint(len(tokens), (1,))]
    nearest = (tokens - chosen).square().sum(dim=1)
    rows = [chosen]
    for _ in range(number - 1):
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        row = tokens[torch.multinomial(weights, 1)]
        nearest = torch.minimum(nearest, (tokens - row).square().sum(dim=1))
        rows.append(row)
    return torch.cat(rows)
