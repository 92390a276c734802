"""Multiply-accumulates against sums done by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from andon.export.cost import stage_cost
from torch import nn


@pytest.mark.parametrize(
    ("module", "shape", "macs", "parameters"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, groups=2), (1, 8, 10, 12), 16 * 10 * 12 * 4 * 9, 16 * 4 * 9 + 16),
        (nn.Linear(6, 7), (1, 5, 6), 5 * 6 * 7, 6 * 7 + 7),
        (nn.Linear(6, 7), (5, 6), 5 * 6 * 7, 6 * 7 + 7),
        (nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False), (1, 4, 5, 5), 4 * 25 * 3 * 4, 4 * 3 * 4),
    ],
)
def test_counts(tmp_path, module: nn.Module, shape: tuple[int, ...], macs: int, parameters: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (torch.rand(shape),), tmp_path / "m.onnx", dynamo=False, opset_version=17)
    assert stage_cost(tmp_path / "m.onnx") == (macs, parameters)
