"""Thresholds and products set by command: kept over a restart, audited, and for the model they were set for."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.errors import BundleError, ConfigError, ProductError
from andon.runtime.judge import Judge
from andon.runtime.overrides import Overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .judging import frame, picture

LANES = ("lane1", "lane2", "lane3")


def test_overrides_outlive_a_restart_and_are_audited(make_judge: Callable[..., Judge], tmp_path: Path) -> None:
    judge = make_judge(judge={"thresholds": {"mono": 0.7}}, product="poly")
    assert judge.threshold("mono") == 0.7, "the configuration's stands before the bundle's"
    assert judge.set_threshold("mono", 0.2, by="shift lead") == {"before": 0.7, "now": 0.2}
    assert judge.set_product("cam", "mono") == {"before": "poly", "now": "mono"}
    assert judge.judge(frame(picture(60), product=None)).verdict.label == "NG"
    again = make_judge(product="poly")
    assert again.threshold("mono") == 0.2 and again.product_of("cam") == "mono"
    assert again.set_threshold("mono", None) == {"before": 0.2, "now": 0.5}
    assert again.set_product("cam", None) == {"before": "mono", "now": "poly"}
    audit = [json.loads(line) for line in (tmp_path / "state/audit.jsonl").read_text().splitlines()]
    assert [(entry["what"], entry["of"], entry["before"], entry["now"], entry["by"]) for entry in audit] == [
        ("threshold", "mono", 0.7, 0.2, "shift lead"),
        ("product", "cam", "poly", "mono", None),
        ("threshold", "mono", 0.2, None, None),
        ("product", "cam", "mono", None, None),
    ]
    for call in (lambda: judge.set_threshold("nut", 1.0), lambda: judge.set_product("cam", "nut")):
        with pytest.raises(ProductError):
            call()
    with pytest.raises(ConfigError):
        judge.set_product("cam9", "mono")


def test_auto_by_command_is_refused_where_nothing_tells_the_products_apart(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    judge = make_judge(product="poly")
    with pytest.raises(ConfigError, match="product auto of cam: the bundle has no classifier") as refused:
        judge.set_product("cam", "auto")
    assert refused.value.expected == "one of mono, poly" and judge.product_of("cam") == "poly"
    data = make_judge(product="poly", source={"kind": "dataset", "data": "elpv"})
    assert data.set_product("cam", "auto")["now"] == "auto", "a data set says each image's product"


def test_a_product_by_command_is_refused_where_each_image_names_its_own(make_judge: Callable[..., Judge]) -> None:
    """It was answered ok, kept over restarts and shown everywhere, and changed no verdict."""
    judge = make_judge(source={"kind": "dataset", "data": "elpv"})
    with pytest.raises(ConfigError, match="plays a data set, in which each image names its product") as refused:
        judge.set_product("cam", "poly")
    assert refused.value.expected == "auto" and judge.product_of("cam") == "auto"
    assert not judge.takes("cam", "poly") and judge.takes("cam", "auto")


def test_a_product_by_command_that_cannot_be_judged_is_said_at_the_start(
    make_judge: Callable[..., Judge], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept by an earlier version, or set for another bundle."""
    Overrides(tmp_path / "state").set_product("cam", "nut", "mono", None)
    caplog.clear()
    judge = make_judge(product="mono")
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "product nut of cam by command cannot be judged" in told and "send the command product" in told
    assert judge.judge(frame(picture(60), product=None)).verdict.label == "UNKNOWN", "not judged as another product"


