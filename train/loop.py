"""The training loop of every method: schedule, mixed precision, clipping, weight average, DDP, logging, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import distributed
from .errors import TrainingError
from .features import FeatureSet, bar_settings
from .method import AnomalyModel, Batch, Optimizer, Schedule, parse_decay
from .resume import ResumeFile
from .sampler import BalancedSampler
from .state import load_state
from .weightaverage import WeightAverage

#: How far (share of the run) the clock may run ahead of the steps before the schedule follows the clock.
_CLOCK_SLACK = 0.02
Log = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Fitted:
    """What the loop did: steps taken, seconds of training over all sessions, the last logged numbers, why it ended."""

    steps: int
    seconds: float
    last: Mapping[str, float]
    stopped_early: bool


class _Step(nn.Module):
    """DistributedDataParallel hooks into `forward`; a method's training entry is `training_step`."""

    def __init__(self, model: AnomalyModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of a batch."""
        return self.model.training_step(batch, step)


def fit(
    model: AnomalyModel,
    data: FeatureSet,
    device: torch.device,
    *,
    log: Log,
    resume: ResumeFile | None = None,
    progress: bool = True,
) -> Fitted:
    """Train `model` in place on `data` with its own schedule; at the end it holds the averaged weights if it has any.

    Args:
        log: takes a record of numbers now and then (rank 0 only).
        resume: saves the state now and then; if the file is already there, training goes on from it.

    Raises:
        TrainingError: a loss is not finite, or the resume file is of another run.
    """
    model.to(device)
    torch.manual_seed(model.config.seed + distributed.rank())
    if resume is None or not resume.exists():
        if distributed.is_main():
            with torch.no_grad():
                model.prepare(data)
        distributed.broadcast_module(model)
    model.train()  # here and not before: `prepare` may have looked at the data in eval mode
    if model.config.schedule.steps == 0:
        return Fitted(0, 0.0, {}, False)
    return _Trainer(model, data, device, log, resume, progress).run()


class _Trainer:
    """State of one call of :func:`fit`."""

    def __init__(
        self,
        model: AnomalyModel,
        data: FeatureSet,
        device: torch.device,
        log: Log,
        resume: ResumeFile | None,
        progress: bool,
    ):
        self.model, self.data, self.device, self.log, self.resume = model, data, device, log, resume
        self.progress = progress and distributed.is_main()
        self.schedule = bounded(model.config.schedule, len(data))
        model.progress = None
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}
        self.optimizers = model.optimizers()
        self.peaks = [[g["lr"] for g in o.optimizer.param_groups] for o in self.optimizers]
        self.average = WeightAverage(model, self.schedule.ema) if self.schedule.ema is not None else None
        self.dtype = amp_dtype(self.schedule.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.sampler = BalancedSampler(data.class_ids, self.schedule.batch * distributed.world(), model.config.seed)
        if resume is not None and resume.exists():
            self._restore(resume.load())
            if distributed.is_main():  # records after this step are repeated below
                log({"step": self.step, "seconds": round(self.seconds, 2), "resumed": 1.0})
        self.call: nn.Module = _Step(model)
        if distributed.active():
            # Experts of absent products have no gradient in a step; buffers are the methods' own business.
            self.call = DistributedDataParallel(self.call, find_unused_parameters=True, broadcast_buffers=False)

    def run(self) -> Fitted:
        """Steps until the schedule or the clock ends."""
        every = max(1, min(50, self.schedule.steps // 100))
        stopped = False
        with tqdm(
            total=self.schedule.steps, initial=self.step, desc="train", disable=not self.progress, **bar_settings()
        ) as bar:
            while self.step < self.schedule.steps:
                started = time.monotonic()
                losses = self._one()
                self.step += 1
                self.seconds = distributed.all_reduce_max(self.seconds + time.monotonic() - started, self.device)
                bar.update()
                limit = self.schedule.max_seconds
                stopped = limit is not None and self.seconds >= limit and self.step < self.schedule.steps
                if self.step % every == 0 or stopped or self.step == self.schedule.steps:
                    self._report(losses, bar)
                if self.resume is not None and self.resume.due(distributed.all_reduce_max, self.device):
                    self.resume.save(self._state())
                if stopped:
                    break
        if self.average is not None:
            self.average.copy_to(self.model)
        return Fitted(self.step, self.seconds, self.last, stopped)

    def _one(self) -> dict[str, Tensor | float]:
        """One optimisation step."""
        factor = lr_factor(self.schedule, self.step, self.seconds)
        # never back: steps that catch up with the clock do not begin a phase again
        self.model.progress = max(self.model.progress or 0.0, share_done(self.schedule, self.step, self.seconds))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            losses = self.call(self._batch(), self.step)
        loss = losses["loss"]
        self._check(loss, losses)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self._apply(optimizer)
        self.scaler.update()
        with torch.no_grad():
            numbers = self.model.after_step(self.step)
        if self.average is not None:
            self.average.update(self.model)
        return {**{k: v.detach() for k, v in losses.items()}, **numbers, "lr": self.optimizers[0].lr * factor}

    def _batch(self) -> Batch:
        size = self.schedule.batch
        indices = self.sampler.indices(self.step)[distributed.rank() * size :][:size]
        return self.data.batch(indices).to(self.device)

    def _apply(self, optimizer: Optimizer) -> None:
        if self.schedule.clip is not None:
            self.scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(optimizer.parameters, self.schedule.clip)
        self.scaler.step(optimizer.optimizer)

    def _check(self, loss: Tensor, losses: Mapping[str, Tensor]) -> None:
        """Stop at a loss that is not a number. On a GPU every 20th step only: the question waits for the device."""
        if (self.device.type == "cpu" or self.step % 20 == 0) and not torch.isfinite(loss):
            parts = ", ".join(f"{k} {float(v.detach()):.4g}" for k, v in losses.items())
            raise TrainingError(
                f"the loss is not finite at step {self.step}",
                found=parts,
                expected="finite numbers",
                next_step="lower schedule.lr, set schedule.clip, or set schedule.amp=off",
            )

    def _report(self, losses: Mapping[str, Tensor | float], bar: tqdm[Any]) -> None:
        self.last = {"step": self.step, "seconds": round(self.seconds, 2)}
        self.last |= {k: float(v) for k, v in losses.items()}
        # the bar shows the losses; what after_step counts (perplexities, revivals) goes to log.jsonl only
        shown = {k: f"{float(v):.3g}" for k, v in losses.items() if isinstance(v, Tensor)}
        bar.set_postfix(shown, refresh=False)
        limit = self.schedule.max_seconds
        if limit is not None:
            bar.total = min(self.schedule.steps, max(self.step, int(self.step * limit / max(self.seconds, 1e-9))))
        if distributed.is_main():
            self.log(self.last)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [o.optimizer.state_dict() for o in self.optimizers],
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        load_state(self.model, state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.optimizer.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])


def bounded(schedule: Schedule, images: int) -> Schedule:
    """The schedule with the steps that `max_epochs` allows for this many training images."""
    if schedule.max_epochs is None:
        return schedule
    most = math.ceil(schedule.max_epochs * images / (schedule.batch * distributed.world()))
    return schedule.model_copy(update={"steps": min(schedule.steps, most)})


def share_done(schedule: Schedule, step: int, seconds: float) -> float:
    """Share of a run that is done: of its steps, or of `max_seconds` while that is well ahead, so that what a method
    does for a share of the run it also does where the limit ends it."""
    done = step / schedule.steps
    if schedule.max_seconds is None:
        return done
    clock = seconds / schedule.max_seconds
    return clock if clock > done + _CLOCK_SLACK else done


def lr_factor(schedule: Schedule, step: int, seconds: float) -> float:
    """Learning rate at a step as a share of its peak: linear warm-up, then `schedule.decay`.

    Progress is counted in steps; while the share of `max_seconds` that is gone is well ahead of the share of the steps,
    in time, so that the schedule comes to its end where the limit ends the run. A run that never falls behind like
    that is reproducible to the bit; one that does for a while (the machine slept, or had other work) is not, even
    where it makes up for it. Without `max_seconds` every run is.
    """
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    if (share := share_done(schedule, step, seconds)) > step / schedule.steps:
        done = share
    kind, numbers = parse_decay(schedule.decay)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if kind == "step":
        return numbers[1] if done >= numbers[0] else 1.0
    if kind == "inverse":
        return float((1 + numbers[0] * min(1.0, done)) ** -numbers[1])
    return 1.0


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast type of the training step. auto: bf16 where the processor computes in it, fp16 on older GPUs, else none.

    Raises:
        TrainingError: `amp` is none of auto, off, bf16, fp16, or fp16 was asked for on a CPU.
    """
    if amp == "off":
        return None
    if amp == "bf16":
        return torch.bfloat16
    if amp == "fp16" and device.type == "cuda":
        return torch.float16
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    raise TrainingError(
        f"cannot train with schedule.amp {amp!r} on {device.type}",
        expected="auto | off | bf16 | fp16 (GPU only)",
        next_step="mend the configuration",
    )
