"""A small method of our own: encoder, looped refinement with every loop feature, score. Cheap, deterministic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from andon.export.bundle import Provenance
from andon.export.frames import Evidence, Frames, with_synthetic_defects
from andon.export.stage import StageDef, StagedModel
from andon.runtime.manifest import Backbone, Loop, Outputs, Preprocess, Run
from andon.train.method import AnomalyModel, Batch, Scores
from torch import Tensor, nn

SIZE, WIDTH, STEPS = 16, 8, 3
CLASSES = ("left", "right")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Encode(nn.Module):
    """frame -> features [1, C, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU6(), nn.Conv2d(WIDTH, WIDTH, 1))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, frame: Tensor) -> Tensor:
        x = frame.float().permute(0, 3, 1, 2) / 255 - 0.5
        x = self.body(torch.relu(self.stem(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Refine(nn.Module):
    """One step: pull u towards the features, weigh by a table row; m remembers how far it went."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, u: Tensor, m: Tensor, f: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        change = torch.tanh(self.mix(f - u)) * row[0]
        return u + change, 0.5 * m + row[1] * change.abs()


class Score(nn.Module):
    """Squared distance of features to the refined ones and to the product's prototype."""

    def forward(self, f: Tensor, u: Tensor, prototype: Tensor) -> tuple[Tensor, Tensor]:
        apart = (f - u).square().sum(1, keepdim=True) + (f - prototype[None, :, None, None]).square().mean(1, True)
        return apart, apart.amax((1, 2, 3))


class ToyModel(AnomalyModel):
    """The same in one piece."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.classes = CLASSES
        self.steps = steps
        self.encode, self.refine, self.score = Encode(), Refine(), Score()
        self.register_buffer("prototypes", torch.randn(len(CLASSES), WIDTH))
        self.register_buffer("start", torch.randn(1, WIDTH, SIZE // 2, SIZE // 2))
        self.register_buffer("rows", torch.rand(STEPS + 2, 2))

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(height=SIZE, width=SIZE)

    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        f = self.encode(images)
        u = self.start.expand_as(f)
        m = torch.zeros_like(u)
        for k in range(self.steps):
            u, m = self.refine(u, m, f, self.rows[k])
        map_, score = self.score(f, u, self.prototypes[int(class_ids[0])])
        return Scores(map_[:, 0], score)

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        raise AssertionError("not trained in these tests")


def cut(model: ToyModel, fp32: tuple[str, ...] = ()) -> StagedModel:
    """The toy, cut; `m` persists per product, but nothing that is judged depends on it."""
    zeros = np.zeros((len(CLASSES), *model.start.shape), np.float32)
    loop = Loop(
        loop="refine",
        count=model.steps,
        carry={"u_next": "u", "m_next": "m"},
        init={"u": "state:start", "m": "class:moment"},
        tables={"row": "rows"},
        persist={"m": "moment"},
    )
    return StagedModel(
        method="toy",
        classes=model.classes,
        preprocess=model.preprocess,
        stages=(
            StageDef("encode", model.encode, {"frame": "frame"}, ("f",), fp32=fp32),
            StageDef(
                "refine",
                model.refine,
                {"u": "carry", "m": "carry", "f": "encode.f", "row": "table"},
                ("u_next", "m_next"),
            ),
            StageDef(
                "score",
                model.score,
                {"f": "encode.f", "u": "refine.u_next", "prototype": "class:prototypes"},
                ("map", "score"),
                fp32=("",),
                int8=False,
            ),
        ),
        program=(Run(run="encode"), loop, Run(run="score")),
        alternatives={"short": (Run(run="encode"), loop.model_copy(update={"count": 1}), Run(run="score"))},
        outputs=Outputs(score="score.score", map="score.map"),
        state={"prototypes": model.prototypes.numpy(), "start": model.start.numpy(), "moment": zeros},
        class_bound=frozenset({"prototypes", "moment"}),
        tables={"rows": model.rows.numpy()},
    )


@dataclass(frozen=True)
class Toy:
    """Model, cut and evidence."""

    model: ToyModel
    staged: StagedModel
    evidence: Evidence
    provenance: Provenance

    def with_stage(self, name: str, **changes: Any) -> Toy:
        """The same with one stage changed."""
        stages = tuple(replace(s, **changes) if s.name == name else s for s in self.staged.stages)
        return replace(self, staged=replace(self.staged, stages=stages))


def frames(count: int, size: int = SIZE, classes: int = len(CLASSES)) -> Frames:
    """Smooth random pictures."""
    rng = np.random.default_rng(7)
    low = rng.uniform(40, 200, (count, 4, 4, 3)).astype(np.float32)
    images = np.kron(low, np.ones((1, size // 4, size // 4, 1), np.float32)).astype(np.uint8)
    return Frames(images, np.arange(count, dtype=np.int32) % classes, np.zeros(count, np.int32), "made for the test")


def evidence(count: int = 24, size: int = SIZE, classes: int = len(CLASSES)) -> Evidence:
    """Good frames, and the same with synthetic defects."""
    good = frames(count, size, classes)
    return Evidence(good, with_synthetic_defects(frames(count + 8, size, classes).select(range(8, count + 8))))


@pytest.fixture
def provenance() -> Provenance:
    return Provenance(Backbone(id="toy", weights="random:0", sha256="0" * 64), preset="test")


@pytest.fixture
def toy(provenance: Provenance) -> Toy:
    torch.manual_seed(0)
    model = ToyModel().eval()
    return Toy(model, cut(model), evidence(), provenance)
