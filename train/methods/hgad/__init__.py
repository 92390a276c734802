"""HGAD: conditional normalising flows with a hierarchical Gaussian mixture (METHODS.md 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import HgadConfig

    return HgadConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import HgadConfig
    from .model import Hgad

    return Hgad(HgadConfig.model_validate(config), classes)


METHOD = MethodSpec(
    name="hgad",
    summary="normalising flows whose latent space is a Gaussian mixture per product",
    config=_config,
    build=_build,
    paper="Yao et al., Hierarchical Gaussian Mixture Normalizing Flow Modeling for Unified Anomaly Detection, 2024",
)
