"""The HGAD model: frozen feature levels, one flow and one mixture per level, calibrated scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....runtime.manifest import Preprocess
from ...align import Standardize
from ...errors import no_constants
from ...method import AnomalyModel, Batch, Optimizer, Scores, TrainingData
from .config import HgadConfig
from .features import LevelFeatures
from .flow import Flow
from .mixture import Mixture, intra_density, log_sum_exp, negative_entropy, squared_distance
from .score import Constants, DensityScore, calibrated, quantile


class LevelModel(nn.Module):
    """What is trained at one level; each level has its own optimiser."""

    standardize: Standardize
    flow: Flow
    mixture: Mixture

    def __init__(self, config: HgadConfig, channels: int, grid: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        f = config.flow
        self.standardize = Standardize(channels)
        self.flow = Flow(
            channels,
            (grid, grid),
            blocks=f.blocks,
            position=f.position,
            hidden=f.hidden,
            clamp=f.clamp,
            generator=generator,
        )
        self.mixture = Mixture(classes, config.centres, channels, generator)

    def forward(self, features: Tensor, index: Tensor | None = None, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """features: [B, d, h, w] raw; index: positions to take; noise: standard deviation of what is added to the
        flow's input; returns z [B, N, d] and log-determinant [B, N]."""
        x = self.standardize(features).flatten(2).transpose(1, 2)
        if index is not None:
            x = x[:, index]
        if noise:
            x = x + noise * torch.randn_like(x)
        z, log_det = self.flow(x, index)
        return z, log_det