def test_a_product_by_command_of_a_camera_that_the_line_has_no_more_stops_no_start(
    make_judge: Callable[..., Judge], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Overrides(tmp_path / "state").set_product("removed", "poly", "mono", None)
    caplog.clear()
    judge = make_judge(product="mono")
    assert judge.judge(frame(picture(60), product=None)).verdict.product == "mono"
    assert "cannot be judged" not in caplog.text


def test_a_threshold_by_command_is_for_the_model_it_was_set_for(
    make_judge: Callable[..., Judge],
    make_bundle: Callable[..., Path],
    dim: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On another scale of scores the old number would call every part OK."""
    defect = frame(picture(250))
    make_judge().set_threshold("mono", 0.6, by="ann")
    caplog.clear()
    other = make_judge(make_bundle(tmp_path / "other", dim, thresholds=0.005))
    assert other.threshold("mono") == 0.005 and other.judge(defect).verdict.label == "NG"
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    model = other.detector.bundle.model_id
    assert "0.6 of mono by command is ignored" in told and f"this is model {model}, program default" in told
    ignored = json.loads((tmp_path / "state/audit.jsonl").read_text().splitlines()[-1])
    assert (ignored["what"], ignored["of"], ignored["before"]) == ("threshold ignored", "mono", 0.6)
    assert make_judge().threshold("mono") == 0.6, "with the model back it is in force again"
    assert other.set_threshold("mono", None) == {"before": 0.005, "now": 0.005}
    assert make_judge(other.detector.bundle.path).set_threshold("mono", None)["now"] == 0.005
    assert make_judge().threshold("mono") == 0.5, "and it can be forgotten under another model, too"


def test_a_threshold_by_command_outlives_a_new_calibration_and_says_so(
    make_judge: Callable[..., Judge], bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_judge().set_threshold("mono", 0.6)
    with Bundle.load(bundle) as loaded:
        entry = loaded.manifest.thresholds["mono"]["default"].model_copy(update={"value": 0.25})
        loaded.save_thresholds({"mono": {"default": entry}})
    caplog.clear()
    assert make_judge().threshold("mono") == 0.6
    assert "overridden by an earlier command: 0.6 (calibrated: 0.25)" in caplog.text and "with null" in caplog.text


def test_a_threshold_by_command_is_for_one_program(make_judge: Callable[..., Judge], tmp_path: Path) -> None:
    judge = make_judge()
    judge.set_threshold("mono", 0.6)
    overrides = Overrides(tmp_path / "state")
    overrides.use(judge.detector.bundle, "default")
    assert overrides.thresholds() == {"mono": 0.6}
    overrides.use(judge.detector.bundle, "fast")
    assert overrides.thresholds() == {}
    described = overrides.describe()["thresholds"]["mono"]
    model = judge.detector.bundle.model_id
    assert described == {"value": 0.6, "model": model, "program": "default", "in_force": False}


@pytest.mark.parametrize("which", [0, 1])
def test_a_threshold_set_under_a_former_name_of_the_model_stays_in_force(
    make_judge: Callable[..., Judge], bundle: Path, tmp_path: Path, which: int
) -> None:
    with Bundle.load(bundle) as loaded:
        override = {"value": 0.6, "model": loaded.former_ids[which], "program": "default"}
    (tmp_path / "state").mkdir()
    (tmp_path / "state/overrides.json").write_text(json.dumps({"thresholds": {"mono": override}, "products": {}}))
    judge = make_judge()
    assert judge.threshold("mono") == 0.6
    judge.set_product("cam", "poly")  # the file is written whole
    assert make_judge().threshold("mono") == 0.6


def test_a_threshold_of_an_earlier_version_names_no_model_and_is_ignored(
    make_judge: Callable[..., Judge], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/overrides.json").write_text('{"thresholds": {"mono": 0.9}, "products": {"cam": "poly"}}')
    judge = make_judge(product="mono")
    assert judge.threshold("mono") == 0.5 and "set for no named model" in caplog.text
    assert judge.product_of("cam") == "poly", "a product means the same under every model"
    judge.set_product("cam", None)
    assert Overrides(tmp_path / "state").describe()["thresholds"]["mono"]["model"] is None, "kept as it was"
    judge.set_threshold("mono", 0.9)
    assert make_judge().threshold("mono") == 0.9


def test_what_cannot_be_written_is_not_in_force(
    make_judge: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = make_judge(product="mono")
    judge.set_threshold("mono", 0.6)
    written = (tmp_path / "state/overrides.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("andon.runtime.overrides.write_atomic", full)
    changes = (
        lambda: judge.set_threshold("mono", 0.9),
        lambda: judge.set_threshold("poly", 0.9),
        lambda: judge.set_threshold("mono", None),
        lambda: judge.set_product("cam", "poly"),
    )
    for change in changes:
        with pytest.raises(ConfigError, match="stays as it was"):
            change()
    assert (judge.threshold("mono"), judge.threshold("poly"), judge.product_of("cam")) == (0.6, 0.5, "mono")
    assert judge.judge(frame(picture(180), product=None)).verdict.threshold == 0.6
    assert (tmp_path / "state/overrides.json").read_bytes() == written
    assert len((tmp_path / "state/audit.jsonl").read_text().splitlines()) == 1


def test_a_change_that_cannot_be_audited_is_answered_as_it_is(
    make_judge: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge = make_judge()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("andon.calib.audit.AuditLog.write", full)
    assert judge.set_threshold("mono", 0.6) == {"before": 0.5, "now": 0.6}
    assert "audit.jsonl cannot be written" in caplog.text


@pytest.mark.parametrize("threshold", ['"hi', "NaN}", '{"value": Infinity, "model": "m", "program": "p"}}'])
def test_damaged_overrides_are_set_aside(tmp_path: Path, threshold: str) -> None:
    (tmp_path / "overrides.json").write_text(f'{{"products": {{}}, "thresholds": {{"mono": {threshold}}}')
    overrides = Overrides(tmp_path)
    assert overrides.thresholds() == {} and (tmp_path / "overrides.damaged").exists()


def test_overrides_that_cannot_be_read_this_time_refuse_the_start_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a process that has too many files open: set aside, the thresholds of the bundle would be in force again."""
    Overrides(tmp_path).set_product("cam", "poly", "mono", None)

    def fails(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(ConfigError, match=r"overrides\.json cannot be read") as refused:
            Overrides(tmp_path)
    assert "Too many open files" in str(refused.value.found)
    assert dict(Overrides(tmp_path).products) == {"cam": "poly"} and not (tmp_path / "overrides.damaged").exists()


def test_a_threshold_of_one_camera_is_nothing_to_the_others(make_judge: Callable[..., Judge], tmp_path: Path) -> None:
    judge = make_judge(cameras=LANES, product="mono")
    assert judge.set_threshold("mono", 0.2, "ann", "lane2") == {"before": 0.5, "now": 0.2}
    for judged in (judge, make_judge(cameras=LANES, product="mono")):
        verdicts = [judged.judge(frame(picture(80), camera=lane, product=None)).verdict for lane in LANES]
        assert [(v.threshold, v.label) for v in verdicts] == [(0.5, "OK"), (0.2, "NG"), (0.5, "OK")]
    assert judge.in_force() == {"mono": {0.5, 0.2}}
    judge.set_threshold("mono", 0.3, "bob")
    assert [judge.threshold("mono", lane) for lane in LANES] == [0.3] * 3, "in place of its own"
    audit = [json.loads(line) for line in (tmp_path / "state/audit.jsonl").read_text().splitlines()]
    found = [
        (e["cameras"], e["before"], e["now"], e["by"], e.get("replaced")) for e in audit if e["what"] == "threshold"
    ]
    assert found == [(["lane2"], 0.5, 0.2, "ann", None), ("all", 0.5, 0.3, "bob", {"lane2": 0.2})]


def test_a_threshold_of_before_there_were_cameras_is_in_force_at_all_until_it_is_taken_back(
    make_judge: Callable[..., Judge], bundle: Path, tmp_path: Path
) -> None:
    with Bundle.load(bundle) as loaded:
        override = {"value": 0.6, "model": loaded.model_id, "program": "default"}
    file = tmp_path / "state/overrides.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"thresholds": {"mono": override}, "products": {}}))
    judge = make_judge(cameras=LANES)
    assert [judge.threshold("mono", lane) for lane in LANES] == [0.6, 0.6, 0.6]
    judge.set_product("lane1", "mono")
    assert set(json.loads(file.read_text())) == {"thresholds", "products"}, "as a station of before wrote it"
    assert judge.set_threshold("mono", 0.1, None, "lane2") == {"before": 0.6, "now": 0.1}
    assert judge.set_threshold("mono", None, None, "lane3") == {"before": 0.6, "now": 0.5}
    again = make_judge(cameras=LANES)
    assert [again.threshold("mono", lane) for lane in LANES] == [0.6, 0.1, 0.5], "taken back where that was asked for"
    again.set_threshold("mono", None)
    assert [again.threshold("mono", lane) for lane in LANES] == [0.5, 0.5, 0.5]
    alone = json.loads(file.read_text())
    assert alone["thresholds"] == {} and "camera_thresholds" not in alone


def test_a_resting_threshold_of_one_camera_hides_none_that_is_in_force(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], dim: str, tmp_path: Path
) -> None:
    make_judge(cameras=LANES).set_threshold("mono", 0.6)
    other = make_judge(make_bundle(tmp_path / "other", dim, thresholds=0.005), cameras=LANES)
    other.set_threshold("mono", 0.004, None, "lane1")
    assert [other.threshold("mono", lane) for lane in LANES] == [0.004, 0.005, 0.005]
    back = make_judge(cameras=LANES)
    assert [back.threshold("mono", lane) for lane in LANES] == [0.6, 0.6, 0.6]
    back.set_threshold("mono", None, None, "lane2")
    assert [back.threshold("mono", lane) for lane in LANES] == [0.6, 0.5, 0.6], "others keep what is in force there"


def test_a_bundle_that_has_thresholds_for_some_cameras_alone_is_refused_where_others_are_judged(
    make_judge: Callable[..., Judge], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    entry = {"mono": {"default": {"value": 0.3, "false_alarm_rate": 0.05, "samples": 20}}}
    judge = make_judge(cameras=LANES, product="mono")
    for lanes in (LANES, LANES[:2]):
        own = dict.fromkeys(lanes, entry)
        root = make_bundle(tmp_path / f"of {len(lanes)}", thresholds=None, camera_thresholds=own)
        with Bundle.load(root) as bundle:
            if lanes == LANES:
                judge.require_thresholds(bundle)
                continue
            with pytest.raises(BundleError, match="has no threshold for mono, which the line judges now"):
                judge.require_thresholds(bundle)


COMMAND = st.tuples(st.sampled_from(("mono", "poly")), st.none() | st.floats(0, 1), st.none() | st.sampled_from(LANES))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(COMMAND, max_size=8), st.booleans())
def test_whatever_is_commanded_acts_on_the_cameras_it_names_and_on_no_other(
    make_judge: Callable[..., Judge], tmp_path: Path, commands: list[Any], old: bool
) -> None:
    (tmp_path / "state/overrides.json").unlink(missing_ok=True)
    judge = make_judge(cameras=LANES)
    expected = {(lane, product): 0.5 for lane in LANES for product in ("mono", "poly")}
    for product, value, camera in [("mono", 0.25, None)] * old + commands:
        judge.set_threshold(product, value, None, camera)
        expected |= {(lane, product): 0.5 if value is None else value for lane in LANES if camera in (None, lane)}
    kept = Overrides(tmp_path / "state")
    kept.use(judge.detector.bundle, "default")
    for (lane, product), value in expected.items():
        assert judge.threshold(product, lane) == value
        assert kept.thresholds(lane).get(product, 0.5) == value, "after a restart, too"
        assert judge.judge(frame(picture(0), camera=lane, product=product)).verdict.threshold == value
    kept.close()
