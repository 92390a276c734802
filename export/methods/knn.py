"""The cut of knn: features, then distance and score; the bank is state that online calibration may grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...runtime.errors import ConfigError
from ...runtime.manifest import Memory, Outputs, Run
from ...train.method import AnomalyModel
from ...train.methods.knn.features import PatchFeatures
from ...train.methods.knn.model import Knn
from ..stage import StageDef, StagedModel


class CentredPatches(nn.Module):
    """frame uint8 [1, S, S, 3] and centre [d] to patches [m, d]; the centre is state, so engines outlive products."""

    def __init__(self, features: PatchFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, frame: Tensor, center: Tensor) -> Tensor:
        patches: Tensor = self.features(frame)[0]
        return patches - center


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """See :class:`andon.export.methods.Cut`.

    Raises:
        ConfigError: an option was given; knn has none.
    """
    if options:
        raise ConfigError("knn has no export options", found=", ".join(options), expected="none")
    knn = cast(Knn, model)
    config, per_class = knn.config, knn.config.banks == "product"
    kind = "class" if per_class else "state"
    state = {"center": knn.center, "bank": knn.bank, "valid": knn.valid}
    arrays = {name: value.detach().cpu().numpy().copy() for name, value in state.items()}
    if not per_class:
        arrays["bank"], arrays["valid"] = arrays["bank"][0], arrays["valid"][0]
    stages = (
        StageDef("features", CentredPatches(knn.features), {"frame": "frame", "center": "state:center"}, ("patches",)),
        StageDef(
            "score",
            knn.distance,
            {"patches": "features.patches", "bank": f"{kind}:bank", "valid": f"{kind}:valid"},
            ("map", "score", "patch_score", "anchor"),
            fp32=("",),
            int8=False,
        ),
    )
    return StagedModel(
        method="knn",
        classes=knn.classes,
        preprocess=knn.preprocess,
        stages=stages,
        program=(Run(run="features"), Run(run="score")),
        outputs=Outputs(score="score.score", map="score.map"),
        state=arrays,
        class_bound=frozenset({"bank", "valid"} if per_class else ()),
        memory=Memory(
            bank="bank",
            valid="valid",
            semantic_rows=config.coreset,
            episodic_rows=config.episodic,
            candidates="features.patches",
            patch_score="score.patch_score",
            anchor="score.anchor",
            per_class=per_class,
        ),
        constants={"coreset_rows": float(torch.sum(knn.valid).item())},
    )
