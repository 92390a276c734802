"""The cut of FOCT: features, cost, a loop of CT steps that carries phi and Adam's moments over frames, score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, matmul, nn

from ...runtime.errors import ConfigError
from ...runtime.manifest import Loop, Memory, Outputs, Run, Step
from ...train.method import AnomalyModel
from ...train.methods.foct.model import WARM_ROWS, Foct, adam_table
from ...train.methods.foct.transport import CARRIED
from ...train.methods.knn.features import PatchFeatures
from ..stage import StageDef, StagedModel
from .knn import CentredPatches

PHI = ("w1", "b1", "w2")
#: What every step of a frame reads, as ct_cost gives it and a siamese step takes it.
STEP_FIXED = ("some", "some_r", "rows", "rows_r", "rows_mask", "weight", "some_cost", "some_cost_t")


class ProjectedPatches(nn.Module):
    """frame uint8 [1, S, S, 3], centre [c], PCA basis [c, d] to patches [m, d] and raw features [m, c].

    The raw ones are for enrolling further products with the same engine.
    """

    def __init__(self, features: PatchFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, frame: Tensor, center: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        raw: Tensor = self.features(frame)[0]
        return matmul(raw - center, basis), raw


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """See :class:`andon.export.methods.Cut`.

    Raises:
        ConfigError: an option was given; foct has none.
    """
    if options:
        raise ConfigError("foct has no export options", found=", ".join(options), expected="none")
    foct = cast(Foct, model)
    c, n = foct.config, foct.config.navigator
    state, tables = _state(foct), {"adam_warm": adam_table(WARM_ROWS, n.lr)}
    programs = {f"ct{steps}": _program(steps, n.warm and steps <= max(10, n.steps)) for steps in n.alternatives}
    default = _program(n.steps, n.warm)
    cold = [s.count for p in (default, *programs.values()) for s in p if isinstance(s, Loop) and not s.counter]
    if any(cold):
        tables["adam_cold"] = adam_table(max(cold), n.cold_lr)
    return StagedModel(
        method="foct",
        classes=foct.classes,
        preprocess=foct.preprocess,
        stages=_stages(foct),
        program=default,
        alternatives=programs,
        outputs=Outputs(
            score="ct_score.score",
            map="ct_score.map",
            telemetry={"nearest": "ct_score.nearest"} | ({"loss": "ct_step.loss"} if n.steps else {}),
        ),
        state=state,
        class_bound=frozenset(state),
        tables=tables,
        memory=Memory(
            bank="bank",
            valid="valid",
            semantic_rows=c.semantic,
            episodic_rows=c.episodic,
            candidates="foct_features.patches",
            patch_score="ct_score.patch_score",
            transport="ct_score.transport",
            nearest="ct_score.matched",
            foreground="foreground",
            per_class=True,
        ),
        constants={
            "alpha": c.alpha,
            "beta": c.beta,
            "perplexity": n.perplexity,
            "rho": n.rho,
            "lr": n.lr,
            "stride": float(n.stride),
            "enroll_steps": float(n.enroll_steps),
            "enroll_lr": n.enroll_lr,
            "pair": float(n.kind == "pair"),
        },
    )


def _state(foct: Foct) -> dict[str, np.ndarray[Any, Any]]:
    """All per product. phi and moments are what the loop keeps; their values here are phi_0 and zero."""
    names = ["center", "bank", "valid", "foreground", "projection", "inv_tau", *PHI]
    if foct.config.pca is not None:
        names.append("basis")
    state = {name: getattr(foct, name).detach().cpu().numpy().copy() for name in names}
    for moment in ("m", "v"):
        state |= {f"{moment}_{name}": np.zeros_like(state[name]) for name in PHI}
    return state


def _program(steps: int, warm: bool) -> tuple[Step, ...]:
    loop = Loop(
        loop="ct_step",
        count=steps,
        carry={f"{name}_next": name for name in CARRIED},
        init={name: f"class:{name}" for name in CARRIED},
        tables={"adam": "adam_warm" if warm else "adam_cold"},
        persist={name: name for name in CARRIED} if warm and steps else {},
        counter="ct_steps" if warm and steps else None,
    )
    if not steps:
        loop = loop.model_copy(update={"tables": {"adam": "adam_warm"}})
    return Run(run="foct_features"), Run(run="ct_cost"), loop, Run(run="ct_score")


def _stages(foct: Foct) -> tuple[StageDef, ...]:
    """FP32 from the cost on: distances and softmax over distances (METHODS.md 6.1)."""
    siamese = foct.config.navigator.kind == "siamese"
    features = {"frame": "frame", "center": "class:center"}
    if foct.config.pca is None:
        first = StageDef("foct_features", CentredPatches(foct.features), features, ("patches",))
    else:
        features["basis"] = "class:basis"
        first = StageDef("foct_features", ProjectedPatches(foct.features), features, ("patches", "raw"))
    patches, bank, projection = "foct_features.patches", "class:bank", "class:projection"
    cost = StageDef(
        "ct_cost",
        foct.cost,
        {"patches": patches, "bank": bank, "valid": "class:valid", "projection": projection},
        ("cost", "mask", "bank_r", *STEP_FIXED),
        fp32=("",),
        int8=False,
        # The root of a rounding error: a patch at (nearly) no distance to its row keeps few digits of it.
        tolerance=1e-3,
    )
    made = {name: f"ct_cost.{name}" for name in cost.outputs}
    pairs = ("some_r", "rows_r", "rows_mask", "weight", "some_cost")
    step_inputs = {name: made[name] for name in pairs}
    score_inputs = {"patches": patches, "bank_r": made["bank_r"], "cost": made["cost"], "mask": made["mask"]}
    score_inputs["projection"] = projection
    if siamese:
        known = made | {"patches": patches, "bank": bank, "projection": projection, "inv_tau": "class:inv_tau"}
        score_names = ("patches", "bank", "bank_r", "cost", "mask", "projection", "inv_tau")
        step_inputs = {name: known[name] for name in (*STEP_FIXED, "inv_tau")}
        score_inputs = {name: known[name] for name in score_names}
    step_inputs |= {"adam": "table"} | dict.fromkeys(CARRIED, "carry")
    score_inputs |= {name: f"ct_step.{name}_next" for name in PHI}
    step = StageDef(
        "ct_step",
        foct.step,
        step_inputs,
        (*(f"{name}_next" for name in CARRIED), "loss"),
        fp32=("",),
        int8=False,
        # The first Adam steps divide a gradient by its own size: tiny entries keep few digits in any order of sums.
        tolerance=1e-3,
    )
    score = StageDef(
        "ct_score",
        foct.score,
        score_inputs,
        ("map", "score", "patch_score", "transport", "matched", "nearest"),
        fp32=("",),
        int8=False,
        # `matched` is an index: where two rows are equally likely it may flip, which counts as a full difference.
        tolerance=5e-3,
    )
    return first, cost, step, score
