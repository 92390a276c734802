"""Engines that give something else than what was recorded: each is refused in every precision, as `andon verify` is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.agreement import retold
from andon.runtime.bundle import Bundle
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import BundleError
from andon.runtime.manifest import Loop, Run, Variant
from andon.runtime.program import Program
from andon.runtime.replay import (
    GATE,
    GOLDEN,
    WARM,
    carries,
    gate_lacks,
    gate_programs,
    play_warm,
    replay_finite,
    replay_gate,
    replay_golden,
    replay_warm,
)

from .conftest import ENCODE, ENGINE, run  # type: ignore[import-not-found]
from .conftest import SCORE as PLAIN
from .memorystation import SCORE, memory_parts  # type: ignore[import-not-found]
from .parts import FEATURES, gate, golden  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
REDUCED: tuple[Variant, ...] = ("fp16", "int8")
FRAMES = np.random.default_rng(5).integers(90, 130, (6, 4, 4, 3), dtype=np.uint8)
IDS = np.array([0, 1, 0, 1, 0, 1], np.int32)


@contextmanager
def opened(path: Path, name: str = "default") -> Iterator[Program]:
    with (
        Bundle.load(path) as bundle,
        OnnxRuntimeBackend(threads=1) as backend,
        Program(bundle, backend, program=name) as program,
    ):
        yield program


def recorded(path: Path) -> dict[str, np.ndarray]:
    """The golden set that a right engine gives."""
    rows: dict[str, list[np.ndarray]] = {}
    with opened(path) as program:
        for frame, product in zip(FRAMES, IDS, strict=True):
            program.reset()
            program.frame[...] = frame
            result = program.run(int(product))
            rows.setdefault("score", []).append(np.array(result.score, np.float32))
            rows.setdefault("map", []).append(np.array(result.map)[None])
            for name in program.outputs:
                rows.setdefault(name, []).append(np.array(program.read(name)))
    return {"frames": FRAMES, "class_ids": IDS} | {name: np.stack(values) for name, values in rows.items()}


def failing(path: Path, variant: Variant, most: int | None = None) -> set[str]:
    """What `andon verify` refuses of the golden set; most: as `andon check` looks at a few frames."""
    with opened(path) as program:
        program.variant = variant
        return {check.subject for check in replay_golden(program, most=most) if not check.ok}


def scaled(text: str, output: str, factor: float) -> str:
    """The stage with one output multiplied where it leaves the stage."""
    head, body = text.split("{\n", 1)
    body = re.sub(rf"\b{output}\b", f"{output}_right", body.rsplit("}", 1)[0])
    by = f"by_{output} = Constant<value = float {{{factor}}}>()"
    return f"{head}{{\n{body}    {by}\n    {output} = Mul({output}_right, by_{output})\n}}"


@pytest.mark.parametrize("variant", REDUCED)
@pytest.mark.parametrize(
    ("output", "factor"),
    [("score", 0.5), ("map", 0.5), ("patch_score", 0.0), ("anchor", 0.5), ("score", 1.002), ("patch_score", 1.01)],
)
def test_a_reduced_engine_that_gives_something_else(
    make_bundle: MakeBundle, variant: Variant, output: str, factor: float
) -> None:
    """Half the score, half the map, nothing for the memory to learn by: what was measured of rounding is allowed."""
    parts = memory_parts(anchor="score.anchor")
    right = recorded(make_bundle(**parts))
    stages = dict(parts["stages"])
    stages["score"] = (scaled(SCORE, output, factor), stages["score"][1])
    path = make_bundle(**{**parts, "stages": stages}, npz={GOLDEN: right})
    wrong = factor < 0.9
    name = output if output in ("score", "map") else f"score.{output}"
    for most in (None, 3):
        found = failing(path, variant, most)
        assert (name in found) == wrong and (wrong or not found), (most, found)


def test_three_in_a_hundred_are_too_much_for_fp16(make_bundle: MakeBundle) -> None:
    parts = memory_parts()
    right = recorded(make_bundle(**parts))
    stages = {**parts["stages"], "score": (scaled(SCORE, "score", 0.97), parts["stages"]["score"][1])}
    path = make_bundle(**{**parts, "stages": stages}, npz={GOLDEN: right})
    assert failing(path, "fp16") == {"score"} == failing(path, "fp32") - {"score.score"}


def told(count: int = 8) -> dict[str, np.ndarray]:
    """A golden set with the classifier's logits."""
    made = golden([10 * i + 10 for i in range(count)])
    return made | {"encode.logits": made["encode.u"][..., :2]}


