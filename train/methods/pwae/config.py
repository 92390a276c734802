"""Configuration of P-WAE; defaults are the paper's where it is usable (METHODS.md 3.1 and Annex C)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...method import Config, MethodConfig


class TilesConfig(Config):
    """The puzzle."""

    grid: int = Field(default=3, gt=1, description="Tiles per side")
    permutations: int = Field(default=1000, gt=0, description="Orders with large Hamming distance, identity apart")
    identity: float = Field(default=0.5, ge=0, le=1, description="Share of training images left in order")


class EncoderConfig(Config):
    """What is made of a tile's backbone map."""

    frozen: bool = Field(
        default=False, description="Keep the backbone as it is and compute its maps once; P-WAE trains it"
    )
    latent: int = Field(default=128, gt=0, description="Width of z, which the jigsaw head reads")
    code: int = Field(default=24, gt=0, description="Channels of the code in bottleneck mode")


class LayerConfig(Config):
    """One decoder layer: convolution, doubling of the side if `up`, batch norm, ReLU."""

    channels: int = Field(gt=0, description="Output channels")
    kernel: int = Field(default=1, gt=0, description="Side of the kernel, without padding")
    up: bool = Field(default=False, description="Double the side, bilinear with aligned corners")


def _paper_decoder() -> tuple[LayerConfig, ...]:
    ups = [LayerConfig(channels=c, up=True) for c in (512, 256, 128, 64, 32)]
    first, second, third, fourth, fifth = ups
    conv512, conv256 = LayerConfig(channels=512, kernel=3), LayerConfig(channels=256, kernel=7)
    return (first, conv512, second, conv256, third, fourth, fifth, LayerConfig(channels=32, kernel=3))


class DecoderConfig(Config):
    """From the grid of codes to the image; a last 3x3 convolution gives the three colours."""

    layers: tuple[LayerConfig, ...] = Field(default_factory=_paper_decoder, description="In order")
    target: int = Field(default=300, gt=0, description="Side of the reconstruction, a divisor of size, pixels")


class LossConfig(Config):
    """Weights and shape of the losses."""

    hsic: float = Field(default=0.01, ge=0, description="lambda_1, nHSIC")
    swd: float = Field(default=0.1, ge=0, description="lambda_2, sliced Wasserstein distance to the prior")
    jigsaw: float = Field(default=1.0, ge=0, description="lambda_3, cross entropy of the permutation")
    beta: float = Field(default=0.1, ge=0, description="Weight of the image term in nHSIC")
    projections: int = Field(default=64, gt=0, description="L, random directions of the sliced distance")
    oversample: int = Field(default=256, gt=0, description="Prior samples per image, for low-variance quantiles")
    nu: float = Field(default=5.0, ge=1, description="Degrees of freedom of the Student-t priors; 1 is Cauchy's")
    shift: Literal["unit", "literal"] = Field(
        default="unit", description="Prior of tile k centred at k times a unit vector, or at k in every coordinate"
    )
    kernel_side: int = Field(default=64, gt=0, description="Side to which images are reduced for the HSIC kernel")


class PwaeConfig(MethodConfig):
    """P-WAE."""

    method: Literal["pwae"] = "pwae"
    size: int = Field(default=300, gt=0, description="Network input, pixels, square")
    mode: Literal["bottleneck", "spatial"] = Field(
        default="bottleneck",
        description="bottleneck: the decoder reads a narrow code that is held to the prior; spatial: the backbone's "
        "maps, as the released code does (the prior then touches a side branch only)",
    )
    tiles: TilesConfig = TilesConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    loss: LossConfig = LossConfig()
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="sgd has momentum 0.9")
    quantile: float = Field(default=0.99, gt=0, lt=1, description="Of held-out errors; the thresholds nu of the score")
    sigma: float = Field(default=4.0, ge=0, description="Gaussian over the error map, pixels of the target")

    @model_validator(mode="after")
    def _sizes(self) -> PwaeConfig:
        if self.size % self.tiles.grid or self.decoder.target % self.tiles.grid or self.size % self.decoder.target:
            raise ValueError("size and decoder.target must be divisible by tiles.grid, and size by decoder.target")
        return self
