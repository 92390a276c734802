"""The cut of VPDM: encode, a looped step with the update inside, score (METHODS.md 2.6, Annex A).

One step engine serves every sampler: the program is a loop whose tables of time codes and coefficients say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.errors import ConfigError
from ...runtime.manifest import Loop, Outputs, Run, Step
from ...train.method import AnomalyModel
from ...train.methods.vpdm.denoiser import AttentionWeights
from ...train.methods.vpdm.model import Vpdm
from ...train.methods.vpdm.samplers import Sampler, calibrated, coefficients, find_sampler, samplers, time_codes
from ..stage import StageDef, StagedModel


class Encode(nn.Module):
    """frame [1, S, S, 3] uint8, prototypes [K, d], their squares [K] -> x0, yhat, u_restore, weights [1, K].

    u_restore is where the `restore` sampler enters: the residual scaled to its t, without noise.
    """

    temperature: Tensor

    def __init__(self, model: Vpdm) -> None:
        super().__init__()
        self.front = model.front
        self.standardize = model.standardize
        self.condition = model.condition
        self.register_buffer("temperature", model.temperature.clone())
        self.signal = float(model.root[model.config.restore_t])

    def forward(self, frame: Tensor, prototypes: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0 = self.standardize(self.front(frame)["features"])
        yhat, weights = self.condition(x0, prototypes, square, self.temperature)
        return x0, yhat, self.signal * (x0 - yhat), weights


class Score(nn.Module):
    """x0, yhat, u0, then mean and deviation if calibrated by position -> map [1, 1, S, S], score [1]."""

    std: Tensor

    def __init__(self, model: Vpdm) -> None:
        super().__init__()
        self.scoring = model.scoring
        self.register_buffer("std", model.standardize.std.clone())

    def forward(self, x0: Tensor, yhat: Tensor, u0: Tensor, *usual: Tensor) -> tuple[Tensor, Tensor]:
        map_, score = self.scoring(x0, yhat, u0, self.std, *usual)
        return map_, score


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, dtype=np.float32)


def _state(model: Vpdm) -> dict[str, NDArray[Any]]:
    """Prototypes, the noise that the steps roll through, and the fixed start of every sampler that needs one."""
    prototypes = model.prototypes.detach()
    state = {
        "prototypes": _float32(prototypes.numpy()),
        "prototypes_square": _float32((prototypes * prototypes).sum(1).numpy()),
        "noise": _float32(model.noise.numpy()),
    }
    for sampler in samplers(model.config).values():
        if sampler.start == "noise":
            empty = torch.zeros_like(model.start)
            state[f"start_t{sampler.times[0]}"] = _float32(model.initial(sampler, empty, empty).numpy())
    return state | {name: _float32(model.get_buffer(name).numpy()) for name in _constants(model)}


def _constants(model: Vpdm) -> tuple[str, ...]:
    """The constants by position of all samplers that have their own."""
    return tuple(name for sampler in calibrated(model.config) for name in model.usual(sampler))


def _tables(model: Vpdm) -> dict[str, NDArray[Any]]:
    tables = {}
    for sampler in samplers(model.config).values():
        tables[f"coef_{sampler.name}"] = _float32(coefficients(sampler, model.config)[:, None])
        tables[f"code_{sampler.name}"] = _float32(time_codes(sampler.times, model.config.denoiser.time)[:, None])
    return tables


def _usual(model: Vpdm, sampler: Sampler) -> dict[str, str]:
    """Inputs of the score stage that hold constants by position, and their sources."""
    return {i: f"class:{name}" for i, name in zip(("mean", "deviation"), model.usual(sampler), strict=False)}


def _program(model: Vpdm, sampler: Sampler) -> tuple[Step, ...]:
    start = "vpdm_encode.u_restore" if sampler.start == "input" else f"state:start_t{sampler.times[0]}"
    loop = Loop(
        loop="vpdm_step",
        count=len(sampler.times),
        carry={"u_next": "u", "noise_next": "noise"},
        init={"u": start, "noise": "state:noise"},
        tables={"code": f"code_{sampler.name}", "coef": f"coef_{sampler.name}"},
    )
    return Run(run="vpdm_encode"), loop, Run(run="vpdm_score", inputs=_usual(model, sampler))


def _stages(model: Vpdm, default: Sampler) -> tuple[StageDef, ...]:
    island = (nn.GroupNorm, AttentionWeights)
    kept = [name for name, module in model.step.named_modules() if isinstance(module, island)]
    step = {"u": "carry", "yhat": "vpdm_encode.yhat", "code": "table", "coef": "table", "noise": "carry"}
    encode = {"frame": "frame", "prototypes": "state:prototypes", "prototypes_square": "state:prototypes_square"}
    score = {"x0": "vpdm_encode.x0", "yhat": "vpdm_encode.yhat", "u0": "vpdm_step.u0"}
    score |= _usual(model, default)
    return (
        StageDef(
            "vpdm_encode",
            Encode(model),
            encode,
            ("x0", "yhat", "u_restore", "weights"),
            fp32=("standardize", "condition"),
        ),
        StageDef("vpdm_step", model.step, step, ("u_next", "u0", "noise_next"), fp32=(*kept, "update")),
        StageDef("vpdm_score", Score(model), score, ("map", "score"), fp32=("",), int8=False),
    )


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """Cut a trained VPDM. options: ``sampler``, the default program (otherwise the configuration's).

    Raises:
        ConfigError: another model, an unknown option or sampler.
    """
    if not isinstance(model, Vpdm):
        raise ConfigError("the VPDM cut got another model", found=type(model).__name__, expected="Vpdm")
    if unknown := set(options) - {"sampler"}:
        raise ConfigError("vpdm does not know this export option", found=", ".join(sorted(unknown)), expected="sampler")
    default = find_sampler(model.config, str(options.get("sampler", model.config.sampler)))
    known = samplers(model.config)
    return StagedModel(
        method="vpdm",
        classes=model.classes,
        preprocess=model.preprocess,
        stages=_stages(model, default),
        program=_program(model, default),
        outputs=Outputs(
            score="vpdm_score.score", map="vpdm_score.map", telemetry={"prototype_weights": "vpdm_encode.weights"}
        ),
        state=_state(model),
        class_bound=frozenset(_constants(model)),
        tables=_tables(model),
        alternatives={name: _program(model, s) for name, s in known.items() if name != default.name},
        constants={"temperature": float(model.temperature)},
        whole=lambda images, ids: model.score_features(model.front(images)["features"], ids, default),
    )