NEGATED = ENCODE.replace("logits = Slice", "right = Slice").replace("\n}", "\n    logits = Neg(right)\n}")


@pytest.mark.parametrize("variant", ["fp32", *REDUCED])
def test_an_engine_that_tells_other_products(make_bundle: MakeBundle, variant: Variant) -> None:
    """With `product: auto` it judges each part by another's threshold."""
    stages = {"encode": (NEGATED, {"image": "frame"}), "score": (PLAIN, {"u": "encode.u"})}
    judged = gate([10, 20, 60, 70], 0.5)
    npz = {GOLDEN: told(), GATE: judged | {"logits": told()["encode.logits"][[0, 1, 5, 6], 0]}}
    assert {"encode.logits", "products told"} <= failing(make_bundle(stages=stages, npz=npz), variant)
    for made, wrong in (({"stages": stages}, True), ({}, False)):
        with opened(make_bundle(**made, npz=npz)) as program:
            program.variant = variant
            assert {check.subject for check in replay_gate(program) if not check.ok} == (
                {"products told"} if wrong else set()
            )


def test_products_that_are_equally_likely_may_be_told_either_way() -> None:
    reference = np.array([[1.0, 1.0, 0.0], [1.0, 0.9, 0.0]])
    other = reference[:, [1, 0, 2]] - [[1e-7, 0.0, 0.0]]
    assert retold("fp16", other, reference).tolist() == [False, True]
    assert retold("fp16", reference * np.nan, reference).all(), "what is not a number tells nothing"
    assert retold("fp16", np.array([[0.0, np.nan, 9.0]]), np.array([[1.0, 1.0, 0.0]])).all(), "not even on a near tie"
    large = np.array([[100.0, 99.99995, 0.0], [100.0, 99.999, 0.0]])
    assert retold("fp16", large[:, [1, 0, 2]], large).tolist() == [False, True], "near, for logits of that size"
    assert not retold("fp16", large * 2, large).any()
    assert retold("fp16", np.array([[7.0], [np.nan]]), np.ones((2, 1))).tolist() == [False, True], "one product alone"


def test_the_verdicts_of_the_golden_set_at_the_bundles_thresholds(make_bundle: MakeBundle) -> None:
    """INT8 may be 4 in 100 off, which is next to nothing, unless a threshold lies there."""
    made = told()
    entry = {"false_alarm_rate": 0.05, "samples": 19}
    stages = {"encode": (ENCODE, {"image": "frame"}), "score": (scaled(PLAIN, "score", 0.96), {"u": "encode.u"})}
    made["frames"][1:4] = made["frames"][0]
    for name in ("score", "map", "encode.u", "encode.logits"):
        made[name][1:4] = made[name][0]
    for value, wrong in ((0.098, True), (0.25, False), (None, False)):
        thresholds = {} if value is None else {"a": {"default": {"value": value, **entry}}}
        path = make_bundle(stages=stages, npz={GOLDEN: made}, thresholds=thresholds)
        assert failing(path, "int8") == ({"verdicts"} if wrong else set())
        path = make_bundle(stages=stages, npz={GOLDEN: made}, camera_thresholds={"lane2": thresholds})
        assert failing(path, "int8") == ({"verdicts at lane2"} if wrong else set())


# -- loops -------------------------------------------------------------------------------------------------------------

#: p and q go on by the level, q at another rate; the score hardly depends on them.
STEP = """step (float[1] level, float[1] p, float[1] q) => (float[1] p_next, float[1] q_next) {
    rate = Constant<value = float {0.01}>()
    part = Mul(level, rate)
    p_next = Add(p, level)
    q_next = Add(q, part)
}"""
WARM_SCORE = """score (float[1] level, float[1] p) => (float[1,1,1,1] map, float[1] score) {
    shape = Constant<value = int64[4] {1,1,1,1}>()
    small = Constant<value = float {0.0000001}>()
    little = Mul(p, small)
    score = Add(level, little)
    map = Reshape(score, shape)
}"""
KEPT = {"p": "p", "q": "q"}


def looped(
    make_bundle: MakeBundle, npz: Mapping[str, Any] | None = None, persist: Mapping[str, str] | None = None
) -> Path:
    """Ten steps a frame, carried on by product; `persist`: where to."""
    carry, init = {"p_next": "p", "q_next": "q"}, {"p": "class:p", "q": "class:q"}
    loop = {"loop": "step", "count": 10, "carry": carry, "init": init, "persist": KEPT if persist is None else persist}
    return make_bundle(
        stages={
            "features": (FEATURES, {"image": "frame"}),
            "step": (STEP, {"level": "features.level", "p": "carry", "q": "carry"}),
            "score": (WARM_SCORE, {"level": "features.level", "p": "step.p_next"}),
        },
        program=[{"run": "features"}, loop, {"run": "score"}],
        state={name: np.zeros((2, 1), np.float32) for name in KEPT},
        class_bound=("p", "q"),
        outputs={"score": "score.score", "map": "score.map"},
        npz=npz or {},
    )


