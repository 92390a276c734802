"""The study: its records and the page made of them; the runs themselves are tested as commands elsewhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from andon.export import results_page, study
from andon.runtime.errors import AndonError
from andon.runtime.results import load_results


def _args(tmp_path: Path, *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samplers", action="store_true")  # these two are of `andon eval` itself
    parser.add_argument("--limit", type=int)
    study.configure(parser)
    return parser.parse_args(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.json"), *extra])


def _fake(calls: list[list[str]]):
    def andon(arguments: list[str]) -> dict:
        calls.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        seed = int(arguments[arguments.index("--seed") + 1])
        metrics = {"image_AUROC": 0.9 + 0.01 * seed, "pixel_AUROC": None, "pixel_AUPRO": 0.7, "F1_max": 0.8}
        (out / "metrics.json").write_text(json.dumps({"products": {"tile": metrics}}))
        return {}

    return andon


def test_seeds_are_trained_once_and_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(study, "_andon", _fake(calls))
    monkeypatch.setattr(study, "_engines", lambda *a: iter(()))
    args = _args(tmp_path, "--all", str(tmp_path / "tile"), "--methods", "hvq")
    study.main(args)
    study.main(args)  # finished runs are kept
    assert [c[c.index("--seed") + 1] for c in calls] == ["0", "1", "2"]
    records = load_results(tmp_path / "results.json")
    assert {r["metric"] for r in records} == {"image_AUROC", "pixel_AUPRO", "F1_max"}
    assert all(r["command"].startswith("andon train --method hvq --data $ANDON_DATA/tile --seed") for r in records)
    page = (tmp_path / "results.md").read_text()
    assert "| hvq | tile | 0.910 ± 0.010 | 0.700 ± 0.000 | 0.800 ± 0.000 | 3 |" in page


def test_control_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(study, "_andon", _fake(calls))
    monkeypatch.setattr(study, "_engines", lambda *a: iter(()))
    study.main(_args(tmp_path, "--all", "elpv", "--methods", "hvq", "--study-seeds", "1"))
    study.main(_args(tmp_path, "--all", "elpv", "--methods", "hvq", "--untrained"))
    assert "backbone.weights=random:0" in calls[1]
    page = (tmp_path / "results.md").read_text()
    assert "| hvq | tile |" in page and "| hvq, untrained backbone | tile |" in page


def test_settings_on_validation_sets_have_rows_and_a_page_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(study, "_andon", _fake(calls))
    common = (
        "--all",
        str(tmp_path / "tile24"),
        "--methods",
        "hvq",
        "--study-seeds",
        "1",
        "--validation",
        "--study-set",
    )
    study.main(_args(tmp_path, *common, "schedule.max_seconds=null", "schedule.max_epochs=25"))
    study.main(_args(tmp_path, *common, "schedule.max_seconds=null", "schedule.max_epochs=75"))
    assert len({c[c.index("--out") + 1] for c in calls}) == 2 and "schedule.max_seconds=null" in calls[0]
    page = (tmp_path / "results.md").read_text()
    assert "No test image was read" in page and "| hvq, schedule.max_epochs=25 | tile |" in page


def test_samplers_are_recorded_with_their_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def andon(arguments: list[str]) -> dict:
        if arguments[0] == "train":
            return _fake(calls)(arguments)
        calls.append(arguments)
        programs = {"default": 4.0, "ddim10": 40.0}
        quality = {"mono": {"image_AUROC": 0.9}}
        return {
            "samplers": {n: {"products": quality, "latency_ms": {"total": {"p50": t}}} for n, t in programs.items()}
        }

    monkeypatch.setattr(study, "_andon", andon)
    monkeypatch.setattr(study, "_engines", lambda *a: iter(()))
    arguments = ("--all", "elpv", "--methods", "vpdm", "--study-seeds", "1", "--samplers", "--limit", "10")
    study.main(_args(tmp_path, *arguments))
    assert calls[-1][0] == "eval" and calls[-1][-3:] == ["--limit", "10", "--json"]
    page = (tmp_path / "results.md").read_text()
    assert "| elpv | mono | – | sampler ddim10 | 0.900 | – | 1 |" in page
    assert "| elpv | all | – | sampler ddim10 | – | 40.000 | 1 |" in page


def test_a_failed_run_ends_the_study() -> None:
    with pytest.raises(AndonError, match="andon train failed"):
        study._andon(["train", "--method", "no-such-method", "--data", "elpv"])


def test_few_shots_and_cost_have_tables_of_their_own(tmp_path: Path) -> None:
    base = {"method": "foct", "set": "tile", "product": "tile", "seed": 0, "command": "andon eval"}
    records = [
        {**base, "shots": 1, "metric": "image_AUROC", "value": 0.7},
        {**base, "shots": 1, "seed": 1, "metric": "image_AUROC", "value": 0.8},
        {**base, "shots": None, "metric": "GMAC", "value": 1.5},
    ]
    page = results_page.write_page(records, tmp_path / "p.md").read_text()
    assert "| tile | tile | 1 |  | 0.750 ± 0.071 | 2 |" in page
    assert "| foct | tile | – | – | 1.50 | – |" in page
    assert "MVTec-AD" in page  # the papers' figures
    assert "(selection.md)" in page and "| hgad | On validation alone" in page
    chosen = (tmp_path / "selection.md").read_text()
    assert "## hgad\n" in chosen and "- **Size.** 288 pixels instead of 224" in chosen
