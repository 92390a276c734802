"""Detector: labels, products, NaN, and the seam of online calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.bundle import Bundle, write_manifest
from andon.runtime.detector import Detector
from andon.runtime.errors import ConfigError, ProductError
from andon.runtime.manifest import Threshold

MakeBundle = Callable[..., Path]


def threshold(value: float) -> Threshold:
    return Threshold(value=value, false_alarm_rate=0.01, samples=200)


def test_scores_are_held_against_the_products_threshold(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    with Bundle.load(path) as bundle:
        bundle.save_thresholds({"a": {"default": threshold(0.5)}, "b": {"default": threshold(1.5)}})
    image = np.full((9, 7, 3), 100, np.uint8)  # score 100 * 0.01
    with Detector.open(path, backend="onnxruntime", threads=1) as detector:
        assert [detector.judge_image(image, p).label for p in "ab"] == ["NG", "OK"]
        score = detector.judge_image(image, "a").score
        assert score is not None
        detector.set_threshold("a", threshold(score))
        assert detector.judge_image(image, "a").label == "OK"  # NG is above the threshold, not at it
        detector.set_threshold("b", None)
        judgement = detector.judge_image(image, "b")
        assert (judgement.label, judgement.reason, judgement.score) == ("UNKNOWN", "no_threshold", pytest.approx(1.0))
        assert set(judgement.latency_ms) == {"preprocess", "encode", "score", "total"}
        with pytest.raises(ProductError, match="unknown product 'c'"):
            detector.judge_image(image, "c")


def test_auto_takes_the_product_with_the_largest_logit(make_bundle: MakeBundle) -> None:
    with Detector.open(make_bundle(), backend="onnxruntime", threads=1) as detector:
        for channel, product in ((0, "a"), (1, "b")):
            image = np.zeros((4, 4, 3), np.uint8)
            image[:, :, channel] = 50
            judgement = detector.judge_image(image, "auto")
            assert (judgement.product, judgement.predicted) == (product, product)
            assert detector.judge_image(image, "b" if product == "a" else "a").predicted == product


def test_auto_without_a_classifier_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle(outputs={"score": "score.score", "map": "score.map"})
    with (
        Detector.open(path, backend="onnxruntime", threads=1) as detector,
        pytest.raises(ConfigError, match="cannot tell the product") as refused,
    ):
        detector.judge_image(np.zeros((4, 4, 3), np.uint8))
    assert "--product given (andon eval)" in str(refused.value.next_step), "no command has --product NAME"


@pytest.mark.parametrize(
    ("verification", "warned"),
    [
        ({}, {("fp16", "short"), ("fp16", "long")}),  # a bundle from before there was a record of it
        ({"gated": {"fp16": ["default", "short"]}}, {("fp16", "long")}),
    ],
)
def test_a_program_whose_decisions_no_gate_has_seen_is_warned_of(
    make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture, verification: dict[str, Any], warned: set[Any]
) -> None:
    """Export chooses a stage's precision by the default program; FP32 is what it compares with."""
    steps = [{"run": "encode"}, {"run": "score"}]
    path = make_bundle(alternatives={"short": steps, "long": steps}, verification=verification)
    with Bundle.load(path) as bundle:
        manifest = bundle.manifest
    stages = {
        name: stage.model_copy(update={"files": {**stage.files, "fp16": stage.files["fp32"]}})
        for name, stage in manifest.stages.items()
    }
    write_manifest(path, manifest.model_copy(update={"stages": stages, "variants": ("fp32", "fp16")}))
    for variant in ("fp32", "fp16"):
        for program in ("default", "short", "long"):
            caplog.clear()
            Detector.open(path, backend="onnxruntime", variant=variant, program=program, threads=1).close()
            told = [
                r for r in caplog.records if f"program {program} keeps its decisions in {variant}" in r.getMessage()
            ]
            assert bool(told) == ((variant, program) in warned), (variant, program)


def test_an_unusable_image_is_unknown(make_bundle: MakeBundle) -> None:
    with Detector.open(make_bundle(), backend="onnxruntime", threads=1) as detector:
        for bad in (np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8)):
            judgement = detector.judge_image(bad, "a")
            assert (judgement.label, judgement.reason, judgement.score) == ("UNKNOWN", "bad_frame", None)


NAN = """accumulate (float[1,3] u, float[1,3] total) => (float[1,3] total_next) {
    total_next = Add(u, total)
}"""
LOG = """encode (uint8[1,4,4,3] image) => (float[1,3] u, float[1,2] logits) {
    x = Cast<to=1>(image)
    m = ReduceMean<axes=[1,2], keepdims=0>(x)
    u = Log(m)
    logits = Slice(u, start, stop, axis)
}"""


@pytest.mark.parametrize("of", ["u", "Relu(u)"], ids=["score and map", "the map alone"])
def test_what_is_not_a_number_is_unknown_and_does_not_poison_the_next_frame(make_bundle: MakeBundle, of: str) -> None:
    from .conftest import SCORE  # type: ignore[import-not-found]

    score = SCORE if of == "u" else SCORE.replace("score = Re", "r = Relu(u)\n    score = Re").replace("0>(u)", "0>(r)")
    path = make_bundle(
        stages={
            "encode": (LOG, {"image": "frame"}),
            "accumulate": (NAN, {"u": "encode.u", "total": "carry"}),
            "score": (score, {"u": "accumulate.total_next"}),
        },
        program=[
            {"run": "encode"},
            {
                "loop": "accumulate",
                "count": 2,
                "carry": {"total_next": "total"},
                "init": {"total": "state:total"},
                "persist": {"total": "total"},
            },
            {"run": "score"},
        ],
        state={"total": np.zeros((1, 3), np.float32)},
    )
    good, bad = np.full((4, 4, 3), 20, np.uint8), np.zeros((4, 4, 3), np.uint8)
    with Detector.open(path, backend="onnxruntime", threads=1) as detector:
        seen: list[float] = []
        detector.observer = lambda program, judgement: seen.append(float(program.read("score.score")[0]))
        first = detector.judge_image(good, "a").score
        second = detector.judge_image(good, "a").score
        assert first and second == pytest.approx(2 * first, rel=1e-6)
        poisoned = detector.judge_image(bad, "a")
        assert (poisoned.label, poisoned.reason, poisoned.score) == ("UNKNOWN", "not_a_number", None)
        assert detector.judge_image(good, "a").score == pytest.approx(first)
        assert seen == pytest.approx([first, second, first])  # the observer sees scored frames only
