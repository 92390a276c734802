"""What `andon export` verifies on: the checkpoint's set, found again, without what training left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from andon.cli import main
from andon.export import command, frames, verify
from andon.export.exporter import Request, export_bundle
from andon.export.frames import gather
from andon.runtime.dataset import Dataset, Sample, open_dataset
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.fingerprint import image_hash, pack
from andon.runtime.manifest import Preprocess
from andon.train.checkpoint import Provenance

from .conftest import Toy  # type: ignore[import-not-found]


@pytest.fixture
def data(synthetic_data: Path, tmp_path: Path) -> Path:
    """A set of one product, in a folder of sets, with an image that cannot be decoded in each split."""
    shutil.copytree(synthetic_data / "grid", tmp_path / "data" / "grid")
    for name in BROKEN:
        broken = tmp_path / "data" / name
        broken.write_bytes(broken.read_bytes()[:200] + name.encode())
    return tmp_path / "data"


BROKEN = ("grid/train/good/003.png", "grid/test/good/003.png")
HELD = ("grid/train/good/000.png", "grid/train/good/001.png")


def provenance(dataset: Dataset, *, contents: bool = True, skipped: tuple[str, ...] = BROKEN) -> Provenance:
    def prints(samples: list[Sample]) -> str:
        return pack(image_hash(s.path) for s in samples)

    groups = {"thresholds": HELD, "skipped": skipped}
    record = {use: prints([s for s in dataset.samples if s.key in keys]) for use, keys in groups.items()}
    return Provenance(
        method="toy",
        created="2026-01-01T00:00:00.000+00:00",
        andon="0",
        classes=("grid",),
        data="data",
        data_path=str(dataset.root),
        holdout=HELD,
        fingerprints=record if contents else {},
        skipped=skipped,
        trained_on=11,
        steps=1,
        seconds=1.0,
        weights_sha256="0" * 64,
    )


@pytest.mark.parametrize("contents", [True, False], ids=["by content", "an old checkpoint, by key"])
def test_what_training_skipped_is_left_out(
    toy: Toy, data: Path, capsys: pytest.CaptureFixture[str], contents: bool
) -> None:
    """Else `train --on-corrupt skip` ends in an export that tells to train with --on-corrupt skip."""
    origin = provenance(open_dataset(data), contents=contents)
    evidence = command._evidence(None, origin, toy.model)
    assert (len(evidence.good), len(evidence.labelled)) == (2, 15)
    assert "skipped 2 images that training could not decode" in capsys.readouterr().out
    with pytest.raises(SourceError, match="cannot decode"):
        command._evidence(None, provenance(open_dataset(data), contents=contents, skipped=()), toy.model)
    shutil.copy(data / "grid/test/good/004.png", data / BROKEN[1])
    assert len(command._evidence(None, origin, toy.model).labelled) == 16, "mended since"


def test_copies_of_training_images_among_the_test_images_are_no_evidence(
    toy: Toy, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The patches of one would be rows of a bank, and what rounding makes of a distance of 0 fails the parity."""
    train, test = data / "grid/train/good", data / "grid/test/good"
    shutil.copy(train / "007.png", test / "IMG_7.png")
    shutil.copy(train / "000.png", test / "IMG_0.png")
    origin = provenance(open_dataset(data))
    record = {**origin.fingerprints, "fitted": pack([image_hash(train / "007.png")])}
    origin = origin.model_copy(update={"fingerprints": record})
    evidence = command._evidence(None, origin, toy.model)
    assert (len(evidence.good), len(evidence.labelled)) == (2, 15)
    said = "test images left out of the evidence: 1 trained on, 1 held out for thresholds"
    assert said in capsys.readouterr().out
    for image in test.iterdir():
        shutil.copy(train / "007.png", image)
    labelled = command._evidence(None, origin, toy.model).labelled
    assert "synthetic" in labelled.source and len(labelled) == 4, "the product is judged by its held-out images"


