"""The device's commands on a real export: hvq after a few steps, its torch model beside it, both backends."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.cli import main
from andon.export import nextstep
from andon.runtime.bundle import Bundle
from andon.runtime.commands import calibrate
from andon.runtime.dataset import open_dataset
from andon.runtime.engine.base import Backend
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.images import read_rgb
from andon.runtime.preprocess import resize
from andon.runtime.program import Program

from . import trtdouble

pytestmark = pytest.mark.slow
ENGINE = ("--backend", "onnxruntime", "--threads", "1")


def run(*arguments: object) -> dict[str, Any]:
    """A command in this process: its JSON line, exit code and text."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([str(a) for a in arguments] + ["--json"])
    result: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    result["code"], result["text"] = code, out.getvalue()
    return result


def next_of(result: dict[str, Any]) -> list[str]:
    """The command that a command says to go on with, as a shell takes it."""
    line = next(line for line in result["text"].splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words[0] == "andon"
    return words[1:]


@pytest.fixture(scope="module")
def exported(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    data = synthetic_data.name  # trained from one directory and exported from another
    short = ("schedule.steps=3", "backbone.weights=random:0", "augment.images=0")
    settings = (*(part for s in short for part in ("--set", s)), "--no-eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(synthetic_data.parent)
        train = run("train", "--method", "hvq", "--data", data, *settings, "--out", root / "run")
    assert train["code"] == 0
    export = run(*next_of(train), "--fp16", "--out", root / "bundle", "--threads", 1)
    assert export["code"] == 0
    (root / "export.txt").write_text(export["text"])
    return root


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(exported / "bundle", tmp_path / "bundle"))


def test_calibrate_eval_verify_bench(bundle: Path, exported: Path, synthetic_data: Path) -> None:
    calibrated = run("calibrate", "--bundle", bundle, "--data", synthetic_data, "--false-alarm-rate", 0.5, *ENGINE)
    assert calibrated["code"] == 0 and calibrated["origin"] == "held out by training"
    assert set(calibrated["left_out"]) == {"fitted", "constants"}, "known by content, through checkpoint and export"
    evaluated = run("eval", "--bundle", bundle, "--data", synthetic_data, "--product", "auto", *ENGINE)
    assert evaluated["code"] == 0 and evaluated["unknown"] == 0
    assert set(evaluated["right_product"]) == set(Bundle.load(bundle).manifest.classes)
    verified = run("verify", "--bundle", bundle, *ENGINE)
    assert verified["code"] == 0 and set(verified["checks"]) == {"fp32", "fp16"}
    measured = run("bench", "--bundle", bundle, "--frames", 10, "--checkpoint", exported / "run", *ENGINE)
    assert measured["code"] == 0 and measured["torch_ms"]["p50"] > 0 and measured["speedup_over_torch"] > 0
    assert measured["executor_overhead"] < 0.5  # a sanity bound; the figure is in docs/results.md


def test_bench_refuses_the_checkpoint_of_another_bundle(bundle: Path, exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported / "run", tmp_path / "other"))
    provenance = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps({**provenance, "weights_sha256": "0" * 64}))
    measured = run("bench", "--bundle", bundle, "--frames", 1, "--checkpoint", other, *ENGINE)
    assert measured["code"] == 1 and "is not the checkpoint the bundle was made from" in measured["error"]
    measured = run("bench", "--bundle", bundle, "--frames", 1, "--warmup", 1, *ENGINE)  # not under the runs folder
    assert measured["code"] == 0 and measured["torch_ms"] is None and "--checkpoint" in measured["text"]


def test_what_export_says_to_do_next_works_as_it_stands(exported: Path, synthetic_data: Path, tmp_path: Path) -> None:
    command = next_of({"text": (exported / "export.txt").read_text()})
    assert command[command.index("--bundle") + 1] == str(exported / "bundle")
    command[command.index("--bundle") + 1] = shutil.copytree(exported / "bundle", tmp_path / "bundle")
    result = run(*command, *ENGINE)
    assert result["code"] == 0 and result["origin"] == "held out by training"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (99, "--data 'my set'"),
        (29, "--data 'my set' --false-alarm-rate 0.034"),
        (19, "--data 'my set' --false-alarm-rate 0.05"),
        (3, "--data 'my set' --false-alarm-rate 0.25"),
        (0, "--data FOLDER"),
    ],
)
def test_the_rate_that_export_names_is_one_that_the_held_out_images_can_promise(held: int, says: str) -> None:
    parser = ArgumentParser()
    calibrate.configure(parser)
    assert parser.get_default("false_alarm_rate") == nextstep.DEFAULT_RATE
    line = nextstep.rate_step(Path("b"), "my set", held)
    assert line.endswith(says) and "andon calibrate --bundle b " in line
    assert line.startswith("next: ") == bool(held)


def test_export_counts_the_images_that_calibrate_will_take(
    exported: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    """The held-out ones by content: keys depend on how the set is named."""
    data = Path(shutil.copytree(synthetic_data, tmp_path / "data"))
    for image in (data / "grid/train/good").iterdir():
        image.rename(image.with_name(f"new-{image.name}"))
    line = nextstep.calibrate_step(exported / "bundle", str(data))
    assert line.startswith("next: ") and f"--data {data} " in line
    gone = nextstep.calibrate_step(exported / "bundle", str(tmp_path / "gone"))
    assert "no data set at" in gone and gone.endswith("--data FOLDER")


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_the_double_of_tensorrt_gives_what_onnxruntime_gives(
    bundle: Path, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Any
) -> None:
    loaded = Bundle.load(bundle)
    products = loaded.manifest.classes
    samples = [s for p in products for s in open_dataset(synthetic_data).select(split="test", products=[p]).samples[:2]]

    def scores(backend: Backend) -> list[Any]:
        found = []
        with Program(loaded, backend, variant) as program:
            for sample in samples:
                resize(read_rgb(sample.path), loaded.manifest.preprocess, out=program.frame)
                for product in (loaded.class_index(sample.product), None):
                    result = program.run(product)
                    found.append((result.score, result.class_index, np.array(result.map)))
        return found

    with OnnxRuntimeBackend(threads=1) as reference:
        expected = scores(reference)
    trtdouble.install(monkeypatch, "10.3.0")
    with TensorRTBackend(tmp_path / "plans") as backend:
        for (score, product, score_map), (wanted, choice, wanted_map) in zip(scores(backend), expected, strict=True):
            assert product == choice and score == pytest.approx(wanted, rel=1e-6)
            np.testing.assert_allclose(score_map, wanted_map, rtol=1e-5)
