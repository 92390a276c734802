"""Configuration of HGAD."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ...method import Config, MethodConfig

_Rate = Annotated[float, Field(ge=0, lt=1)]


class Level(Config):
    """One feature level and its flow."""

    size: int | None = Field(
        default=None, gt=0, description="Side of the image this level sees, resized from `size`; none: `size` itself"
    )
    tap: int = Field(ge=0, description="timm features_only index; must be one of backbone.taps")
    sample: float = Field(default=1.0, gt=0, le=1, description="Share of positions drawn at each training step")


class FlowConfig(Config):
    """The conditional flow (METHODS.md 4.2)."""

    blocks: int = Field(default=12, gt=0, description="Coupling blocks per level")
    position: int = Field(default=256, gt=0, description="Channels of the sinusoidal position code, a multiple of 4")
    hidden: float = Field(default=2.0, gt=0, description="Hidden width as a multiple of the subnet's input width")
    clamp: float = Field(default=1.9, gt=0, description="Bound of the log-scale of a coupling")


class LossConfig(Config):
    """Weights of METHODS.md 4.3."""

    likelihood: float = Field(default=1.0, ge=0, description="lambda1, weight of the inter-class likelihood")
    information: float = Field(default=100.0, ge=0, description="lambda2, weight of the mutual information")
    smoothing: float = Field(default=0.02, ge=0, lt=1, description="Label smoothing in the mutual information")
    use_lz: bool = Field(default=True, description="Add -logsigmoid of the intra-class likelihood")
    first_phase: float = Field(default=0.08, ge=0, lt=1, description="Share of steps before the intra-class terms")


class ScoreConfig(Config):
    """Scoring (METHODS.md 4.4)."""

    map: int | None = Field(default=None, gt=0, description="Side of the score map; none: `size`")
    sigma: float = Field(default=4.0, ge=0, description="Gaussian blur of the map, in map pixels")
    quantile: float = Field(default=0.999, gt=0, lt=1, description="Quantile of the calibration constants")
    by_position: bool = Field(
        default=False,
        description="Calibrate each position by what held-out good images have there, mean and spread (not in the "
        "paper): for parts that lie still under the camera",
    )
    prior: float = Field(default=10.0, ge=0, description="by_position: images that the mean over positions counts for")
    spread_prior: float = Field(default=1.0, ge=0, description="by_position: the same for the spread")
    log_det: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Weight of the flow's log-determinant in the scored log-likelihood: 1 is the published density, 0 "
        "the likelihood in latent space alone, as CS-Flow localises (Rudolph et al. 2022, arXiv:2110.02855). The "
        "volume term prefers what varies little (Nalisnick et al. 2019, arXiv:1810.09136), the plain inside of a large "
        "defect too",
    )
    delta: float | None = Field(
        default=0.03,
        ge=0,
        description="S = S_l (delta + S_e); 0 is the published product, none: S_l alone, as always with one class",
    )


class HgadConfig(MethodConfig):
    """HGAD. Defaults are the released code's settings (METHODS.md Annex C)."""

    levels: tuple[Level, ...] = Field(min_length=1, description="Feature levels, one flow each")
    smooth: bool = Field(default=False, description="3x3 mean over every feature map")
    standardize: bool = Field(default=False, description="Standardise every channel on the training images")
    noise: float = Field(
        default=0.0,
        ge=0,
        description="Gaussian noise on what the flows are trained on, in its own units (with `standardize`: standard "
        "deviations of a channel). Not in the paper: it smooths a density that few images determine (Rothfuss et al. "
        "2019, arXiv:1907.08982)",
    )
    centres: int = Field(default=10, gt=0, description="Gaussian centres of a class")
    flow: FlowConfig = Field(default=FlowConfig(), description="The flows")
    loss: LossConfig = Field(default=LossConfig(), description="Loss weights")
    score: ScoreConfig = Field(default=ScoreConfig(), description="Scoring")
    betas: tuple[_Rate, _Rate] = Field(default=(0.95, 0.99), description="Adam's decay rates")

    @property
    def needs_constants(self) -> bool:
        return True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of the image that each level sees."""
        return tuple(level.size or self.size for level in self.levels)

    @model_validator(mode="after")
    def _check(self) -> HgadConfig:
        for level in self.levels:
            if level.tap not in self.backbone.taps:
                raise ValueError(f"level tap {level.tap} is not in backbone.taps {self.backbone.taps}")
            if level.size is not None and level.size > self.size:
                raise ValueError(f"level size {level.size} is larger than the network input {self.size}")
        if self.holdout == 0:
            raise ValueError("holdout must be above 0: the score is calibrated on held-out good images")
        if self.flow.position % 4:
            raise ValueError("flow.position must be a multiple of 4")
        return self
