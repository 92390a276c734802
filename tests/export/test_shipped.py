"""What travels along with a bundle, and that no export ships what `andon verify` would refuse on the same machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from andon.cli import main
from andon.export import command, reduce, verify
from andon.export.exporter import GateError, Request, export_bundle
from andon.export.frames import Frames
from andon.export.precision import Fp16Graph, to_fp16
from andon.export.shipped import require_warm_starts
from andon.export.stage import StageDef, StagedModel
from andon.export.verify import Scored
from andon.export.walk import Walk, torch_call
from andon.runtime.agreement import LIMITS, Rms
from andon.runtime.bundle import Bundle, read_npz
from andon.runtime.classifier import told_right
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


def test_how_often_the_classifier_is_right_is_recorded_and_below_the_limit_warned_of(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that says the first product whatever it sees: no reason to refuse, as most lines name their product."""
    told = telling(toy)
    head = told.staged.stages[0].module.head
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([1.0, 0.0])
    request = Request(tmp_path / "blind", ())
    result = export_bundle(toy.model, told.staged, toy.evidence, toy.provenance, request)
    first, second = (int((toy.evidence.good.class_ids == i).sum()) for i in (0, 1))
    a, b = toy.staged.classes
    assert told_right(Bundle.load(tmp_path / "blind").manifest) == {a: (first, first), b: (0, second)}
    line = next(text for text in verify.table(result.checks).splitlines() if "classifier" in text)
    assert line.startswith("warn  classifier: right product, least share") and ">= 0.995" in line
    assert f"{a} {first} of {first}, {b} 0 of {second}" in line
    entry = next(each for each in result.report["checks"] if each["subject"] == "classifier")
    assert entry["required"] is False and not entry["ok"]
    command._summary(result, 1.0, None)
    assert f"{len(result.checks) - 1} checks passed, 1 warned of" in capsys.readouterr().out


def test_a_classifier_that_is_right_is_said_and_without_one_nothing_is() -> None:
    frames = judged_frames(each=200)
    logits = np.eye(2)[frames.class_ids]
    full = Scored(np.ones(400), np.ones((400, 1, 1)), logits)
    checks, counts = verify.classifier(full, frames, ["a", "b"])
    assert [(c.ok, c.refused, c.value) for c in checks] == [(True, False, 1.0)]
    assert counts == {"a": (200, 200), "b": (200, 200)}
    logits[[0, 1]] = logits[[0, 1], ::-1]  # 198 of 200 of a: the mean over both would be .995
    checks, counts = verify.classifier(full, frames, ["a", "b"])
    assert not checks[0].ok and verify.passed(checks) and counts["a"] == (198, 200)
    assert verify.classifier(replace(full, logits=None), frames, ["a", "b"]) == ([], {})
    assert verify.classifier(replace(full, logits=logits[:, :1]), frames, ["a"]) == ([], {})


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


def judged_frames(classes: int = 2, each: int = 200) -> Frames:
    """So many frames of each product, every second one defective."""
    ids = np.repeat(np.arange(classes, dtype=np.int32), each)
    return Frames(np.zeros((len(ids), 1, 1, 3), np.uint8), ids, np.arange(len(ids), dtype=np.int32) % 2, "made up")


