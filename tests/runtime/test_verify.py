"""andon verify: the golden set and the gate replayed, and what counts as a difference."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.agreement import flipped
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
    assert flipped("fp32", np.array([1e-5]), np.array([-1e-5]), np.array([0.0]))[0], "0 is near to nothing but itself"


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
