"""HVQ-Trans (METHODS.md 1): encoder, hierarchical per-class quantisation, decoder, per-class expert, OT score term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....runtime.manifest import Preprocess
from ...align import Standardize
from ...method import AnomalyModel, Batch, Optimizer, Scores, TrainingData
from ...scoremap import ScoreMap
from . import calibration, pot
from .config import HvqConfig
from .frontend import Frontend
from .quantizer import ClassCodebooks, Quantized
from .transformer import DecoderLayer, EncoderLayer, Positions


@dataclass(frozen=True)
class Encoded:
    """features: [B, N, C] the reconstruction target; hidden: h0..hL, each [B, N, dim]; logits: [B, classes]."""

    features: Tensor
    hidden: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True)
class Decoded:
    """reconstruction: [B, N, C]; queries: what was quantised at levels 1..L and at the top; quantized: likewise."""

    reconstruction: Tensor
    queries: tuple[Tensor, ...]
    quantized: tuple[Quantized, ...]


class Encoder(nn.Module):
    """Aligned features [B, C, grid, grid] to (features [B, N, C], h0..hL each [B, N, dim])."""

    def __init__(self, config: HvqConfig, channels: int) -> None:
        super().__init__()
        t = config.transformer
        self.standardize = Standardize(channels) if config.features.standardize else nn.Identity()
        self.embed = nn.Linear(channels, t.dim)
        self.layers = nn.ModuleList(EncoderLayer(t.dim, t.heads, t.ffn, t.dropout) for _ in range(t.layers))

    def forward(self, aligned: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the class."""
        features = self.standardize(aligned).flatten(2).transpose(1, 2)
        hidden = [self.embed(features)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], positions))
        return features, tuple(hidden)


