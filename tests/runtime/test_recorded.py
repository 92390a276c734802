"""Verdicts as they were published against the ground truth: the join, and that nothing missing looks good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from andon.runtime.dataset import Sample
from andon.runtime.errors import ConfigError
from andon.runtime.evaluation import confusion_table
from andon.runtime.recorded import from_verdicts, read_verdicts


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
    assert evaluated.seconds == pytest.approx(4.0)
    assert [line.split() for line in confusion_table(evaluated).splitlines()][1] == ["tile", "1", "1", "0", "1", "1"]


def test_an_image_without_a_verdict_is_an_error() -> None:
    with pytest.raises(ConfigError, match="1 of 4 images have no verdict"):
        from_verdicts(VERDICTS[:3], SAMPLES)


@pytest.mark.parametrize(("text", "message"), [("", "holds no verdict"), ("{}\n", "line 1"), ("nonsense\n", "line 1")])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_verdicts(file)
