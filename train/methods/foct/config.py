"""Configuration of FOCT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt

from ...method import Config, MethodConfig
from ..knn.config import PatchConfig


class NavigatorConfig(Config):
    """The navigator d(u, v) (METHODS.md 5.3)."""

    kind: Literal["siamese", "pair"] = Field(
        default="siamese",
        description="siamese: |g(u) - g(v)|^2 / tau, starts as plain distance; pair: the paper's MLP((u - v)^2), "
        "starts random and needs about 100 steps",
    )
    dims: int = Field(default=64, gt=0, description="p of siamese; d1, the MLP's input, of pair")
    hidden: int = Field(default=128, gt=0, description="Hidden width")
    perplexity: float = Field(default=3.0, gt=1, description="Memory rows a support patch spreads over; sets tau")
    stride: int = Field(default=2, gt=0, description="Every how many-th row and column of patches CT steps see")
    thin: int = Field(default=1, gt=0, description="Every how many-th episodic row CT steps see; the score sees all")
    steps: int = Field(default=10, ge=0, description="CT steps a frame in the default program")
    alternatives: tuple[NonNegativeInt, ...] = Field(
        default=(0, 5, 100), description="Step counts of the other programs"
    )
    warm: bool = Field(
        default=True, description="phi and Adam's moments go on from frame to frame; false: from phi_0 every frame"
    )
    lr: float = Field(default=1e-3, gt=0, description="Learning rate of the default program and of 5 and 10 steps")
    cold_lr: float = Field(default=1e-4, gt=0, description="Learning rate of 100 steps, which start at phi_0 (paper)")
    rho: float = Field(default=0.5, ge=0, le=1, description="Weight of the forward map in the objective")
    enroll_steps: int = Field(default=100, ge=0, description="CT steps of support against support that make phi_0")
    enroll_lr: float = Field(default=1e-4, gt=0, description="Learning rate of these")


class FoctConfig(MethodConfig):
    """Defaults are METHODS.md Annex C; the edge preset follows F.3."""

    patches: PatchConfig = Field(default=PatchConfig(grid=42, reduce=(512, 512)), description="Patch features")
    pca: int | None = Field(default=256, gt=0, description="Dimensions after PCA on the support; null: none")
    shots: int = Field(
        default=4, gt=0, description="Support images per product, drawn from the training set by the seed"
    )
    foreground: Literal["auto", "all"] = Field(default="auto", description="auto: GrabCut where it finds a part")
    alpha: float = Field(default=0.10, gt=0, le=1, description="Share of foreground patches in the memory")
    beta: float = Field(default=0.075, gt=0, le=1, description="Share of background patches in the memory")
    semantic: int = Field(default=720, gt=0, description="Rows reserved for the semantic memory")
    episodic: int = Field(default=100, gt=0, description="Rows that online calibration may fill (L)")
    navigator: NavigatorConfig = Field(default=NavigatorConfig(), description="Navigator and CT steps")
    sigma: float = Field(default=4.0, ge=0, description="Gaussian blur of the map, in pixels; the score is unblurred")

    @property
    def uses_constants(self) -> bool:
        return False
