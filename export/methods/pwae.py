"""The cut of P-WAE: encode, decode, score (METHODS.md 3.5). The jigsaw head and the regularisers stay out of it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...runtime.errors import ConfigError
from ...runtime.manifest import Outputs, Run
from ...train.method import AnomalyModel
from ...train.methods.pwae.model import Decoder, PwaeModel
from ...train.methods.pwae.tiles import assemble
from ..stage import StageDef, StagedModel


class Encode(nn.Module):
    """frame uint8 [1, S, S, 3] -> x [1, 3, t, t] in normalised colours, grid [1, c, n, n] of codes in image order."""

    def __init__(self, model: PwaeModel) -> None:
        super().__init__()
        self.maps, self.code, self.side = model.maps, model.code, model.config.tiles.grid

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.maps(frame)
        return features["target"], assemble(self.code(features["maps"][0])[None], self.side)


class Score(nn.Module):
    """x, xhat [1, 3, t, t], nu [1 + tiles] -> e [1, 1 + tiles], map [1, 1, t, t], score [1]."""

    def __init__(self, model: PwaeModel) -> None:
        super().__init__()
        self.score = model.score

    def forward(self, x: Tensor, xhat: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        errors, error_map, score = self.score(x, xhat, nu[None])
        return errors, error_map, score


def fold(decoder: Decoder) -> Decoder:
    """A copy with each batch norm inside its convolution: a map per channel commutes with the resize between them."""
    folded = deepcopy(decoder)
    for layer in folded.each_layer:
        if isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
        layer.norm = nn.Identity()
    return folded


def cut(model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel:
    """Stages encode, decode and score of a trained P-WAE; it has no options of its own.

    Raises:
        ConfigError: another method's model, or an option is given.
    """
    if not isinstance(model, PwaeModel):
        raise ConfigError("not a P-WAE model", found=type(model).__name__, expected="PwaeModel")
    if options:
        raise ConfigError("pwae has no export options", found=", ".join(options), next_step="leave out --option")
    return StagedModel(
        method="pwae",
        classes=model.classes,
        preprocess=model.preprocess,
        stages=(
            StageDef("encode", Encode(model).eval(), {"frame": "frame"}, ("x", "grid")),
            StageDef("decode", fold(model.decoder).eval(), {"grid": "encode.grid"}, ("xhat",)),
            StageDef(
                "score",
                Score(model).eval(),
                {"x": "encode.x", "xhat": "decode.xhat", "nu": "class:nu"},
                ("e", "map", "score"),
                fp32=("",),
                int8=False,
            ),
        ),
        program=(Run(run="encode"), Run(run="decode"), Run(run="score")),
        outputs=Outputs(score="score.score", map="score.map", telemetry={"errors": "score.e"}),
        state={"nu": model.nu.detach().numpy()},
        class_bound=frozenset({"nu"}),
    )
