"""The judge on a real engine: OK, NG and every reason to be UNKNOWN; the region of interest, smoothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.errors import EngineError, ProductError
from andon.runtime.judge import Judge
from andon.runtime.slot import missed
from andon.runtime.types import UNKNOWN_REASONS

from .judging import frame, picture


def test_ok_and_ng_with_regions_in_camera_pixels(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge()
    good = judge.judge(frame(picture(60), part_id="A")).verdict
    assert (good.label, good.reason, good.product, good.part_id, good.seq) == (
        "OK", "score_within_threshold", "mono", "A", 7,
    )  # fmt: skip
    assert good.score == pytest.approx(60 / 255, abs=1e-3) and good.threshold == 0.5 and good.regions == ()
    assert set(good.latency_ms) == {"wait", "preprocess", "judge", "total"}
    bad = judge.judge(frame(picture(60, (16, 32, 8, 4)))).verdict
    assert (bad.label, bad.reason) == ("NG", "score_above_threshold")
    (region,) = bad.regions
    assert region.bbox == (16, 32, 8, 4) and region.area == 32 and region.peak == pytest.approx(1.0)
    assert bad.id > good.id and bad.bundle == judge.detector.bundle.id


def test_a_threshold_of_the_line_alone_judges_and_shows_regions(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"thresholds": {"mono": 0.5}, "pixel_threshold": 0.5, "min_area": 1}
    judge = make_judge(make_bundle(tmp_path / "uncalibrated", thresholds=None), judge=settings)
    assert judge.judge(frame(picture(60))).verdict.label == "OK"
    bad = judge.judge(frame(picture(60, (16, 32, 8, 4)))).verdict
    assert (bad.label, bad.threshold, [region.bbox for region in bad.regions]) == ("NG", 0.5, [(16, 32, 8, 4)])
    assert judge.judge(frame(picture(60), product="poly")).verdict.reason == "no_threshold"
    with pytest.raises(ProductError, match="nut"):
        make_judge(judge={"thresholds": {"nut": 0.5}})


def test_a_product_is_taken_that_the_camera_may_be_set_to(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge()
    asked = [("cam", "poly"), ("cam", "nut"), ("cam", "auto"), ("cam9", "poly")]
    assert [judge.takes(*each) for each in asked] == [True, False, False, False]


def test_latencies_count_from_when_the_frame_was_taken(make_judge: Callable[..., Judge]) -> None:
    """A lighting or a rejecting gate is timed by them."""
    judge, long_ago = make_judge(), replace(frame(picture(60)), monotonic=time.monotonic() - 1000)
    stages = judge.judge(long_ago).verdict.latency_ms
    assert 1e6 <= stages["wait"] < stages["total"] < 2e6
    assert stages["wait"] + stages["preprocess"] + stages["judge"] == pytest.approx(stages["total"], rel=1e-2)
    assert 1e6 <= judge.unknown(missed(long_ago, "no_frame", "")).verdict.latency_ms["total"] < 2e6


def test_the_region_of_interest_is_all_that_is_judged(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge(roi=(32, 0, 32, 32))
    outside = judge.judge(frame(picture(10, (0, 40, 8, 8))))
    assert outside.verdict.label == "OK" and outside.box == (32, 0, 32, 32)
    inside = judge.judge(frame(picture(10, (40, 8, 4, 6)))).verdict
    assert inside.label == "NG" and inside.regions[0].bbox == (40, 8, 4, 6)
    for size in ((20, 20), (48, 48)):  # the second has a part of the region
        small = judge.judge(frame(picture(10, size=size)))
        assert (small.verdict.label, small.verdict.reason) == ("UNKNOWN", "bad_frame"), "another resolution: no guess"
        assert small.detail.endswith(f"(32, 0, 32, 32) does not lie in the picture of {size[0]} x {size[1]} pixels")


def test_not_a_number_is_unknown_and_the_next_frame_is_judged(
    make_judge: Callable[..., Judge], nan_bundle: Path
) -> None:
    judge = make_judge(nan_bundle)
    dark = judge.judge(frame(picture(0))).verdict
    assert (dark.label, dark.reason, dark.score) == ("UNKNOWN", "not_a_number", None)
    assert judge.judge(frame(picture(20))).verdict.label == "OK"


def test_not_a_number_in_the_map_alone_is_unknown(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    text = """judge (uint8[1,32,32,3] image) => (float[1,1,32,32] map, float[1] score) {
        x = Cast<to=1>(image)
        m = ReduceMean<axes=[3], keepdims=0>(x)
        shape = Constant<value = int64[4] {1,1,32,32}>()
        g = Reshape(m, shape)
        map = Div(g, g)
        score = ReduceMin<axes=[1,2,3], keepdims=0>(g)
    }"""
    judge = make_judge(make_bundle(tmp_path / "nan-map", text))
    verdict = judge.judge(frame(picture(0))).verdict
    assert (verdict.label, verdict.reason) == ("UNKNOWN", "not_a_number")
    assert judge.judge(frame(picture(9))).verdict.label == "NG"


def test_no_threshold_is_unknown(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    judge = make_judge(make_bundle(tmp_path / "uncalibrated", thresholds=None))
    verdict = judge.judge(frame(picture(60))).verdict
    assert (verdict.label, verdict.reason) == ("UNKNOWN", "no_threshold")
    assert verdict.score == pytest.approx(60 / 255, abs=1e-3), "what is known is said"
    judge.set_threshold("mono", 0.1)
    assert judge.judge(frame(picture(60))).verdict.label == "NG"


def test_unknown_product_is_unknown(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge()
    verdict = judge.judge(frame(picture(60), product="nut")).verdict
    assert (verdict.label, verdict.reason, verdict.product) == ("UNKNOWN", "wrong_product", "nut")
    auto = judge.judge(frame(picture(60), product=None)).verdict
    assert (auto.label, auto.reason) == ("UNKNOWN", "wrong_product"), "auto, and the bundle has no classifier"
    never = judge.unknown(missed(frame(picture(1), product="auto"), "no_frame", "a trigger behind `product` auto"))
    assert never.verdict.product is None
    with pytest.raises(ProductError, match="nut"):
        make_judge(product="nut")


@pytest.mark.parametrize("error", [EngineError("CUDA is gone"), MemoryError("no room")])
def test_an_engine_error_is_unknown(
    make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    judge = make_judge()

    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(judge.detector, "judge_image", fail)
        judgement = judge.judge(frame(picture(60), part_id="B"))
    assert (judgement.verdict.label, judgement.verdict.reason) == ("UNKNOWN", "engine_error")
    assert judgement.verdict.part_id == "B" and str(error) in judgement.detail
    assert judge.judge(frame(picture(60))).verdict.label == "OK"


def test_a_late_judgement_is_unknown(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge()
    late = judge.judge(frame(picture(60), deadline=time.monotonic() - 1)).verdict
    assert (late.label, late.reason) == ("UNKNOWN", "deadline_missed") and late.score is not None
    assert judge.judge(frame(picture(60), deadline=time.monotonic() + 60)).verdict.label == "OK"


@pytest.mark.parametrize("check", [False, True])
def test_a_part_that_the_classifier_takes_for_another_product_is_unknown_on_request(
    make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    judge = make_judge(judge={"check_product": check})
    assert judge.judge(frame(picture(60))).verdict.label == "OK", "nothing told its product"
    right = judge.detector.judge_image
    monkeypatch.setattr(judge.detector, "judge_image", lambda *given: replace(right(*given), predicted="poly"))
    for shade in (60, 250):
        judgement = judge.judge(frame(picture(shade)))
        verdict = judgement.verdict
        if check:
            assert (verdict.label, verdict.reason) == ("UNKNOWN", "wrong_product"), "neither OK nor NG of the other"
            assert judgement.detail == "expected mono, the classifier sees poly"
            assert (verdict.product, verdict.threshold) == ("mono", 0.5) and verdict.score is not None
        else:
            assert verdict.label == ("OK" if shade == 60 else "NG")
        assert judge.judge(frame(picture(shade), product="poly")).verdict.label == ("OK" if shade == 60 else "NG")


def test_regions_are_of_the_lines_settings_before_the_bundles(make_judge: Callable[..., Judge]) -> None:
    image = picture(60)
    for (x, y, width, height), shade in (((4, 4, 8, 4), 255), ((30, 30, 6, 6), 220), ((50, 50, 2, 2), 255)):
        image[y : y + height, x : x + width] = shade

    def boxes(**settings: Any) -> list[tuple[int, int, int, int]]:
        verdict = make_judge(judge=settings).judge(frame(image)).verdict
        assert verdict.label == "NG"
        return sorted(region.bbox for region in verdict.regions)

    first, second, small = (4, 4, 8, 4), (30, 30, 6, 6), (50, 50, 2, 2)
    assert boxes(min_area=1) == [first, second, small] and boxes(min_area=10) == [first, second]
    assert boxes(min_area=1, pixel_threshold=0.95) == [first, small]
    assert boxes(min_area=1, max_regions=1) in ([first], [small])


class Memory:
    """A memory that is broken for mono."""

    teaches_first = False

    def unusable(self, product: str) -> str | None:
        return "checksum" if product == "mono" else None

    def version(self, product: str) -> int | None:
        return 17


def test_an_unusable_memory_is_unknown(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge(memory=Memory())
    broken = judge.judge(frame(picture(60))).verdict
    assert (broken.label, broken.reason, broken.memory_version) == ("UNKNOWN", "memory_unusable", 17)
    assert judge.judge(frame(picture(60), product="poly")).verdict.label == "OK"


def test_a_camera_that_cannot_be_judged_is_said_when_it_begins_and_when_it_ends(
    make_judge: Callable[..., Judge], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "andon.runtime.judge")
    judge = make_judge()
    for product in ("mono", "nut", "nut", "mono", "poly", "mono"):
        judge.judge(frame(picture(60), product=product))
    judge.unknown(missed(frame(picture(1)), "no_frame", "a trigger without a picture"))
    judge.judge(frame(picture(60), product="nut"))
    assert [text.partition(" (")[0] for text in caplog.messages if text.startswith("camera cam")] == [
        "camera cam cannot be judged: wrong_product",
        "camera cam is judged again",
        "camera cam cannot be judged: no_frame",
        "camera cam cannot be judged: wrong_product",
    ]


@pytest.mark.parametrize("reason", UNKNOWN_REASONS)
def test_a_missed_part_is_unknown_with_its_reason(make_judge: Callable[..., Judge], reason: str) -> None:
    verdict = make_judge().unknown(missed(frame(picture(1), part_id="C"), reason, "because")).verdict
    assert (verdict.label, verdict.reason, verdict.part_id, verdict.product) == ("UNKNOWN", reason, "C", "mono")
    assert verdict.score is None


def test_smoothing_is_off_by_default_and_starts_anew_with_a_product(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge(smoothing=0.25)
    scores = [
        judge.judge(frame(picture(shade), product=product)).verdict
        for shade, product in [(0, "mono"), (255, "mono"), (255, "mono"), (255, "mono"), (200, "poly"), (51, "poly")]
    ]
    assert [round(verdict.score or 0, 3) for verdict in scores] == [0, 0.25, 0.438, 0.578, 0.784, 0.638]
    assert [verdict.label for verdict in scores] == ["OK", "OK", "OK", "NG", "NG", "NG"]


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_a_score_on_the_threshold_is_ok(make_judge: Callable[..., Judge], smoothing: float | None) -> None:
    judge = make_judge(smoothing=smoothing)
    score = judge.judge(frame(picture(60))).verdict.score
    judge.set_threshold("mono", score)
    verdict = judge.judge(frame(picture(60))).verdict
    assert verdict.score == verdict.threshold == score and verdict.label == "OK"
