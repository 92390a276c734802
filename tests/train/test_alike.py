"""Several pictures of each part are told from one picture each, also where parts are turned or lie still."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from andon.cli import main
from andon.runtime.dataset import Sample
from andon.train import alike
from andon.train.alike import descriptors, group_warnings, handfuls
from andon.train.augment import View
from andon.train.features import FeatureSet

from .conftest import SETS

RNG = np.random.default_rng(0)


def parts(count: int, pictures: int, spread: float = 0.2, dimensions: int = 30) -> torch.Tensor:
    """Points of `count` parts, with as many pictures each that differ by `spread` of how parts differ."""
    own = RNG.normal(size=(count, dimensions)).repeat(pictures, 0)
    return torch.from_numpy((own + spread * RNG.normal(size=own.shape)).astype(np.float32))


@pytest.mark.parametrize("pictures", [3, 5, 10])
def test_pictures_of_one_part_lie_in_handfuls(pictures: int) -> None:
    assert handfuls(parts(240 // pictures, pictures)) > 0.9


@pytest.mark.parametrize("dimensions", [2, 5, 30])
def test_one_picture_of_each_part_does_not(dimensions: int) -> None:
    assert handfuls(parts(240, 1, dimensions=dimensions)) < 0.5


def test_parts_that_are_turned_do_not() -> None:
    angle = RNG.uniform(0, 2 * np.pi, 240)
    circle = np.stack([np.sin(angle), np.cos(angle)], 1) + 0.01 * RNG.normal(size=(240, 2))
    assert handfuls(torch.from_numpy(circle.astype(np.float32))) < 0.5


def test_a_product_is_named_where_nothing_but_its_images_tells(tmp_path: Path) -> None:
    """Views of an image are near to it and no pictures of a part; few images say nothing."""
    maps = [parts(30, 4), parts(120, 1), parts(10, 4)]
    values = torch.cat([*maps, maps[1], maps[1]]).numpy()
    names = [0] * 120 + [1] * 120 + [2] * 40 + [1] * 240
    samples = tuple(
        (Sample if i < 280 else View)(tmp_path / f"{i}.png", str(i), "abc"[name], "good", "train")
        for i, name in enumerate(names)
    )
    tokens = np.repeat(values[:, None, :], 4, 1)  # [n, 2 x 2 tokens, c]
    data = FeatureSet(samples, {"tokens": tokens, "map": values[:, :, None, None]}, None, np.array(names))
    said = list(group_warnings(data, ("a", "b", "c")))
    assert len(said) == 1 and said[0].startswith("warning: a: ") and "--group-by" in said[0]
    assert descriptors(data, np.arange(3)).shape == (3, 4 * 30 + 30)
    assert not list(group_warnings(FeatureSet(samples, {}, None, np.array(names)), ("a", "b", "c")))


def test_training_says_so_unless_it_was_told(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alike, "_FEWEST", 40)
    folder = tmp_path / "set/grid/train/good"
    folder.mkdir(parents=True)
    for image in sorted((synthetic_data / "grid/train/good").iterdir()):
        pixels = cv2.imread(str(image)).astype(np.float32)
        for k in range(4):
            noisy = np.clip(pixels + RNG.normal(0, 2, pixels.shape), 0, 255)
            cv2.imwrite(str(folder / f"part{image.stem}_{k}.png"), noisy.astype(np.uint8))
    common = ["train", "--method", "hvq", "--data", str(tmp_path / "set"), "--no-eval", *SETS]
    assert main([*common, "--out", str(tmp_path / "alone")]) == 0
    assert "warning: grid: " in (said := capsys.readouterr().out) and "train again with --group-by" in said
    assert main([*common, "--out", str(tmp_path / "told"), "--group-by", r"part\d+"]) == 0
    assert "train again with --group-by" not in capsys.readouterr().out
