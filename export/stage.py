"""What a method's cut hands to the exporter: stages as torch modules, the program, state and tables.

A cut (export/methods/<name>.py) is one function ``cut(model, options) -> StagedModel``. Everything after it (ONNX,
precision, parity, gates, golden set, bundle) is common to all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.manifest import Memory, Outputs, Preprocess, Step
from ..train.method import Scores

#: (images uint8 [B, H, W, 3], class_ids [B]) -> scores and maps
Whole = Callable[[Tensor, Tensor], Scores]


@dataclass(frozen=True)
class StageDef:
    """One stage.

    module: called with its inputs positionally in the order of `inputs`, returns a tensor or a tuple in the order of
        `outputs`. No Python control flow on tensor values, no int64 inputs, batch 1.
    inputs: input name -> source (see manifest.StageInput.source). Shapes and dtypes are found by running the program
        once in torch.
    fp32: names of submodules (dotted, as in ``module.named_modules()``; "" is the whole module) that stay FP32 in
        reduced variants (METHODS.md 6.1). A stage with "" is FP32 throughout.
        Large constants of FP32 nodes may still be stored as FP16 (export/storage.py).
    int8: False keeps products from being computed in INT8; their weights may still be stored so.
    """

    name: str
    module: torch.nn.Module
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    fp32: tuple[str, ...] = ()
    int8: bool = True
    tolerance: float = 1e-4


@dataclass(frozen=True)
class StagedModel:
    """A whole method, cut.

    state: name -> array (float32 unless it must not be); class-bound ones are listed in `class_bound` and have the
        class as leading axis.
    tables: name -> array [rows, ...].
    constants: numbers for the record.
    whole: the default program in one piece, which it is held against; None: the model's own forward, unless an option
        of the cut has made another program the default.
    """

    method: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    stages: tuple[StageDef, ...]
    program: tuple[Step, ...]
    outputs: Outputs
    state: Mapping[str, NDArray] = field(default_factory=dict)  # type: ignore[type-arg]
    class_bound: frozenset[str] = frozenset()
    tables: Mapping[str, NDArray] = field(default_factory=dict)  # type: ignore[type-arg]
    alternatives: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    memory: Memory | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    whole: Whole | None = None
