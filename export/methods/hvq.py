"""The cut of HVQ-Trans: encode, decode, score (METHODS.md 1.7 and Annex A).

Codebooks and expert of the product are class-bound state: switching products is a change of pointers, there is no
argmax over classes in the graph. The codes are stored centred and matched in FP32 (METHODS.md 1.7, "safe VQ").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.errors import ConfigError
from ...runtime.manifest import Outputs, Run
from ...train.method import AnomalyModel
from ...train.methods.hvq import pot
from ...train.methods.hvq.config import PotConfig
from ...train.methods.hvq.model import HvqModel
from ...train.methods.hvq.quantizer import centre, nearest_code
from ..stage import StageDef, StagedModel

#: Class-bound inputs of the decode stage in graph order, before those of the OT term.
_STATE = ("top", "top_mean", "top_half_sq", "codes", "codes_mean", "codes_half_sq", "w_expert", "b_expert")
_POT_STATE = {"off": (), "ct_level1": ("unit",), "sinkhorn_all": ("epsilon",)}


class Encode(nn.Module):
    """frame uint8 [1, S, S, 3] -> f [1, N, C], hs [L + 1, N, dim] (h0..hL), logits [1, classes] of several products.

    One product alone has no logits: no gradient ever reaches their weights, so they are noise, and noise has no parity.
    """

    positions: Tensor

    def __init__(self, model: HvqModel) -> None:
        super().__init__()
        self.features, self.encoder = model.features, model.encoder
        self.classifier = model.classifier if len(model.classes) > 1 else None
        self.register_buffer("positions", model.positions().detach())

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        aligned = self.features(frame)["aligned"]
        features, hidden = self.encoder(aligned, self.positions)
        found = (features, torch.cat(hidden))
        return found if self.classifier is None else (*found, self.classifier(aligned))


class Quantize(nn.Module):
    """Hierarchical quantisation of one image; stays FP32.

    hs [L + 1, N, dim], top [K, dim] and codes [L, K, 2 dim] centred -> z [L, N, 2 dim], queries [L, N, 2 dim],
    indices [L + 1, N] int32 (levels 1..L, then the top).
    """

    def __init__(self, levels: int, size: int) -> None:
        super().__init__()
        self.levels, self.size = levels, size

    def forward(
        self,
        hs: Tensor,
        top: Tensor,
        top_mean: Tensor,
        top_half_sq: Tensor,
        codes: Tensor,
        mean: Tensor,
        half_sq: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        levels = self.levels
        top_index = nearest_code(hs[levels], top, top_mean, top_half_sq)
        theta = F.embedding(top_index, top) + top_mean
        queries = torch.cat([hs[:levels], theta.expand(levels, -1, -1)], dim=-1)
        indices = nearest_code(queries, codes, mean, half_sq)
        rows = indices + torch.arange(levels, device=codes.device)[:, None] * self.size
        z = F.embedding(rows, codes.flatten(0, 1)) + mean
        return z, queries, torch.cat([indices, top_index[None]]).to(torch.int32)


class Transport(nn.Module):
    """OT term of the score from level queries and centred codes; stays FP32."""

    def __init__(self, config: PotConfig, levels: int) -> None:
        super().__init__()
        self.config, self.levels = config, levels

    def forward(self, hs: Tensor, queries: Tensor, codes: Tensor, codes_mean: Tensor, *extra: Tensor) -> Tensor:
        """extra: unit [K, 2 dim] in ct_level1; top [K, dim], top_mean, epsilon [L + 1] in sinkhorn_all. Returns [N]."""
        if self.config.mode == "ct_level1":
            return pot.conditional_transport(queries[0], codes[0], extra[0])
        top, top_mean, epsilon = extra
        levels, steps = self.levels, self.config.iterations
        below = pot.sinkhorn(queries - codes_mean, codes, epsilon[:levels, None, None], steps).sum(dim=0)
        return below + pot.sinkhorn(hs[levels] - top_mean, top, epsilon[levels], steps)


class Distance(nn.Module):
    """Euclidean distance over channels as a grid map, FP32: [1, N, C] twice -> [1, 1, grid, grid]."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, reconstruction: Tensor, features: Tensor) -> Tensor:
        """See the class."""
        error = (reconstruction - features).square().sum(dim=-1).sqrt()
        return error.reshape(1, 1, self.grid, self.grid)


