"""Thresholds of the configuration: in force for the model they name, and said wherever they name none."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import andon
import pytest
import yaml
from andon.cli import main
from andon.runtime.app import LineApp
from andon.runtime.bundle import Bundle
from andon.runtime.judge import Judge
from andon.runtime.lineconfig import JudgeConfig, load_line
from andon.runtime.linethresholds import describe, log_thresholds, standing
from andon.runtime.overrides import Overrides, Stored, ThresholdOverride
from andon.runtime.startup import Options
from jsonschema import Draft202012Validator

from ..runtime.bundles import rewrite
from .judging import frame, picture
from .running import LIVE, RunningLine

PATTERN = {"source": {"kind": "test"}, "product": "mono"}
STATUS = json.loads((Path(andon.__file__).parent / "configs/schema/status.json").read_text())


def model_of(path: Path) -> str:
    with Bundle.load(path) as loaded:
        return loaded.model_id


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """Exit code and what `andon check` finds of the thresholds."""

    def run(line: Path) -> tuple[int, str]:
        code = main(["check", "--config", str(line), "--json"])
        findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
        return code, next(each["found"] for each in findings if each["what"] == "thresholds")

    return run


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno == level]
    return [text for text in found if "judge." in text]


def test_a_threshold_that_names_its_model_rests_under_another(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], bundle: Path, dim: str, tmp_path: Path
) -> None:
    """On another scale of scores the number would call every part OK."""
    own = {"value": 0.7, "model": model_of(bundle)}
    settings = {"thresholds": {"mono": own}, "pixel_threshold": {**own, "value": 0.9}}
    judge = make_judge(judge=settings)
    assert judge.threshold("mono") == 0.7
    seen = judge.judge(frame(picture(204, spot=(8, 8, 8, 8)))).verdict
    assert (seen.label, len(seen.regions)) == ("NG", 1) and seen.regions[0].bbox[2] <= 10, "above 0.9, not the picture"
    other = make_judge(make_bundle(tmp_path / "other", dim, thresholds=0.005), judge=settings)
    assert other.threshold("mono") == 0.005 and other.judge(frame(picture(250))).verdict.label == "NG"
    assert other.detector.threshold("mono").pixel == 0.5  # type: ignore[union-attr]  # the bundle's, too
    judge.set_threshold("mono", 0.6)
    assert judge.threshold("mono") == 0.6, "a command's stands before it"
    assert judge.set_threshold("mono", None) == {"before": 0.6, "now": 0.7}
    fast = {**own, "program": "fast"}
    assert make_judge(judge={"thresholds": {"mono": fast}}).threshold("mono") == 0.5, "another program's scores"


def test_a_new_calibration_of_the_model_does_not_change_it(make_judge: Callable[..., Judge], bundle: Path) -> None:
    with Bundle.load(bundle) as loaded:
        names = (loaded.model_id, *loaded.former_ids)
        entry = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": 0.25})
        now = loaded.save_thresholds({"mono": {"default": entry}})
    assert now.id != loaded.id
    for name in names:
        assert make_judge(judge={"thresholds": {"mono": {"value": 0.7, "model": name}}}).threshold("mono") == 0.7


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{value: 0.5}", "mono.model: this key is required"),
        ("{value: 0.5, model: 012345670123}", 'stands in quotes, as in model: "012345678901"'),
        ("{value: 0.5, model: 9876543210ab, porgram: x}", "mono.porgram: unknown key; did you mean 'program'?"),
        ("{value: 0.5, model: newest}", "12 hexadecimal digits; andon check says which model runs (found 'newest')"),
        ("{value: off, model: 9876543210ab}", "mono.value: Input should be a valid number"),
        ("{value: .inf, model: 9876543210ab}", "mono.value: Input should be a finite number"),
    ],
)
def test_what_is_no_threshold_is_refused(
    make_line: Any, capsys: pytest.CaptureFixture[str], written: str, told: str
) -> None:
    line = make_line({"cam0": PATTERN}, bundle="none")
    line.write_text(line.read_text() + f"judge: {{thresholds: {{mono: {written}}}}}\n")
    assert main(["check", "--config", str(line)]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("judge.thresholds") == 1, error


@pytest.mark.parametrize("name", ["hvq-1", "hvq-*"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_check_warns_of_a_plain_number_and_prints_the_line_that_ends_the_warning(
    checked: Any, make_line: Any, make_bundle: Callable[..., Path], tmp_path: Path, name: str, calibrated: bool
) -> None:
    path = make_bundle(tmp_path / "hvq-1", thresholds=0.5 if calibrated else None)
    sections = {"bundle": str(tmp_path / name), "broker": None}
    judge: dict[str, Any] = {"thresholds": {"mono": 0.7}}
    code, said = checked(make_line({"cam0": PATTERN}, judge=judge, **sections))
    assert code == 0 and said.startswith("mono 0.7 (by the configuration" + ("; without it: 0.5)" * calibrated))
    if not calibrated and name == "hvq-1":
        assert said == "mono 0.7 (by the configuration)", "there is nothing in its place, and no other will come"
    else:
        assert "warning: judge.thresholds.mono is a plain number, in force under whatever model runs" in said
        assert ("its promise does not hold" in said and "0.5, calibrated: at most 5.0% false" in said) == calibrated
        assert ("bundle hvq-* means another model after the next export" in said) == ("*" in name)
        line = said.split("write ")[1].split(" (in judge.thresholds)")[0]
        assert line == f'mono: {{value: 0.7, model: "{model_of(path)}"}}'
        judge["thresholds"] = yaml.safe_load(line)
        code, said = checked(make_line({"cam0": PATTERN}, judge=judge, **sections))
        assert code == 0 and said.startswith("mono 0.7 (by the configuration") and "warning" not in said
    judge["thresholds"] = {"mono": {"value": 0.7, "model": "0123456789ab"}}
    code, said = checked(make_line({"cam0": PATTERN}, judge=judge, **sections))
    assert code == (0 if calibrated else 1) and "judge.thresholds.mono is ignored" in said
    if calibrated:
        first, *more = said.splitlines()
        assert first == "mono 0.5 (0.7 of the configuration is ignored: set for another model or program)"
        assert f'mono: {{value: 0.7, model: "{model_of(path)}"}}' in more[-1]


def test_a_plain_pixel_threshold_is_said_and_one_of_the_calibrations_own_value_breaks_no_promise(
    checked: Any, make_line: Any, bundle: Path
) -> None:
    line = make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, judge={"pixel_threshold": 0.9})
    _, said = checked(line)
    assert said.startswith("mono 0.5\nwarning: judge.pixel_threshold is a plain number")
    assert "0.5 of mono, 0.5 of poly" in said and "promise" not in said
    assert f'pixel_threshold: {{value: 0.9, model: "{model_of(bundle)}"}} (in judge)' in said
    rewrite(bundle, lambda m: m.update(thresholds={}, camera_thresholds={"cam0": m["thresholds"]}))
    _, said = checked(line)
    assert "judge.pixel_threshold is a plain number" in said and "0.5 of mono at cam0, 0.5 of poly at cam0" in said
    rewrite(bundle, lambda m: m.update(thresholds=m.pop("camera_thresholds")["cam0"]))
    same = {"thresholds": {"mono": 0.5}}
    _, said = checked(make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, judge=same))
    assert "judge.thresholds.mono is a plain number" in said and "promise does not hold" not in said


def test_a_threshold_set_by_hand_in_the_bundle_is_said_to_promise_nothing(
    checked: Any,
    make_line: Any,
    bundle: Path,
    make_images: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["calibrate", "--bundle", str(bundle), "--set", "mono=0.3"]) == 0
    capsys.readouterr()
    source = {"kind": "folder", "path": str(make_images(tmp_path / "parts", [100]))}
    line = make_line({"cam0": {"source": source, "product": "mono"}}, bundle=str(bundle), broker=None)
    assert checked(line) == (0, "mono 0.3 (set by hand in the bundle: it promises nothing)")
    summary = LineApp(Options(config=line, backend="onnxruntime", threads=1, until_end=True)).run()
    assert summary["verdicts"] == {"mono": {"NG": 1}}
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("threshold of ")]
    assert told == ["threshold of mono: 0.3, set by hand in the bundle: it promises no false-alarm rate"]
    line = make_line({"cam0": PATTERN}, bundle=str(bundle), broker=None, judge={"thresholds": {"mono": 0.7}})
    _, said = checked(line)
    assert "its promise" not in said and "0.3, set by hand in the bundle" in said and "plain number" in said


def test_what_a_camera_has_of_its_own_is_told_apart_and_the_configuration_stands_before_it(
    checked: Any, make_line: Any, bundle: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["calibrate", "--bundle", str(bundle), "--set", "mono=0.3", "--camera", "cam1"]) == 0
    capsys.readouterr()
    cameras = dict.fromkeys(("cam0", "cam1"), PATTERN)
    code, said = checked(make_line(cameras, bundle=str(bundle), broker=None))
    assert code == 0
    assert said == "mono 0.5 at cam0, mono 0.3 at cam1 (its own) (set by hand in the bundle: it promises nothing)"
    settings = {"bundle": str(bundle), "broker": None, "judge": {"thresholds": {"mono": 0.7}}}
    _, said = checked(make_line(cameras, **settings))
    by = "by the configuration; without it"
    assert said.startswith(f"mono 0.7 at cam0 ({by}: 0.5), mono 0.7 at cam1 ({by}: 0.3)")
    assert "; 0.3 at cam1, set by hand in the bundle" in said and "its promise does not hold" in said
    with Bundle.load(bundle) as loaded:
        plain = load_line(make_line(cameras, bundle=str(bundle), broker=None))
        log_thresholds(plain, loaded, Stored())
        told = "threshold of mono at cam1: 0.3, set by hand in the bundle: it promises no false-alarm rate"
        assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("threshold of")] == [told]
        caplog.clear()
        own = Stored(camera_thresholds={"cam1": {"mono": ThresholdOverride(0.6, loaded.model_id, "default")}})
        log_thresholds(plain, loaded, own)
        log_thresholds(load_line(make_line(dict.fromkeys(["cam0"], PATTERN), **settings)), loaded, Stored())
        assert not [r for r in caplog.records if r.getMessage().startswith("threshold of")]
        assert standing(load_line(make_line(cameras, **settings)), loaded, own, "cam0") == {"mono": 0.7}
        assert standing(load_line(make_line(cameras, **settings)), loaded, own, "cam1") == {}


@pytest.mark.parametrize("camera", [None, "cam0"])
def test_no_warning_of_a_number_that_a_command_stands_before(
    checked: Any, make_line: Any, bundle: Path, tmp_path: Path, camera: str | None
) -> None:
    overrides = Overrides(tmp_path / "state")
    with Bundle.load(bundle) as loaded:
        overrides.use(loaded, "default")
        overrides.set_threshold("mono", 0.6, 0.5, None, camera)
        sections = {"bundle": str(bundle), "broker": None, "state": "state", "judge": {"thresholds": {"mono": 0.7}}}
        line = make_line({"cam0": PATTERN}, **sections)
        _, said = checked(line)
        assert said == "mono 0.6 (by command; without it: 0.7)"
        assert not describe(load_line(line), loaded, overrides.stored)["thresholds"]["mono"]["in_force"]
        line = make_line({"cam0": PATTERN, "cam1": PATTERN}, **sections)
        assert ("plain number" in checked(line)[1]) is (camera is not None), "it is in force at cam1"
        entry = describe(load_line(line), loaded, overrides.stored)["thresholds"]["mono"]
        assert entry["in_force"] is (camera is not None)


def test_the_log_the_status_and_the_summary_say_which_are_the_configurations(
    start_line: Callable[..., RunningLine],
    make_line: Any,
    bundle: Path,
    consumer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    cameras = {"cam0": {"source": LIVE, "product": "mono"}}
    rests = {"value": 0.9, "model": "0123456789ab"}
    line = start_line(cameras, judge={"thresholds": {"mono": 0.7, "poly": rests}})

    def status() -> Any:
        return next((each.get("configured_thresholds") for each in consumer.of("status", "cam0")[::-1]), None)

    consumer.until(lambda: status() == {"mono": 0.7})
    (warned,), (ignored,) = messages(caplog, logging.WARNING), messages(caplog, logging.ERROR)
    assert "judge.thresholds.mono is a plain number" in warned and "found:    0.7" in warned and "0.5, cali" in warned
    assert "judge.thresholds.poly is ignored" in ignored and "\n" not in warned + ignored
    assert line.command("cam0", "threshold", threshold=0.6)["ok"]
    consumer.until(lambda: status() == {})
    assert line.command("cam0", "threshold", threshold=None)["result"]["now"] == 0.7
    consumer.until(lambda: status() == {"mono": 0.7})
    caplog.clear()
    broker = {"host": line.app.broker.host, "port": line.app.broker.port}
    own = {"value": 0.8, "model": model_of(bundle)}
    make_line(cameras, bundle=str(bundle), broker=broker, judge={"thresholds": {"mono": own, "poly": 0.4}})
    line.app.reload()
    consumer.until(lambda: status() == {"mono": 0.8, "poly": 0.4})
    (warned,) = messages(caplog, logging.WARNING)
    assert "judge.thresholds.poly is a plain number" in warned and not messages(caplog, logging.ERROR)
    assert "threshold of mono: 0.8, the configuration's for this model: it promises no" in caplog.text
    make_line(cameras, bundle=str(bundle), broker=broker, judge={"thresholds": {"mono": own}})
    line.app.reload()
    consumer.until(lambda: status() == {"mono": 0.8})
    for document in consumer.of("status"):
        Draft202012Validator(STATUS).validate(document)
    line.app.stop()
    line.thread.join(20)
    shown = line.summary["configured"]
    assert shown["pixel_threshold"] is None
    assert shown["thresholds"] == {"mono": {**own, "program": "default", "in_force": True}}


def test_rebuild_carries_no_plain_number_over_to_another_model(
    start_line: Callable[..., RunningLine], make_line: Any, consumer: Any, make_bundle: Any, dim: str, tmp_path: Path
) -> None:
    """It was taken, answered ok, and every part was OK from then on: the other model's defects score 0.0098."""
    first = make_bundle(tmp_path / "bundles" / "hvq-1")
    cameras = {"cam0": {"source": {**LIVE, "pattern": "white"}, "product": "mono"}}
    sections = {"bundle": str(tmp_path / "bundles/hvq-*"), "judge": {"thresholds": {"mono": 0.7}}}
    line = start_line(cameras, **sections)
    consumer.wait_for("verdict", 1)
    with Bundle.load(first) as loaded:
        lower = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": 0.4})
        calibrated = loaded.save_thresholds({"mono": {"default": lower}})
    assert line.command("cam0", "rebuild")["ok"], "a new calibration is of the same model"
    consumer.until(lambda: consumer.of("verdict")[-1]["bundle"] == calibrated.id)
    consumer.until(lambda: consumer.of("status")[-1]["ready"] is True)
    newest = make_bundle(tmp_path / "bundles" / "hvq-2", dim, 0.005, created="2026-02-01T00:00:00Z")
    answer = line.command("cam0", "rebuild")
    assert not answer["ok"] and "another model, and judge.thresholds.mono of the configuration" in answer["error"]
    assert "mono 0.7" in answer["found"] and line.app.state.snapshot()["ready"] is True
    written = answer["next"].split("write ")[1].split(" (in judge.thresholds)")[0]
    seen = len(consumer.of("verdict"))
    assert consumer.wait_for("verdict", seen + 2)[-1]["label"] == "NG", "what is refused changes nothing"
    broker = {"host": line.app.broker.host, "port": line.app.broker.port}
    sections["judge"] = {"thresholds": yaml.safe_load(written)}
    make_line(cameras, broker=broker, **sections)
    line.app.reload()
    consumer.until(lambda: line.app.state.snapshot()["configured"]["thresholds"]["mono"]["model"] is not None)
    answer = line.command("cam0", "rebuild")
    assert answer["ok"], answer
    with Bundle.load(newest) as loaded:
        consumer.until(lambda: consumer.of("verdict")[-1]["bundle"] == loaded.id)
    assert (consumer.of("verdict")[-1]["threshold"], consumer.of("verdict")[-1]["label"]) == (0.005, "NG")
    consumer.until(lambda: consumer.of("status")[-1]["configured_thresholds"] == {})


def test_rebuild_carries_no_plain_pixel_threshold_over(make_judge: Any, make_bundle: Any, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", created="2026-02-01T00:00:00Z")
    judge = make_judge(judge={"pixel_threshold": 0.9}, product="mono")
    with Bundle.load(other) as found, pytest.raises(andon.runtime.errors.BundleError, match=r"judge\.pixel_threshold"):
        judge.require_thresholds(found)
    judge.configure({}, JudgeConfig())
    with Bundle.load(other) as found:
        judge.require_thresholds(found)
