"""The cut of FOCT beyond the edge preset: PCA, the literal navigator, cold starts; the exported loop against Adam."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from andon.export.methods import get_cut
from andon.export.onnx import export_stage
from andon.export.walk import Walk, torch_call
from andon.runtime.errors import ConfigError
from andon.train.config import load_config
from andon.train.methods.foct.model import Foct, adam_table
from andon.train.methods.foct.transport import CARRIED

from .conftest import frames

TINY = (
    "backbone.weights=random:0",
    "size=64",
    "patches.grid=8",
    "semantic=40",
    "episodic=16",
    "navigator.dims=8",
    "navigator.hidden=6",
    "navigator.stride=2",
    "navigator.thin=2",
    "navigator.enroll_steps=3",
)


def made(*overrides):
    model = Foct(load_config("foct", overrides=(*TINY, *overrides)), ("a", "b")).eval()
    images = frames(8, 64).images
    with torch.no_grad():
        raw = [p.numpy() for p in model.features(torch.from_numpy(images))]
    for index in range(2):
        model.enroll(index, raw[2 * index : 2 * index + 2], [np.ones(64, bool)] * 2)
    return model, get_cut("foct")(model, {}), images


@pytest.mark.parametrize(
    "overrides",
    [
        ("pca=16",),
        ("navigator.kind=pair",),
        ("navigator.kind=pair", "pca=16"),
        ("navigator.warm=false",),
        ("navigator.steps=0",),
        ("navigator.steps=3", "navigator.alternatives=[0,20]", "navigator.thin=1"),
    ],
    ids=lambda o: " ".join(o),
)
def test_every_program_computes_what_the_model_does(overrides):
    model, staged, images = made(*overrides)
    counts = {"default": model.config.navigator.steps}
    counts |= {f"ct{n}": n for n in model.config.navigator.alternatives}
    for name, count in counts.items():
        walk = Walk(staged, torch_call(staged), name)
        for index in range(2):
            walk.reset()
            values = walk.frame(images[6][None], index)
            with torch.no_grad():
                raw = model.features(torch.from_numpy(images[6][None]))[0]
                expected = model.judge(raw, index, count)
            assert values["ct_score.score"][0] == pytest.approx(float(expected[1][0]), rel=1e-5), (name, index)
            np.testing.assert_allclose(values["ct_score.map"], expected[0].numpy(), rtol=1e-4)


def test_warm_programs_go_on_and_cold_ones_do_not():
    _model, staged, images = made("navigator.lr=1e-2", "navigator.cold_lr=1e-2", "navigator.alternatives=[5,100]")
    for name, moves in (("default", True), ("ct5", True), ("ct100", False)):
        walk = Walk(staged, torch_call(staged), name)
        scores = [float(walk.frame(images[6][None], 0)["ct_score.score"][0]) for _ in range(2)]
        assert (scores[0] != scores[1]) == moves, name


def test_a_hundred_onnxruntime_calls_equal_torch_adam():
    """The exported step, called in a loop that feeds its outputs back, against torch.optim.Adam and autograd."""
    _model, staged, images = made()
    stage = next(s for s in staged.stages if s.name == "ct_step")
    inputs, outputs = {}, {}

    def keep(name, step, taken, given):
        if name == "ct_step" and step == 0:  # copies: the walk writes persistent state in place
            inputs.update({k: np.array(v) for k, v in taken.items()})
            outputs.update({k: np.array(v) for k, v in given.items()})

    Walk(staged, torch_call(staged), trace=keep).frame(images[6][None], 0)
    graph = export_stage(stage, inputs, outputs)
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    fixed = {k: np.array(v) for k, v in inputs.items() if k not in (*CARRIED, "adam")}
    carried = {name: np.array(inputs[name]) for name in CARRIED}
    leaves = [torch.from_numpy(carried[n].astype(np.float64)).requires_grad_() for n in CARRIED[:3]]
    adam = torch.optim.Adam(leaves, lr=1e-3)
    tensors = {k: torch.from_numpy(v.astype(np.float64)) for k, v in fixed.items()}
    for row in adam_table(100, 1e-3):
        values = session.run(None, {**fixed, **carried, "adam": row})
        carried = dict(zip(CARRIED, values[: len(CARRIED)], strict=True))
        adam.zero_grad()
        objective(tensors, leaves).backward()
        adam.step()
    for name, leaf in zip(CARRIED[:3], leaves, strict=True):
        np.testing.assert_allclose(carried[name], leaf.detach().numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
    assert np.abs(carried["w2"]).max() > 1e-2, "the steps have moved phi, or the comparison means nothing"


def objective(x, phi):
    """METHODS.md 5.3 on what a step reads, rows with weight only."""
    keep = x["weight"] > 0
    w1, b1, w2 = phi

    def g(rows, rows_r):
        return rows_r + torch.relu(rows @ w1.T + b1) @ w2.T

    d = (g(x["rows"][keep], x["rows_r"][keep])[:, None] - g(x["some"], x["some_r"])[None]).square().sum(2)
    d = d * x["inv_tau"]
    c = x["some_cost"].T[keep]
    return 0.5 * (torch.softmax(-d, 0) * c).sum(0).mean() + 0.5 * (torch.softmax(-d, 1) * c).sum(1).mean()


def test_options_are_refused():
    model, _, _ = made()
    with pytest.raises(ConfigError, match="no export options"):
        get_cut("foct")(model, {"x": 1})
