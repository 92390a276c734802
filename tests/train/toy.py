"""A small method for tests of the loop: two linear maps with an optimiser each, and a running mean kept by hand.

As a script it is one process of a DistributedDataParallel run: ``torchrun toy.py DATA RESULT BATCH STEPS``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from andon.runtime.dataset import open_dataset
from andon.runtime.manifest import Preprocess
from andon.train import distributed
from andon.train.features import extract
from andon.train.loop import fit
from andon.train.method import (
    AnomalyModel,
    BackboneConfig,
    Batch,
    MethodConfig,
    Optimizer,
    Schedule,
    Scores,
    TrainingData,
)
from torch import Tensor, nn


class Patches(nn.Module):
    """Means of 8x8 patches, a stand-in for a backbone. [B, 32, 32, 3] uint8 -> {"patches": [B, 48]}."""

    calls = 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        Patches.calls += 1
        x = images.permute(0, 3, 1, 2).float() / 255
        return {"patches": nn.functional.avg_pool2d(x, 8).flatten(1)}


class Toy(AnomalyModel):
    """Predicts the patch means from a code of 4 numbers; the score is the error."""

    def __init__(self, config: MethodConfig, classes: tuple[str, ...]):
        super().__init__()
        self.config, self.classes = config, classes
        self.encode, self.decode = nn.Linear(48, 4), nn.Linear(4, 48)
        self.patches = Patches()
        self.register_buffer("center", torch.zeros(0))
        self.register_buffer("running", torch.zeros(48))
        self.noise = 0.0
        self._seen = torch.zeros(48), 0

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=32, width=32)

    @property
    def frontend(self) -> nn.Module:
        return self.patches

    def prepare(self, data: TrainingData) -> None:
        """Replaces a buffer by one of another size and leaves eval mode behind, as a method may."""
        self.eval()
        self.center = torch.from_numpy(data.features["patches"].mean(0))

    def optimizers(self) -> list[Optimizer]:
        lr = self.config.schedule.lr
        parts = [list(self.encode.parameters()), list(self.decode.parameters())]
        return [Optimizer(torch.optim.AdamW(p, lr=lr), lr, p) for p in parts]

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        assert self.training
        x = batch.features["patches"] - self.center
        self._seen = x.detach().sum(0), len(x)
        code = self.encode(x) + self.noise * torch.randn(len(x), 4)
        loss = (self.decode(code) - x).square().mean()
        return {"loss": loss, "size": code.detach().norm()}

    def after_step(self, step: int) -> dict[str, float]:
        total, count = self._seen
        mean = distributed.all_reduce_sum(total.clone()) / (count * distributed.world())
        self.running.lerp_(mean, 0.1)
        return {"running": float(self.running.norm())}

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        x = self.patches(images)["patches"] - self.center
        error = (self.decode(self.encode(x)) - x).square()
        return Scores(error.view(-1, 3, 4, 4).mean(1), error.mean(1))


def config(**schedule: object) -> MethodConfig:
    """Settings of the toy."""
    settings = {"steps": 40, "batch": 8, "lr": 0.02, "warmup": 3, "clip": 1.0, "ema": 0.9, "amp": "off", **schedule}
    return MethodConfig(
        method="toy",
        size=32,
        backbone=BackboneConfig(id="none", taps=(0,)),
        schedule=Schedule.model_validate(settings),
    )


def build(**schedule: object) -> Toy:
    """A toy with fixed initial weights, for the products of the synthetic set."""
    torch.manual_seed(0)
    return Toy(config(**schedule), ("grain", "grid", "stripes"))


def main(data: str, result: str, batch: str, steps: str) -> None:
    """Train and let rank 0 write the weights and the mean of the running buffer over ranks."""
    with distributed.process_group():
        model = build(batch=int(batch), steps=int(steps))
        samples = [s for s in open_dataset(data).samples if s.split == "train"]
        fit(model, extract(model, samples, progress=False), torch.device("cpu"), log=lambda _: None, progress=False)
        states = distributed.gather_objects({k: v.clone() for k, v in model.state_dict().items()})
        if distributed.is_main():
            torch.save(states, Path(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
