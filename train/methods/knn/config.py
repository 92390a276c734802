"""Configuration of the nearest-neighbour memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...method import Config, MethodConfig


class PatchConfig(Config):
    """From backbone maps to patches."""

    grid: int = Field(default=28, gt=0, description="Side of the patch grid; every map is brought to it bilinearly")
    reduce: tuple[int, ...] | None = Field(
        default=None, description="Channels of each tap after averaging neighbouring ones; null: all of them"
    )


class KnnConfig(MethodConfig):
    """Defaults are DATA.md's reference."""

    patches: PatchConfig = Field(default=PatchConfig(), description="Patch features")
    banks: Literal["product", "shared"] = Field(
        default="product", description="One bank per product, or one bank for all of them"
    )
    coreset: int = Field(default=4000, gt=0, description="Rows that greedy k-centre keeps in a bank")
    pool: int = Field(
        default=30000, gt=0, description="Patches drawn at random, evenly over the images, to choose from"
    )
    project: int = Field(default=64, gt=0, description="Dimensions of the JL projection that the coreset is chosen in")
    episodic: int = Field(default=800, gt=0, description="Spare rows of a bank that online calibration may fill")
    sigma: float = Field(default=4.0, ge=0, description="Gaussian blur of the map, in pixels; the score is unblurred")

    @property
    def uses_constants(self) -> bool:
        return False
