"""andon eval on other thresholds: the table of what they would do, and --threshold, which tries one."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.dataset import open_dataset
from andon.runtime.report import charts

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import golden, held, level, write

MakeBundle = Callable[..., Path]


@pytest.fixture
def calibrated(make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Thresholds of 0.19; good test parts of b score 0.03, 0.08 ... 0.38 , defects 0.61 to 0.64; those of a less."""
    steps = {"alternatives": {"short": [{"run": "encode"}, {"run": "score"}]}}
    root = make_bundle(report={"holdout": held()}, npz={"golden/golden.npz": golden([10, 40])}, **steps)
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)[0] == 0
    for kind, levels in (("bright", (10, 16, 17, 50)), ("good", (0, 2, 3, 4, 5, 7, 8, 14))):
        for i, brightness in enumerate(levels):
            write(data / "a/test" / kind / f"{i:03}.png", level(brightness, "a"))
    return root


def test_eval_says_what_other_thresholds_would_do(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    code, result, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, "--report", page, *ENGINE)
    assert code == 0
    points = {name: p for p in result["trade_off"]["a"] for name in p["names"]}
    assert set(points) == {"now", "best F1", "no miss", *(f"good NG <= {share}%" for share in (1, 5, 10))}
    now = points["now"]
    assert (now["false_alarms"], now["missed"]) == (0, 3) and now["threshold"] == result["products"]["a"]["threshold"]
    assert (points["no miss"]["missed"], points["no miss"]["false_alarms"]) == (0, 1)
    assert points["good NG <= 10%"]["false_alarms"] == 0 and points["good NG <= 10%"]["missed"] == 1
    assert result["products"]["b"]["miss_rate"] == 0 and result["trade_off"]["b"][-1]["names"] == ["now"]
    assert "looks better on them than it is on new ones" in text and "  now\n" in text
    shown = page.read_text()
    assert "<h2>Thresholds</h2>" in shown and "errors of a by threshold" in shown and ">now 0.19<" in shown
    next_step = next(line for line in text.splitlines() if line.startswith("next, to miss fewer"))
    value = points["good NG <= 5%"]["threshold"]  # 5% are promised
    assert f"andon eval --bundle {calibrated} --data {data} --threshold a={value}; to keep it" in next_step
    assert f"andon calibrate --bundle {calibrated} --set a={value} (by hand" in next_step and "b=" not in next_step
    _, _, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, "--program", "short", *ENGINE)
    next_step = next(line for line in text.splitlines() if line.startswith("next, to miss fewer"))
    assert "--program short --threshold a=" in next_step and "--programs short (by hand" in next_step, "of its scale"


def test_the_next_command_is_of_the_same_images(
    calibrated: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "a", data / "no product of the bundle")
    chosen = ("--products", "a", "--limit", 50, "--on-corrupt", "skip", "--roi", "a=0,0,8,8")
    code, result, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, *chosen, *ENGINE)
    printed = next(line for line in text.splitlines() if line.startswith("next, to miss fewer"))
    command = shlex.split(printed.partition("andon ")[2].partition(";")[0])
    code, again, text = run(capsys, *command, *ENGINE)
    assert code == 0 and again["thresholds_tried"], text
    assert again["images"] == result["images"] and again["mean"]["image_AUROC"] == result["mean"]["image_AUROC"]
    assert "[0, 0, 8, 8] is cut out of pictures of 8 x 8, as --roi says" in text


def test_the_threshold_that_it_offers_to_keep_is_one_of_the_same_program(
    calibrated: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Bundle.load(calibrated)
    _, _, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, "--program", "short", *ENGINE)
    keep = text.partition("to keep it: andon ")[2].partition(" (by hand")[0]
    assert run(capsys, *shlex.split(keep))[0] == 0
    after = Bundle.load(calibrated)
    assert after.threshold("a") == before.threshold("a"), "its scores have another scale"
    assert after.threshold("a", "short") != before.threshold("a", "short")


