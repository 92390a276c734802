"""HVQ-Trans: hierarchical vector-quantised transformer with per-class codebooks and experts (METHODS.md 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import HvqConfig

    return HvqConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import HvqConfig
    from .model import HvqModel

    return HvqModel(HvqConfig.model_validate(config.model_dump()), classes)


METHOD = MethodSpec(
    name="hvq",
    summary="reconstructs features from per-product codebooks; one model for all products",
    config=_config,
    build=_build,
    paper="Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly Detection, NeurIPS 2023",
)
