"""`andon train` as a user calls it: configuration, checkpoint, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from andon.cli import main
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.fingerprint import image_hash, pack, unpack
from andon.train import run
from andon.train.checkpoint import load_checkpoint, newest_checkpoint, read_provenance
from andon.train.config import differences, dump_config, load_config, override
from andon.train.errors import CheckpointError
from andon.train.evaluate import evaluate
from andon.train.holdout import Split, split_good
from andon.train.methods.hvq.model import HvqModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

SETTINGS = ("backbone.weights=random:0", "schedule.steps=4", "schedule.warmup=1", "augment.images=0")
SETS = [part for s in SETTINGS for part in ("--set", s)]


@pytest.fixture(scope="module")
def checkpoint(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "hvq"
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid,stripes"]
    assert main([*arguments, "--out", str(folder), "--seed", "3", *SETS]) == 0
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `andon train` says when it refuses."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 1
    return capsys.readouterr().err


# ---- configuration


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    config = load_config("hvq", None, ["schedule.steps=7", "backbone.weights=random:2", "schedule.lr=1e-3", "seed=5"])
    assert (config.schedule.steps, config.schedule.lr, config.seed) == (7, 1e-3, 5)
    assert config.backbone.weights == "random:2"
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config("hvq", path) == config
    assert load_config("hvq", None, ["schedule.amp=off"]).schedule.amp == "off", "a word, not YAML's truth value"
    path.write_text(dump_config(config).replace("amp: auto", "amp: off"))
    assert load_config("hvq", path).schedule.amp == "off"


def test_differences_are_settings_that_give_the_other() -> None:
    plain = load_config("hvq")
    other = load_config("hvq", None, ["schedule.steps=7", "augment.flips=[]"])
    found = differences(plain, other)
    assert found == {"schedule.steps": 7, "augment.flips": []} and differences(plain, plain) == {}
    assert override(plain, [f"{key}={json.dumps(value)}" for key, value in found.items()]) == other


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.stepps=7", "unknown key 'stepps'"),
        ("skedule.steps=7", "no section 'skedule'"),
        ("schedule.steps", "no value"),
        ("schedule.steps=many", "schedule.steps"),
        ("schedule.steps=-1", "schedule.steps"),
        ("schedule.lr=[", "not YAML"),
        ("schedule.lr=.inf", "schedule.lr"),
        ("schedule.decay=foo", "schedule.decay"),
        ("schedule.decay=step:0.8", "schedule.decay"),
        ("schedule.decay=step:0.8:x", "schedule.decay"),
        ("schedule.decay=inverse:-2:0.5", "schedule.decay"),
        ("schedule.amp=fp32", "schedule.amp"),
        ("schedule.ema=1", "schedule.ema"),
        ("schedule.max_seconds=0", "schedule.max_seconds"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("size=0", "size"),
    ],
)
def test_bad_override_is_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config("hvq", None, [setting])


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("hvq", "pot.lam=-1"),
        ("pwae", "loss.nu=0"),
        ("pwae", "loss.nu=0.01"),
        ("hgad", "betas=[0.9, 1.0]"),
        ("hgad", "score.delta=-0.1"),
        ("vpdm", "diffusion.beta=[0.0001, 1.5]"),
        ("vpdm", "diffusion.beta=[0.02, 0.0001]"),
        ("vpdm", "denoiser.multipliers=[1, 0]"),
        ("foct", "navigator.alternatives=[-1]"),
    ],
)
def test_a_number_that_means_nothing_to_a_method_is_refused(method: str, setting: str) -> None:
    """Else it is a fault, an infinite loss or an empty program, after the features are extracted."""
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load_config(method, None, [setting])


def test_bad_configuration_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(load_config("hvq")) + "colour: red\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:\d+: colour: unknown key"):
        load_config("hvq", path)
    path.write_text(dump_config(load_config("hvq")).replace("method: hvq", "method: other"))
    with pytest.raises(ConfigError, match="method"):
        load_config("hvq", path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("hvq", tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="unknown method 'hvk'"):
        load_config("hvk")


# ---- hold-out


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


# ---- checkpoint


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


# ---- refusals and output


def test_refusals_name_what_is_wrong(
    synthetic_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(synthetic_data)
    assert "--method and --data are needed" in refusal(capsys, "--method", "hvq")
    assert "no data set at" in refusal(capsys, "--method", "hvq", "--data", str(tmp_path / "none"))
    error = refusal(capsys, "--method", "hvq", "--data", data, "--products", "bolt", "--out", str(tmp_path / "x"))
    assert "no product bolt" in error and "grain, grid, stripes" in error
    assert not (tmp_path / "x").exists(), "a refusal leaves no folder"
    assert "is not empty" in refusal(capsys, "--method", "hvq", "--data", data, "--out", str(checkpoint))
    assert "nothing to resume" in refusal(capsys, "--resume", str(checkpoint))
    assert f"andon export --method hvq --checkpoint {checkpoint}" in refusal(capsys, "--resume", str(checkpoint))
    if not torch.cuda.is_available():
        error = refusal(capsys, "--method", "hvq", "--data", data, "--out", str(tmp_path / "y"), "--device", "cuda")
        assert "cannot train on device cuda" in error


def test_corrupt_image_stops_or_is_skipped_and_recorded(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    broken = data / "grid" / "train" / "good" / "004.png"
    broken.write_bytes(broken.read_bytes()[:300])
    common = ["--method", "hvq", "--data", str(data), "--no-eval", *SETS]
    assert str(broken) in refusal(capsys, *common, "--out", str(tmp_path / "a"))
    assert main(["train", *common, "--out", str(tmp_path / "b"), "--on-corrupt", "skip", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any("skipped 1 undecodable" in line for line in out)
    provenance = read_provenance(tmp_path / "b")
    assert provenance.skipped == ("grid/train/good/004.png",)
    assert provenance.fingerprints["skipped"] == pack([image_hash(broken)])
    assert json.loads(out[-1])["ok"] is True and f"next: andon export --method hvq --checkpoint {tmp_path / 'b'}" in out


def test_names_that_are_no_utf8_do_not_cost_the_training(synthetic_data: Path, tmp_path: Path) -> None:
    """As a PLC or an old Windows share writes them: of the set, the product, the defect and the images."""
    part, scratch = (os.fsdecode(name) for name in (b"Geh\xe4use", b"Kratzer-\xfc"))
    data = tmp_path / part
    shutil.copytree(synthetic_data / "grid", data / part)
    for folder in ("test", "ground_truth"):
        (data / part / folder / "patch").rename(data / part / folder / scratch)
    for image in (*(data / part / "train/good").iterdir(), *(data / part / "test" / scratch).iterdir()):
        image.rename(image.with_name(part + image.name))
    for mask in (data / part / "ground_truth" / scratch).iterdir():
        mask.rename(mask.with_name(part + mask.name))
    views = ["--set", "augment.images=14", "--products", part]
    assert main(["train", "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS, *views]) == 0
    origin = read_provenance(tmp_path / "run")
    assert origin.classes == (r"Geh\xe4use",) and origin.data.endswith(r"Geh\xe4use") and origin.views
    assert len(open_dataset(data).select(keys=origin.holdout, products=origin.classes)) == len(origin.holdout) > 0
    assert {s.label for s in open_dataset(data).samples} == {"good", r"Kratzer-\xfc"}


def test_mask_of_another_size_is_refused_before_the_training(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    mask = data / "grid" / "ground_truth" / "patch" / "002_mask.png"
    assert cv2.imwrite(str(mask), np.zeros((48, 40), np.uint8))
    monkeypatch.setattr(run, "fit", lambda *a, **k: pytest.fail("it has trained"))
    said = refusal(capsys, "--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    assert str(mask) in said and "40x48" in said and "96x96" in said


@pytest.mark.parametrize("left", [20, 100])
def test_a_mask_that_is_cut_off_is_refused_before_the_training(
    left: int, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind its head; --on-corrupt skip is about images and is not what it is told to do."""
    data = tmp_path / "data"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    mask = data / "grid" / "ground_truth" / "patch" / "002_mask.png"
    mask.write_bytes(mask.read_bytes()[:left])
    monkeypatch.setattr(run, "fit", lambda *a, **k: pytest.fail("it has trained"))
    arguments = ("--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), "--on-corrupt", "skip")
    said = refusal(capsys, *arguments, *SETS)
    assert f"cannot decode {mask}" in said and "--on-corrupt" not in said


def test_masks_are_held_against_the_image_as_it_is_read(tmp_path: Path) -> None:
    """A camera's note that a picture is to be turned is followed by the reader; its size is the turned one."""
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    Image.new("RGB", (18, 12)).save(tmp_path / "0.jpg", exif=turned)
    Image.new("L", (18, 12)).save(tmp_path / "lying.png")
    Image.new("L", (12, 18)).save(tmp_path / "standing.png")
    sample = Sample(tmp_path / "0.jpg", "0.jpg", "bolt", "bad", "test")
    run._check_masks([dataclasses.replace(sample, mask_path=tmp_path / "standing.png")])
    with pytest.raises(SourceError, match=r"lying\.png is not of its image's size"):
        run._check_masks([dataclasses.replace(sample, mask_path=tmp_path / "lying.png")])


def test_masks_may_be_of_images_that_pillow_takes_for_a_bomb_or_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert cv2.imwrite(str(tmp_path / "0.tif"), np.zeros((12, 18, 3), np.uint16))
    assert cv2.imwrite(str(tmp_path / "0.png"), np.zeros((12, 18), np.uint8))
    run._check_masks([Sample(tmp_path / "0.tif", "0.tif", "bolt", "bad", "test", tmp_path / "0.png")])


def test_unreadable_test_image_does_not_cost_the_training(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(synthetic_data / "grid", data / "grid")
    broken = data / "grid" / "test" / "good" / "003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    assert str(broken) in refusal(capsys, "--method", "hvq", "--data", str(data), "--out", str(out), *SETS)
    assert load_checkpoint(out).config.method == "hvq"


def refusal_of(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said when a resumed run is refused; its folder stays, for its settings are nowhere else."""

    def refused(*args: object, **settings: object) -> None:
        raise CheckpointError("this does not go on")

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", refused)
        told = refusal(capsys, "--resume", str(out))
    assert (out / "run.json").is_file()
    return told


def test_a_fault_before_there_is_anything_to_keep_leaves_no_folder(
    synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **settings: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(run, "extract", broken)
    arguments = ["--method", "hvq", "--data", str(synthetic_data), "--out", str(tmp_path / "run"), *SETS]
    assert "a fault" in refusal(capsys, *arguments) and not (tmp_path / "run").exists()


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


def test_nothing_held_out(synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid", "--no-eval"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--set", "holdout=0", *SETS]) == 0
    assert read_provenance(tmp_path / "run").holdout == () and "no image held out" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["hgad", "vpdm"])
def test_a_product_without_an_image_for_its_constants_is_refused_before_the_training(
    method: str, synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in sorted((data / "grid/train/good").iterdir())[3:]:
        image.unlink()
    arguments = ("--method", method, "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    told = refusal(capsys, *arguments)
    assert "no held-out good image of product 'grid'" in told and "3 good training images" in told
    assert not (tmp_path / "run").exists(), "a refusal leaves no folder, so the command may be given again"
    if method == "vpdm":
        assert "score.by_position=false" in told
        assert main(["train", *arguments, "--set", "score.by_position=false", "--no-eval"]) == 0


def test_a_product_that_nothing_would_be_learned_of_is_refused(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in (data / "grid/train/good").iterdir():
        image.write_bytes(b"")
    arguments = ("--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), *SETS)
    told = refusal(capsys, *arguments, "--on-corrupt", "skip")
    assert "no good image of product grid to train on" in told and "--products grain,stripes" in told
    assert not (tmp_path / "run").exists()


def test_a_product_of_which_nothing_is_held_out_is_named(
    synthetic_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be trained, and refused by the export minutes later."""
    data = shutil.copytree(synthetic_data, tmp_path / "data")
    for image in sorted((data / "grid/train/good").iterdir())[3:]:
        image.unlink()
    arguments = ["--method", "hvq", "--data", str(data), "--out", str(tmp_path / "run"), "--no-eval", *SETS]
    assert main(["train", *arguments]) == 0
    assert "no good image of grid is held out: `andon export` will not" in capsys.readouterr().out