def class_likelihood(z: Tensor, log_det: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
    """Automatic class (METHODS.md 4.4): z [B, N, d], log_det [B, N], centres [Y, M, d], weights [Y, M] -> [B, Y]."""
    classes, count, d = centres.shape
    exponent = log_weights.flatten() - 0.5 * squared_distance(z, centres.reshape(classes * count, d))
    per_class = log_sum_exp(exponent.unflatten(-1, (classes, count)))
    return (per_class + log_det[..., None]).mean(1) / d


@dataclass(frozen=True)
class Densities:
    """Per level: what is scored, log-likelihood per dimension under the given class (its log-determinant weighted by
    `score.log_det`), and negative class entropy, both [B, N]."""

    likelihood: list[Tensor]
    entropy: list[Tensor]


class Hgad(AnomalyModel):
    """HGAD (METHODS.md 4): one model for all classes; the class is given, or the argmax of `Scores.logits`."""

    config: HgadConfig
    reach: Tensor

    def __init__(self, config: HgadConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        generator = torch.Generator().manual_seed(config.seed)
        self.features = LevelFeatures(config)
        self.levels = nn.ModuleList(
            LevelModel(config, channels, grid, len(classes), generator)
            for channels, grid in zip(self.features.channels, self.features.grids, strict=True)
        )
        self.scoring = DensityScore(self.features.grids, config.size, config.score, len(classes))
        for number, grid in enumerate(self.features.grids, 1):
            self.register_buffer(f"ceiling{number}", torch.zeros(len(classes), 2, grid * grid))
            if config.score.by_position:
                self.register_buffer(f"gain{number}", torch.ones(len(classes), 2, grid * grid))
        self.register_buffer("reach", torch.full((len(classes), 2), float(len(self.levels))))

    @property
    def each_level(self) -> list[LevelModel]:
        """The levels, shallow first."""
        return cast("list[LevelModel]", list(self.levels))

    @property
    def ceilings(self) -> list[Tensor]:
        """m of every level, [Y, 2, N_l]: of log-likelihood and negative entropy, by position."""
        return [self.get_buffer(f"ceiling{number}") for number in range(1, len(self.levels) + 1)]

    @property
    def gains(self) -> list[Tensor]:
        """k of every level like `ceilings`; empty without calibration by position, where each is 1."""
        numbers = range(1, len(self.levels) + 1) if self.config.score.by_position else ()
        return [self.get_buffer(f"gain{number}") for number in numbers]

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module:
        return self.features

    def _inputs(self, features: dict[str, Tensor] | Batch) -> list[Tensor]:
        maps = features.features if isinstance(features, Batch) else features
        return [maps[name] for name in self.features.names]

    def densities(self, features: Sequence[Tensor], class_ids: Tensor) -> tuple[Densities, Tensor]:
        """Densities under the given classes, and the class logits [B, Y].

        features: levels of [B, d, h, w]; class_ids: [B] int64.
        """
        out, weight = Densities([], []), self.config.score.log_det
        logits: list[Tensor] = []
        for level, x in zip(self.each_level, features, strict=True):
            z, log_det = level(x)
            mixture = level.mixture
            centres, weights = mixture.centres(), mixture.log_weights()
            out.likelihood.append(intra_density(z, weight * log_det, centres[class_ids], weights[class_ids]))
            out.entropy.append(negative_entropy(z, mixture.main))
            logits.append(class_likelihood(z, log_det, centres, weights))
        return out, torch.stack(logits).sum(0)

    def score_features(self, features: Sequence[Tensor], class_ids: Tensor) -> Scores:
        """Scores from what the front end gave, levels of [B, d, h, w]."""
        densities, logits = self.densities(features, class_ids)
        ceilings, gains = ([x[class_ids] for x in of_levels] for of_levels in (self.ceilings, self.gains))
        constants = Constants(ceilings, gains, self.reach[class_ids])
        maps, score = self.scoring(densities.likelihood, densities.entropy, constants)
        return Scores(maps[:, 0], score, logits)

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        return self.score_features(self._inputs(self.features(images)), class_ids)

    def prepare(self, data: TrainingData) -> None:
        """Channel statistics of the training images, if the configuration asks for them."""
        if not self.config.standardize:
            return
        for level, name in zip(self.each_level, self.features.names, strict=True):
            level.standardize.fit(data, name)

    def optimizers(self) -> list[Optimizer]:
        """One Adam per level: the levels share nothing (METHODS.md 4.3); no decay on centres and weights."""
        s, out = self.config.schedule, []
        for level in self.each_level:
            flow, mixture = list(level.flow.parameters()), list(level.mixture.parameters())
            groups: list[dict[str, Any]] = [{"params": flow}, {"params": mixture, "weight_decay": 0.0}]
            adam = torch.optim.Adam(groups, lr=s.lr, betas=self.config.betas, weight_decay=s.weight_decay)
            out.append(Optimizer(adam, s.lr, flow + mixture))
        return out

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        done = step / self.config.schedule.steps if self.progress is None else self.progress
        intra = done >= self.config.loss.first_phase
        total: Tensor | None = None
        log: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
        for number, (level, x) in enumerate(zip(self.each_level, self._inputs(batch), strict=True)):
            index = self._positions(number, x.shape[2] * x.shape[3], generator)
            z, log_det = level(x, None if index is None else index.to(x.device), self.config.noise)
            with torch.autocast(z.device.type, enabled=False):
                terms = level.mixture.losses(z, log_det, batch.class_ids, self.config.loss, intra)
            loss = terms.pop("loss")
            total = loss if total is None else total + loss
            log |= {f"{name}{number}": value.detach() for name, value in terms.items()}
        if total is None:
            raise ValueError("HGAD needs at least one level")
        return {"loss": total, **log}

    def _positions(self, number: int, count: int, generator: torch.Generator) -> Tensor | None:
        """Positions of this step at a level, the same for all images of the batch; None for all."""
        share = self.config.levels[number].sample
        if share >= 1:
            return None
        return torch.randperm(count, generator=generator)[: max(1, round(share * count))]

    @torch.no_grad()
    def finalize(self, holdout: TrainingData) -> None:
        """Calibration constants per class from held-out good images (METHODS.md 4.4, 0.6).

        Raises:
            CalibrationError: a class has no held-out image.
        """
        c = self.config.score
        for index, name in enumerate(self.classes):
            chunks = list(self._class_densities(holdout, index))
            if not chunks:
                raise no_constants(name)
            for kind in range(2):
                for level, grid in enumerate(self.features.grids):
                    values = torch.cat([chunk[kind][level] for chunk in chunks])
                    ceiling, gain = calibrated(values, grid, c)
                    self.ceilings[level][index, kind] = ceiling
                    if self.gains:
                        self.gains[level][index, kind] = gain
                ceilings, gains = ([x[index, kind] for x in of_levels] for of_levels in (self.ceilings, self.gains))
                totals = [self.scoring.total(chunk[kind], ceilings, gains) for chunk in chunks]
                self.reach[index, kind] = quantile(totals, c.quantile)

    def _class_densities(self, data: TrainingData, index: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        device = self.reach.device
        for batch in data.batches(16):
            own = batch.class_ids == index
            if own.any():
                features = [x[own].to(device) for x in self._inputs(batch)]
                ids = torch.full((len(features[0]),), index, device=device)
                densities, _ = self.densities(features, ids)
                yield densities.likelihood, densities.entropy