def test_what_a_loop_gives_may_be_further_off_by_as_many_steps(make_bundle: MakeBundle) -> None:
    """Export compares step by step; after ten the errors of ten have added up (1.1e-3 of 1e-3 was seen)."""
    right = recorded(looped(make_bundle))
    for name, error, wrong in (
        ("step.q_next", 5e-3, False),
        ("step.q_next", 2e-2, True),
        ("features.level", 5e-3, True),
    ):
        path = looped(make_bundle, {GOLDEN: right | {name: right[name] * np.float32(1 + error)}})
        assert failing(path, "fp32") == ({name} if wrong else set())


@pytest.mark.parametrize(
    ("persist", "wrong"),
    [
        (KEPT, set()),
        ({"p": "q", "q": "p"}, {"warm state.q"}),
        ({"p": "p"}, None),
        ({}, None),
    ],
    ids=["right", "swapped", "one of two", "nothing"],
)
def test_a_program_that_goes_on_from_something_else_than_was_recorded(
    make_bundle: MakeBundle, persist: Mapping[str, str], wrong: set[str] | None
) -> None:
    """Every frame for itself, and its score, are as they should be: only what the frames leave is not."""
    reference = looped(make_bundle)
    with opened(reference) as program:
        warm = play_warm(program, FRAMES, IDS)
    assert len(warm["score"]) == 2 * len(FRAMES) and warm["state.q"].shape == (2, 1)
    path = looped(make_bundle, {GOLDEN: recorded(reference), WARM: warm}, persist)
    assert not failing(path, "fp32")
    with opened(path) as program:
        for program.variant in ("fp32", *REDUCED):
            if wrong is None:
                with pytest.raises(BundleError, match=r"warm\.npz is not of this program"):
                    replay_warm(program)
                continue
            checks = replay_warm(program)
            found = {check.subject for check in checks if not check.ok}
            assert found >= wrong and bool(found) == bool(wrong)
        assert program.read_state("p", 0)[0] == 0, "no line starts from where the replay ended"


@pytest.mark.parametrize(
    ("name", "factor", "wrong"), [("score", 1.1, True), ("state.q", 1.1, False), ("state.q", 1.5, True)]
)
def test_what_is_carried_may_be_further_off_than_scores(
    make_bundle: MakeBundle, name: str, factor: float, wrong: bool
) -> None:
    reference = looped(make_bundle)
    with opened(reference) as program:
        warm = play_warm(program, FRAMES, IDS)
    warm[name] = warm[name] * np.float32(factor)
    with opened(looped(make_bundle, {GOLDEN: recorded(reference), WARM: warm})) as program:
        program.variant = "fp16"
        found = {check.subject for check in replay_warm(program) if not check.ok}
    assert found == ({f"warm {name}"} if wrong else set())


@pytest.mark.parametrize(
    ("changes", "carried"), [({}, False), ({"persist": {"p": "p"}}, True), ({"counter": "steps"}, True)]
)
def test_a_loop_carries_what_it_keeps_for_the_next_frame(changes: Mapping[str, Any], carried: bool) -> None:
    loop = {"loop": "step", "count": 10, "carry": {"p_next": "p"}, "init": {"p": "class:p"}}
    assert carries([Run(run="features"), Loop.model_validate(loop | changes)]) is carried


# -- other programs than the default, and bundles without a golden set -------------------------------------------------

STEPS = [{"run": "encode"}, {"run": "score"}]


def test_the_programs_whose_decisions_a_gate_set_can_show(make_bundle: MakeBundle) -> None:
    gated = {"gated": {"fp16": ["default", "short", "long"], "int8": ["default"]}}
    judged = gate([10, 20, 60, 70], 0.5)
    judged |= {"score.short": judged["score"], "score.odd": judged["score"]}
    more = {"alternatives": dict.fromkeys(("short", "long", "odd"), STEPS), "verification": gated}
    for npz, expected in (({GATE: judged}, ["default", "short"]), ({}, ["default"])):
        with Bundle.load(make_bundle(npz=npz, **more)) as bundle:
            assert gate_programs(bundle, "fp16") == expected
            assert gate_programs(bundle, "int8") == gate_programs(bundle, "fp32") == ["default"]


