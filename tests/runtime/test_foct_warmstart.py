"""Reset rules of what a loop carries between frames, on a real program."""

from __future__ import annotations

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.select import open_backend
from andon.runtime.program import Program
from andon.runtime.warmstart import WarmStart

from .parts import FEATURES  # type: ignore[import-not-found]

#: phi grows by one a step; the loss is the frame's level.
STEP = """step (float[1] level, float[1] phi) => (float[1] phi_next, float[1] loss) {
    one = Constant<value = float {1.0}>()
    phi_next = Add(phi, one)
    loss = Identity(level)
}"""
SCORE = """score (float[1] phi) => (float[1,1,1,1] map, float[1] score) {
    shape = Constant<value = int64[4] {1,1,1,1}>()
    map = Reshape(phi, shape)
    score = Identity(phi)
}"""


@pytest.fixture
def program(make_bundle):
    loop = {"loop": "step", "count": 2, "carry": {"phi_next": "phi"}, "init": {"phi": "state:phi"}}
    path = make_bundle(
        stages={
            "features": (FEATURES, {"image": "frame"}),
            "step": (STEP, {"level": "features.level", "phi": "carry"}),
            "score": (SCORE, {"phi": "step.phi_next"}),
        },
        program=[{"run": "features"}, {**loop, "persist": {"phi": "phi"}}, {"run": "score"}],
        alternatives={"cold": [{"run": "features"}, loop, {"run": "score"}]},
        state={"phi": np.zeros(1, np.float32)},
        outputs={"score": "score.score", "map": "score.map", "telemetry": {"loss": "step.loss"}},
        classes=("a",),
    )
    with (
        Bundle.load(path) as bundle,
        open_backend("onnxruntime", threads=1) as backend,
        Program(bundle, backend) as warm,
        Program(bundle, backend, program="cold") as cold,
    ):
        yield warm, cold


def run(program, level):
    program.frame[...] = level
    return program.run(0).score


def test_every_so_many_frames(program):
    warm, _ = program
    rule = WarmStart(warm, frames=3)
    scores, resets = [], []
    for _ in range(7):
        scores.append(run(warm, 10))
        resets.append(rule.after_frame(warm, 0))
    assert scores == [2, 4, 6, 2, 4, 6, 2]
    assert resets == [False, False, True, False, False, True, False]


def test_when_the_loss_jumps(program):
    warm, _ = program
    rule = WarmStart(warm)
    for _ in range(12):
        run(warm, 10)
        assert not rule.after_frame(warm, 0)
    run(warm, 14)
    assert not rule.after_frame(warm, 0)
    run(warm, 16)
    assert rule.after_frame(warm, 0)
    assert run(warm, 10) == 2


def test_a_program_that_carries_nothing_is_left_alone(program):
    _, cold = program
    rule = WarmStart(cold, frames=1)
    assert not rule.active
    run(cold, 10)
    assert not rule.after_frame(cold, 0)