def test_a_threshold_can_be_tried_and_leaves_the_bundle_as_it_is(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, arguments = tmp_path / "r.html", ("eval", "--bundle", calibrated, "--data", data, *ENGINE)
    with Bundle.load(calibrated) as bundle:
        before = bundle.id
    code, result, text = run(capsys, *arguments, "--threshold", "a=0.09", "--report", page)
    a, b = (result["products"][product] for product in "ab")
    assert code == 0 and result["thresholds_tried"] == {"a": 0.09}
    assert (a["threshold"], a["miss_rate"], a["false_alarm_rate"]) == (0.09, 0, 1 / 8) and b["threshold"] != 0.09
    said = "threshold 0.09 is tried in place of the bundle's 0.19: it promises nothing, and is not stored"
    assert f"a: {said}" in text and said in unescape(page.read_text()) and list(result["promises"]) == ["b"]
    names = [p["names"] for p in result["trade_off"]["a"]]
    assert names[0] == ["bundle's"] and names[-1] == ["tried", "best F1", "no miss"] and "next, to" not in text
    with Bundle.load(calibrated) as bundle:
        assert bundle.id == before
    _, both, _ = run(capsys, *arguments, "--threshold", "a=0.09", "--threshold", "0.3")
    assert both["thresholds_tried"] == {"a": 0.09, "b": 0.3} and both["products"]["b"]["false_alarm_rate"] == 2 / 8


def test_a_threshold_can_be_tried_on_recorded_verdicts(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the line would have decided with it; what it did not decide stays so."""
    file = tmp_path / "line.jsonl"
    tests = sorted(open_dataset(str(data)).select(split="test", products=["a"]).samples, key=lambda s: not s.good)
    line = {"ts_judged": "2026-01-01T00:00:00Z", "method": "synthetic", "bundle": "x", "product": "a", "latency_ms": {}}
    with file.open("w") as lines:
        for i, s in enumerate(tests):
            verdict = (
                {"score": float(i), "threshold": 100.0, "label": "OK"} if i else dict.fromkeys(("score", "threshold"))
            )
            verdict = {"label": "UNKNOWN", **verdict, "id": s.key, "part_id": s.key.removesuffix(".png")}
            lines.write(json.dumps(line | verdict) + "\n")
    arguments = ("eval", "--bundle", calibrated, "--data", data, "--products", "a", "--verdicts", file, *ENGINE)
    _, result, text = run(capsys, *arguments)
    assert result["products"]["a"]["miss_rate"] == 1 and f"--verdicts {file} --threshold a=" in text
    _, result, text = run(capsys, *arguments, "--threshold", 7.5)
    assert "a: threshold 7.5 is tried in place of the line's 100: it" in text and "line's\n" in text
    figures = result["products"]["a"]
    assert figures["threshold"] == 7.5 and (figures["false_alarm_rate"], figures["miss_rate"]) == (0, 0)
    assert result["unknown"] == 1 and result["not_compared"] == [], "it is not the line's threshold that is told of"
    for chosen, told in (("a=3", []), ("a=100", ["a"])):
        assert run(capsys, "calibrate", "--bundle", calibrated, "--set", chosen)[0] == 0
        _, result, text = run(capsys, *arguments)
        assert result["by_hand"] == told and ("set by hand in the bundle" in text) is bool(told), "the line had 100"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("--threshold c=1", "--threshold of an unknown product 'c'"),
        ("--threshold a=1 --threshold a=2", "--threshold says twice what is meant"),
        ("--threshold 1 --samplers", "--samplers and --threshold exclude each other"),
        ("--camera lane2 --few-shot 1", "--few-shot and --camera exclude each other"),
        ("--threshold 1 --few-shot 1", "--few-shot and --threshold exclude each other"),
        ("--threshold a=", "is not a number as 36.9 or PRODUCT=36.9"),
        ("--threshold a=nan", "is not a number as 36.9 or PRODUCT=36.9"),
    ],
)
def test_a_threshold_that_makes_no_sense_is_refused(
    make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str], given: str, error: str
) -> None:
    code, _, said = run(capsys, "eval", "--bundle", make_bundle(), "--data", data, *given.split(), *ENGINE)
    assert code != 0 and error in said and "next:" in said


def test_the_chart_steps_at_every_score_and_marks_what_is_in_force() -> None:
    chart = charts.errors(np.array([1.0, 2.0]), np.array([2.0, 3.0]), {"now": 2.5}, "t")
    assert chart.count('class="threshold"') == 1 and "now 2.5" in chart
    alarms, missed = (part.partition('"')[0].split("L") for part in chart.split(' d="M')[1:])
    assert len(alarms) == len(missed) >= 5, "two points for each step"
    assert alarms[0].split(",")[1] == missed[-1].split(",")[1], "all are alarms at the left, all missed at the right"
