"""Good images unlike the calibration's: said where chance is excluded, silent where it is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from andon.runtime.dataset import Sample
from andon.runtime.detector import Detector
from andon.runtime.evaluation import Judged
from andon.runtime.manifest import Threshold
from andon.runtime.unlike import Parts, held, not_compared, over_promise, unlike_calibration

MakeBundle = Callable[..., Path]
PROMISE = Threshold(value=0.5, false_alarm_rate=0.05, samples=19)


@pytest.fixture
def detector(make_bundle: MakeBundle) -> Iterator[Detector]:
    with Detector.open(make_bundle(), backend="onnxruntime", threads=1) as opened:
        opened.set_threshold("a", PROMISE)
        yield opened


def judged(labels: str, product: str = "a", good: bool = True) -> list[Judged]:
    """Images of product a; labels: N for NG, O for OK, U for UNKNOWN."""
    names = {"N": "NG", "O": "OK", "U": "UNKNOWN"}
    sample = Sample(Path("x.png"), "x", "a", "good" if good else "scratch", "test")
    return [Judged(sample, names[c], float("inf") if c == "U" else 1.0, product, None) for c in labels]


def unlike(detector: Detector, images: list[Judged], parts: Parts = None) -> dict[str, str]:
    return unlike_calibration(held(detector, images, parts))


def over(detector: Detector, images: list[Judged], parts: Parts = None) -> dict[str, str]:
    return over_promise(held(detector, images, parts))


def test_many_alarms_are_said_and_a_few_are_not(detector: Detector) -> None:
    found = unlike(detector, judged("N" * 8 + "O" * 2))
    assert list(found) == ["a"] and "8 of 10 good images are called NG where 5.0% were promised" in found["a"]
    assert "the 19 of the calibration" in found["a"] and "probability 1e-05" in found["a"]
    assert "probability below 1e-09" in unlike(detector, judged("N" * 200))["a"]
    assert not unlike(detector, judged("NN" + "O" * 8))
    assert not unlike(detector, [])


def test_a_rate_above_the_promise_stands_beside_it(detector: Detector) -> None:
    """Bad luck or not: who promised 5 % wants to know of 20 %; what is unlike is said as that alone."""
    said = over(detector, judged("NN" + "O" * 8))["a"]
    assert "2 of 10 good images are called NG, 20.0%, where at most 5.0% were promised" in said
    assert said.endswith("probability 0.1")
    assert not over(detector, judged("N" + "O" * 19)), "just what was promised"
    assert not over(detector, judged("N" * 8 + "O" * 2)) and not over(detector, judged("U" * 9))
    detector.set_threshold("a", PROMISE.model_copy(update={"samples": 3000, "false_alarm_rate": 1 / 3001}))
    assert "0.08%, where at most 0.033% were promised" in over(detector, judged("N" + "O" * 1249))["a"]
    detector.set_threshold("a", PROMISE.model_copy(update={"source": "provisional, from 1 support image"}))
    assert over(detector, judged("N" * 9))["a"].endswith("were promised"), "the chance is not known"
    detector.set_threshold("a", PROMISE.model_copy(update={"samples": 0, "false_alarm_rate": 1.0}))
    assert not over(detector, judged("N" * 9)), "by hand: nothing was promised"
    detector.set_threshold("a", PROMISE.model_copy(update={"samples": 0}))
    assert not over(detector, judged("N" * 9)), "by nobody's images"
    detector.set_threshold("a", PROMISE.model_copy(update={"images": "".join(f"{i:016x}" for i in range(19))}))
    assert over(detector, judged("NN" + "O" * 8)) == {"a": said}, "an image a part: no part need be known"


def test_parts_are_what_the_promise_is_held_against_where_they_are_known(detector: Detector) -> None:
    """Ten pictures of a part are no ten parts: one in three of them is over 5 %, and may happen."""
    images = [replace(j, sample=replace(j.sample, key=str(i))) for i, j in enumerate(judged("N" * 10 + "OO"))]
    assert unlike(detector, images)["a"].startswith("10 of 12 good images are called NG where 5.0%")
    parts = {str(i): "burst" if i < 10 else str(i) for i in range(12)}
    assert not unlike(detector, images, parts)
    said = over(detector, images, parts)["a"]
    assert "10 of 12 good images of 3 parts are called NG, 33.3% with each part counted once, where at most" in said
    assert said.endswith("probability at most 0.1")
    alone = {str(i): str(i) for i in range(12)}
    assert unlike(detector, images, alone) == unlike(detector, images)
    detector.set_threshold("a", PROMISE.model_copy(update={"images": "".join(f"{i:016x}" for i in range(40))}))
    assert not over(detector, images), "of parts: it is not known how many these are"
    assert "40 images show 19), and it is not known which part" in not_compared(detector, images)["a"]
    assert "33.3% with each part" in over(detector, images, parts)["a"]


def test_what_is_no_matter_of_the_light_does_not_count(detector: Detector) -> None:
    assert not unlike(detector, judged("U" * 30)), "nothing was judged: that is for the table of labels"
    assert not unlike(detector, judged("N" * 30, product="b")), "the classifier took them for b"
    assert not unlike(detector, judged("N" * 30, good=False)), "alarms on defects are what is wanted"
    mixed = judged("N" * 6 + "U" * 30) + judged("O" * 30, good=False)
    assert "6 of 6 good images" in unlike(detector, mixed)["a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 0},  # by hand
        {"false_alarm_rate": 1.0},
        {"samples": 5},  # promises less than it says: not conformal
        {"source": "provisional, from 1 support image, 2026-01-01"},
    ],
)
def test_thresholds_of_which_the_chance_is_not_known_are_left_out(
    detector: Detector, changes: dict[str, object]
) -> None:
    detector.set_threshold("a", PROMISE.model_copy(update=changes))
    assert not unlike(detector, judged("N" * 40))
    detector.set_threshold("a", None)
    assert not unlike(detector, judged("N" * 40))


def test_programs_with_a_past_are_left_out(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their good images were not scored as the calibration's were, whatever the light."""
    from andon.runtime.manifest import Loop

    loop = Loop(loop="s", count=1, carry={"x": "y"}, init={"y": "state:y"}, persist={"y": "y"})
    monkeypatch.setattr("andon.runtime.unlike.programs", lambda manifest: {"default": (loop,)})
    assert not unlike(detector, judged("N" * 40))
