"""andon verify: the golden set and the gate replayed, and what counts as a difference."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.agreement import Rms, auroc_drop, correlation, difference, flipped, most_flips, rms_difference
from andon.runtime.bundle import Bundle
from andon.runtime.commands import bench, verify
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.manifest import Variant
from andon.runtime.program import Program
from andon.runtime.replay import replay_gate

from .conftest import ENCODE, ENGINE, SCORE, run  # type: ignore[import-not-found]
from .parts import gate, golden

MakeBundle = Callable[..., Path]


def test_the_help_of_verify_says_what_auto_does_there() -> None:
    """verify runs every variant; only the others pick one."""
    shown = {}
    for command in (verify, bench):
        parser = ArgumentParser()
        command.configure(parser)
        shown[command] = " ".join(parser.format_help().split())
    assert "auto: every one that the bundle has" in shown[verify] and "else fp32" not in shown[verify]
    assert "auto: fp16 on tensorrt, else fp32" in shown[bench]


def test_verify_replays_golden_set_and_gate(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"golden/golden.npz": golden([10, 40]), "golden/gate.npz": gate([10, 20, 60, 70], 0.5)}
    code, result, text = run(capsys, "verify", "--bundle", make_bundle(npz=good), *ENGINE)
    assert code == 0 and result["ok"] and "verified" in text
    subjects = {check["subject"] for check in result["checks"]["fp32"]}
    assert subjects == {"encode.u", "score", "map", "decisions", "a"}
    other = golden([10, 40])
    other["encode.u"] = other["encode.u"] * np.float32(1.01)
    flipped = gate([10, 20, 60, 70], 0.5)
    flipped["score"][1] = 0.6  # what export saw was NG
    for npz, subject in (
        ({**good, "golden/golden.npz": other}, "encode.u"),
        ({**good, "golden/gate.npz": flipped}, "decisions"),
    ):
        code, result, text = run(capsys, "verify", "--bundle", make_bundle(npz=npz), *ENGINE)
        assert code == 1 and not result["ok"] and "NOT verified" in text
        assert [check["subject"] for check in result["checks"]["fp32"] if not check["ok"]] == [subject]


@pytest.mark.parametrize("worse", [False, True], ids=["a near tie", "a worse engine"])
def test_a_pair_that_rounding_swaps_is_no_lost_auroc(make_bundle: MakeBundle, worse: bool) -> None:
    """One pair of 400 weighs 0.0025, more than FP16's limit of 0.002: that alone must not fail a device."""
    good, bad = [*range(10, 29), 60], [61, *range(80, 99)]
    npz = gate([*good, *bad], 0.5) | {"labels": np.repeat(np.array([0, 1], np.int32), 20)}
    order = np.arange(40)
    order[[19, 20]] = 20, 19
    npz["frames"] = npz["frames"][order[::-1] if worse else order]  # beside the scores of the export
    path = make_bundle(npz={"golden/gate.npz": npz})
    with Bundle.load(path) as bundle, OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        program.variant = "fp16"
        found = {check.subject: check for check in replay_gate(program)}["a"]
    assert found.ok is not worse, found
    assert worse or found.value == pytest.approx(1 / 400)


