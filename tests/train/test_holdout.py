"""Which good images a training holds out, and for what: the same every time, copies together."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from andon.cli import main
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.fingerprint import unpack
from andon.train.checkpoint import read_provenance
from andon.train.config import default_config, load_config
from andon.train.holdout import Split, split_good
from andon.train.methods.hvq.model import HvqModel
from andon.train.registry import get_method, list_methods
from hypothesis import given
from hypothesis import strategies as st

from .conftest import SETS

USES = ("holdout", "constants")
CHOSEN = ["010", "035", "055", "066"]


def test_the_hold_out_has_two_parts_and_is_the_same_every_time(synthetic_data: Path) -> None:
    samples = [s for s in open_dataset(synthetic_data).samples if s.split == "train"]
    split = split_good(samples, 0.1)
    parts = (split.fitting, split.constants, split.thresholds)
    keys = [{s.key for s in part} for part in parts]
    assert sum(map(len, parts)) == len(samples) and set.union(*keys) == {s.key for s in samples}
    for part, count in zip(parts, (11, 2, 1), strict=True):  # a quarter of 14 is held out, for 40 would be more
        assert Counter(s.product for s in part) == dict.fromkeys(("grain", "grid", "stripes"), count)
    backwards = split_good(samples[::-1], 0.1)
    assert backwards.thresholds == split.thresholds[::-1], "the order of the list does not matter"
    assert split_good(samples, 0.0) == Split(samples, [], [])
    half = split_good(samples[:10], 0.5)
    assert (len(half.fitting), len(half.constants), len(half.thresholds)) == (5, 3, 2)
    many = [dataclasses.replace(samples[0], key=str(i)) for i in range(200)]
    assert len(split_good(many, 0.1).thresholds) == 19, "enough to promise 5 % false alarms"


@given(st.integers(1, 3000), st.sampled_from((0.1, 0.25, 0.5)))
def test_thresholds_get_a_number_of_images_that_promises_what_is_asked(images: int, share: float) -> None:
    split = split_good([Sample(Path(f"{i}.png"), str(i), "nut", "good", "train") for i in range(images)], share)
    kept, held = len(split.thresholds), len(split.thresholds) + len(split.constants)
    assert len(split.fitting) + held == images and len(split.fitting) >= 1
    if held >= 38:
        exact = (kept + 1 - math.ceil(0.95 * (kept + 1) - 1e-9)) / (kept + 1)
        assert exact == pytest.approx(0.05) and abs(kept - held / 2) <= 10.5 and split.constants
    else:
        assert kept == held // 2, "too few for 5 % whatever is done"


@given(st.integers(1, 3000), st.sampled_from((0.1, 0.25, 0.5)))
def test_without_constants_all_that_is_held_out_is_for_thresholds(images: int, share: float) -> None:
    """And the images that are trained on stay the same: recorded results and feature caches hold."""
    samples = [Sample(Path(f"{i}.png"), str(i), "nut", "good", "train") for i in range(images)]
    halves, whole = split_good(samples, share), split_good(samples, share, for_constants=False)
    assert whole.fitting == halves.fitting and whole.constants == []
    assert {s.key for s in whole.thresholds} == {s.key for s in (*halves.constants, *halves.thresholds)}


class Looked(Exception):
    """`finalize` has looked at the held-out images."""


class Watched:
    """A hold-out that nobody may look at."""

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        raise Looked(name)


SETTINGS = [(method, kind, ()) for method in list_methods() for kind in ("edge", "methods")]
SETTINGS += [("vpdm", "edge", ("score.by_position=false",)), ("hvq", "edge", ("score.calibrate=none",))]
SETTINGS += [("hvq", "edge", ("score.calibrate=none", f"pot.mode={mode}")) for mode in ("ct_level1", "sinkhorn_all")]


@pytest.mark.parametrize(("method", "kind", "sets"), SETTINGS)
def test_what_a_method_says_of_its_constants_is_true(method: str, kind: str, sets: tuple[str, ...]) -> None:
    """`finalize` looks at held-out images if and only if some are kept for it."""
    config = load_config(method, default_config(method, kind), overrides=("backbone.weights=random:0", *sets))
    model = get_method(method).build(config, ("nut", "bolt")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if config.uses_constants:
        with pytest.raises(Looked):
            model.finalize(Watched())
    else:
        assert not config.needs_constants
        model.finalize(Watched())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_knn_and_foct_set_no_constants() -> None:
    assert [name for name in list_methods() if not load_config(name).uses_constants] == ["foct", "knn"]


def test_a_method_without_constants_keeps_all_of_the_hold_out_for_thresholds(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--method", "knn", "--data", str(synthetic_data), "--products", "grid", "--no-eval"]
    sets = ("--set", "backbone.weights=random:0", "--set", "coreset=50", "--set", "pool=500")
    assert main([*common, *sets, "--out", str(tmp_path / "run"), "--group-by", r"(\d+)"]) == 0
    said = capsys.readouterr().out
    assert "11 to train on; held out: 3 for thresholds" in said
    assert "constants" not in said, "also of the parts, and of their defaults"
    provenance = read_provenance(tmp_path / "run")
    assert len(provenance.holdout) == 3 and provenance.constants == ()
    prints = provenance.fingerprints
    assert [len(unpack(prints[use])) for use in ("fitted", "constants", "thresholds")] == [11, 0, 3]


def test_copies_of_an_image_stay_in_one_part() -> None:
    """And count as one: eight copies of ten images are ten images."""
    samples = [Sample(Path(f"{i:02}.png"), f"{i:02}", "nut", "good", "train") for i in range(80)]
    contents = {s.key: str(i % 10) for i, s in enumerate(samples)}
    split = split_good(samples, 0.1, contents)
    parts = [{contents[s.key] for s in part} for part in (split.fitting, split.constants, split.thresholds)]
    assert [len(part) for part in parts] == [8, 1, 1] and len(set.union(*parts)) == 10
    assert split_good(samples, 0.1, {s.key: s.key for s in samples}) == split_good(samples, 0.1), "none is a copy"


def test_copies_are_said_and_none_is_held_out_that_was_trained_on(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(synthetic_data / "grid", tmp_path / "data" / "grid")
    for image in list((tmp_path / "data/grid/train/good").iterdir()):
        shutil.copy(image, image.with_name(f"again-{image.name}"))
    common = ["--method", "hvq", "--data", str(tmp_path / "data"), "--no-eval", *SETS]
    assert main(["train", *common, "--out", str(tmp_path / "run")]) == 0
    assert "14 of them are copies of others" in capsys.readouterr().out
    prints = read_provenance(tmp_path / "run").fingerprints
    parts = [unpack(prints[use]) for use in ("fitted", "constants", "thresholds")]
    assert [len(part) for part in parts] == [11, 2, 1] and len(frozenset.union(*parts)) == 14


def test_no_constant_is_set_on_an_image_kept_for_thresholds(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(HvqModel, "finalize", lambda self, data: seen.extend(s.key for s in data.samples))
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--no-eval", "--out", str(tmp_path / "run")]
    assert main([*arguments, *SETS]) == 0
    provenance = read_provenance(tmp_path / "run")
    assert sorted(seen) == sorted(provenance.constants) and not {*seen} & {*provenance.holdout}
    assert provenance.holdout, "and there are some for thresholds"


def test_pictures_of_a_part_stay_together_and_count_as_one() -> None:
    """Also where a copy joins two parts; and without parts every choice is what it was."""
    samples = [Sample(Path(f"{i:03}.png"), f"{i:03}", "nut", "good", "train") for i in range(240)]
    contents = {s.key: s.key for s in samples} | {"239": "000"}
    parts = {s.key: str(i // 6) for i, s in enumerate(samples)}
    split = split_good(samples, 0.1, contents, parts)
    shown = [{parts[s.key] for s in part} for part in (split.fitting, split.constants, split.thresholds)]
    assert len(set.union(*shown)) == sum(map(len, shown)) == 40, "no part is in two of them"
    assert next(part for part in shown if "0" in part) == next(part for part in shown if "39" in part)
    assert len(shown[1]) + len(shown[2]) in (9, 10), "a quarter of what are 39 parts now"
    assert split_good(samples, 0.1, contents, {}) == split_good(samples, 0.1, contents)
    assert split_good(samples, 0.1, None, {s.key: s.key for s in samples}) == split_good(samples, 0.1)
    assert [s.key for s in split_good(samples, 0.1).thresholds][:4] == CHOSEN, "the choice of earlier versions"


def test_parts_are_held_out_whole_recorded_and_said(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """grid: three pictures a part. Its test is drawn of the same folder, so it shows the same parts."""
    images = sorted((synthetic_data / "grid/train/good").iterdir())
    (tmp_path / "data/grid/good").mkdir(parents=True)
    for i, image in enumerate(images):
        shutil.copy(image, tmp_path / f"data/grid/good/part{i // 3}_{i}.png")
    common = ["train", "--method", "hvq", "--data", str(tmp_path / "data"), "--no-eval", *SETS]
    arguments = [*common, "--set", "holdout=0.5", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--group-by", r"part(\d+)_"]) == 0
    said = capsys.readouterr().out
    assert "whose pictures stay together" in said and "good test images show parts that are trained on" in said
    provenance = read_provenance(tmp_path / "run")
    of = {use: {key.split("_")[0] for key in keys} for use, keys in vars(provenance).items() if use in USES}
    assert of["holdout"] and of["constants"] and not of["holdout"] & of["constants"]
    prints = unpack(provenance.fingerprints["thresholds"])
    assert provenance.parts and frozenset.union(*map(unpack, provenance.parts)) <= prints
    assert len(provenance.parts) <= len(of["holdout"])
    assert load_config("hvq", tmp_path / "run" / "config.yaml").group_by == r"part(\d+)_"
    assert main([*common, "--out", str(tmp_path / "alone"), "--group-by", r"_\d+"]) == 0
    assert "warning: no two images show the same part" in capsys.readouterr().out