class Classifier(nn.Module):
    """Product logits [B, classes] of aligned features [B, C, grid, grid]; linear in their standardised mean.

    The features come from the frozen front end, so its loss reaches nothing but this module.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)
        # What good images never move has no gradient: a random weight would stay there and meet a defect first.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, aligned: Tensor) -> Tensor:
        """See the class."""
        return self.linear((aligned.mean(dim=(2, 3)) - self.mean) / self.std)

    @torch.no_grad()
    def fit_scale(self, data: TrainingData) -> None:
        """Mean and standard deviation of the pooled features of the good images; no channel counts as quieter than
        a thousandth of the usual one, as in Standardize."""
        pooled = torch.cat([batch.features["aligned"].float().mean(dim=(2, 3)) for batch in data.batches(64)])
        self.mean.copy_(pooled.mean(dim=0))
        std = pooled.std(dim=0, correction=0) + 1e-6
        self.std.copy_(std.clamp_min(1e-3 * float(std.mean())))


class HvqModel(AnomalyModel):
    """HVQ-Trans for several products at once.

    ``codebooks`` are the levels 1..L (width 2 * dim, z^l = VQ([h^{l-1}; theta])) followed by the top (width dim,
    theta = VQ(h^L)); HVQ-Trans eq. 1.
    """

    lam: Tensor
    epsilon: Tensor
    map_mean: Tensor
    map_std: Tensor

    def __init__(self, config: HvqConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config: HvqConfig = config
        self.classes = classes
        c, t, grid = config.codebook, config.transformer, config.features.grid
        f = config.features
        self.features = Frontend(config.backbone, grid, mode=f.align, smooth=f.smooth)
        channels, wide = self.features.channels, 2 * t.dim
        self.positions = Positions(grid, t.dim)
        self.encoder = Encoder(config, channels)
        self.classifier = Classifier(channels, len(classes))
        self.decoder = nn.ModuleList(
            DecoderLayer(wide, t.decoder_heads, t.decoder_ffn, t.dropout) for _ in range(t.layers)
        )
        self.codebooks = nn.ModuleList(ClassCodebooks(len(classes), wide, c) for _ in range(t.layers))
        self.codebooks.append(ClassCodebooks(len(classes), t.dim, c))
        self.norm = nn.LayerNorm(wide)
        bound = wide**-0.5
        self.expert_weight = nn.Parameter(torch.empty(len(classes), channels, wide).uniform_(-bound, bound))
        self.expert_bias = nn.Parameter(torch.zeros(len(classes), channels))
        score = config.score
        self.score_map = ScoreMap(
            grid,
            config.size,
            sigma=score.sigma,
            mode=score.mode,
            window=score.window,
            top_share=score.top_share,
        )
        self.register_buffer("lam", torch.tensor([80.0 if config.pot.lam == "std" else config.pot.lam]))
        self.register_buffer("epsilon", torch.ones(t.layers + 1, len(classes)))
        self.register_buffer("map_mean", torch.zeros(len(classes), grid**2))
        self.register_buffer("map_std", torch.ones(len(classes), grid**2))

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module:
        return self.features

    @property
    def books(self) -> tuple[ClassCodebooks, ...]:
        """Levels 1..L, then the top."""
        return tuple(cast(ClassCodebooks, book) for book in self.codebooks)

    # ---------------------------------------------------------------- the computation

    def encode(self, aligned: Tensor) -> Encoded:
        """Tokens, encoder states and product logits of aligned features [B, C, grid, grid]."""
        features, hidden = self.encoder(aligned, self.positions())
        return Encoded(features, hidden, self.classifier(aligned))

    def decode(self, encoded: Encoded, class_ids: Tensor) -> Decoded:
        """Quantise with the codebooks of class_ids [B] and reconstruct with its experts (HVQ-Trans eq. 1 and 2)."""
        *below, last = self.books
        top = last(encoded.hidden[-1], class_ids)
        queries = [torch.cat([h.float(), top.tokens], dim=-1) for h in encoded.hidden[:-1]]
        levels = [book(q, class_ids) for book, q in zip(below, queries, strict=True)]
        positions = self.positions().repeat(1, 2)
        output = levels[-1].tokens
        for layer, level in zip(self.decoder, reversed(levels), strict=True):
            output = layer(output, level.tokens, positions)
        weight, bias = self.expert_weight[class_ids], self.expert_bias[class_ids]
        reconstruction = self.norm(output) @ weight.transpose(1, 2) + bias[:, None]
        return Decoded(reconstruction, (*queries, encoded.hidden[-1].float()), (*levels, top))

    def transport(self, decoded: Decoded, class_ids: Tensor) -> Tensor:
        """Score term s_POT [B, N] of the configured mode."""
        options = self.config.pot
        if options.mode == "ct_level1":
            codes = self.books[0].codes[class_ids]
            unit = F.normalize(codes, dim=-1)
            return pot.conditional_transport(decoded.queries[0], codes - codes.mean(dim=1, keepdim=True), unit)
        terms = [
            pot.sinkhorn(query, book.codes[class_ids], self.epsilon[level, class_ids, None, None], options.iterations)
            for level, (query, book) in enumerate(zip(decoded.queries, self.books, strict=True))
        ]
        return torch.stack(terms).sum(dim=0)

    def grid_maps(self, aligned: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """s_org [B, N], s_POT [B, N] unless off, logits [B, classes]."""
        encoded = self.encode(aligned)
        decoded = self.decode(encoded, class_ids)
        error = (decoded.reconstruction.float() - encoded.features).square().sum(dim=-1).sqrt()
        term = None if self.config.pot.mode == "off" else self.transport(decoded, class_ids)
        return error, term, encoded.logits

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        return self.score_features(self.features(images)["aligned"], class_ids)

    def score_features(self, aligned: Tensor, class_ids: Tensor) -> Scores:
        """Scores from cached features [B, C, grid, grid]."""
        error, term, logits = self.grid_maps(aligned, class_ids)
        grid = self.config.features.grid
        combined = error if term is None else error + self.lam * term
        combined = (combined - self.map_mean[class_ids]) / self.map_std[class_ids]
        pixel_map, score = self.score_map(combined.reshape(-1, 1, grid, grid))
        return Scores(pixel_map[:, 0], score, logits)

    # ---------------------------------------------------------------- training

    def optimizers(self) -> list[Optimizer]:
        s = self.config.schedule
        own = list(self.classifier.parameters())
        rest = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("classifier.")]
        rate = self.config.classifier.lr
        return [
            Optimizer(torch.optim.AdamW(rest, lr=s.lr, weight_decay=s.weight_decay), s.lr, rest),
            Optimizer(torch.optim.AdamW(own, lr=rate, weight_decay=s.weight_decay), rate, own),
        ]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        encoded = self.encode(batch.features["aligned"])
        decoded = self.decode(encoded, batch.class_ids)
        c, options = self.config.codebook, self.config.pot
        losses = {
            "reconstruction": F.mse_loss(decoded.reconstruction.float(), encoded.features),
            "commitment": torch.stack([q.commitment for q in decoded.quantized]).sum(),
            "classifier": F.cross_entropy(
                encoded.logits.float(), batch.class_ids, label_smoothing=self.config.classifier.smoothing
            ),
        }
        loss = losses["reconstruction"] + c.commitment * losses["commitment"] + losses["classifier"]
        if c.learn == "gradient":
            loss = loss + torch.stack([q.codebook for q in decoded.quantized]).sum()
        if options.alpha > 0:
            losses["transport"] = self._transport_loss(decoded, batch.class_ids)
            loss = loss + options.alpha * losses["transport"]
        return {"loss": loss, **losses}

    def after_step(self, step: int) -> dict[str, float]:
        names = [*(str(i + 1) for i in range(len(self.books) - 1)), "top"]
        return {
            f"{key}_{name}": value
            for name, book in zip(names, self.books, strict=True)
            for key, value in book.update(step).items()
        }

    def _transport_loss(self, decoded: Decoded, class_ids: Tensor) -> Tensor:
        """Mean OT cost of all levels; the plan is constant, the gradient reaches the codes through the cost."""
        terms = []
        for query, book in zip(decoded.queries, self.books, strict=True):
            codes, tokens = book.codes[class_ids], query.detach()
            with torch.no_grad():
                median = pot.distances(tokens, codes).flatten(1).median(dim=1).values[:, None, None]
            epsilon = self.config.pot.epsilon * median
            terms.append(pot.sinkhorn(tokens, codes, epsilon, self.config.pot.iterations, detach_plan=True).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def prepare(self, data: TrainingData) -> None:
        """Channel statistics of the good images, then the codes from the first images of each class."""
        if isinstance(self.encoder.standardize, Standardize):
            self.encoder.standardize.fit(data, "aligned")
        self.classifier.fit_scale(data)
        training = self.training
        self.eval()
        wanted = -(-4 * self.config.codebook.size // self.config.features.grid**2)
        first: dict[int, list[Tensor]] = {i: [] for i in range(len(self.classes))}
        for batch in data.batches(self.config.schedule.batch):
            for aligned, class_id in zip(batch.features["aligned"], batch.class_ids.tolist(), strict=True):
                if len(first[class_id]) < wanted:
                    first[class_id].append(aligned.float())
            if all(len(images) == wanted for images in first.values()):
                break
        for class_id, images in first.items():
            if images:
                self._seed(class_id, torch.stack(images).to(self.lam.device))
        self.train(training)

    def _seed(self, class_id: int, aligned: Tensor) -> None:
        hidden = self.encode(aligned).hidden
        ids = torch.full((len(aligned),), class_id, device=aligned.device)
        *below, top = self.books
        top.seed(class_id, hidden[-1].flatten(0, 1))
        theta = top(hidden[-1], ids).tokens
        for book, h in zip(below, hidden[:-1], strict=True):
            book.seed(class_id, torch.cat([h, theta], dim=-1).flatten(0, 1))

    @torch.no_grad()
    def finalize(self, holdout: TrainingData) -> None:
        """Constants of OT term and score from held-out good images, see calibration.py."""
        options = self.config
        if len(holdout) == 0 or not options.uses_constants:
            return
        self.eval()
        if options.pot.mode == "sinkhorn_all":
            self._calibrate_epsilon(holdout)
        parts = []
        for batch in self._own_batches(holdout):
            error, term, _ = self.grid_maps(batch.features["aligned"], batch.class_ids)
            parts.append((error, torch.zeros_like(error) if term is None else term, batch.class_ids))
        errors, terms, class_ids = (torch.cat(part) for part in zip(*parts, strict=True))
        if options.pot.mode != "off" and options.pot.lam == "std":
            self.lam.fill_(calibration.equal_deviation(errors, terms))
        if options.score.calibrate == "position":
            mean, std = calibration.position_statistics(
                errors + self.lam * terms, class_ids, len(self.classes), options.score.prior
            )
            self.map_mean.copy_(mean)
            self.map_std.copy_(std)

    def _calibrate_epsilon(self, holdout: TrainingData) -> None:
        medians: dict[tuple[int, int], list[Tensor]] = {}
        for batch in self._own_batches(holdout):
            decoded = self.decode(self.encode(batch.features["aligned"]), batch.class_ids)
            for level, (query, book) in enumerate(zip(decoded.queries, self.books, strict=True)):
                cost = pot.distances(query, book.codes[batch.class_ids]).flatten(1).median(dim=1).values
                for class_id, value in zip(batch.class_ids.tolist(), cost, strict=True):
                    medians.setdefault((level, class_id), []).append(value)
        for (level, class_id), values in medians.items():
            self.epsilon[level, class_id] = self.config.pot.epsilon * torch.stack(values).mean()

    def _own_batches(self, data: TrainingData) -> list[Batch]:
        return [batch.to(self.lam.device) for batch in data.batches(self.config.schedule.batch)]
