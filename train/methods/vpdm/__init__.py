"""VPDM: vague prototypes as the condition of a diffusion model over features (METHODS.md 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import VpdmConfig

    return VpdmConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import VpdmConfig
    from .model import Vpdm

    return Vpdm(VpdmConfig.model_validate(config), classes)


METHOD = MethodSpec(
    name="vpdm",
    summary="feature diffusion conditioned on blurry prototypes of normal images",
    config=_config,
    build=_build,
    paper="Vague Prototype-Oriented Diffusion Model for Multi-Class Anomaly Detection, ICML 2024",
)
