"""What travels along with a bundle, and that no export ships what `andon verify` would refuse on the same machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from andon.cli import main
from andon.export import reduce, verify
from andon.export.exporter import GateError, Request, export_bundle
from andon.export.precision import Fp16Graph, to_fp16
from andon.export.shipped import require_warm_starts
from andon.export.stage import StageDef, StagedModel
from andon.export.verify import Scored
from andon.export.walk import Walk, torch_call
from andon.runtime.agreement import LIMITS, Rms
from andon.runtime.bundle import read_npz
from andon.runtime.errors import ConfigError
from andon.runtime.manifest import Loop
from andon.runtime.replay import GATE, WARM
from torch import Tensor, nn

from .conftest import WIDTH, Toy  # type: ignore[import-not-found]
from .test_foct import made  # type: ignore[import-not-found]


def export(toy: Toy, out: Path, *variants: str) -> verify.Sequence[verify.Check]:
    return export_bundle(toy.model, toy.staged, toy.evidence, toy.provenance, Request(out, variants)).checks  # type: ignore[arg-type]


# -- the classifier ----------------------------------------------------------------------------------------------------


class Telling(nn.Module):
    """The encoder, and logits of two products."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(WIDTH, 2)

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        features = self.inner(frame)
        return features, self.head(features.mean((2, 3)))


def telling(toy: Toy) -> Toy:
    staged = toy.staged
    first = StageDef("encode", Telling(toy.model.encode), {"frame": "frame"}, ("f", "logits"))
    outputs = staged.outputs.model_copy(update={"logits": "encode.logits"})
    return replace(toy, staged=replace(staged, stages=(first, *staged.stages[1:]), outputs=outputs))


def negated(model: onnx.ModelProto, keep: object) -> Fp16Graph:
    """FP16 that tells the other product."""
    graph = to_fp16(model, keep)  # type: ignore[arg-type]
    for node in list(graph.model.graph.node):
        if "logits" in node.output:
            node.output[list(node.output).index("logits")] = "logits_right"
            graph.model.graph.node.append(onnx.helper.make_node("Neg", ["logits_right"], ["logits"], name="wrong"))
    return graph


def test_a_classifier_that_tells_other_products_in_fp16_falls_back(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `product: auto` every part would be judged by another's constants and threshold."""
    checks = export(telling(toy), tmp_path / "right", "fp16")
    assert [c.value for c in checks if c.what == "other products told"] == [0]
    gate = read_npz(tmp_path / "right" / GATE)
    assert gate["logits"].shape == (len(gate["frames"]), 2)
    assert main(["verify", "--bundle", str(tmp_path / "right"), "--backend", "onnxruntime", "--threads", "1"]) == 0
    monkeypatch.setattr(reduce, "to_fp16", negated)
    result = export_bundle(
        toy.model, telling(toy).staged, toy.evidence, toy.provenance, Request(tmp_path / "wrong", ("fp16",))
    )
    stage = result.manifest.stages["encode"]
    assert stage.files["fp16"] == "stages/encode.fp32.onnx" and "other products told 1" in stage.fallback["fp16"]


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_the_gate_sees_scores_and_maps_that_keep_their_order(toy: Toy, variant: str) -> None:
    """Half of everything has the same AUROC, ranks and correlation, and no flips above a low threshold."""
    frames = toy.evidence.labelled
    rng = np.random.default_rng(0)
    full = Scored(rng.uniform(1, 2, len(frames)), rng.uniform(0, 1, (len(frames), 4, 4)))
    low = np.full(2, 0.1)
    for reduced, wrong in (
        (full, set()),
        (Scored(full.score * 0.5, full.map), {"score, RMS difference"}),
        (Scored(full.score, full.map * 0.5), {"map, RMS difference"}),
    ):
        checks = verify.decisions(variant, reduced, full, frames, low, toy.staged.classes)  # type: ignore[arg-type]
        assert {check.what for check in checks if not check.ok} == wrong


# -- the replay --------------------------------------------------------------------------------------------------------


def test_what_ships_is_replayed_first(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = export(toy, tmp_path / "b", "fp16")
    assert [(c.subject, c.value) for c in checks if c.subject.startswith("replay")] == [
        ("replay fp32", 0),
        ("replay fp16", 0),
    ]
    monkeypatch.setitem(LIMITS, "fp16", replace(LIMITS["fp16"], carried=0.0))  # type: ignore[index]
    with pytest.raises(GateError, match=r"warm state\.moment") as caught:
        export(toy, tmp_path / "c", "fp16")
    assert "andon verify would refuse" in caught.value.next_step and not (tmp_path / "c").exists()


# -- what is carried from frame to frame -------------------------------------------------------------------------------


def test_the_warm_set_is_of_frames_in_a_row(toy: Toy, tmp_path: Path) -> None:
    export(toy, tmp_path / "b")
    warm, golden = (read_npz(tmp_path / "b" / name) for name in (WARM, "golden/golden.npz"))
    walk = Walk(toy.staged, torch_call(toy.staged))
    for _ in range(2):
        for frame, product in zip(golden["frames"], golden["class_ids"], strict=True):
            walk.frame(frame[None], int(product))
    np.testing.assert_allclose(warm["state.moment"], walk.state["moment"], rtol=1e-5)
    assert np.abs(warm["state.moment"]).min(axis=(1, 2, 3, 4)).max() > 0 and len(warm["score"]) == 2 * len(
        golden["score"]
    )
    cold = replace(toy, staged=changed(toy.staged, persist={}))
    export(cold, tmp_path / "cold")
    assert not (tmp_path / "cold" / WARM).exists()


def changed(staged: StagedModel, **update: object) -> StagedModel:
    """The default program's loop otherwise."""
    steps = tuple(s.model_copy(update=update) if isinstance(s, Loop) else s for s in staged.program)
    return replace(staged, program=steps)


@pytest.mark.parametrize(
    "update",
    [
        {"persist": {name: {"m_w1": "v_w1", "v_w1": "m_w1"}.get(name, name) for name in ("w1", "m_w1", "v_w1")}},
        {"persist": {}},
    ],
    ids=["Adam's moments swapped", "steps are counted and nothing kept"],
)
def test_a_cut_that_does_not_go_on_where_it_was_is_refused(update: dict[str, object]) -> None:
    _, staged, _ = made()
    require_warm_starts(staged)
    with pytest.raises(ConfigError, match="program default does not go on where the last frame left ct_step"):
        require_warm_starts(changed(staged, **update))


def test_foct_three_times_the_same_frame_is_one_frame_of_three_times_the_steps() -> None:
    """phi, both moments and the step count go on: the same Adam, whose only novelty are the frame's borders."""
    model, staged, images = made("navigator.lr=1e-2")
    count = model.config.navigator.steps
    warm = Walk(staged, torch_call(staged))
    for _ in range(3):
        last = warm.frame(images[6][None], 1)
    once = Walk(changed(staged, count=3 * count, persist={}, counter=None), torch_call(staged))
    expected = once.frame(images[6][None], 1)
    loop = next(s for s in staged.program if isinstance(s, Loop))
    for output, name in loop.carry.items():
        apart = Rms(expected[f"ct_step.{output}"])
        apart.add(warm.state[name][1], expected[f"ct_step.{output}"])
        assert apart.value < 1e-4, name
        assert torch.equal(torch.from_numpy(warm.state[name][0]), torch.from_numpy(staged.state[name][0])), "not b's"
    assert last["ct_score.score"][0] == pytest.approx(float(expected["ct_score.score"][0]), rel=1e-5)