class Decode(nn.Module):
    """f, hs and the product's state -> map14 [1, 1, g, g], (sot likewise unless off), idx [L + 1, N] int32."""

    positions: Tensor

    def __init__(self, model: HvqModel) -> None:
        super().__init__()
        self.grid = model.config.features.grid
        self.quantize = Quantize(model.config.transformer.layers, model.config.codebook.size)
        self.transport = (
            None if model.config.pot.mode == "off" else Transport(model.config.pot, model.config.transformer.layers)
        )
        self.layers, self.norm = model.decoder, model.norm
        self.distance = Distance(self.grid)
        self.register_buffer("positions", model.positions().detach().repeat(1, 2))

    def forward(self, f: Tensor, hs: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """State in the order of `_STATE` and the mode's `_POT_STATE`."""
        top, top_mean, top_half_sq, codes, codes_mean, codes_half_sq, w_expert, b_expert, *extra = state
        z, queries, idx = self.quantize(hs, top, top_mean, top_half_sq, codes, codes_mean, codes_half_sq)
        output = z[-1:]
        for level, layer in zip(range(len(self.layers) - 1, -1, -1), self.layers, strict=True):
            output = layer(output, z[level : level + 1], self.positions)
        reconstruction = self.norm(output) @ w_expert.transpose(0, 1) + b_expert
        error = self.distance(reconstruction, f)
        if self.transport is None:
            return error, idx
        if self.transport.config.mode == "sinkhorn_all":
            extra = [top, top_mean, *extra]
        term = self.transport(hs, queries, codes, codes_mean, *extra)
        return error, term.reshape(1, 1, self.grid, self.grid), idx


class Score(nn.Module):
    """map14 (and sot, lam [1]) with mean, std [N] of good images -> map [1, 1, S, S], score [1]; FP32."""

    def __init__(self, model: HvqModel) -> None:
        super().__init__()
        self.score_map = model.score_map

    def forward(self, map14: Tensor, mean: Tensor, std: Tensor, *term: Tensor) -> tuple[Tensor, Tensor]:
        """term: sot and lam, unless the OT term is off."""
        combined = map14 + term[1] * term[0] if term else map14
        return self.score_map((combined - mean.reshape(map14.shape)) / std.reshape(map14.shape))


@torch.no_grad()
def _state(model: HvqModel) -> dict[str, Tensor]:
    """Class-bound state, the class as leading axis."""
    top, top_mean, top_half_sq = centre(model.books[-1].codes)
    levels = torch.stack([book.codes for book in model.books[:-1]], dim=1)
    codes, codes_mean, codes_half_sq = centre(levels)
    state = dict(zip(_STATE, (top, top_mean, top_half_sq, codes, codes_mean, codes_half_sq), strict=False))
    state["w_expert"], state["b_expert"] = model.expert_weight, model.expert_bias
    state["unit"] = F.normalize(levels[:, 0], dim=-1)
    state["epsilon"] = model.epsilon.T
    return {name: state[name] for name in (*_STATE, *_POT_STATE[model.config.pot.mode])}


def _islands(module: nn.Module, *names: str) -> tuple[str, ...]:
    """The named submodules and every LayerNorm and Softmax (METHODS.md 6.1)."""
    found = [n for n, m in module.named_modules() if isinstance(m, nn.LayerNorm | nn.Softmax)]
    return (*names, *found)


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """Stages encode, decode and score of a trained HVQ-Trans; it has no options of its own.

    Raises:
        ConfigError: another method's model, or an option is given.
    """
    if not isinstance(model, HvqModel):
        raise ConfigError("not an HVQ-Trans model", found=type(model).__name__, expected="HvqModel")
    if options:
        raise ConfigError("hvq has no export options", found=", ".join(options), next_step="leave out --option")
    with_term = model.config.pot.mode != "off"
    state = _state(model)
    encode, decode, score = Encode(model).eval(), Decode(model).eval(), Score(model).eval()
    logits = ("logits",) if encode.classifier is not None else ()
    maps = ("map14", "sot") if with_term else ("map14",)
    score_inputs = {"map14": "decode.map14", "map_mean": "class:map_mean", "map_std": "class:map_std"}
    if with_term:
        score_inputs |= {"sot": "decode.sot", "lam": "state:lam"}
    statistics = {"map_mean": model.map_mean, "map_std": model.map_std}
    return StagedModel(
        method="hvq",
        classes=model.classes,
        preprocess=model.preprocess,
        stages=(
            StageDef("encode", encode, {"frame": "frame"}, ("f", "hs", *logits), fp32=_islands(encode)),
            StageDef(
                "decode",
                decode,
                {"f": "encode.f", "hs": "encode.hs", **{name: f"class:{name}" for name in state}},
                (*maps, "idx"),
                fp32=_islands(decode, "quantize", "distance", *(("transport",) if with_term else ())),
            ),
            StageDef("score", score, score_inputs, ("map", "score"), fp32=("",), int8=False),
        ),
        program=(Run(run="encode"), Run(run="decode"), Run(run="score")),
        outputs=Outputs(
            score="score.score",
            map="score.map",
            logits="encode.logits" if logits else None,
            telemetry={"codes": "decode.idx"},
        ),
        state={n: t.detach().contiguous().numpy() for n, t in (state | statistics).items()}
        | ({"lam": model.lam.numpy()} if with_term else {}),
        class_bound=frozenset(state | statistics),
        constants={"lambda": float(model.lam)} if with_term else {},
    )
