"""Configuration of HVQ-Trans; defaults are the paper's (METHODS.md Annex C)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...align import Resample
from ...method import Config, MethodConfig
from ...scoremap import ScoreMode


class FeatureConfig(Config):
    """How the backbone's maps become one map on the token grid."""

    grid: int = Field(default=14, gt=0, description="Tokens per side")
    align: Resample = Field(
        default="bilinear",
        description="bilinear: align_corners resize as HVQ-Trans and UniAD; area: average pool to the grid",
    )
    smooth: bool = Field(default=False, description="3x3 average over each map")
    standardize: bool = Field(default=False, description="Zero mean and unit variance per channel on good images")


class TransformerConfig(Config):
    """Sizes of the encoder and the decoder; the decoder is twice as wide because it reads [h; theta]."""

    dim: int = Field(default=256, gt=0, description="Encoder width")
    heads: int = Field(default=8, gt=0, description="Encoder heads")
    ffn: int = Field(default=1024, gt=0, description="Encoder feed-forward width")
    decoder_heads: int = Field(default=8, gt=0, description="Decoder heads")
    decoder_ffn: int = Field(default=1024, gt=0, description="Decoder feed-forward width")
    layers: int = Field(default=4, gt=0, description="Encoder layers, decoder layers and levels below the top")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in both")

    @model_validator(mode="after")
    def _divisible(self) -> TransformerConfig:
        if self.dim % 2 or self.dim % self.heads or (2 * self.dim) % self.decoder_heads:
            raise ValueError("dim must be even and divisible by heads, and 2 * dim by decoder_heads")
        return self


class CodebookConfig(Config):
    """The vector quantisers: one codebook per class and level."""

    size: int = Field(default=512, gt=1, description="Codes per class and level")
    init: Literal["tokens", "kmeans++", "normal"] = Field(
        default="kmeans++", description="From the first good images of each class, or N(0,1) as the released code"
    )
    learn: Literal["ema", "gradient"] = Field(
        default="ema", description="gradient makes the codes parameters; needed when pot.alpha > 0"
    )
    decay: float = Field(default=0.99, gt=0, lt=1, description="Decay of the moving averages")
    commitment: float = Field(default=0.25, ge=0, description="Weight of the summed commitment loss")
    revive_below: float = Field(default=0.01, ge=0, description="Re-seed codes used less than this share of the mean")
    revive_every: int = Field(default=1, ge=1, description="Steps between re-seedings")


class PotConfig(Config):
    """Prototype-oriented optimal transport (HVQ-Trans eq. 4): score term and optional loss."""

    mode: Literal["ct_level1", "sinkhorn_all", "off"] = Field(
        default="ct_level1",
        description="ct_level1: conditional transport to the level-1 codebook, as the released code's test; "
        "sinkhorn_all: entropic OT at every level, as the paper's text",
    )
    lam: Annotated[float, Field(ge=0)] | Literal["std"] = Field(
        default=80.0,
        description="Weight of the term in the map; std: equal standard deviations on the held-out good images",
    )
    iterations: int = Field(default=50, gt=0, description="Sinkhorn iterations")
    epsilon: float = Field(default=0.05, gt=0, description="Entropic regularisation, times the median cost")
    alpha: float = Field(default=0.0, ge=0, description="Weight of the OT term in the training loss")


class ScoreConfig(Config):
    """From the grid map to the pixel map and the image score."""

    mode: ScoreMode = Field(default="pool", description="max | pool | top | mean, see train/scoremap.py")
    window: int = Field(default=16, gt=0, description="Side of the average pool in `pool` mode, pixels")
    top_share: float = Field(default=0.02, gt=0, le=1, description="Share of the grid map in `top` mode")
    sigma: float = Field(default=0.0, ge=0, description="Gaussian over the pixel map, pixels")
    calibrate: Literal["none", "position"] = Field(
        default="none",
        description="position: the map in standard deviations of held-out good images there; not in the paper",
    )
    prior: float = Field(default=10.0, gt=0, description="Images that the mean over all positions counts for")


class ClassifierConfig(Config):
    """The product classifier behind the `auto` product mode; it sees detached features only."""

    lr: float = Field(default=1e-2, gt=0, description="Peak learning rate of its own optimiser")
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing")


class HvqConfig(MethodConfig):
    """HVQ-Trans."""

    method: Literal["hvq"] = "hvq"
    features: FeatureConfig = FeatureConfig()
    transformer: TransformerConfig = TransformerConfig()
    codebook: CodebookConfig = CodebookConfig()
    pot: PotConfig = PotConfig()
    score: ScoreConfig = ScoreConfig()
    classifier: ClassifierConfig = ClassifierConfig()

    @property
    def uses_constants(self) -> bool:
        weighed = self.pot.mode != "off" and self.pot.lam == "std"
        return weighed or self.pot.mode == "sinkhorn_all" or self.score.calibrate != "none"

    @model_validator(mode="after")
    def _pot_gradient(self) -> HvqConfig:
        if self.pot.alpha > 0 and self.codebook.learn == "ema":
            raise ValueError("pot.alpha > 0 needs codebook.learn: gradient, because EMA codes have no gradient")
        if self.pot.alpha > 0 and self.pot.mode == "off":
            raise ValueError("pot.alpha > 0 needs a pot.mode")
        return self