def test_the_decisions_of_another_program_are_held_against_its_own(make_bundle: MakeBundle) -> None:
    """Its scores are of another scale, and so is its threshold."""
    judged = gate([10, 20, 60, 70], 0.5)
    own = {"score.short": judged["score"], "threshold.short": judged["threshold"]}
    judged |= {"score": judged["score"] * 10, "threshold": judged["threshold"] * 1.5}
    path = make_bundle(npz={GATE: judged | own}, alternatives={"short": STEPS})
    for name, wrong in (("default", True), ("short", False)):
        with opened(path, name) as program:
            checks = replay_gate(program)
        prefix = "short: " if name == "short" else ""
        assert [check.subject for check in checks] == [f"{prefix}decisions", f"{prefix}a"]
        assert [check.ok for check in checks] == [not wrong, True]


def test_a_gate_frame_of_unknown_label_is_no_good_one(make_bundle: MakeBundle) -> None:
    judged = gate([*range(10, 30), *range(60, 70)], 0.5)
    judged["labels"] = np.repeat(np.array([0, -1, 1], np.int32), 10)
    judged["frames"][10:20] = 90
    with opened(make_bundle(npz={GATE: judged})) as program:
        assert {check.subject: check.ok for check in replay_gate(program)} == {"decisions": False, "a": True}


def test_what_a_gate_set_cannot_show(make_bundle: MakeBundle) -> None:
    for brightness, labels, lacks in (
        ([10, 20, 60, 70], [0, 0, 1, 1], []),
        ([10, 20, 60, 70], [0, 0, -1, -1], ["whether defects still stand out"]),
        ([10, 20, 30, 40], [0, 0, 1, 1], ["verdicts of both kinds (all scores of the gate set lie below"]),
        ([60, 70, 80, 90], [0, 0, 1, 1], ["verdicts of both kinds (all scores of the gate set lie above"]),
    ):
        judged = gate(brightness, 0.5) | {"labels": np.array(labels, np.int32)}
        with Bundle.load(make_bundle(npz={GATE: judged})) as bundle:
            found = gate_lacks(bundle)
        assert len(found) == len(lacks) and all(
            text.startswith(start) for text, start in zip(found, lacks, strict=True)
        )


@pytest.mark.parametrize("has_golden", [True, False])
def test_a_frame_without_a_number_is_found_where_nothing_was_recorded(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, has_golden: bool
) -> None:
    flat, hole = np.zeros((1, 2, 2)), np.array([[[0, 1], [np.nan, 2]]])
    right, score, spot = (0.5, flat), (np.nan, flat), (0.5, hole)
    with opened(make_bundle(npz={GOLDEN: told(2)} if has_golden else {})) as program:
        for results, bad in (((right, right), 0), ((right, score), 1), ((spot, right), 1), ((score, spot), 2)):
            given, judged = iter(results), []

            def judge(
                program: Program, frame: np.ndarray, product: int, given: Any = given, judged: Any = judged
            ) -> Any:
                judged.append((int(frame.max()), product))
                return next(given)

            with monkeypatch.context() as patch:
                patch.setattr("andon.runtime.replay._judge", judge)
                (check,) = replay_finite(program, 2)
            assert (check.value, check.ok) == (bad, bad == 0)
            assert judged == ([(10, 0), (20, 0)] if has_golden else [(128, 0), (128, 1)]), "a frame of each product"


def test_verify_says_what_it_could_not_check(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    good = {GOLDEN: told(2)}
    judged = gate([10, 20, 60, 70], 0.5)
    for npz, told_of in (
        (good, ["decisions beyond"]),
        (good | {GATE: judged}, ["products that the classifier tells"]),
        (good | {GATE: judged | {"logits": told()["encode.logits"][[0, 1, 5, 6], 0]}}, []),
    ):
        code, result, text = run(capsys, "verify", "--bundle", make_bundle(npz=npz), *ENGINE)
        assert code == 0 and len(result["not_checked"]) == len(told_of) == text.count("NOT CHECKED: ")
        assert all(part in said for part, said in zip(told_of, result["not_checked"], strict=True))
    reference = looped(make_bundle)
    with opened(reference) as program:
        warm = play_warm(program, FRAMES, IDS)
    npz = {GOLDEN: recorded(reference), GATE: {**judged, "score": np.zeros(4, np.float32)}}
    for more, carried in (({}, True), ({WARM: warm}, False)):
        _, result, _ = run(capsys, "verify", "--bundle", looped(make_bundle, {**npz, **more}), *ENGINE)
        assert any("from frame to frame" in said for said in result["not_checked"]) == carried
        assert any(check["subject"] == "warm state.q" for check in result["checks"]["fp32"]) != carried
