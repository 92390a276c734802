"""Every registered method on the synthetic set: a short training, image AUROC above 0.9, a checkpoint that loads.

The settings are the edge preset with untrained backbone weights and few steps; a method that needs others has them in
tests/fixtures/short/<method>.yaml as ``dotted.key: value``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from andon.cli import main
from andon.runtime.dataset import open_dataset
from andon.train.checkpoint import load_checkpoint
from andon.train.config import default_config, load_config
from andon.train.features import load_frame
from andon.train.registry import get_method, list_methods
from pydantic import BaseModel

SHORT = Path(__file__).resolve().parents[1] / "fixtures" / "short"
METHODS = list_methods()


def settings(method: str) -> list[str]:
    """Overrides of the edge preset for a short training."""
    values: dict[str, object] = {"backbone.weights": "random:0", "schedule.warmup": 5, "schedule.max_seconds": None}
    values["augment.images"] = 14  # of 11 images a product: three views of them
    if load_config(method).schedule.steps > 0:
        values["schedule.steps"] = 30
    own = SHORT / f"{method}.yaml"
    values |= yaml.safe_load(own.read_text()) if own.is_file() else {}
    return [f"{k}={json.dumps(v)}" for k, v in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_short_training_finds_the_defects(
    method: str, synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    sets = [part for s in settings(method) for part in ("--set", s)]
    assert main(["train", "--method", method, "--data", str(synthetic_data), "--out", str(folder), *sets]) == 0
    with capsys.disabled():
        metrics = json.loads((folder / "metrics.json").read_text())
        figures = {p: round(m["image_AUROC"], 3) for p, m in metrics["products"].items()}
        print(f"\n{method}: {figures}, {metrics['training']['seconds']} s", end=" ")
    assert metrics["mean"]["image_AUROC"] > 0.9
    assert metrics["mean"]["pixel_AUROC"] > 0.9

    model = load_checkpoint(folder)
    samples = open_dataset(synthetic_data).select(split="test", products=["grid"]).samples[:3]
    frames = torch.stack([torch.from_numpy(load_frame(s, model.preprocess)) for s in samples])
    ids = torch.full((3,), model.classes.index("grid"))
    with torch.inference_mode():
        together = model(frames, ids)
        alone = model(frames[1:2], ids[1:2])
    assert together.score.shape == (3,) and together.score.dtype == torch.float32
    assert together.map.ndim == 3 and len(together.map) == 3
    torch.testing.assert_close(alone.score, together.score[1:2], rtol=1e-3, atol=1e-4, msg="depends on the batch")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["edge", "methods"])
def test_shipped_configurations_are_valid(method: str, kind: str) -> None:
    path = default_config(method, kind)
    assert path.is_file(), f"{path} is missing"
    config = load_config(method, path)
    assert config.method == method and config.preset
    assert list(undescribed(get_method(method).config())) == []


def undescribed(model: type[BaseModel]) -> Iterator[str]:
    """Settings without a description, sections' own ones included."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{inner}" for inner in undescribed(field.annotation))
        elif not field.description and name != "method":
            yield name
