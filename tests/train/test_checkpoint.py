"""A checkpoint: complete and truthful, the same for the same seed, refused once it is altered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from andon.cli import main
from andon.runtime.dataset import open_dataset
from andon.runtime.fingerprint import image_hash, pack
from andon.train.checkpoint import load_checkpoint, newest_checkpoint, read_provenance
from andon.train.errors import CheckpointError
from andon.train.evaluate import evaluate

from .conftest import SETS


def test_checkpoint_is_complete_and_truthful(checkpoint: Path, synthetic_data: Path) -> None:
    names = {p.name for p in checkpoint.iterdir()}
    assert names == {"model.safetensors", "config.yaml", "metrics.json", "log.jsonl", "provenance.json"}
    provenance = read_provenance(checkpoint)
    assert provenance.classes == ("grid", "stripes") and provenance.data == str(synthetic_data)
    assert provenance.backbone is not None and provenance.backbone.weights == "random:0"
    data = open_dataset(synthetic_data)
    held = data.select(keys=(*provenance.holdout, *provenance.constants))
    assert (len(provenance.holdout), len(provenance.constants), len(held)) == (2, 4, 6)
    assert all(s.split == "train" and s.good for s in held.samples)
    assert provenance.trained_on == 22 and provenance.steps == 4
    parts = {"thresholds": provenance.holdout, "constants": provenance.constants, "skipped": ()}
    left = [s for s in data.select(split="train", products=provenance.classes).samples if s not in held.samples]
    for use, keys in (*parts.items(), ("fitted", [s.key for s in left])):
        found = pack(image_hash(s.path) for s in data.select(keys=keys).samples)
        assert provenance.fingerprints[use] == found and len(found) == 16 * len(keys), use
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert set(metrics["products"]) == {"grid", "stripes"}
    assert 0 <= metrics["mean"]["pixel_AUPRO"] <= 1 and metrics["products"]["grid"]["defective"] == 8
    assert json.loads((checkpoint / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_loaded_model_gives_the_same_figures(checkpoint: Path, synthetic_data: Path) -> None:
    model = load_checkpoint(checkpoint)
    assert not model.training and model.config.seed == 3 and model.config.backbone.weights == "random:0"
    tests = open_dataset(synthetic_data).select(split="test", products=["grid"]).samples
    found = evaluate(model, tests, progress=False)["grid"]
    recorded = json.loads((checkpoint / "metrics.json").read_text())["products"]["grid"]
    assert found == pytest.approx(recorded, rel=1e-5)


def test_altered_or_unfinished_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="not the file that training wrote"):
        load_checkpoint(copy)
    (copy / "provenance.json").unlink()
    (copy / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a complete checkpoint") as caught:
        load_checkpoint(copy)
    assert f"--resume {copy}" in str(caught.value.next_step)


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_provenance(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a bundle, which is exported already"):
        read_provenance(tmp_path)


def test_weights_of_another_architecture_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = (copy / "config.yaml").read_text()
    assert "layers: 2" in config
    (copy / "config.yaml").write_text(config.replace("layers: 2", "layers: 3"))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(copy)


def test_newest_checkpoint_is_the_last_completed_of_its_method(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of hvq.*\n  found:    nothing\n"):
        newest_checkpoint("hvq", tmp_path)
    for name, created in (("b", "2026-01-01T00:00:00+00:00"), ("a", "2026-01-02T00:00:00+00:00")):
        shutil.copytree(checkpoint, tmp_path / name)
        record = json.loads((tmp_path / name / "provenance.json").read_text())
        (tmp_path / name / "provenance.json").write_text(json.dumps({**record, "created": created}))
    (tmp_path / "unfinished").mkdir()
    assert newest_checkpoint("hvq", tmp_path) == tmp_path / "a"
    with pytest.raises(CheckpointError):
        newest_checkpoint("hgad", tmp_path)


def test_a_damaged_checkpoint_is_not_in_the_way_of_the_newest(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("whole", "damaged"):
        shutil.copytree(checkpoint, tmp_path / name)
    (tmp_path / "damaged/provenance.json").write_text("{")
    assert newest_checkpoint("hvq", tmp_path) == tmp_path / "whole"
    assert "passed over" in caplog.text and str(tmp_path / "damaged") in caplog.text


def test_same_seed_gives_the_same_weights(checkpoint: Path, synthetic_data: Path, tmp_path: Path) -> None:
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid,stripes", "--no-eval"]
    for seed in ("3", "4"):
        assert main([*arguments, "--out", str(tmp_path / seed), "--seed", seed, *SETS]) == 0
    first = load_checkpoint(checkpoint).state_dict()
    same, other = (load_checkpoint(tmp_path / s).state_dict() for s in ("3", "4"))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert read_provenance(tmp_path / "4").holdout == read_provenance(checkpoint).holdout
