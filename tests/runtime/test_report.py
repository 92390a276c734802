"""The evaluation report: its arithmetic, and that it is one well-formed file with nothing to fetch."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from andon.runtime.quality import summarize
from andon.runtime.report import charts, gallery
from andon.runtime.report.evaluation import Evaluation, Part, choose, confusion, render, write
from sklearn.metrics import roc_auc_score

VOID = {"meta", "img", "br", "line", "rect", "circle", "path", "i"}


class Balance(HTMLParser):
    """Fails on an unclosed element; collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag


def _parts() -> list[Part]:
    rng = np.random.default_rng(0)
    good = [
        Part(f"g{i}", "tile", "good", float(s), "NG" if s > 2.8 else "OK") for i, s in enumerate(rng.normal(2, 0.4, 60))
    ]
    bad = [
        Part(f"b{i}", "tile", "crack", float(s), "NG" if s > 2.8 else "OK")
        for i, s in enumerate(rng.normal(3.2, 0.6, 40))
    ]
    return [*good, *bad, Part("u", "tile", "crack", float("nan"), "UNKNOWN")]


def test_roc_points_enclose_the_area_sklearn_computes() -> None:
    rng = np.random.default_rng(1)
    good, bad = np.round(rng.normal(0, 1, 80), 1), np.round(rng.normal(1, 1, 50), 1)
    fpr, tpr = charts.roc_points(good, bad)
    area = np.trapezoid(tpr, fpr)
    expected = roc_auc_score(np.r_[np.zeros(80), np.ones(50)], np.r_[good, bad])
    assert area == pytest.approx(expected, abs=1e-12)
    assert (fpr[-1], tpr[-1]) == (1.0, 1.0)


def test_confusion_counts_every_part_once() -> None:
    parts = _parts()
    count = confusion(parts)
    assert sum(count.values()) == len(parts)
    assert count["defective_UNKNOWN"] == 1
    assert count["good_NG"] == sum(p.good and p.score > 2.8 for p in parts)


def test_choice_shows_misses_and_false_alarms_first() -> None:
    chosen = choose(_parts(), 2.8, each=3)
    missed = [p for name, p in chosen if name == "defect missed"]
    assert missed and all(p.label == "OK" and not p.good for p in missed)
    assert missed[0].score == min(p.score for p in _parts() if p.label == "OK" and not p.good)


def test_choice_shows_no_part_twice() -> None:
    chosen = choose(_parts(), 2.8, each=10)
    keys = [p.key for _, p in chosen]
    assert len(set(keys)) == len(keys) and "nearest to the threshold" in [name for name, _ in chosen]


def test_rates_stand_with_the_decisions_and_no_table_is_too_wide_to_read(tmp_path) -> None:
    """In one table of all figures, error rates were beyond the edge of the page at any width of the window."""
    rng = np.random.default_rng(0)
    scores, truth = rng.random(40), np.arange(40) % 2 == 0
    labels = ["UNKNOWN", *("NG" if score > 0.5 else "OK" for score in scores[1:])]
    metrics = summarize(scores, truth, threshold=0.5, labels=labels)
    text = write(Evaluation("t", "l", _parts(), {"tile": metrics}, {}), tmp_path / "report.html").read_text()
    tables = [part.partition("</thead>")[0] for part in text.split("<thead>")[1:]]
    assert all(table.count("<th>") <= 9 for table in tables)
    ranking, decisions = tables[:2]
    for name in metrics:
        limit = " (FPR ≤ 0.3)" * (name == "pixel_AUPRO")
        assert f"<th>{name.replace('_', ' ')}{limit}</th>" in ranking + decisions, name
    assert "<th>false alarm rate</th>" in decisions and "<th>miss rate</th>" in decisions
    assert "<th>image AUROC</th>" in ranking


def test_a_rate_is_a_percentage_and_stands_beside_what_was_promised_by_how_many(tmp_path) -> None:
    metrics = {"image_AUROC": 0.7, "threshold": 26.3, "false_alarm_rate": 0.4, "promised_false_alarm_rate": 0.25}
    report = Evaluation("t", "l", _parts(), {"tile": {**metrics, "calibration_samples": 7.0}}, {}, facts=[("x", "y")])
    text = write(report, tmp_path / "report.html").read_text()
    assert "<td>26.3</td><td>40.0%</td><td>≤ 25.0%</td><td>7</td>" in text and "<td>0.700</td>" in text
    assert "<th>calibration samples</th>" in text


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("promised_false_alarm_rate", 1 / 3001, "≤ 0.033%"),
        ("promised_false_alarm_rate", 0.0164, "≤ 1.6%"),
        ("false_alarm_rate", 0.0004, "0.04%"),
        ("false_alarm_rate", 1e-5, "0.001%"),
        ("false_alarm_rate", 0.0, "0.0%"),
        ("miss_rate", 1.0, "100.0%"),
        ("calibration_samples", 12345.0, "12345"),
    ],
)
def test_a_small_rate_is_not_shown_as_none(name: str, value: float, shown: str) -> None:
    """Thousands of good parts promise less than a tenth of a percent: rounded to one, nothing was ever allowed."""
    page = render(Evaluation("t", "l", _parts(), {"tile": {name: value}}, {}))
    assert f"<td>{shown}</td>" in page


def test_a_dark_part_and_its_map_do_not_run_together(monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(gallery, "data_uri", lambda image, side: shown.append(image))
    gallery.pair(np.zeros((64, 64, 3), np.uint8), np.zeros((4, 4)), 1.0, 5.0, None)
    assert (shown[0].min(axis=(0, 2)) == 255).any()


def test_overlay_leaves_normal_pixels_alone() -> None:
    image = np.full((40, 60, 3), 120, np.uint8)
    score_map = np.zeros((4, 6))
    score_map[1, 1] = 5.0
    shown = gallery.overlay(image, score_map, low=1.0, high=5.0)
    assert (shown[30:, 40:] == 120).all()
    assert (shown[15, 15] != 120).any()


def test_report_is_one_well_formed_file(tmp_path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((50, 70), np.uint8)
    mask[10:20, 10:20] = 255
    e = Evaluation(
        "hvq <on> tile", "lead & more", [*_parts(), Part("Geh\udce4use", "tile", "crack", 99.0, "NG")],
        {"tile": {"image_AUROC": 0.9, "pixel_AUROC": None}}, {"tile": 2.8},
        stage_ms={"encode": 3.0}, tiles=[("0.9", "AUROC")], facts=[("bundle", "x")],
    )  # fmt: skip
    path = write(
        e, tmp_path / "report.html", lambda p: (rng.integers(0, 255, (50, 70, 3), np.uint8), rng.random((7, 7)), mask)
    )
    text = path.read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.stack == []
    assert parser.fetched == []
    assert "&lt;on&gt;" in text and "<on>" not in text
    assert r"Geh\xe4use" in text, "a file whose name is no UTF-8"
    assert text.count("<figure>") >= 8
    assert "outlined in green where the data set marks it" in text and "the more anomalous" in text
