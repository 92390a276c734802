"""andon eval --unlabelled: pictures that nobody has labelled are judged, and nothing is said of quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from andon.runtime import unlabelled_report

from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import held, level, write

MakeBundle = Callable[..., Path]
UNLABELLED = ("--unlabelled", "--products", "a")


@pytest.fixture
def calibrated(make_bundle: MakeBundle, data: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    root = make_bundle(report={"holdout": held()})
    assert run(capsys, "calibrate", "--bundle", root, "--data", data, "--false-alarm-rate", 0.05, *ENGINE)[0] == 0
    return root


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Pictures of a in no arrangement that andon knows; one is hidden, one is a mask, one no picture."""
    for name, brightness in {"1.png": 5, "2.png": 60, "shift 2/3.png": 12, "shift 2/deep/4.png": 30}.items():
        write(tmp_path / "new" / name, level(brightness, "a"))
    for name in (".hidden.png", "ground_truth/2.png"):
        write(tmp_path / "new" / name, level(99, "a"))
    (tmp_path / "new" / "notes.txt").write_text("of Monday")
    return tmp_path / "new"


def test_they_are_scored_and_shown_and_no_figure_is_made_up(
    calibrated: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "r.html", tmp_path / "i.jsonl"
    files = ("--report", page, "--out", file)
    code, result, text = run(capsys, "eval", "--bundle", calibrated, "--data", new, *UNLABELLED, *files, *ENGINE)
    assert code == 0 and result["labels"] == {"OK": 2, "NG": 2, "UNKNOWN": 0} and result["images"] == 4
    assert result["scores"] == pytest.approx({"min": 0.05, "median": 0.21, "max": 0.6})
    assert "products" not in result and "AUROC" not in text and "missed" not in text
    assert (
        "4 pictures that nobody has labelled, judged as a" in text
        and "a: 2 OK, 2 NG, 0 UNKNOWN, threshold 0.19" in text
    )
    assert [line.split("  ")[-2] for line in text.splitlines() if line.startswith("NG")] == [
        "2.png",
        "shift 2/deep/4.png",
    ]
    rows = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == {"1.png", "2.png", "shift 2/3.png", "shift 2/deep/4.png"}
    assert {row["defect"] for row in rows.values()} == {None} and len(rows["2.png"]["regions"]) == 1
    shown = page.read_text()
    assert shown.count("<figure>") == 4 and "how good these decisions are, nothing here says" in shown
    assert shown.index("2.png</figcaption>") < shown.index("shift 2/deep/4.png</figcaption>"), "highest first"
    assert "AUROC" not in shown and "()" not in shown


def test_options_that_go_with_it(
    calibrated: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval", "--bundle", calibrated, "--data", new, *UNLABELLED, *ENGINE)
    _, result, text = run(capsys, *arguments, "--threshold", 0.5)
    assert result["labels"]["NG"] == 1 and result["threshold"] == 0.5 and "tried in place of the bundle's 0.19" in text
    assert run(capsys, *arguments, "--limit", 2)[1]["images"] == 2
    (new / "broken.png").write_bytes(b"no picture")
    assert "cannot decode" in run(capsys, *arguments)[1]["error"]
    assert run(capsys, *arguments, "--on-corrupt", "skip")[1]["skipped"] == ["broken.png"]
    monkeypatch.setattr(unlabelled_report, "SHOWN", 2)
    assert run(capsys, *arguments, "--on-corrupt", "skip", "--report", tmp_path / "r.html")[0] == 0
    assert (tmp_path / "r.html").read_text().count("<figure>") == 2 and "; 2 of 4." in (tmp_path / "r.html").read_text()


def test_they_are_judged_by_the_thresholds_of_the_camera_that_is_named(
    calibrated: Path, new: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--products", "a", "--camera", "lane2")
    by_hand = ("calibrate", "--bundle", calibrated, "--set", "a=0.5", *own[2:])
    assert run(capsys, *by_hand)[0] == 0
    page = tmp_path / "r.html"
    arguments = ("eval", "--bundle", calibrated, "--data", new, "--unlabelled", *own, *ENGINE)
    code, result, text = run(capsys, *arguments, "--report", page)
    assert code == 0 and result["threshold"] == 0.5 and result["labels"] == {"OK": 3, "NG": 1, "UNKNOWN": 0}
    assert result["camera"] == "lane2" and "judged as at camera lane2" in text
    assert "Judged as at camera lane2." in page.read_text()
    rate = ("--false-alarm-rate", 0.05, "--roi", "2,2,4,4")
    assert run(capsys, "calibrate", "--bundle", calibrated, "--data", data, *own, *rate, *ENGINE)[0] == 0
    assert "a: [2, 2, 4, 4] is cut out of pictures of 8 x 8, as the bundle says" in run(capsys, *arguments)[2]


def test_without_a_threshold_there_are_scores_and_the_way_to_one(
    make_bundle: MakeBundle, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--unlabelled", "--products", "a", "--report", tmp_path / "r.html")
    code, result, text = run(capsys, "eval", "--bundle", make_bundle(), "--data", new, *arguments, *ENGINE)
    assert code == 0 and result["labels"]["UNKNOWN"] == 4 and result["scores"]["max"] == pytest.approx(0.6)
    assert "no threshold for a, so nothing is OK or NG: andon calibrate" in text and "2.png  no_threshold" in text
    assert (tmp_path / "r.html").read_text().count("<figure>") == 4


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("", "of which product are the pictures?"),
        ("--products a b", "of which product are the pictures?"),
        ("--products c", "unknown product 'c'"),
        ("--products a --samplers", "--unlabelled and --samplers exclude each other"),
        ("--products a --product auto", "--unlabelled and --product auto exclude each other"),
        ("--products a --group-by x --verdicts y", "--unlabelled and --verdicts and --group-by exclude each other"),
        ("--products a --camera lane2", "the bundle has no thresholds of camera lane2"),
        ("--products a --few-shot 1", "--few-shot and --unlabelled exclude each other"),
        (
            "--products a --all --results {new}/r.json --camera x",
            "--all and --unlabelled and --camera exclude each other",
        ),
        ("--products a --camera lane3", "the bundle has no thresholds of camera lane3"),
        ("--products a --data {new}/notes.txt", "no folder of pictures at {new}/notes.txt"),
        ("--products a --data {new}/.empty", "no picture in {new}/.empty"),
    ],
)
def test_what_needs_labels_or_one_product_is_refused(
    make_bundle: MakeBundle, new: Path, capsys: pytest.CaptureFixture[str], given: str, error: str
) -> None:
    (new / ".empty").mkdir()
    arguments = (
        "eval",
        "--bundle",
        make_bundle(),
        "--data",
        new,
        "--unlabelled",
        *given.format(new=new).split(),
        *ENGINE,
    )
    code, result, _ = run(capsys, *arguments)
    assert code == 1 and result["error"] == error.format(new=new) and result["next"]


def test_one_product_need_not_be_named(make_bundle: MakeBundle, new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_bundle(classes=("a",), outputs={"score": "score.score", "map": "score.map"})
    code, result, _ = run(capsys, "eval", "--bundle", root, "--data", new, "--unlabelled", *ENGINE)
    assert code == 0 and result["product"] == "a"


def test_the_refusal_of_an_unknown_layout_names_it(
    make_bundle: MakeBundle, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (new, new / "shift 2"):
        code, result, _ = run(capsys, "eval", "--bundle", make_bundle(), "--data", folder, *ENGINE)
        assert code == 1 and "cannot tell the layout" in result["error"]
        assert "scored by andon eval --unlabelled" in result["next"], folder
    (new.parent / "nothing").mkdir()
    code, result, _ = run(capsys, "eval", "--bundle", make_bundle(), "--data", new.parent / "nothing", *ENGINE)
    assert code == 1 and "--unlabelled" not in result["next"]
