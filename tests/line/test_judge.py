"""The judge on a real engine: OK, NG and every reason to be UNKNOWN; regions, smoothing, overrides, evidence."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.detector import Detector
from andon.runtime.errors import ConfigError, EngineError, ProductError
from andon.runtime.evidence import EvidenceStore, overlay
from andon.runtime.judge import Judge, Judgement
from andon.runtime.lineconfig import CameraConfig, EvidenceConfig, JudgeConfig
from andon.runtime.overrides import Overrides
from andon.runtime.regions import clip_roi, find_regions
from andon.runtime.slot import missed
from andon.runtime.types import UNKNOWN_REASONS, Frame
from andon.runtime.verdict import Ids
from hypothesis import given, settings
from hypothesis import strategies as st


def picture(shade: int, spot: tuple[int, int, int, int] | None = None, size: tuple[int, int] = (64, 64)) -> Any:
    image = np.full((size[1], size[0], 3), shade, np.uint8)
    if spot:
        x, y, width, height = spot
        image[y : y + height, x : x + width] = 255
    return image


def frame(image: Any, **fields: Any) -> Frame:
    now = time.monotonic()
    return Frame("cam", 7, datetime.now(timezone.utc), now, image, **{"product": "mono", **fields})


def camera(**settings: Any) -> CameraConfig:
    return CameraConfig.model_validate({"source": {"kind": "test"}, **settings})


@pytest.fixture
def make_judge(tmp_path: Path, bundle: Path) -> Iterator[Callable[..., Judge]]:
    opened: list[Detector] = []

    def make(path: Path = bundle, memory: Any = None, judge: Mapping[str, Any] | None = None, **settings: Any) -> Judge:
        detector = Detector.open(path, backend="onnxruntime", threads=1)
        opened.append(detector)
        overrides = Overrides(tmp_path / "state")
        return Judge(detector, {"cam": camera(**settings)}, JudgeConfig(**judge or {}), overrides, Ids().next, memory)

    yield make
    for detector in opened:
        detector.close()


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


def test_the_region_of_interest_is_all_that_is_judged(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge(roi=(32, 0, 32, 32))
    outside = judge.judge(frame(picture(10, (0, 40, 8, 8))))
    assert outside.verdict.label == "OK" and outside.box == (32, 0, 32, 32)
    inside = judge.judge(frame(picture(10, (40, 8, 4, 6)))).verdict
    assert inside.label == "NG" and inside.regions[0].bbox == (40, 8, 4, 6)
    small = judge.judge(frame(picture(10, size=(20, 20)))).verdict
    assert (small.label, small.reason) == ("UNKNOWN", "bad_frame"), "a camera of another resolution is not guessed at"


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


@pytest.mark.parametrize("reason", UNKNOWN_REASONS)
def test_a_missed_part_is_unknown_with_its_reason(make_judge: Callable[..., Judge], reason: str) -> None:
    verdict = make_judge().unknown(missed(frame(picture(1), part_id="C"), reason, "because")).verdict
    assert (verdict.label, verdict.reason, verdict.part_id, verdict.product) == ("UNKNOWN", reason, "C", "mono")
    assert verdict.score is None


def test_smoothing_is_off_by_default_and_starts_anew_with_a_product(make_judge: Callable[..., Judge]) -> None:
    judge = make_judge(smoothing=0.25)
    scores = [
        judge.judge(frame(picture(shade), product=product)).verdict
        for shade, product in [(0, "mono"), (255, "mono"), (255, "mono"), (255, "mono"), (200, "poly")]
    ]
    assert [round(verdict.score or 0, 3) for verdict in scores] == [0, 0.25, 0.438, 0.578, 0.784]
    assert [verdict.label for verdict in scores] == ["OK", "OK", "OK", "NG", "NG"]


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
    assert dict(overrides.thresholds) == {"mono": 0.6}
    overrides.use(judge.detector.bundle, "fast")
    assert dict(overrides.thresholds) == {}
    described = overrides.describe()["thresholds"]["mono"]
    model = judge.detector.bundle.model_id
    assert described == {"value": 0.6, "model": model, "program": "default", "in_force": False}


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

    monkeypatch.setattr("andon.calib.snapshots.AuditLog.write", full)
    assert judge.set_threshold("mono", 0.6) == {"before": 0.5, "now": 0.6}
    assert "audit.jsonl cannot be written" in caplog.text


@pytest.mark.parametrize("threshold", ['"hi', "NaN}", '{"value": Infinity, "model": "m", "program": "p"}}'])
def test_damaged_overrides_are_set_aside(tmp_path: Path, threshold: str) -> None:
    (tmp_path / "overrides.json").write_text(f'{{"products": {{}}, "thresholds": {{"mono": {threshold}}}')
    overrides = Overrides(tmp_path)
    assert dict(overrides.thresholds) == {} and (tmp_path / "overrides.damaged").exists()


# -- regions -----------------------------------------------------------------------------------------------------------


def test_regions_are_sorted_by_peak_and_bounded() -> None:
    anomaly_map = np.zeros((20, 20), np.float32)
    for index in range(5):
        anomaly_map[4 * index, 4 * index : 4 * index + 2] = 1 + index
    found = find_regions(anomaly_map, 0.5, (0, 0, 40, 80), limit=3)
    assert [region.peak for region in found] == [5, 4, 3]
    assert found[0].bbox == (32, 64, 4, 4) and found[0].area == 16
    assert find_regions(anomaly_map, 9, (0, 0, 40, 80)) == ()
    assert len(find_regions(anomaly_map, 0.5, (0, 0, 40, 80), min_area=17)) == 0


@settings(deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), min_size=1, max_size=40),
    box=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 300), st.integers(1, 300)),
)
def test_regions_cover_every_cell_above_the_threshold_and_stay_in_the_box(
    cells: list[tuple[int, int]], box: tuple[int, int, int, int]
) -> None:
    anomaly_map = np.zeros((14, 14), np.float32)
    for row, column in cells:
        anomaly_map[row, column] = 1 + row + column / 100
    found = find_regions(anomaly_map, 0.5, box, min_area=0, limit=1000)
    x, y, width, height = box
    for left, top, wide, high in (region.bbox for region in found):
        assert x <= left and y <= top and left + wide <= x + width and top + high <= y + height
    for row, column in set(cells):
        middle_x, middle_y = x + (column + 0.5) * width / 14, y + (row + 0.5) * height / 14
        assert any(
            left <= middle_x <= left + wide and top <= middle_y <= top + high
            for left, top, wide, high in (region.bbox for region in found)
        )
    assert sum(region.area for region in found) == pytest.approx(len(set(cells)) * width * height / 196, abs=len(found))
    assert max(region.peak for region in found) == anomaly_map.max()


def test_a_roi_is_clipped_or_lies_outside() -> None:
    assert clip_roi(None, 40, 30) == (0, 0, 40, 30)
    assert clip_roi((10, 10, 100, 5), 40, 30) == (10, 10, 30, 5)
    assert clip_roi((40, 0, 5, 5), 40, 30) is None


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_evidence_is_kept_under_its_quota(
    make_judge: Callable[..., Judge], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    judge = make_judge()
    config = EvidenceConfig(max_bytes=2**16)

    def judged(shade: int) -> Judgement:
        noise = np.random.default_rng(shade).integers(0, 255, (200, 200, 3), np.uint8)
        return judge.judge(frame(noise if shade else picture(0)))

    with EvidenceStore(config, tmp_path / "evidence") as store:
        ok = judged(0)
        assert store.keep(ok.verdict, picture(0), ok.scored.map, ok.box, 0.5) is None, "only NG is kept"
        paths = []
        for shade in range(1, 9):
            bad = judged(shade)
            image = np.random.default_rng(shade).integers(0, 255, (200, 200, 3), np.uint8)
            paths.append(store.keep(bad.verdict, image, bad.scored.map, bad.box, 0.5))
            eventually(lambda shade=shade: store.written == shade)
    assert all(paths)
    left = list((tmp_path / "evidence").rglob("*.jpg"))
    assert sum(path.stat().st_size for path in left) <= config.max_bytes
    assert 0 < len(left) < 8 and Path(paths[-1]) in left and Path(paths[0]) not in left
    assert store.removed == 8 - len(left)
    assert cv2.imread(paths[-1]).shape == (200, 200, 3)
    with EvidenceStore(config, tmp_path / "evidence") as store:
        assert store.removed == 0, "pictures of an earlier run count towards the quota and stay"


def test_the_overlay_touches_only_the_region_of_interest() -> None:
    image = picture(100)
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[2, 2] = 5
    drawn = overlay(image, anomaly_map, (16, 16, 32, 32), 1.0)
    changed = (drawn != image).any(axis=2)
    assert changed[26, 26] and not changed[:16].any() and not changed[48:].any()
    assert not changed[40:48, 40:48].any(), "what is normal is left as the camera saw it"
    assert drawn.shape == image.shape and image.min() == 100


def test_a_picture_that_cannot_be_drawn_does_not_end_the_others(
    make_judge: Callable[..., Judge], tmp_path: Path
) -> None:
    bad = make_judge().judge(frame(picture(250)))
    assert bad.verdict.label == "NG"
    with EvidenceStore(EvidenceConfig(), tmp_path / "evidence") as store:
        store.keep(bad.verdict, "no picture at all", bad.scored.map, bad.box, 0.5)  # type: ignore[arg-type]
        kept = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.failed, store.written) == (1, 1)
    assert kept is not None and Path(kept).is_file()


def test_a_picture_that_cannot_be_stored_leaves_nothing_behind(
    make_judge: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    bad = make_judge().judge(frame(picture(250)))
    folder = tmp_path / "evidence"
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", half)
        with EvidenceStore(EvidenceConfig(), folder) as store:
            path = store.keep(bad.verdict, picture(250), bad.scored.map, bad.box, 0.5)
    assert (store.failed, store.written) == (1, 0) and path is not None
    assert [left for left in folder.rglob("*") if left.is_file()] == []
    killed, foreign = Path(path).with_suffix(".part"), folder / "download.part"
    killed.write_bytes(b"half a picture")
    foreign.write_bytes(b"not ours")
    with EvidenceStore(EvidenceConfig(), folder):
        assert not killed.exists() and foreign.exists(), "what a killed process left is removed at the start"
