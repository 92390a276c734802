"""The edge preset of a registered method with random weights, cut and converted, made once per test session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from andon.export.frames import Frames
from andon.export.methods import get_cut
from andon.export.onnx import StageGraph, export_stage
from andon.export.precision import keep_fp32, to_fp16
from andon.export.quantize import quantisable, to_int8
from andon.export.ranges import measure
from andon.export.stage import StagedModel
from andon.export.storage import storable, store_fp16
from andon.export.walk import Array, Walk, torch_call
from andon.train.config import load_config
from andon.train.features import FeatureSet
from andon.train.method import AnomalyModel
from andon.train.registry import get_method

from .conftest import frames

CLASSES = ("left", "right")
VARIANTS = ("fp32", "fp16", "int8")
#: The other end of what an INT8 bundle may hold: nothing computed in INT8, everything stored so that can be
STORED = "stored"


@dataclass(frozen=True)
class Edge:
    """A method's model, cut, frames, recorded calls (stage -> [(inputs, outputs)]) and FP32 graphs."""

    model: AnomalyModel
    staged: StagedModel
    frames: Frames
    calls: dict[str, list[tuple[dict[str, Array], dict[str, Array]]]]
    graphs: dict[str, StageGraph]


@cache
def edge(method: str, classes: tuple[str, ...] = CLASSES, overrides: tuple[str, ...] = ()) -> Edge:
    """Build, fit on a few made-up frames what is not trained by gradient, cut, export every stage."""
    torch.manual_seed(0)
    config = load_config(method, overrides=("backbone.weights=random:0", *overrides))
    model = get_method(method).build(config, classes)
    made = frames(14, model.preprocess.height, len(classes))
    some = made.select(range(10, 14))
    data = _training_data(model, made.select(range(10)))
    model.prepare(data)
    model.eval()
    with torch.no_grad():
        model.finalize(data)
    staged = get_cut(method)(model, {})
    calls: dict[str, list[Any]] = {stage.name: [] for stage in staged.stages}

    def keep(stage: str, step: int, inputs: Any, outputs: Any) -> None:
        calls[stage].append(({k: np.array(v) for k, v in inputs.items()}, dict(outputs)))

    walk = Walk(staged, torch_call(staged), trace=keep)
    for image, class_id in zip(some.images[:2], some.class_ids[:2], strict=True):
        walk.reset()
        walk.frame(image[None], int(class_id))
    graphs = {stage.name: export_stage(stage, *calls[stage.name][0]) for stage in staged.stages if calls[stage.name]}
    return Edge(model, staged, some, calls, graphs)


def _training_data(model: AnomalyModel, some: Frames) -> FeatureSet:
    model.eval()
    features, images = {}, None
    if model.frontend is None:
        images = some.images
    else:
        with torch.no_grad():
            features = {k: v.float().numpy() for k, v in model.frontend(torch.from_numpy(some.images)).items()}
    return FeatureSet(tuple(range(len(some))), features, images, some.class_ids.astype(np.int64))  # type: ignore[arg-type]


@cache
def stage_model(method: str, stage: str, variant: str, *how: tuple[str, ...]) -> onnx.ModelProto:
    """A stage's graph in a variant, as the exporter makes it (before any fall-back). how: as for :func:`edge`."""
    made = edge(method, *how)
    graph = made.graphs[stage]
    definition = next(s for s in made.staged.stages if s.name == stage)
    if variant == "fp32":
        return graph.model
    inputs = [call[0] for call in made.calls[stage]]
    keep = keep_fp32(graph.model, graph.islands, measure(graph.model, inputs).nodes)
    chosen = quantisable(graph.model, keep) if definition.int8 and variant == "int8" else []
    stored = storable(graph.model, keep, chosen)
    if variant == "fp16" or not (chosen or stored):
        return store_fp16(to_fp16(graph.model, keep)).model
    return store_fp16(to_int8(graph.model, keep, inputs, chosen, stored)).model
