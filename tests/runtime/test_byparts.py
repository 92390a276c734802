"""An evaluation counted by part: figures, the promise in the same unit, and where parts are not known."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from andon.calib.threshold import chance_of_as_many, conformal_threshold
from andon.runtime.byparts import part_metrics
from andon.runtime.dataset import Sample
from andon.runtime.evaluation import Judged
from andon.runtime.quality import auroc

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import contents, level, write

MakeBundle = Callable[..., Path]


def judged(part: str, labels: str, defect: str = "good", scores: float = 1.0) -> list[Judged]:
    """Images of a part; labels: N for NG, O for OK, U for UNKNOWN, which has no score."""
    names = {"N": "NG", "O": "OK", "U": "UNKNOWN"}
    return [
        Judged(Sample(Path("x"), f"{defect}/{part}_{i}", "a", defect, "test"), names[c], s, "a", None)
        for i, c in enumerate(labels)
        for s in [math.nan if c == "U" else scores + (c == "N")]
    ]


def counted(images: list[Judged]) -> dict[str, float | None]:
    return part_metrics(images, {j.sample.key: j.sample.key.split("/")[1].split("_")[0] for j in images})["a"]


def test_each_part_counts_once_with_the_share_of_its_images() -> None:
    good = judged("1", "N" * 10) + judged("2", "O") + judged("3", "OONN") + judged("4", "UU")
    bad = judged("1", "NNNO", "scratch", 3) + judged("2", "O", "scratch", 3) + judged("2", "N", "dent", 3)
    found = counted(good + bad)
    assert found["false_alarm_rate"] == pytest.approx((1 + 0 + 0.5) / 3), "by image it is 12 of 15"
    assert found["miss_rate"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert found["unknown_rate"] == pytest.approx(1 / 7)
    assert (found["good"], found["defective"]) == (4, 3), "of one part's images those with one label"
    assert found["image_AUROC"] == 1, "of what has a score"
    nothing = counted(judged("1", "UU"))
    assert [nothing[n] for n in ("false_alarm_rate", "miss_rate", "image_AUROC", "unknown_rate")] == [None] * 3 + [1]


def test_where_every_image_is_of_a_part_of_its_own_the_figures_are_those_by_image() -> None:
    rng = np.random.default_rng(0)
    images = [
        Judged(
            Sample(Path("x"), str(i), "a", "good" if i % 2 else "dent", "test"), "NG" if s > 1 else "OK", s, "a", None
        )
        for i, s in enumerate(np.round(rng.standard_normal(60) + np.tile([0.5, 0], 30), 1).tolist())
    ]
    truth = [not j.sample.good for j in images]
    alone, twice = part_metrics(images, {str(i): str(i) for i in range(60)})["a"], [*images, *images[:2], *images[:2]]
    assert alone["image_AUROC"] == pytest.approx(auroc([j.score for j in images], truth))
    more = [Judged(Sample(Path("x"), f"{j.sample.key}+{k}", "a", j.sample.label, "test"), j.label, j.score, "a", None)
            for k, j in enumerate(twice)]  # fmt: skip
    found = part_metrics(more, {j.sample.key: j.sample.key.split("+")[0] for j in more})["a"]
    assert found == pytest.approx(alone), "to have a picture of a part three times changes nothing"


@pytest.mark.parametrize("alike", [0.5, 1.0], ids=["images that differ", "images that are one"])
def test_the_chance_that_is_told_of_parts_is_not_too_small(alike: float) -> None:
    """It is that of parts whose images are all decided alike: of others fewer lie far from the promise."""
    rng, images = np.random.default_rng(0), 4

    def draw(parts: int) -> np.ndarray:
        return alike * rng.standard_normal((parts, 1)) + math.sqrt(1 - alike**2) * rng.standard_normal((parts, images))

    names = [str(i // images) for i in range(39 * images)]
    chances = []
    for _ in range(400):
        threshold = conformal_threshold(draw(39).ravel(), 0.1, parts=names)
        weight = float((draw(30) > threshold).mean(1).sum())
        chances.append(chance_of_as_many(math.floor(weight + 1e-9), 30, 39, 0.1))
    assert np.mean(np.array(chances) <= 0.05) <= 0.075


@pytest.fixture
def bursts(data: Path) -> Path:
    """The set with good test images of four parts of each product, of the last five images: those are bright."""
    for product in "ab":
        shutil.rmtree(data / product / "test/good")
        names = ["s1_0", "s2_0", "s3_0", *(f"s4_{i}" for i in range(5))]
        for name, brightness in zip(names, (2, 5, 9, 50, 51, 52, 53, 54), strict=True):
            image = level(brightness, product)
            image[:, :, 2] = 1  # what no image of the training is
            write(data / product / "test/good" / f"{name}.png", image)
        for image in sorted((data / product / "train/good").iterdir())[20:]:
            image.unlink()
    return data


def test_eval_holds_a_promise_of_parts_against_the_rate_of_parts(
    make_bundle: MakeBundle, bursts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thresholds are set on five parts of four images each; by image the rate is above what they promise."""
    held = [contents(bursts, 4 * i + 1, 4 * i + 4, p) for p in "ab" for i in range(5)]
    record = {"fingerprints": {"thresholds": contents(bursts, 1, 20)}, "parts": held}
    page, told = tmp_path / "r.html", r"/(s\d)_"

    def evaluate(record: dict[str, object], *more: object) -> tuple[int, dict, str]:
        root = make_bundle(report=record)
        calibrate = ("calibrate", "--bundle", root, "--data", bursts, "--false-alarm-rate", 0.334, *ENGINE)
        assert run(capsys, *calibrate)[0] == 0
        return run(capsys, "eval", "--bundle", root, "--data", bursts, "--report", page, *more, *ENGINE)

    code, result, text = evaluate(record)
    assert code == 0 and result["by_part"] is None and result["promises"] == {}
    assert result["not_compared"] == ["a", "b"] and result["over_promise"] == []
    said = "at most 33.4% false alarms were promised of parts (the calibration's 20 images show 5), and it is not known"
    assert f"a: {said}" in text and "say it with --group-by" in text and "Next: say it" in page.read_text()

    for code, result, text in (evaluate(record, "--group-by", told), evaluate({**record, "group_by": told})):
        assert code == 0 and result["products"]["a"]["false_alarm_rate"] == 5 / 8
        assert result["by_part"]["a"]["false_alarm_rate"] == 1 / 4 and result["by_part"]["a"]["good"] == 4
        assert result["by_part"]["a"]["defective"] == 4, "of which nothing is said: parts of their own"
        rate = {"false_alarm_rate": 1 / 4, "promised": 0.334, "images": 8, "parts": 4, "alarms": 5}
        assert result["promises"]["a"] == rate and result["over_promise"] == result["not_compared"] == []
        said = (
            "5 of 8 good images of 4 parts are called NG, 25.0% with each part counted once, where at most 33.4% were"
        )
        assert f"a: {said}" in text and "by part" in text and "By part" in page.read_text()
        assert "false alarm rate by part" in page.read_text()

    code, result, text = evaluate({**record, "group_by": r"/(t\d)_"})
    assert code == 0 and result["not_compared"] == ["a", "b"], "training's names are not those of this set"
    assert "warning: training told parts by /(t\\d)_, which does not say what these images show" in text
    code, result, text = evaluate(record, "--group-by", r"/(t\d)_")
    assert code == 1 and "does not say which part" in result["error"]
    code, result, text = evaluate(record, "--group-by", r"s\d_\d")
    assert code == 0 and result["by_part"] is None and "no two images show the same part" in text
    assert result["promises"]["a"]["parts"] == 8 and result["over_promise"] == ["a", "b"], "each image is a part"
