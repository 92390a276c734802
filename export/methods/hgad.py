"""The cut of HGAD: features, flows, class density, score (METHODS.md 4.5, Annex A).

The flows do not depend on the product, so they and the class logits come before the first class-bound stage: with an
automatic class the runtime reads `hgad_flow.logits`, binds that product's centres, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.errors import ConfigError
from ...runtime.manifest import Outputs, Run
from ...train.method import AnomalyModel
from ...train.methods.hgad.flow import CouplingBlock, Flow, axis_code
from ...train.methods.hgad.mixture import Mixture, intra_density, negative_entropy
from ...train.methods.hgad.model import Hgad, class_likelihood
from ...train.methods.hgad.score import Constants
from ..stage import StageDef, StagedModel


class FoldedSubnet(nn.Module):
    """The subnet of a block with the position folded to two bias tables and the factor 0.1 into the last layer.

    The position code is separable, so its part of the first layer is one table per axis: 256 channels less to multiply.
    x1: [N, d_1] -> [N, 2 d_2]. May run in FP16.
    """

    row: Tensor
    column: Tensor

    def __init__(self, block: CouplingBlock, grid: tuple[int, int]) -> None:
        super().__init__()
        weight, bias = block.inner.weight, block.inner.bias
        by_position = weight[:, block.kept :]
        half = by_position.shape[1] // 2
        x = axis_code(grid[1], half).to(weight) @ by_position[:, :half].T
        y = axis_code(grid[0], half).to(weight) @ by_position[:, half:].T
        self.register_buffer("column", x[None])
        self.register_buffer("row", (y + bias)[:, None])
        self.inner = _linear(weight[:, : block.kept], None)
        self.outer = _linear(0.1 * block.outer.weight, 0.1 * block.outer.bias)

    def forward(self, kept: Tensor) -> Tensor:
        hidden = self.inner(kept).unflatten(0, (self.row.shape[0], self.column.shape[1]))
        return self.outer(F.relu(hidden + self.row + self.column).flatten(0, 1))


class FoldedCoupling(nn.Module):
    """The rest of a block with global scale, offset and rotation folded to one affine map. FP32: the residual stream.

    x: [N, d], s: [N, 2 d_2] -> x [N, d], log-scale [N, d_2].
    """

    def __init__(self, block: CouplingBlock) -> None:
        super().__init__()
        self.kept, self.changed, self.clamp = block.kept, block.changed, block.clamp
        rotation = block.rotation.to(block.offset)
        self.mix = _linear(rotation * block.scale(), rotation @ block.offset)

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.clamp * torch.tanh(s[:, : self.changed])
        changed = x[:, self.kept :] * log_scale.exp() + s[:, self.changed :]
        return self.mix(torch.cat((x[:, : self.kept], changed), dim=1)), log_scale


class FoldedFlow(nn.Module):
    """A flow with everything constant folded (METHODS.md 4.5). x: [N, d] -> z [N, d], log-determinant [N]."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        blocks = flow.each_block
        self.subnets = nn.ModuleList(FoldedSubnet(block, flow.grid) for block in blocks)
        self.couplings = nn.ModuleList(FoldedCoupling(block) for block in blocks)
        self.log_scale = sum(float(block.scale().detach().double().log().sum()) for block in blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det: Tensor | None = None
        for subnet, coupling in zip(self.subnets, self.couplings, strict=True):
            x, log_scale = coupling(x, subnet(x[:, : coupling.kept]))
            log_det = log_scale if log_det is None else log_det + log_scale
        if log_det is None:
            raise ValueError("a flow has at least one block")
        return x, log_det.sum(1) + self.log_scale


class Features(nn.Module):
    """frame [1, S, S, 3] uint8 -> standardised features of every level, [N_l, d_l]."""

    def __init__(self, model: Hgad) -> None:
        super().__init__()
        self.features = model.features
        self.standardize = nn.ModuleList(level.standardize for level in model.each_level)

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        maps = self.features(frame)
        names = self.features.names
        return tuple(
            standardize(maps[name])[0].flatten(1).T for name, standardize in zip(names, self.standardize, strict=True)
        )


class ClassHead(nn.Module):
    """What a level says about the product: z, log-determinant -> negative entropy [N], class likelihood [1, Y]."""

    main: Tensor
    centres: Tensor
    log_weights: Tensor

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.register_buffer("main", mixture.main.detach())
        self.register_buffer("centres", mixture.centres().detach())
        self.register_buffer("log_weights", mixture.log_weights().detach())

    def forward(self, z: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        likelihood = class_likelihood(z[None], log_det[None], self.centres, self.log_weights)
        return negative_entropy(z, self.main), likelihood


class Flows(nn.Module):
    """Features of every level -> z_1, log_det_1, z_2, ... (log-determinants and entropies if scored), entropies, and
    logits if several classes."""

    def __init__(self, model: Hgad) -> None:
        super().__init__()
        self.flows = nn.ModuleList(FoldedFlow(level.flow) for level in model.each_level)
        several = len(model.classes) > 1
        self.heads = nn.ModuleList(ClassHead(level.mixture) for level in model.each_level if several)
        self.entropy = model.scoring.delta is not None
        self.log_det = model.config.score.log_det > 0

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        latent = [flow(x) for flow, x in zip(self.flows, features, strict=True)]
        out = [tensor for pair in latent for tensor in pair[: 1 + self.log_det]]
        if not self.heads:
            return tuple(out)
        heads = [head(*pair) for head, pair in zip(self.heads, latent, strict=True)]
        if self.entropy:
            out += [entropy for entropy, _ in heads]
        logits = heads[0][1]
        for _, likelihood in heads[1:]:
            logits = logits + likelihood
        return (*out, logits)

    def islands(self) -> tuple[str, ...]:
        """Submodules that stay FP32."""
        couplings = [f"flows.{level}.couplings" for level in range(len(self.flows))]
        return (*couplings, *(f"heads.{level}" for level in range(len(self.heads))))


class Density(nn.Module):
    """Per level (z, log_det if scored, mu_y [M, d], log weights [M]) -> log-likelihood per dimension [N]."""

    def __init__(self, model: Hgad) -> None:
        super().__init__()
        self.weight = model.config.score.log_det

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.weight:
            latent = zip(*(iter(inputs),) * 3, strict=True)
            return tuple(intra_density(z, 0.0, centres, weights) for z, centres, weights in latent)
        groups = zip(*(iter(inputs),) * 4, strict=True)
        return tuple(intra_density(z, self.weight * det, centres, weights) for z, det, centres, weights in groups)


class Score(nn.Module):
    """Densities, entropies, calibration constants -> map [1, 1, h, w], score [1]."""

    def __init__(self, model: Hgad) -> None:
        super().__init__()
        self.scoring = model.scoring
        self.count = len(model.levels)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *values, reach = (x[None] for x in inputs)
        levels = [values[i : i + self.count] for i in range(0, len(values), self.count)]
        densities, entropies = levels.pop(0), levels.pop(0) if self.scoring.delta is not None else []
        ceilings, gains = levels if self.scoring.by_position else (levels[0], [])
        map_, score = self.scoring(densities, entropies, Constants(ceilings, gains, reach))
        return map_, score


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data.copy_(weight.detach())
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().numpy().astype(np.float32))


def _state(model: Hgad) -> dict[str, NDArray[Any]]:
    """Everything a product owns: its centres at every level and its calibration constants; the class leads."""
    state = {"reach": _array(model.reach)}
    for number, level in enumerate(model.each_level, 1):
        state[f"ceiling{number}"] = _array(model.ceilings[number - 1])
        if model.gains:
            state[f"gain{number}"] = _array(model.gains[number - 1])
        state[f"centres{number}"] = _array(level.mixture.centres())
        state[f"log_weights{number}"] = _array(level.mixture.log_weights())
    return state


def _stages(model: Hgad) -> tuple[StageDef, ...]:
    numbers = range(1, len(model.levels) + 1)
    features, flows = Features(model), Flows(model)
    entropies = [f"nh{n}" for n in numbers] if flows.entropy else []
    latent = [name for n in numbers for name in (f"z{n}", f"log_det{n}")[: 1 + flows.log_det]]
    logits = ["logits"] if flows.heads else []
    density: dict[str, str] = {}
    for n in numbers:
        density |= {f"z{n}": f"hgad_flow.z{n}"} | ({f"log_det{n}": f"hgad_flow.log_det{n}"} if flows.log_det else {})
        density |= {f"centres{n}": f"class:centres{n}", f"log_weights{n}": f"class:log_weights{n}"}
    score = {f"lp{n}": f"hgad_density.lp{n}" for n in numbers} | {name: f"hgad_flow.{name}" for name in entropies}
    kinds = ("ceiling", "gain") if model.gains else ("ceiling",)
    constants = [*(f"{kind}{n}" for kind in kinds for n in numbers), "reach"]
    names = model.features.names
    return (
        StageDef(
            "hgad_features",
            features,
            {"frame": "frame"},
            names,
            fp32=tuple(f"standardize.{n - 1}" for n in numbers),
        ),
        StageDef(
            "hgad_flow",
            flows,
            {name: f"hgad_features.{name}" for name in names},
            (*latent, *entropies, *logits),
            fp32=flows.islands(),
            int8=False,
        ),
        StageDef("hgad_density", Density(model), density, tuple(f"lp{n}" for n in numbers), fp32=("",), int8=False),
        StageDef(
            "hgad_score",
            Score(model),
            score | {name: f"class:{name}" for name in constants},
            ("map", "score"),
            fp32=("",),
            int8=False,
        ),
    )


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """Cut a trained HGAD.

    Raises:
        ConfigError: another model, or an option (there are none).
    """
    if not isinstance(model, Hgad):
        raise ConfigError("the HGAD cut got another model", found=type(model).__name__, expected="Hgad")
    if options:
        raise ConfigError("hgad has no export options", found=", ".join(options), expected="none")
    state = _state(model)
    stages = _stages(model)
    return StagedModel(
        method="hgad",
        classes=model.classes,
        preprocess=model.preprocess,
        stages=stages,
        program=tuple(Run(run=stage.name) for stage in stages),
        outputs=Outputs(
            score="hgad_score.score",
            map="hgad_score.map",
            logits="hgad_flow.logits" if len(model.classes) > 1 else None,
        ),
        state=state,
        class_bound=frozenset(state),
    )
