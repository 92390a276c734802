"""FOCT: few-shot detection by online conditional transport over a foreground-aware memory (METHODS.md 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import FoctConfig

    return FoctConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import FoctConfig
    from .model import Foct

    return Foct(FoctConfig.model_validate(config.model_dump()), classes)


METHOD = MethodSpec(
    name="foct",
    summary="new products from 1 to 4 good images: a small memory and conditional transport, adapted per frame",
    config=_config,
    build=_build,
    paper="FOCT: Few-shot Industrial Anomaly Detection with Foreground-aware Online Conditional Transport",
)
