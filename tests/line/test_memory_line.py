"""The memory of a whole line in a process of its own: it learns, obeys MQTT commands, survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.cli import main
from andon.runtime.broker import EmbeddedBroker

RUN = [sys.executable, "-m", "andon.cli", "run", "--backend", "onnxruntime", "--threads", "1", "--json"]


def disc(rng: np.random.Generator) -> np.ndarray:
    image = rng.integers(20, 60, (96, 96, 3), np.uint8)
    cv2.circle(image, (48, 48), 24, (200, 180, 160), -1)
    return image


@pytest.fixture(scope="module", params=["knn", "foct"])
def parts(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Good parts, and a bundle of them by each method with a memory, on an untrained network."""
    method, root = request.param, tmp_path_factory.mktemp("line-memory")
    folder = root / "disc"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(40):
        cv2.imwrite(str(folder / f"part{k:03d}.png"), disc(rng))
    from andon.train.config import default_config

    text = default_config(method).read_text().replace("size: 224", "size: 64").replace("grid: 28", "grid: 8")
    text = text.replace("id: tf_efficientnet_lite0", "id: tf_efficientnet_lite0\n  weights: random:0")
    config = root / "method.yaml"
    config.write_text(text.replace("coreset: 4000", "coreset: 128").replace("episodic: 800", "episodic: 200"))
    arguments = ["--support", str(folder), "--shots", "2", "--config", str(config), "--foreground", "all"]
    assert main(["enroll", "--method", method, *arguments, "--out", str(root / "bundle")]) == 0
    return folder, root / "bundle"


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*RUN, "--config", str(config), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_memory_learns_obeys_and_survives(
    parts: tuple[Path, Path], broker: EmbeddedBroker, consumer: Any, make_line: Any
) -> None:
    folder, bundle = parts
    source = {"kind": "folder", "path": str(folder), "loop": True, "fps": 30}
    line = make_line(
        {"cam0": {"source": source, "product": "disc", "drop": "block"}},  # or engines that open slowly cost the frames
        bundle=str(bundle),
        broker={"host": broker.host, "port": broker.port},
        memory={"enabled": True, "save_every": 0.2, "guard": {"quantile": 1.0, "window": 10, "warmup": 5}},
        judge={"thresholds": {"disc": 1e6}},
    )

    def command(**arguments: Any) -> dict[str, Any]:
        before = len(consumer.of("result"))
        topic = next(m.topic for m in consumer.messages if m.topic.endswith("/cam0/verdict")).removesuffix("/verdict")
        consumer.client.publish(f"{topic}/cmd/memory", json.dumps(arguments), qos=1)
        consumer.until(lambda: len(consumer.of("result")) > before)
        answer: dict[str, Any] = consumer.of("result")[-1]
        assert answer["ok"], answer
        return answer["result"]

    process = start(line)
    try:
        consumer.until(lambda: any(v["memory_version"] >= 3 for v in consumer.of("verdict")), 60)
        assert command(action="freeze", by="test")["frozen"]
        pinned = command(action="snapshot")
        assert pinned["rows"]["disc"] > 0 and pinned["snapshots"]
        assert not command(action="unfreeze")["frozen"]
        consumer.until(lambda: consumer.of("verdict")[-1]["memory_version"] > pinned["version"])
        back = command(action="rollback", version=pinned["version"])
        assert back["rows"] == pinned["rows"] and back["version"] > pinned["version"]
        consumer.until(lambda: consumer.of("verdict")[-1]["memory_version"] > back["version"] + 2)
        assert command(action="reference")["rows"]["disc"] > 0
        audit = next(line.parent.rglob("memory/audit.jsonl")).read_text(encoding="utf-8").splitlines()
        (renewed,) = [entry for entry in map(json.loads, audit) if entry["action"] == "reference"]
        assert renewed["camera"] == "cam0"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    published = max(v["memory_version"] for v in consumer.of("verdict"))
    (line.parent / "state" / "memory" / "audit.jsonl").unlink()  # a power cut takes what of it was not synced
    consumer.forget()
    process = start(line, "--max-frames", "10")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "restored from snapshot" in err
    consumer.until(lambda: sum(not v["replayed"] for v in consumer.of("verdict")) == 10)
    versions = [v["memory_version"] for v in consumer.of("verdict") if not v["replayed"]]
    assert versions == sorted(versions)
    assert versions[0] >= published, "a number that was published is not given to another memory"
    assert json.loads(out.splitlines()[-1])["ok"]