def refused(variant: str, reduced: Scored, full: Scored, frames: Frames, threshold: object) -> set[str]:
    checks = verify.decisions(variant, reduced, full, frames, threshold, ["a", "b"])  # type: ignore[arg-type]
    assert verify.passed(checks) == all(check.ok for check in checks)
    return {check.what for check in checks if not check.ok}


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_each_limit_of_the_gate_refuses_alone(variant: str) -> None:
    frames, rng = judged_frames(), np.random.default_rng(0)
    limits = LIMITS[variant]  # type: ignore[index]
    score = rng.uniform(1, 2, len(frames)) + 2 * frames.labels + 100 * frames.class_ids
    maps = rng.uniform(0, 1, (len(frames), 4, 4))
    full, threshold = Scored(score, maps), np.array([2.5, 102.5])
    assert refused(variant, full, full, frames, threshold) == set()

    for broken in (np.nan, np.inf):
        for reduced in (Scored(score.copy(), maps), Scored(score, maps.copy())):
            (reduced.score if reduced.map is maps else reduced.map).flat[7] = broken
            assert refused(variant, reduced, full, frames, threshold) == {"finite"}

    most = round(limits.flips * len(frames))
    for flips, wrong in ((most, set()), (most + 1, {"verdict flips"})):
        places = np.flatnonzero(frames.labels[:200] == 1)[:flips]
        above, below = score.copy(), score.copy()
        above[places], below[places] = 2.5 + 1e-4, 2.5 - 1e-4
        assert refused(variant, Scored(below, maps), Scored(above, maps), frames, threshold) == wrong, flips

    low = np.array([0.1, 0.1])  # where nothing flips
    steps = score.copy()
    steps[:200] = 1.5 + 1e-3 * np.argsort(np.argsort(score[:200]))  # narrow, so that only the order changes
    swapped = steps.copy()
    good, bad = np.flatnonzero(frames.labels[:200] == 0), np.flatnonzero(frames.labels[:200] == 1)
    top, least = good[np.argsort(steps[good])[-15:]], bad[np.argsort(steps[bad])[:15]]
    swapped[top], swapped[least] = steps[least], steps[top]  # 225 of 10,000 pairs
    assert refused(variant, Scored(swapped, maps), Scored(steps, maps), frames, low) == {"AUROC drop"}
    assert refused(variant, Scored(steps, maps), Scored(swapped, maps), frames, low) == set(), "a gain is no loss"

    alone = np.zeros_like(maps)
    alone[0, 0, 0] = 1  # one pixel stands out, and is seen elsewhere: little in RMS where all are large
    other = np.roll(alone, 1, axis=0)
    wrong = {"map correlation"}
    assert refused(variant, Scored(score, 1e3 + other), Scored(score, 1e3 + alone), frames, threshold) == wrong

    nearly = 1000 + rng.uniform(0, 1, len(frames))
    shuffled = Scored(nearly[rng.permutation(len(frames))], maps)
    plain = replace(frames, labels=np.zeros_like(frames.labels))
    assert refused(variant, shuffled, Scored(nearly, maps), plain, low) == {"score rank correlation"}

    told = np.eye(2)[frames.class_ids]
    with_logits = replace(full, logits=told)
    assert refused(variant, with_logits, with_logits, frames, threshold) == set()
    assert (
        refused(variant, full, with_logits, frames, threshold)
        == set()
        == refused(variant, with_logits, full, frames, threshold)
    )
    wrong = {"other products told"}
    assert refused(variant, replace(full, logits=1 - told), with_logits, frames, threshold) == wrong


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_how_alike_maps_and_ranks_must_be(variant: str) -> None:
    limits = LIMITS[variant]  # type: ignore[index]

    def kept(reduced: Scored, full: Scored) -> set[str]:
        frames = Frames(np.zeros((len(full.score), 1, 1, 3)), *np.zeros((2, len(full.score)), np.int32), "made up")
        return refused(variant, reduced, full, frames, np.array([0.1]))

    draws = np.random.default_rng(0).normal(size=(64, 2))
    axes = np.linalg.qr(draws - draws.mean(0))[0].T.reshape(2, 4, 4, 4)  # without mean, and at right angles
    score = 1.0 + np.arange(4)
    for alike, wrong in ((1.1, set()), (0.9, {"map correlation"})):
        part = 1 - (1 - limits.correlation) / alike  # a little nearer than the limit, or less near
        other = part * axes[0] + np.sqrt(1 - part**2) * axes[1]
        assert kept(Scored(score, 90 + 5 * other), Scored(score, 90 + axes[0])) == wrong, "whatever their scale"
    flat = np.full((4, 4, 4), 9.0)
    assert kept(Scored(score, flat), Scored(score, flat)) == set()
    assert kept(Scored(score, flat * 1.01), Scored(score, flat)) == {"map correlation"}

    def ranks(reduced: list[float], full: list[float]) -> set[str]:
        maps = np.arange(float(len(full))).reshape(-1, 1, 1)
        return kept(Scored(np.array(reduced), maps), Scored(np.array(full), maps))

    wrong = {"score rank correlation"}
    assert ranks([1000.5, 1000], [1000, 1000.5]) == set(), "two have no order that could be measured"
    assert (
        ranks([1000.5, 1000.3, 1000], [1000, 1000.3, 1000.5])
        == wrong
        == ranks([1001, 1000.5, 1000], [1000, 1000.5, 1001])
    )
    assert ranks([1000, 1000, 1000], [1000, 1000.3, 1000.5]) == set() == ranks([1000, 1000.3, 1000.5], [1000] * 3)


