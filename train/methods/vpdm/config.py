"""Configuration of VPDM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ...align import Resample
from ...method import Config, MethodConfig
from ...scoremap import ScoreMode


class FeatureConfig(Config):
    """How the backbone's maps become the diffused tensor x0 (METHODS.md 2.2)."""

    grid: int = Field(default=32, gt=0, description="Side of the feature grid")
    resample: Resample = Field(default="bilinear", description="How maps are brought to the grid")
    smooth: bool = Field(default=False, description="3x3 mean over every map")


class PrototypeConfig(Config):
    """Prototypes and the transport that ties them to images (METHODS.md 2.3)."""

    count: int = Field(default=50, gt=0, description="Number of prototypes K")
    grid: int = Field(default=8, gt=0, description="Side of the low-passed map that a prototype stands for")
    scope: Literal["image", "position", "auto"] = Field(
        default="image",
        description="A prototype is a whole low-passed image, or the vector of one position; auto: images if there are "
        "two to train on for every prototype",
    )
    temperature: float | None = Field(
        default=0.05, gt=0, description="eps_c of the condition, in RMS units; none: set from `perplexity` at the start"
    )
    perplexity: float = Field(default=2.5, gt=1, description="Prototypes that a normal image is made of")
    sinkhorn_eps: float = Field(default=0.05, gt=0, description="Entropic weight of L_OT, times the mean cost")
    sinkhorn_iterations: int = Field(default=50, gt=0, description="Log-domain iterations of L_OT")
    queue: int = Field(default=512, ge=0, description="Recent feature vectors that join the batch in L_OT; 0: none")
    weight: float = Field(default=1.0, ge=0, description="Weight of L_OT")

    @property
    def whole(self) -> bool:
        """True if a prototype is a whole image, which an undecided `auto` is too."""
        return self.scope != "position"


class DiffusionConfig(Config):
    """Forward process and loss (METHODS.md 2.1, 2.4)."""

    steps: int = Field(default=1000, gt=1, description="T")
    beta: tuple[float, float] = Field(default=(1e-4, 0.02), description="First and last beta, linear between")
    prediction: Literal["eps", "v"] = Field(default="eps", description="What the denoiser predicts")
    t: tuple[int, int] = Field(default=(1, 1000), description="Range of t drawn in training, inclusive")
    stop_gradient: bool = Field(default=True, description="Keep the loss of u0 = x0 - yhat out of the prototypes")
    clip: float = Field(default=6.0, gt=0, description="Bound of the estimated u0, in standard deviations")


class DenoiserConfig(Config):
    """The denoiser (METHODS.md 2.4, Annex F.4)."""

    kind: Literal["unet", "flat"] = Field(default="unet", description="U-Net, or convolutions at one resolution")
    width: int = Field(default=128, gt=0, description="Channels of the first level")
    multipliers: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 2), description="U-Net: width of every level over `width`"
    )
    attention: tuple[int, ...] = Field(default=(16, 8), description="U-Net: grid sides with self-attention")
    heads: int = Field(default=4, gt=0, description="U-Net: attention heads")
    blocks: int = Field(default=2, gt=0, description="Residual blocks (U-Net: of a level on the way down)")
    groups: int = Field(default=32, gt=1, description="Groups of GroupNorm")
    time: int = Field(default=128, gt=0, description="Channels of the sinusoidal time code")
    embedding: int = Field(default=512, gt=0, description="Channels of the time embedding")


class ScoreConfig(Config):
    """Scoring (METHODS.md 2.5)."""

    space: Literal["raw", "std"] = Field(default="raw", description="Residual in feature units, or standardised")
    mode: ScoreMode = Field(default="pool", description="Image score from the map")
    sigma: float = Field(default=0.0, ge=0, description="Gaussian blur of the map, in pixels")
    align_corners: bool = Field(
        default=False, description="The map's upsampling puts the grid's corners on the corners, as hgad's does"
    )
    by_position: bool = Field(
        default=False,
        description="Residuals in standard deviations of the product's held-out good images at that position (not in "
        "the paper), after the same sampler",
    )
    prior: float = Field(default=10.0, ge=0, description="by_position: images that the mean over positions counts for")
    spread_prior: float = Field(default=1.0, ge=0, description="by_position: the same for the spread")


class VpdmConfig(MethodConfig):
    """VPDM. Defaults are METHODS.md Annex C."""

    features: FeatureConfig = Field(default=FeatureConfig(), description="Feature grid")
    prototypes: PrototypeConfig = Field(default=PrototypeConfig(), description="Prototypes")
    diffusion: DiffusionConfig = Field(default=DiffusionConfig(), description="Diffusion")
    denoiser: DenoiserConfig = Field(default=DenoiserConfig(), description="Denoiser")
    score: ScoreConfig = Field(default=ScoreConfig(), description="Scoring")
    sampler: str = Field(default="ddim10", description="Default sampler: see train/methods/vpdm/samplers.py")
    restore_t: int = Field(default=300, gt=0, description="t at which the `restore` sampler enters")

    @property
    def uses_constants(self) -> bool:
        return self.score.by_position

    @property
    def needs_constants(self) -> bool:
        return self.uses_constants

    def for_images(self, count: int) -> VpdmConfig:
        """`prototypes.scope` auto decided: a prototype of a whole image is a mean of some, or it is no prototype."""
        if self.prototypes.scope != "auto":
            return self
        scope = "image" if count >= 2 * self.prototypes.count else "position"
        return self.model_copy(update={"prototypes": self.prototypes.model_copy(update={"scope": scope})})

    @model_validator(mode="after")
    def _check(self) -> VpdmConfig:
        if self.features.grid % self.prototypes.grid:
            raise ValueError("features.grid must be a multiple of prototypes.grid")
        if self.score.by_position and self.holdout == 0:
            raise ValueError("score.by_position needs held-out images: holdout must be above 0")
        depth = len(self.denoiser.multipliers) - 1
        if self.denoiser.kind == "unet" and self.features.grid % 2**depth:
            raise ValueError(f"features.grid must be divisible by {2**depth} for a U-Net of {depth + 1} levels")
        first, last = self.diffusion.beta
        if not 0 < first <= last < 1:
            raise ValueError("diffusion.beta must rise between 0 and 1")
        low, high = self.diffusion.t
        if not 1 <= low <= high <= self.diffusion.steps or self.restore_t > self.diffusion.steps:
            raise ValueError("diffusion.t and restore_t must lie within 1..diffusion.steps")
        return self
