"""The measurement behind `make soak`, for seconds instead of half an hour: what it says is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure.consumer import Consumer
from measure.soak import _account
from measure.trend import trend

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_soak_accounts_for_every_verdict(tmp_path: Path, bundle: Path, make_images: Any) -> None:
    for name, shade in (("good", 40), ("bad", 200)):
        make_images(tmp_path / "data" / "train" / "good", [40] * 4)
        make_images(tmp_path / "data" / "test" / name, [shade] * 4)
    command = [sys.executable, "-m", "measure.soak", "--minutes", "0.2", "--outage", "3", "--every", "1"]
    files = ["--out", str(tmp_path / "soak.md"), "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(
        [*command, *files, "--bundle", str(bundle), "--data", str(tmp_path / "data")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "soak.json").read_text())
    assert set(measured["cameras"]) == {"pattern", "folder", "dataset", "rtsp"}
    for name, row in measured["cameras"].items():
        assert row["judged"] == row["arrived"] > 10, name
        assert row["lost"] == row["out_of_order"] == 0 and row["replayed"] > 0, (name, row)
    samples = measured["samples"]
    assert len(samples) >= 10 and all(sample["rss"] > 20 and sample["descriptors"] > 5 for sample in samples)
    assert max(sample["outbox"] for sample in samples) > 10, "while the broker was away verdicts waited"
    assert samples[-1]["verdicts"] <= sum(row["arrived"] for row in measured["cameras"].values())
    page = (tmp_path / "soak.md").read_text()
    assert "MB/h" in page and page == done.stdout.rstrip("\n") + "\n" and str(tmp_path) not in page


def test_what_is_missing_or_comes_twice_is_counted() -> None:
    consumer = Consumer("127.0.0.1", 1, ["cam0", "cam1"])
    for identifier, replayed in (("A", False), ("C", False), ("B", True), ("A", True)):
        document = {
            "id": identifier,
            "camera": "cam0",
            "label": "OK",
            "replayed": replayed,
            "ts_capture": "2026-01-01T00:00:00.000Z",
            "latency_ms": {"total": 7.0},
        }
        consumer.take(json.dumps(document).encode())
    cameras = {name: {"verdicts": verdicts, "restarts": 0} for name, verdicts in (("cam0", 4), ("cam1", 2))}
    account = _account(consumer, {"cameras": cameras, "slots": {"cam0": {"dropped": 0}, "cam1": {"dropped": 0}}})
    first, second = account["cameras"]["cam0"], account["cameras"]["cam1"]
    assert (first["arrived"], first["lost"], first["duplicates"], first["replayed"]) == (3, 1, 1, 1)
    assert first["out_of_order"] == 1 and second["lost"] == 2 and account["lost"] == 3
    assert consumer.latency(0.0, 1e12)["judging_p99"] == 7.0


def test_the_slope_of_a_leak_is_found_and_noise_is_none() -> None:
    random = np.random.default_rng(2)
    hours = np.arange(300) / 600
    steps = np.repeat(random.normal(0, 1, 30), 10)  # memory moves in steps: ten samples say the same
    leak = trend(hours, 180 + 12 * hours + steps)
    assert abs(leak.slope - 12) < 3 * leak.error and leak.slope > 4 * leak.error
    level = trend(hours, 180 + steps)
    assert abs(level.slope) < 3 * level.error
    independent = trend(hours, 180 + random.permutation(steps))
    assert level.error > 2 * independent.error, "repeated samples are worth less than independent ones"
    assert trend(hours, np.full(300, 180.0)).slope == pytest.approx(0)
    with pytest.raises(ValueError, match="three"):
        trend([0, 1], [1, 2])