def test_one_pair_in_another_order_is_no_loss_on_a_small_set() -> None:
    """Of ten pairs one is .1, which is above every limit; two of them are a loss."""
    frames = replace(judged_frames(1, 7), labels=np.array([0, 0, 0, 0, 0, 1, 1], np.int32))
    score, maps = 1 + np.arange(7) / 1e3, np.random.default_rng(0).uniform(0, 1, (7, 2, 2))
    for order, wrong in (([0, 1, 2, 3, 5, 4, 6], set()), ([0, 1, 2, 5, 4, 3, 6], {"AUROC drop"})):
        found = refused("fp16", Scored(score[order], maps), Scored(score, maps), frames, np.array([0.1]))
        assert found - {"score rank correlation"} == wrong


def test_the_program_is_held_to_the_torch_model_by_scores_verdicts_and_maps() -> None:
    frames, rng = judged_frames(each=1000), np.random.default_rng(0)
    right = Scored(rng.uniform(1, 2, len(frames)) + 10 * frames.class_ids, rng.uniform(0, 10, (len(frames), 2, 2)))
    threshold = np.array([1.5, 11.5])
    right.score[0], right.score[1500] = 1.504, 11.54  # clear of the threshold, by less than the next errors

    def wrong(score: float = 0.0, at: int = 0, pixels: int = 0, error: float = 0.02) -> list[str]:
        engine = Scored(right.score.copy(), right.map.copy())
        engine.score[at] += score
        engine.map.reshape(-1)[:pixels] += error
        with np.errstate(invalid="ignore"):
            checks = verify.model_parity(engine, right, frames, threshold)
        return [check.what.split(",")[0] for check in checks if not check.ok]

    assert wrong() == [] and wrong(1e-3) == []
    both = ["score", "verdict flips to torch"]
    assert wrong(4e-3, 3) == ["score"] == wrong(-4e-3, 3) and wrong(np.nan, 3) == both
    assert wrong(-0.01) == both == wrong(-0.08, 1500)
    assert wrong(pixels=4) == [], "one in a thousand: where two codes are equally near"
    assert wrong(pixels=16) == ["map"] and wrong(pixels=16, error=np.nan) == ["map"] == wrong(pixels=16, error=-0.02)
    assert wrong(pixels=8000, error=5e-3) == []


def test_the_files_as_shipped_may_change_as_many_verdicts_as_the_gate_allows() -> None:
    frames = judged_frames(1, 200)
    full = Scored(np.full(200, 1.0), np.zeros((200, 1, 1)))
    for flips, of, ok in ((1, 200, True), (2, 200, False), (2, 400, True), (2, 201, True), (3, 201, False)):
        score = full.score.copy()
        score[:flips] = 2.0
        check = verify.flips_as_shipped("fp16", Scored(score, full.map), full, frames, np.array([1.5]), of)
        assert (check.value, check.ok) == (flips, ok), (flips, of)


def test_how_far_a_fall_back_is_from_fp32() -> None:
    full = Scored(np.array([1.0, 3.0]), np.zeros((2, 1, 1)))
    assert verify.distance(full, full) == 0
    assert verify.distance(Scored(np.array([1.5, 2.75]), full.map), full) == pytest.approx(0.375)
    assert verify.distance(Scored(np.array([np.nan, 3.0]), full.map), full) == np.inf


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