def test_the_set_is_found_from_elsewhere_and_named_at_another_depth(
    toy: Toy, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The checkpoint says where its set is; the record in the bundle keeps the name that was given."""
    origin = provenance(open_dataset(data))
    monkeypatch.chdir(tmp_path.parent)
    whole = command._evidence(None, origin, toy.model)
    assert whole.labelled.source == "data, test split"
    deeper = command._evidence(str(data / "grid"), origin, toy.model)
    assert (deeper.good.images == whole.good.images).all() and len(deeper.labelled) == len(whole.labelled)
    with pytest.raises(SourceError, match="give the same --data"):
        command._evidence(str(data / "grid"), origin.model_copy(update={"fingerprints": {}, "skipped": ()}), toy.model)


def test_what_training_knew_of_parts_travels_along(toy: Toy, data: Path, tmp_path: Path) -> None:
    """`andon eval` counts the parts of a test set by it."""
    origin = provenance(open_dataset(data)).model_copy(update={"parts": ("0123456789abcdef",)})
    config = SimpleNamespace(group_by=r"part(\d+)_", preset="test", backbone=SimpleNamespace(id="toy"))
    for group_by in (config.group_by, ""):
        config.group_by = group_by
        made = command._provenance(origin, SimpleNamespace(config=config))  # type: ignore[arg-type]
        export_bundle(toy.model, toy.staged, toy.evidence, made, Request(tmp_path / f"bundle{group_by[:4]}"))
        report = json.loads((tmp_path / f"bundle{group_by[:4]}" / "report.json").read_text())
        assert report["parts"] == ["0123456789abcdef"] and report.get("group_by", "") == group_by


def test_a_tar_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.tar").write_text("of another day")
    nothing = tmp_path / "no-checkpoint"  # said before any work
    assert main(["export", "--method", "knn", "--checkpoint", str(nothing), "--out", str(tmp_path / "b"), "--tar"]) == 1
    said = "".join(capsys.readouterr())
    assert "b.tar exists" in said and "another --out" in said
    assert (tmp_path / "b.tar").read_text() == "of another day"


@pytest.mark.parametrize("tar", [[], ["--tar"]])
def test_a_folder_that_is_there_is_refused_before_any_work(
    tar: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one we are in, too, which has no name to put .tar behind."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--method", "knn", "--checkpoint", "no-checkpoint", "--out", ".", *tar]) == 1
    assert ". exists" in "".join(capsys.readouterr())


def test_options_are_yaml_and_what_is_none_is_named() -> None:
    assert command.parse_options(["steps=4", "levels=[a, b]"]) == {"steps": 4, "levels": ["a", "b"]}
    with pytest.raises(ConfigError, match="cannot be read"):
        command.parse_options(["steps"])
    with pytest.raises(ConfigError, match=r"--option levels=\[a: the value is not YAML"):
        command.parse_options(["levels=[a"])


def test_a_product_without_defective_test_images_is_judged_by_synthetic_ones(
    synthetic_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(synthetic_data / "grid", tmp_path / "set" / "grid")
    shutil.copytree(synthetic_data / "stripes" / "train", tmp_path / "set" / "stripes" / "train")
    shutil.copytree(synthetic_data / "grain" / "train", tmp_path / "set" / "grain" / "train")
    shutil.copytree(synthetic_data / "grain" / "test" / "good", tmp_path / "set" / "grain" / "test" / "good")
    held = [f"{product}/train/good/00{i}.png" for product in ("grain", "grid", "stripes") for i in range(3)]
    preprocess = Preprocess(height=32, width=32)
    evidence = gather(open_dataset(str(tmp_path / "set")), held, ("grain", "grid", "stripes"), preprocess)
    found = evidence.labelled
    counts = {(c, y): int(np.sum((found.class_ids == c) & (found.labels == y))) for c in range(3) for y in range(2)}
    assert counts == {(0, 0): 3, (0, 1): 3, (1, 0): 8, (1, 1): 8, (2, 0): 3, (2, 1): 3}
    assert "test split" in found.source and "synthetic" in found.source


def test_every_product_has_frames_where_there_is_no_room_for_many(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large frames of many products: each has a threshold and decisions of its own."""
    classes = tuple(f"grid-{i:02}" for i in range(20))
    for product in classes:
        (tmp_path / product).symlink_to(synthetic_data / "grid")
    monkeypatch.setattr(frames, "BUDGET", 0)
    held = [f"{product}/train/good/00{i}.png" for product in classes for i in range(3)]
    evidence = gather(open_dataset(tmp_path), held, classes, Preprocess(height=32, width=32))
    assert sorted(evidence.good.class_ids) == list(range(20))
    assert np.isfinite(verify.thresholds(np.arange(20.0), evidence.good.class_ids, 20)).all()
    found = evidence.labelled
    assert sorted(zip(found.class_ids, found.labels, strict=True)) == [(c, y) for c in range(20) for y in range(2)]
