"""Verdicts as they were published against the ground truth: the join, and that nothing missing looks good."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.errors import ConfigError
from andon.runtime.evaluation import confusion_table, latency_table
from andon.runtime.quality import table
from andon.runtime.recorded import from_verdicts, read_verdicts
from andon.runtime.source.playlist import parts
from andon.runtime.sourceconfig import DatasetSource
from andon.runtime.verdict import timestamp


def _sample(name: str, label: str) -> Sample:
    return Sample(Path(f"{name}.png"), f"test/{label}/{name}.png", "tile", label, "test")


def _verdict(sample: Sample, label: str, score: float | None, second: int) -> dict:
    return {
        "id": f"id-{sample.key}",
        "part_id": sample.key.removesuffix(".png"),
        "product": "tile",
        "label": label,
        "score": score,
        "threshold": 2.0,
        "method": "knn",
        "bundle": "0123456789ab",
        "ts_judged": f"2026-01-01T00:00:{second:02d}.000Z",
        "latency_ms": {"encode": 3.0, "total": 4.0},
    }


SAMPLES = [_sample("a", "good"), _sample("b", "good"), _sample("c", "crack"), _sample("d", "crack")]
VERDICTS = [
    _verdict(SAMPLES[0], "OK", 1.0, 0),
    _verdict(SAMPLES[1], "NG", 2.5, 1),
    _verdict(SAMPLES[2], "NG", 3.0, 2),
    _verdict(SAMPLES[3], "UNKNOWN", None, 3),
]


def test_figures_are_those_of_the_published_labels(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text("".join(json.dumps(v) + "\n" for v in [*VERDICTS, VERDICTS[0]]))
    evaluated = from_verdicts(read_verdicts(file), SAMPLES)
    assert evaluated.products["tile"]["image_AUROC"] == 1.0
    assert evaluated.products["tile"]["false_alarm_rate"] == 0.5
    assert evaluated.products["tile"]["miss_rate"] == 0.0  # UNKNOWN stops the part: it is no miss
    assert evaluated.products["tile"]["unknown_rate_defective"] == 0.5
    assert evaluated.seconds == pytest.approx(4.0)
    assert [line.split() for line in confusion_table(evaluated).splitlines()][1] == ["tile", "1", "1", "0", "1", "1"]


def test_verdicts_of_one_camera_alone(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    cameras = ("lane1", "lane2", "lane1", "lane1")
    file.write_text("".join(json.dumps({**v, "camera": c}) + "\n" for v, c in zip(VERDICTS, cameras, strict=True)))
    assert [v["score"] for v in read_verdicts(file, "lane2")] == [2.5] and len(read_verdicts(file)) == 4
    with pytest.raises(ConfigError, match="no verdict of camera lane3") as refused:
        read_verdicts(file, "lane3")
    assert refused.value.found == "verdicts of lane1, lane2"


@pytest.mark.parametrize("jump", [0, -3600, 86400 * 800, 120])
def test_a_clock_that_is_set_while_it_is_recorded_changes_no_figure(jump: int) -> None:
    """A station that started before its network; 120 s: a pause of the line is none of its speed either."""
    samples = [_sample(f"{k:02d}", "good" if k % 2 else "crack") for k in range(20)]
    verdicts = [_verdict(sample, "OK", float(k), k) for k, sample in enumerate(samples)]
    for k, verdict in enumerate(verdicts):
        moment = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=0.5 * k + (jump if k >= 8 else 0))
        verdict |= {"id": f"01{k:024d}", "ts_judged": timestamp(moment)}
    assert from_verdicts(verdicts[::-1], samples).seconds == pytest.approx(10.0)


def test_an_image_without_a_verdict_is_an_error() -> None:
    with pytest.raises(ConfigError, match="1 of 4 images have no verdict"):
        from_verdicts(VERDICTS[:3], SAMPLES)


def test_parts_that_were_not_judged_are_no_finds_and_the_figures_say_how_many() -> None:
    """A line that is overloaded by defects alone: it has found none of them."""
    good, bad = [_sample(f"g{i}", "good") for i in range(10)], [_sample(f"b{i}", "crack") for i in range(10)]
    verdicts = [_verdict(s, "OK", 1.0, i) for i, s in enumerate(good)]
    dropped = [{**_verdict(s, "UNKNOWN", None, 20), "threshold": None, "latency_ms": {}} for s in bad]
    evaluated = from_verdicts([*verdicts, *dropped], [*good, *bad])
    metrics = evaluated.products["tile"]
    for name in ("image_AUROC", "F1_max", "F1_threshold", "F1", "miss_rate", "balanced_accuracy"):
        assert metrics[name] is None, name
    assert metrics["false_alarm_rate"] == 0.0
    shares = [metrics[f"unknown_rate{kind}"] for kind in ("", "_good", "_defective")]
    assert shares == [0.5, 0.0, 1.0] and evaluated.mean["unknown_rate"] == 0.5
    assert "10 of 20 images are UNKNOWN (0.0% of the good and 100.0% of the defective)" in evaluated.unknown()["tile"]
    assert "unknown_rate" in table(evaluated.products)

    # The other way round: good parts that were dropped are no false alarms in any figure.
    dropped = [{**_verdict(s, "UNKNOWN", None, 20), "threshold": None} for s in good[5:]]
    found = [_verdict(s, "NG", 3.0, 30) for s in bad]
    metrics = from_verdicts([*verdicts[:5], *dropped, *found], [*good, *bad]).products["tile"]
    assert [metrics[k] for k in ("F1", "balanced_accuracy", "false_alarm_rate", "miss_rate")] == [1.0, 1.0, 0.0, 0.0]
    assert [metrics[f"unknown_rate{kind}"] for kind in ("", "_good", "_defective")] == [0.25, 0.5, 0.0]


def test_a_run_in_which_nothing_was_judged_has_no_figures() -> None:
    verdicts = [{**_verdict(s, "UNKNOWN", None, 0), "threshold": None, "latency_ms": {}} for s in SAMPLES]
    evaluated = from_verdicts(verdicts, SAMPLES)
    assert evaluated.mean["image_AUROC"] is None and evaluated.mean["unknown_rate"] == 1.0
    assert latency_table(evaluated.latency_ms) == "no latency: nothing was judged"


def test_file_names_may_hold_dots() -> None:
    samples = [_sample("unit_1.25", "good"), _sample("unit_1.5", "crack")]
    evaluated = from_verdicts([_verdict(samples[0], "OK", 1.0, 0), _verdict(samples[1], "NG", 3.0, 1)], samples)
    assert [j.label for j in evaluated.judged] == ["OK", "NG"]


def test_the_join_takes_the_part_ids_that_a_line_gives(tmp_path: Path) -> None:
    for name in ("good/unit_1.25.png", "good/unit_1.5.png", "bad/7.0.bmp"):
        (tmp_path / "tile" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tile" / name).touch()
    samples = open_dataset(tmp_path).select(split="test").samples
    played = parts(DatasetSource(kind="dataset", data=str(tmp_path)))
    verdicts = [
        {**_verdict(s, "OK", 1.0, i), "part_id": p.part_id}
        for i, (s, p) in enumerate(zip(samples, played, strict=True))
    ]
    assert len(from_verdicts(verdicts, samples).judged) == 2


def test_images_and_verdicts_that_share_a_part_id_are_refused() -> None:
    twins = [_sample("7", "good"), Sample(Path("7.bmp"), "test/good/7.bmp", "tile", "good", "test")]
    with pytest.raises(ConfigError, match="two images share one part id") as error:
        from_verdicts([_verdict(twins[0], "OK", 1.0, 0)], twins)
    assert "test/good/7.png and test/good/7.bmp" in str(error.value.found)
    twice = [*VERDICTS, {**VERDICTS[0], "id": "another", "label": "NG"}]
    with pytest.raises(ConfigError, match="part test/good/a has several verdicts") as error:
        from_verdicts(twice, SAMPLES)
    assert "name one with --camera" in str(error.value.next_step)


def test_a_verdict_that_lacks_something_is_none(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text(json.dumps({k: v for k, v in VERDICTS[0].items() if k != "part_id"}) + "\n")
    with pytest.raises(ConfigError, match="line 1 is not a verdict"):
        read_verdicts(tmp_path / "v.jsonl")


@pytest.mark.parametrize(("text", "message"), [("", "holds no verdict"), ("{}\n", "line 1"), ("nonsense\n", "line 1")])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "the verdicts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_verdicts(file)
    assert refused.value.next_step in (None, f"andon watch --config LINE.yaml --out '{file}'")