def test_a_score_that_is_not_a_number_is_a_flip(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is above no threshold, so a comparison alone would call it a good part."""
    log = ENCODE.replace("u = Mul(m, k)", "zero = Sub(m, m)\n    nan = Div(zero, zero)\n    u = Mul(nan, k)")
    stages = {"encode": (log, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})}
    npz = {"golden/golden.npz": golden([10]), "golden/gate.npz": gate([10, 20, 30, 40], 0.5)}
    _, result, _ = run(capsys, "verify", "--bundle", make_bundle(stages=stages, npz=npz), *ENGINE)
    found = {check["subject"]: check for check in result["checks"]["fp32"]}
    assert not found["decisions"]["ok"] and found["decisions"]["value"] == 1.0
    assert not found["score"]["ok"] and found["score"]["value"] is None


@pytest.mark.parametrize("threshold", [0.4, -250.0], ids=["small", "a log-likelihood"])
def test_the_verdict_of_a_frame_on_its_threshold_is_none_to_keep(threshold: float) -> None:
    """As where one good frame alone has set it: FP32's tolerance, or its rounding, decides which side it falls to."""
    at = np.array([threshold])
    scores = at + 0.3 * abs(threshold)  # the other side, however far: whose reference has no verdict cannot lose it

    def change(variant: Variant, away: float) -> bool:
        return bool(flipped(variant, scores, at * (1 - away * np.sign(threshold)), at)[0])

    for variant in ("fp32", "fp16", "int8"):
        assert not change(variant, 0.0) and not change(variant, 1e-7) and change(variant, 2e-3)
    assert not change("fp32", 5e-4), "less than FP32 engines may differ by"
    assert change("fp16", 5e-6) and change("int8", 5e-6), "a reduced variant keeps every verdict that FP32 gives"
    assert flipped("fp32", np.array([np.nan]), at, at)[0], "what is not a number is no tie"
    on, apart = np.array([1.0, 1.0]), np.array([0.5, 1.5])
    assert flipped("fp32", on, apart, on).tolist() == [False, True], "on the threshold is OK"
    assert flipped("fp32", np.array([1e-5]), np.array([-1e-5]), np.array([0.0]))[0], "0 is near to nothing but itself"


def test_how_far_apart_two_arrays_are() -> None:
    """The floor of every check: 0 for the same, the largest or the RMS difference over the recorded size."""
    inf, nan = np.inf, np.nan
    for value, reference, expected in (
        (np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4]), 0.25),
        (np.array([True, False]), np.array([True, False]), 0.0),
        (np.array([2.0, -3.0, 1.0]), np.array([2.0, -4.0, 1.5]), 0.25),
        (np.array([inf, 2.0, 1.0]), np.array([inf, 2.0, 2.0]), 0.5),
        (np.array([inf, inf]), np.array([inf, inf]), 0.0),
        (np.array([nan, 1.0]), np.array([1.0, 1.0]), inf),
        (np.array([1.0, 1.0]), np.array([inf, 1.0]), inf),
    ):
        assert difference(value, reference) == expected
    assert difference(np.array([0.5]), np.array([0.0])) > 1e6, "what was recorded as nothing is nothing"
    assert rms_difference(np.array([3.0, 3.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert rms_difference(np.array([inf, 3.0, 3.0]), np.array([inf, 3.0, 4.0])) == pytest.approx(0.2)
    assert rms_difference(np.array([nan, 3.0]), np.array([3.0, 3.0])) == inf
    assert rms_difference(np.array([0.5]), np.array([0.0])) > 1e6
    several = Rms(np.array([[3.0, 3.0], [4.0, 4.0]]))
    several.add(np.array([3.0, 3.0]), np.array([3.0, 3.0]))
    assert several.value == 0
    several.add(np.array([3.0, 4.0]), np.array([4.0, 4.0]))
    assert several.value == pytest.approx(np.sqrt(1 / 4) / np.sqrt(50 / 4)), "of all frames together"


def test_correlation_of_maps_and_of_constant_ones() -> None:
    ramp, flat = np.arange(6.0).reshape(2, 3), np.full((2, 3), 4.0)
    assert correlation(3 * ramp + 2, ramp) == pytest.approx(1) and correlation(-ramp, ramp) == pytest.approx(-1)
    assert correlation(np.array([1.0, 0, 0, 1]), np.array([1.0, 0, 1, 0])) == pytest.approx(0)
    assert correlation(np.array([1.0, 2, 4]), np.array([3.0, 7, 8])) == pytest.approx(
        np.corrcoef([1.0, 2, 4], [3.0, 7, 8])[0, 1]
    )
    assert correlation(flat, flat) == 1 and correlation(flat * 1.0005, flat) == 1
    assert correlation(flat * 2, flat) == 0 and correlation(ramp, flat) == 0
    assert correlation(np.full((2, 3), np.nan), ramp) == 0


def test_the_flips_that_few_frames_allow() -> None:
    assert most_flips("fp32", 10) == 0
    assert most_flips("fp16", 64) == pytest.approx(0.005 + 3 * np.sqrt(0.005 * 0.995 / 64))
    assert most_flips("fp16", 8) == 1 / 8, "one frame is the least that can be seen"


@pytest.mark.parametrize(("bad", "good"), [(5, 7), (2, 9), (9, 2)])
def test_the_auroc_that_is_lost_and_its_error(bad: int, good: int) -> None:
    """By DeLong's formula: each frame's share of its pairs, and how much that varies among frames of its kind."""
    rng = np.random.default_rng(0)
    defective = np.arange(bad + good) < bad
    before = rng.normal(size=bad + good) + 5 * defective
    now = rng.normal(size=bad + good) + 0.5 * defective
    found = auroc_drop(before, now, defective)
    assert found is not None

    def order(scores: np.ndarray) -> np.ndarray:
        return np.array([[(a > b) + (a == b) / 2 for b in scores[~defective]] for a in scores[defective]])

    lost = order(before) - order(now)
    assert found[0] == pytest.approx(lost.mean()) and found[0] > 0
    assert found[1] == pytest.approx(np.sqrt(np.var(lost.mean(1), ddof=1) / bad + np.var(lost.mean(0), ddof=1) / good))
    assert auroc_drop(now, before, defective) == (-found[0], found[1])
    assert auroc_drop(before, before, defective) == (0, 0)
    for one_kind in (np.zeros(bad + good, bool), np.ones(bad + good, bool)):
        assert auroc_drop(before, now, one_kind) is None


def test_a_gate_frame_that_set_the_threshold_itself_fails_no_device(make_bundle: MakeBundle) -> None:
    npz = gate([10, 20, 60, 70], 0.5)
    npz["score"] *= np.float32(1 - 1e-5)  # the device's own scores are a little higher
    npz["threshold"][:] = npz["score"][1]
    path = make_bundle(npz={"golden/gate.npz": npz})
    with Bundle.load(path) as bundle, OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        for program.variant in ("fp32", "fp16"):
            found = {check.subject: check for check in replay_gate(program)}["decisions"]
            assert found.ok and found.value == 0.0


def test_verify_without_a_golden_set_is_refused(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = run(capsys, "verify", "--bundle", make_bundle(), *ENGINE)
    assert code == 1 and "has no golden/golden.npz" in text
