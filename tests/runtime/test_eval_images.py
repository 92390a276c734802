"""andon eval image by image (--out) and by type of defect."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from andon.runtime.bydefect import defect_metrics, defect_table, told
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.evaluation import Judged

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import held, level, write

MakeBundle = Callable[..., Path]


@pytest.fixture
def calibrated(make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    root = make_bundle(report={"holdout": held()})
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)[0] == 0
    return root


def test_every_image_is_in_the_file_with_what_was_decided_of_it(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, table = tmp_path / "out" / "i.jsonl", tmp_path / "i.CSV"
    for file in (lines, table):
        code, result, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, "--out", file, *ENGINE)
        assert code == 0 and result["out"] == str(file) and f"24 images in {file}" in text
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {row["key"] for row in rows} == {s.key for s in open_dataset(data).select(split="test").samples}
    bad, good = (next(r for r in rows if r["key"] == f"a/test/{kind}/000.png") for kind in ("bright", "good"))
    assert bad["product"] == bad["judged_as"] == bad["predicted"] == "a" and bad["bundle"] == result["bundle"]
    assert (bad["defect"], bad["label"], bad["reason"]) == ("bright", "NG", None) and bad["program"] == "default"
    assert bad["score"] == pytest.approx(0.61) and bad["threshold"] == pytest.approx(0.19)
    (region,) = bad["regions"]
    assert region["peak"] == pytest.approx(0.61) and region["bbox"] == [0, 0, 3, 8], "in pixels of the picture, 8 x 8"
    assert (good["defect"], good["label"], good["regions"], good["part"]) == ("good", "OK", [], None)
    with table.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == list(rows[0]) and [c["key"] for c in cells] == [r["key"] for r in rows]
    of = next(c for c in cells if c["key"] == bad["key"])
    assert float(of["score"]) == bad["score"] and json.loads(of["regions"]) == bad["regions"] and of["reason"] == ""


def test_regions_are_where_they_lie_in_the_whole_picture(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, arguments = tmp_path / "i.jsonl", ("--roi", "2,1,4,6", "--out", tmp_path / "i.jsonl")
    assert run(capsys, "eval", "--bundle", calibrated, "--data", data, *arguments, *ENGINE)[0] == 0
    found = [json.loads(line)["regions"] for line in file.read_text().splitlines()]
    assert {tuple(r["bbox"]) for regions in found for r in regions} == {(2, 1, 2, 6), (3, 1, 2, 6)}, "a, b"


def test_recorded_verdicts_bring_their_regions_and_reasons(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded, file = tmp_path / "line.jsonl", tmp_path / "i.jsonl"
    line = {"method": "synthetic", "bundle": "x", "ts_judged": "2026-01-01T00:00:00Z", "latency_ms": {}}
    regions = [{"bbox": [1, 2, 3, 4], "area": 9, "peak": 0.7}]
    with recorded.open("w") as lines:
        for s in open_dataset(data).select(split="test").samples:
            verdict = {"id": s.key, "part_id": s.key.removesuffix(".png"), "product": s.product, **line}
            verdict |= {"score": None, "threshold": None, "label": "UNKNOWN", "reason": "overload", "regions": []}
            if not s.good:
                verdict |= {"score": 0.7, "threshold": 0.2, "label": "NG", "reason": "-", "regions": regions}
            lines.write(json.dumps(verdict) + "\n")
    arguments = ("eval", "--bundle", calibrated, "--data", data, "--verdicts", recorded, "--out", file, *ENGINE)
    assert run(capsys, *arguments)[0] == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["label"], r["reason"], len(r["regions"]), r["program"]) for r in rows} == {
        ("NG", None, 1, None),
        ("UNKNOWN", "overload", 0, None),
    }
    assert next(r["regions"] for r in rows if r["regions"]) == regions
    recorded.write_text(recorded.read_text().replace('"bbox"', '"box"'))
    code, result, _ = run(capsys, *arguments)
    assert code == 1 and "is not a verdict" in result["error"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", "--bundle", "nosuch", "--data", "nosuch", "--threads", 1, "--out")
    code, result, _ = run(capsys, *arguments, tmp_path / "i.txt")
    assert code == 1 and "in what form?" in result["error"] and f"--out {tmp_path / 'i.csv'}" in result["next"]
    (tmp_path / "d.csv").mkdir()
    code, result, _ = run(capsys, *arguments, tmp_path / "d.csv")
    assert code == 1 and f"--out {tmp_path / 'd.csv'} cannot be written" in result["error"]
    code, result, _ = run(capsys, *arguments, tmp_path / "i.csv", "--few-shot", 1)
    assert code == 1 and result["error"] == "--few-shot and --out exclude each other"


def test_each_type_of_defects_is_told_of(
    calibrated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    for i, brightness in enumerate((1, 2, 25)):
        write(data / "a/test/dull" / f"{i}.png", level(brightness, "a"))
    code, result, text = run(capsys, "eval", "--bundle", calibrated, "--data", data, "--report", page, *ENGINE)
    assert (
        code == 0
        and set(result["by_defect"]["a"]) == {"bright", "dull"}
        and set(result["by_defect"]["b"]) == {"bright"}
    )
    dull = result["by_defect"]["a"]["dull"]
    assert (dull["images"], dull["missed"], dull["unknown"]) == (3, 2, 0) and dull["miss_rate"] == pytest.approx(2 / 3)
    assert dull["image_AUROC"] == pytest.approx(5 / 24) and result["by_defect"]["a"]["bright"]["image_AUROC"] == 1
    assert "by defect  images" in text and "a dull          3       2      0.667        0        0.208" in text
    assert "b bright" not in text, "one type alone is what the figures by product are of"
    assert "<h2>By defect</h2>" in page.read_text() and "<td>dull</td><td>3</td><td>2</td>" in page.read_text()


def test_defects_that_were_not_decided_are_not_missed() -> None:
    def one(kind: str, label: str, score: float) -> Judged:
        return Judged(Sample(Path("x"), "x", "a", kind, "test"), label, score, "a", None)

    nan = float("nan")
    judged = [one("good", "OK", 1.0), one("cut", "UNKNOWN", nan), one("cut", "OK", 0.5), one("dent", "UNKNOWN", nan)]
    found = defect_metrics(judged)
    assert found["a"]["cut"] == {"images": 2, "missed": 1, "unknown": 1, "miss_rate": 1, "image_AUROC": 0}
    assert found["a"]["dent"]["miss_rate"] is None and found["a"]["dent"]["image_AUROC"] is None
    assert told(found) == found and len(defect_table(found).splitlines()) == 3
    assert told(defect_metrics(judged[:3])) == {} == defect_metrics(judged[:1])
