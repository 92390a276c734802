"""train/augment.py: views of good images where there are few."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from andon.cli import main
from andon.runtime.dataset import Sample
from andon.runtime.images import read_rgb
from andon.train.augment import View, augmented, described
from andon.train.checkpoint import read_provenance
from andon.train.config import load_config
from andon.train.features import extract, load_frame
from andon.train.holdout import Split, split_good
from andon.train.method import Augmentation
from andon.train.methods.hvq.model import HvqModel
from hypothesis import given
from hypothesis import strategies as st

STILL = {"rotation": 0.0, "scale": 0.0, "shift": 0.0}


def good(count: int, product: str = "nut", folder: Path = Path()) -> list[Sample]:
    return [Sample(folder / f"{i:03}.png", f"{product}/{i:03}.png", product, "good", "train") for i in range(count)]


@given(st.integers(1, 60), st.integers(0, 200), st.permutations(range(6)))
def test_a_product_is_filled_up_to_the_number(count: int, images: int, order: list[int]) -> None:
    samples = good(count)
    fitting, _ = augmented(Split(samples, [], []), Augmentation(images=images))
    assert fitting[:count] == samples and len(fitting) == max(count, images)
    views = fitting[count:]
    assert all(isinstance(v, View) for v in views) and len({s.key for s in fitting}) == len(fitting)
    assert len({v.recipe for v in views if isinstance(v, View)}) == len(views), "no view twice"
    per_image = Counter(v.path for v in views)
    assert not views or max(per_image.values()) - min(per_image.get(s.path, 0) for s in samples) <= 1
    shuffled = [samples[i] for i in order if i < count] + samples[6:]
    again, _ = augmented(Split(shuffled, [], []), Augmentation(images=images))
    assert sorted(s.key for s in again) == sorted(s.key for s in fitting), "whatever the order"


@pytest.mark.parametrize(("flips", "most"), [((), 5), (("horizontal",) * 2, 10), (("horizontal", "vertical"), 20)])
def test_mirrored_only_there_are_so_many_different_ones(flips: tuple[str, ...], most: int) -> None:
    settings = Augmentation.model_validate({"images": 96, "flips": flips, **STILL})
    fitting, _ = augmented(Split(good(5), [], []), settings)
    assert len(fitting) == most
    assert len({(s.path, getattr(s, "flips", ())) for s in fitting}) == most


def test_constants_get_views_in_proportion_and_thresholds_none() -> None:
    samples = good(31, "cookie") + good(200, "tile")
    split = split_good(samples, 0.1)
    fitting, constants = augmented(split, Augmentation(images=96))
    assert Counter(s.product for s in fitting) == {"cookie": 96, "tile": len(split.fitting) - 24}, "tile has enough"
    few = [s for s in constants if s.product == "cookie"]
    assert len(few) == 4 * 4 and {s.path for s in few} == {s.path for s in split.constants if s.product == "cookie"}
    assert sum(s.product == "tile" for s in constants) == len(split.constants) - 4
    kept = {s.path for s in split.thresholds if s.product == "cookie"}
    assert kept and not kept & {s.path for s in fitting + constants if s.product == "cookie"}


def test_a_view_shows_the_image_moved() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[4:8, 6:10] = 255
    view = View(**vars(good(1)[0]))
    assert np.array_equal(view.of(image), image)
    mirrored = dataclasses.replace(view, flips=(0, 1)).of(image)
    assert np.array_equal(mirrored, image[::-1, ::-1]) and mirrored.flags.c_contiguous
    shifted = dataclasses.replace(view, shift=(0.5, 0.25)).of(image)
    assert shifted[14:18, 36:40].min() == 255, "30 pixels to the right, 10 down"
    turned = dataclasses.replace(view, rotation=90.0).of(image[:, 10:50])
    assert turned.shape == (40, 40, 3)
    double = dataclasses.replace(view, scale=2.0).of(image)
    assert double.sum() == 0, "the corner has left the picture"


def test_cached_features_are_those_of_the_view(toy: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = good(3, "grid", tmp_path)
    for sample in samples:
        cv2.imwrite(str(sample.path), rng.integers(0, 255, (32, 32, 3), np.uint8))
    model = toy.build()
    fitting, _ = augmented(Split(samples, [], []), Augmentation(images=12))
    data = extract(model, fitting, root=tmp_path, progress=False)
    frames = [load_frame(s, model.preprocess) for s in fitting]
    view = fitting[5]
    assert isinstance(view, View) and view.flips
    plain = load_frame(next(s for s in samples if s.path == view.path), model.preprocess)
    assert not np.array_equal(frames[5], plain)
    assert read_rgb(view.path).shape == (32, 32, 3)
    expected = model.patches(torch.from_numpy(np.stack(frames)))["patches"].numpy()
    assert np.array_equal(data.features["patches"], expected)
    before = len(list((tmp_path / "features").glob("*.lock")))
    other, _ = augmented(Split(samples, [], []), Augmentation(images=12, rotation=5.0))
    extract(model, other, root=tmp_path, progress=False)
    assert len(list((tmp_path / "features").glob("*.lock"))) == before + 1, "other views are another entry"


def test_training_says_so_and_records_it(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid", "--no-eval"]
    settings = ("backbone.weights=random:0", "schedule.steps=2", "schedule.warmup=1", "augment.images=14")
    sets = [part for s in settings for part in ("--set", s)]
    assert main([*arguments, "--out", str(tmp_path / "run"), *sets, "--json"]) == 0
    out = capsys.readouterr().out
    assert "3 views of them are added" in out and "--set augment.flips=[]" in out
    assert json.loads(out.splitlines()[-1])["ok"] is True
    provenance = read_provenance(tmp_path / "run")
    assert (provenance.trained_on, provenance.views) == (11, 3)
    assert main([*arguments, "--out", str(tmp_path / "none"), *sets, "--set", "augment.images=0"]) == 0
    assert "views" not in capsys.readouterr().out and read_provenance(tmp_path / "none").views == 0


def test_training_and_constants_see_the_views(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    for name in ("prepare", "finalize"):
        whole = getattr(HvqModel, name)
        monkeypatch.setattr(
            HvqModel,
            name,
            lambda self, data, name=name, whole=whole: (
                seen.update({name: [s.key for s in data.samples]}),
                whole(self, data),
            ),
        )
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid", "--no-eval"]
    settings = ("backbone.weights=random:0", "schedule.steps=1", "schedule.warmup=0", "augment.images=33")
    sets = [part for s in settings for part in ("--set", s)]
    assert main([*arguments, "--out", str(tmp_path / "run"), *sets]) == 0
    assert len(seen["prepare"]) == 33 and sum("#" in key for key in seen["prepare"]) == 22
    assert len(seen["finalize"]) == 6 and sum("#" in key for key in seen["finalize"]) == 4
    kept = read_provenance(tmp_path / "run").holdout
    assert kept and not {k.partition("#")[0] for part in seen.values() for k in part} & set(kept)


def test_what_the_views_are_is_said() -> None:
    assert described(Augmentation(rotation=10)).startswith("mirrored horizontal and vertical; turned up to 10 degrees")
    assert "mirrored" not in described(Augmentation(flips=()))
    still = Augmentation.model_validate({"flips": ("vertical",), **STILL})
    assert described(still).startswith("mirrored vertical; if such a part is a defect")
    config = load_config("hvq", None, ["augment.flips=[]", "augment.rotation=0"])
    assert config.augment.flips == () and config.augment.rotation == 0
