"""Nearest neighbour on frozen features: the honest reference for every other method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import KnnConfig

    return KnnConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import KnnConfig
    from .model import Knn

    return Knn(KnnConfig.model_validate(config.model_dump()), classes)


METHOD = MethodSpec(
    name="knn",
    summary="distance to the nearest patch of a coreset of good images; no gradient training",
    config=_config,
    build=_build,
    paper="Roth et al., Towards Total Recall in Industrial Anomaly Detection (PatchCore), CVPR 2022",
)
