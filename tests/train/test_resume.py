"""A training that was interrupted: how it goes on, from where, and when it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import cv2
import pytest
import timm
import torch
from andon import __version__
from andon.cli import main
from andon.train import run
from andon.train.backbones import backbones_in
from andon.train.checkpoint import load_checkpoint, read_provenance
from andon.train.errors import CheckpointError
from andon.train.features import FeatureSet
from andon.train.method import AnomalyModel

from .conftest import SETS, refusal


def refusal_of(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said when a resumed run is refused; its folder stays, for its settings are nowhere else."""

    def refused(*args: object, **settings: object) -> None:
        raise CheckpointError("this does not go on")

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", refused)
        told = refusal(capsys, "--resume", str(out))
    assert (out / "run.json").is_file()
    return told


def test_interrupt_says_how_to_go_on(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    out, data = tmp_path / "run", str(synthetic_data)
    monkeypatch.setattr(run, "fit", interrupted)
    assert main(["train", "--method", "hvq", "--data", data, "--products", "grid", "--out", str(out), *SETS]) == 130
    assert f"andon train --resume {out}" in capsys.readouterr().out
    monkeypatch.undo()
    assert "not go on" in refusal_of(out, monkeypatch, capsys)
    assert main(["train", "--resume", str(out)]) == 0
    assert read_provenance(out).steps == 4


def test_a_run_goes_on_from_any_directory(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set that was named from where the run was started is found from elsewhere, and, once moved, by its new name;
    so are the backbone's weights, which the finished checkpoint needs no more."""
    here, out = tmp_path / "here", tmp_path / "run"
    shutil.copytree(synthetic_data / "grid", here / "data" / "grid")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), here / "w.pth")
    settings = [*SETS, "--set", "backbone.weights=w.pth"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["train", "--method", "hvq", "--data", "data", "--no-eval", "--out", str(out), *settings]) == 130
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "not go on" in refusal_of(out, monkeypatch, capsys), "it comes as far as the training"
    (here / "data").rename(here / "moved")
    assert "no data set at" in refusal(capsys, "--resume", str(out))
    assert main(["train", "--resume", "../run", "--data", "../here/moved"]) == 0
    provenance = read_provenance(out)
    assert provenance.data == "../here/moved" and Path(provenance.data_path).samefile(here / "moved")
    assert provenance.backbone is not None and provenance.backbone.weights == "file:w.pth"
    (here / "w.pth").unlink()
    assert load_checkpoint(out).config.backbone.weights == str(here / "w.pth")


@pytest.mark.parametrize("changed", ["an image", "the backbone's file", "nothing"])
def test_a_run_does_not_go_on_with_other_images_or_weights(
    changed: str,
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Features would be of one, the resumed model of the other."""
    shutil.copytree(synthetic_data / "grid", tmp_path / "grid")
    weights, out, records = tmp_path / "w.pth", tmp_path / "run", []

    def interrupt(folder: Path, record: object) -> None:
        records.append(record)
        if len(records) == 2:
            raise KeyboardInterrupt

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)

    save(0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_log", interrupt)
        settings = [*SETS, "--set", f"backbone.weights={weights}"]
        started = ["--data", str(tmp_path / "grid"), "--no-eval", "--save-every", "0", "--out", str(out)]
        assert main(["train", "--method", "hvq", *started, *settings]) == 130
    assert (out / "resume.pt").is_file()
    if changed == "an image":
        for path in (tmp_path / "grid" / "train" / "good").iterdir():
            cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    elif changed == "the backbone's file":
        save(1)
    else:
        assert main(["train", "--resume", str(out)]) == 0
        return
    assert "is of another run" in refusal(capsys, "--resume", str(out))


@pytest.mark.parametrize("setting", [None, "backbone.turned=true"])
def test_a_run_of_the_version_before_goes_on(
    setting: str | None,
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It knew no backbone.turned, and hashed all settings there were; with that setting it would be another run."""
    out = tmp_path / "run"

    def before(model: AnomalyModel, data: FeatureSet) -> tuple[str, str]:
        config = model.config.model_dump(mode="json")
        assert config["backbone"].pop("turned") is (setting is not None)
        assert config.pop("group_by") == ""
        images = [(s.key, digest) for s, digest in zip(data.samples, data.hashes, strict=True)]
        weights = [b.record.sha256 for b in backbones_in(model)]
        known = hashlib.sha256(json.dumps([config, list(model.classes), weights, images]).encode()).hexdigest()
        return known, known

    def interrupt(folder: Path, record: dict[str, float]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    settings = [*SETS, *(["--set", setting] if setting else [])]
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_hashes", before)
        patch.setattr(run, "write_log", interrupt)
        started = ["--data", str(synthetic_data), "--products", "grid", "--no-eval", "--save-every", "0"]
        assert main(["train", "--method", "hvq", *started, "--out", str(out), *settings]) == 130
    state = torch.load(out / "resume.pt", weights_only=True)
    del state["andon"]
    torch.save(state, out / "resume.pt")
    if setting is None:
        assert main(["train", "--resume", str(out)]) == 0
    else:
        error = refusal(capsys, "--resume", str(out))
        assert "is of another run" in error and "by Andon before it was recorded" in error
        assert f"by Andon {__version__}" in error


def test_resume_refuses_options_that_it_would_not_heed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "open_dataset", lambda *a: pytest.fail("it goes on"))
    given = {"--set": "seed=1", "--method": "knn", "--seed": "0", "--save-every": "60", "--device": "auto"}
    for option, value in given.items():
        assert f"not with {option}\n" in refusal(capsys, "--resume", str(tmp_path), option, value)
    error = refusal(capsys, "--resume", str(tmp_path), "--no-eval", "--on-corrupt", "error", "--out", "x")
    assert "not with --out, --no-eval, --on-corrupt" in error and f"next:     andon train --resume {tmp_path}" in error


def test_a_folder_that_a_training_uses_is_left_alone(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run 1"
    start = ["--method", "hvq", "--data", str(synthetic_data), "--products", "grid", "--out", str(out), *SETS]
    told = []

    def others(*args: object, **settings: object) -> None:
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        told.extend([refusal(capsys, "--resume", str(out)), refusal(capsys, *start)])
        assert before == {p.name: p.read_bytes() for p in out.iterdir()}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", others)
    assert main(["train", *start]) == 130
    assert len(told) == 2 and all(f"{out} is in use by pid {os.getpid()}" in text for text in told)
    assert all(f"andon train --resume '{out}'; or" in text for text in told)
    assert main(["train", "--resume", str(out)]) == 130 and len(told) == 4, "a resumed run is one, too"
    assert {p.name for p in out.iterdir()} == {"run.json", "config.yaml"}, "the lock goes with the run"
    (out / "run.lock").write_text("1\n")  # as a killed process leaves it
    assert "not go on" in refusal_of(out, monkeypatch, capsys)
