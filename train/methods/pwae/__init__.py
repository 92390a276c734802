"""P-WAE: sliced-Wasserstein autoencoder over image tiles with a jigsaw task (METHODS.md 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...method import MethodSpec

if TYPE_CHECKING:
    from ...method import AnomalyModel, MethodConfig


def _config() -> type[MethodConfig]:
    from .config import PwaeConfig

    return PwaeConfig


def _build(config: MethodConfig, classes: tuple[str, ...]) -> AnomalyModel:
    from .config import PwaeConfig
    from .model import PwaeModel

    return PwaeModel(PwaeConfig.model_validate(config.model_dump()), classes)


METHOD = MethodSpec(
    name="pwae",
    summary="reconstructs the image from codes of its tiles under a heavy-tailed prior",
    config=_config,
    build=_build,
    paper="P-WAE: Generalized Patch-Wasserstein Autoencoder for Anomaly Screening, 2021",
)
