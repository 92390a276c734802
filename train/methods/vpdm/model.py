"""The VPDM model: frozen features, prototype condition, diffusion of the residual, score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ....runtime.manifest import Preprocess
from ...align import AlignedFeatures, Standardize
from ...byposition import position_statistics
from ...distributed import gathered
from ...errors import no_constants
from ...features import bar_settings
from ...method import AnomalyModel, Batch, Scores, TrainingData
from ...scoremap import ScoreMap
from .config import VpdmConfig
from .denoiser import build_denoiser
from .prototypes import Condition, initial_prototypes, rms_distance, sinkhorn, temperature_for
from .samplers import NoiseSchedule, Sampler, calibrated, coefficients, constants_of, find_sampler, time_codes

_FEATURE = "features"
_NOISE_STRIDE = 7919  # prime, so that 1,000 rolls of a tensor never bring a position the same entry twice
_FIT_ROWS = 8192  # rows that k-means and the temperature look at


class Frontend(nn.Module):
    """uint8 [B, S, S, 3] -> {"features": [B, C, g, g]}."""

    def __init__(self, config: VpdmConfig) -> None:
        super().__init__()
        f = config.features
        self.aligned = AlignedFeatures(config.backbone, f.grid, mode=f.resample, align_corners=False, smooth=f.smooth)
        self.channels = self.aligned.channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {_FEATURE: self.aligned(images)}


class Update(nn.Module):
    """One step of any sampler in residual space (METHODS.md 2.6). FP32 island.

    coef: [1, 8], columns as samplers.COLUMNS. Returns u_next and the clipped estimate of u_0.
    """

    def forward(self, u: Tensor, predicted: Tensor, coef: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        c = [coef[:, i : i + 1, None, None] for i in range(coef.shape[1])]
        u0 = torch.minimum(torch.maximum(c[5] * u + c[6] * predicted, -c[7]), c[7])
        eps = (u - c[0] * u0) / c[1]
        return c[2] * u0 + c[3] * eps + c[4] * noise, u0


class StepEngine(nn.Module):
    """One call of the loop: denoise, update, roll the noise.

    u, yhat, noise: [1, C, g, g]; code: [1, E]; coef: [1, 8]. Returns u_next, u0, noise_next.

    A table of fresh noise for 1,000 steps would be hundreds of megabytes. So one fixed tensor is rolled by a prime
    stride at every step: at each position the values over the steps are distinct entries of it, hence independent;
    the same entries serve other positions at other steps. Deterministic samplers multiply it by sigma = 0.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.update = Update()

    def forward(
        self, u: Tensor, yhat: Tensor, code: Tensor, coef: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        u_next, u0 = self.update(u, self.denoiser(u, yhat, code), coef, noise)
        return u_next, u0, roll(noise)


def prediction_target(kind: str, signal: Tensor, spread: Tensor, u0: Tensor, eps: Tensor) -> Tensor:
    """What the denoiser should give for u = signal u0 + spread eps; kind: eps, or v = signal eps - spread u0."""
    return eps if kind == "eps" else signal * eps - spread * u0


def roll(noise: Tensor) -> Tensor:
    """The noise of the next step."""
    flat = noise.flatten()
    stride = _NOISE_STRIDE % flat.shape[0]
    return torch.cat((flat[stride:], flat[:stride])).reshape(noise.shape)


class ResidualScore(nn.Module):
    """x0, yhat, u0 [B, C, g, g] -> map [B, 1, S, S] and score [B]: norm over channels of what was not restored.

    std: [1, C, 1, 1] weighs channels by their feature units when `score.space` is raw. usual: mean and deviation of the
    norm on good images of the product by position, both [B, 1, g, g]; empty without calibration by position.
    """

    def __init__(self, config: VpdmConfig) -> None:
        super().__init__()
        s = config.score
        self.raw = s.space == "raw"
        self.map = ScoreMap(
            config.features.grid, config.size, align_corners=s.align_corners, sigma=s.sigma, mode=s.mode
        )

    def norm(self, x0: Tensor, yhat: Tensor, u0: Tensor, std: Tensor) -> Tensor:
        """[B, 1, g, g]."""
        residual = x0 - yhat - u0
        if self.raw:
            residual = residual * std
        return (residual * residual).sum(1, keepdim=True).sqrt()

    def forward(self, x0: Tensor, yhat: Tensor, u0: Tensor, std: Tensor, *usual: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.norm(x0, yhat, u0, std)
        if usual:
            mean, deviation = usual
            norm = (norm - mean) / deviation
        map_, score = self.map(norm)
        return map_, score


class Vpdm(AnomalyModel):
    """VPDM (METHODS.md 2): one model for all classes; only a calibration by position needs the class at test time."""

    config: VpdmConfig
    temperature: Tensor
    noise: Tensor
    start: Tensor
    queue: Tensor
    queued: Tensor
    root: Tensor

    def __init__(self, config: VpdmConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        p, d, grid = config.prototypes, config.diffusion, config.features.grid
        self.front = Frontend(config)
        channels = self.front.channels
        self.standardize = Standardize(channels)
        self.condition = Condition(p, channels, grid)
        self.prototypes = nn.Parameter(torch.zeros(p.count, self.condition.dimension))
        self.step = StepEngine(build_denoiser(channels, grid, config.denoiser))
        self.scoring = ResidualScore(config)
        for sampler in calibrated(config) if config.score.by_position else ():
            self.register_buffer(f"mean_{sampler.name}", torch.zeros(len(classes), 1, grid, grid))
            self.register_buffer(f"deviation_{sampler.name}", torch.ones(len(classes), 1, grid, grid))
        generator = torch.Generator().manual_seed(config.seed)
        self.register_buffer("noise", torch.randn(1, channels, grid, grid, generator=generator))
        self.register_buffer("start", torch.randn(1, channels, grid, grid, generator=generator))
        self.register_buffer("temperature", torch.tensor(p.temperature or 1.0))
        self.register_buffer("queue", torch.zeros(p.queue, self.condition.dimension))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        schedule = NoiseSchedule.linear(d.steps, *d.beta)
        self.register_buffer("root", torch.from_numpy(schedule.cumulative**0.5).float(), persistent=False)
        self._recent: Tensor | None = None

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=self.config.size, width=self.config.size)

    @property
    def frontend(self) -> nn.Module:
        return self.front

    @property
    def denoiser(self) -> nn.Module:
        """(u, yhat, time code) -> prediction."""
        return self.step.denoiser

    def usual(self, sampler: Sampler) -> tuple[str, ...]:
        """Names of two buffers, [Y, 1, g, g]: mean and deviation of good images' norms by product and position.

        Empty without calibration by position.
        """
        own = constants_of(self.config, sampler)
        return (f"mean_{own}", f"deviation_{own}") if self.config.score.by_position else ()

    def conditioned(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised x0, condition yhat (both [B, C, g, g]) and prototype weights of raw features."""
        x0 = self.standardize(features)
        square = (self.prototypes * self.prototypes).sum(1)
        yhat, weights = self.condition(x0, self.prototypes, square, self.temperature)
        return x0, yhat, weights

    def initial(self, sampler: Sampler, x0: Tensor, yhat: Tensor) -> Tensor:
        """u at the sampler's first time, [B, C, g, g]."""
        root = self.root[sampler.times[0]]
        if sampler.start == "input":
            return root * (x0 - yhat)
        return ((1 - root * root).sqrt() * self.start).expand_as(x0)

    def restored(self, x0: Tensor, yhat: Tensor, sampler: Sampler) -> Tensor:
        """The estimate of u_0 = x0 - yhat after all calls of a sampler, [B, C, g, g]."""
        coef = torch.from_numpy(coefficients(sampler, self.config)).float().to(x0.device)
        codes = torch.from_numpy(time_codes(sampler.times, self.config.denoiser.time)).float().to(x0.device)
        u, noise, u0 = self.initial(sampler, x0, yhat), self.noise, torch.zeros_like(x0)
        for k in range(len(sampler.times)):
            u, u0, noise = self.step(u, yhat, codes[k : k + 1], coef[k : k + 1], noise)
        return u0

    def score_features(self, features: Tensor, class_ids: Tensor, sampler: Sampler | None = None) -> Scores:
        """Scores of raw features [B, C, g, g], class_ids [B] int64; sampler: default the configured one."""
        sampler = sampler or find_sampler(self.config, self.config.sampler)
        x0, yhat, _ = self.conditioned(features)
        u0 = self.restored(x0, yhat, sampler)
        usual = (self.get_buffer(name)[class_ids] for name in self.usual(sampler))
        map_, score = self.scoring(x0, yhat, u0, self.standardize.std, *usual)
        return Scores(map_[:, 0], score)

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        return self.score_features(self.front(images)[_FEATURE], class_ids)

    @torch.no_grad()
    def prepare(self, data: TrainingData) -> None:
        """Channel statistics, prototypes from k-means, and the temperature unless it is configured."""
        self.standardize.fit(data, _FEATURE)
        rows = torch.cat(list(self._rows(data)))
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.config.seed))[:_FIT_ROWS]
        rows = rows[chosen]
        p = self.config.prototypes
        self.prototypes.copy_(initial_prototypes(rows, p.count, self.config.seed))
        if p.temperature is None:
            square = (self.prototypes * self.prototypes).sum(1)
            distance = rms_distance(rows.to(square.device), self.prototypes, square)
            self.temperature.fill_(temperature_for(distance, p.perplexity))

    @torch.no_grad()
    def finalize(self, holdout: TrainingData) -> None:
        """What residual is usual where after each sampler, from held-out good images, if the configuration asks for it.

        Raises:
            CalibrationError: a class has no held-out image.
        """
        if not self.config.score.by_position:
            return
        c, grid, own = self.config.score, self.config.features.grid, calibrated(self.config)
        norms: list[list[Tensor]] = [[] for _ in self.classes]
        with tqdm(total=len(holdout), desc="constants", unit="img", **bar_settings()) as bar:
            for batch in holdout.batches(16):
                for class_id, norm in zip(batch.class_ids.tolist(), self._norms(batch, own), strict=True):
                    norms[class_id].append(norm)
                bar.update(len(batch.class_ids))
        for index, (name, of_class) in enumerate(zip(self.classes, norms, strict=True)):
            if not of_class:
                raise no_constants(name)
            for sampler, values in zip(own, torch.stack(of_class, 1), strict=True):
                found = position_statistics(values, grid, c.prior, c.spread_prior)
                for buffer, constant in zip(self.usual(sampler), found, strict=True):
                    self.get_buffer(buffer)[index] = constant.reshape(1, grid, grid)

    def _norms(self, batch: Batch, of: Sequence[Sampler]) -> Tensor:
        """Norm of the residual that each sampler leaves, [images, samplers, g^2]."""
        std = self.standardize.std
        x0, yhat, _ = self.conditioned(batch.features[_FEATURE].to(std.device))
        norms = [self.scoring.norm(x0, yhat, self.restored(x0, yhat, sampler), std).flatten(1) for sampler in of]
        return torch.stack(norms, 1)

    def _rows(self, data: TrainingData) -> Iterator[Tensor]:
        for batch in data.batches(64):
            x0 = self.standardize(batch.features[_FEATURE].to(self.prototypes.device))
            yield self.condition.rows(x0).cpu()

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Denoising loss and L_OT (METHODS.md 2.4)."""
        d = self.config.diffusion
        features = batch.features[_FEATURE]
        with torch.autocast(features.device.type, enabled=False):
            x0, yhat, _ = self.conditioned(features)
            transport = self._transport(x0)
            u0 = x0 - (yhat.detach() if d.stop_gradient else yhat)
            t = torch.randint(d.t[0], d.t[1] + 1, (len(x0),), device=x0.device)
            signal = self.root[t][:, None, None, None]
            spread = (1 - signal * signal).sqrt()
            eps = torch.randn_like(u0)
            u = signal * u0 + spread * eps
            target = prediction_target(d.prediction, signal, spread, u0, eps)
        code = self._codes(t)
        diffusion = F.mse_loss(self.denoiser(u, yhat, code).float(), target)
        total = diffusion + self.config.prototypes.weight * transport
        return {"loss": total, "diffusion": diffusion.detach(), "transport": transport.detach()}

    def _codes(self, t: Tensor) -> Tensor:
        codes = time_codes(tuple(t.tolist()), self.config.denoiser.time)
        return torch.from_numpy(codes).float().to(t.device)

    def _transport(self, x0: Tensor) -> Tensor:
        """L_OT: cost of the balanced plan between recent features and prototypes; the plan itself is a constant."""
        p = self.config.prototypes
        own = self.condition.rows(x0)
        self._recent = own.detach()
        rows = torch.cat((own, self.queue[: int(self.queued)]))
        cost = rms_distance(rows, self.prototypes, (self.prototypes * self.prototypes).sum(1))
        with torch.no_grad():
            plan = sinkhorn(cost, p.sinkhorn_eps * float(cost.mean()), p.sinkhorn_iterations)
        return (plan * cost).sum()

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Push the batch's rows to the queue, newest first."""
        if self._recent is not None and len(self.queue):
            recent = torch.cat(gathered(self._recent))  # one queue for all processes: a resumed run has rank 0's
            self.queue.copy_(torch.cat((recent, self.queue))[: len(self.queue)])
            self.queued.copy_((self.queued + len(recent)).clamp_max(len(self.queue)))
        self._recent = None
        return {}
