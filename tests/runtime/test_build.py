"""andon build, and verify and bench of what it built, on a double of TensorRT (trtdouble.py)."""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.program import Program

from . import trtdouble
from .conftest import run  # type: ignore[import-not-found]
from .parts import gate, golden  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]


def test_build_then_verify_then_bench(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("ANDON_CACHE", str(cache))
    npz = {"golden/golden.npz": golden([10, 40]), "golden/gate.npz": gate([10, 20, 60, 70], 0.5)}
    root = make_bundle(npz=npz)
    code, result, text = run(capsys, "build", "--bundle", root)
    assert code == 0 and len(result["plans"]) == 2 and "trtexec --onnx=" in text and "there is none yet" in text
    code, result, text = run(capsys, "build", "--bundle", root, "--variant", "fp32")
    assert code == 0 and "is there" in text and world.builds == 2
    code, result, _ = run(capsys, "verify", "--bundle", root, "--backend", "tensorrt")
    assert code == 0 and result["backend"] == "tensorrt" and world.builds == 2
    code, result, _ = run(capsys, "bench", "--bundle", root, "--frames", 3, "--no-torch")
    assert code == 0 and result["backend"] == "tensorrt" and set(result["latency_ms"]) == {"frame", "total"}
    assert set(result["stages_apart_ms"]) == {"encode", "score", "total"}
    code, _, text = run(capsys, "build", "--bundle", root, "--dla", "nose")
    assert code == 1 and "no such stage" in text


def test_what_was_built_is_what_runs(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("ANDON_CACHE", str(cache))
    world.dla_cores = 2
    npz = {"golden/golden.npz": golden([10, 40]), "golden/gate.npz": gate([10, 20, 60, 70], 0.5)}
    root = make_bundle(npz=npz)

    def used() -> list[str]:
        before = world.builds
        assert run(capsys, "verify", "--bundle", root, "--backend", "tensorrt")[0] == 0 and world.builds == before
        with Bundle.load(root) as bundle, TensorRTBackend() as backend:
            paths = {stage: bundle.stage_path(stage, "fp32") for stage in bundle.manifest.stages}
            assert all(backend.plans.has(stage, path, "fp32") for stage, path in paths.items())
            with Program(bundle, backend):
                return [built.trtexec for built in backend.plans.built]

    for option, value in (("--dla", "encode"), ("--optimization-level", 5), ("--workspace", 256)):
        assert run(capsys, "build", "--bundle", root, option, value)[0] == 0
        line = run(capsys, "build", "--bundle", root, option, value)[1]["plans"][0]["trtexec"]
        assert used()[0] == line
        assert option != "--dla" or ("--useDLACore=0" in used()[0] and "DLA" not in used()[1])
    world = trtdouble.install(monkeypatch, "10.13.2")  # an update of JetPack
    options = next((cache / "plans").glob("encode.*.options"))
    with Bundle.load(root) as bundle, TensorRTBackend() as backend, Program(bundle, backend):
        assert all("workspace:256" in built.trtexec and built.seconds for built in backend.plans.built)
    run(capsys, "build", "--bundle", root)
    assert all("workspace:1024" in line for line in used()), "the newest build is what is meant"
    options.write_text("[]")
    assert all("workspace:1024" in line for line in used()), "what cannot be read is as if it were not there"


def test_what_was_built_into_another_folder_is_what_the_next_step_uses(
    world: trtdouble.World,
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("ANDON_CACHE", str(tmp_path / "usual"))
    npz = {"golden/golden.npz": golden([10, 40]), "golden/gate.npz": gate([10, 20, 60, 70], 0.5)}
    root, disk = make_bundle(npz=npz), tmp_path / "an ssd"
    text = run(capsys, "build", "--bundle", root, "--cache", disk)[2]
    step = shlex.split(next(line for line in text.splitlines() if line.startswith("next: ")))
    name, _, value = step[1].partition("=")
    assert (name, value, step[2:4]) == ("ANDON_CACHE", str(disk), ["andon", "verify"])
    monkeypatch.setenv(name, value)
    assert run(capsys, *step[3:])[0] == 0 and world.builds == 2
    assert {plan.parent for plan in tmp_path.rglob("*.plan")} == {disk / "plans"}
    assert "next: andon verify" in run(capsys, "build", "--bundle", root)[2] and world.builds == 2


def test_a_packed_bundle_says_that_its_trtexec_lines_name_files_that_are_gone(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, packed = make_bundle(), tmp_path / "b.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(root, arcname=".")
    assert "is packed" in run(capsys, "build", "--bundle", packed, "--cache", cache)[2]
    assert "is packed" not in run(capsys, "build", "--bundle", root, "--cache", cache)[2]


@pytest.mark.parametrize("command", ["build", "verify", "eval"])
def test_without_tensorrt_a_command_explains_itself_in_one_screen(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("andon.runtime.engine.probe.cuda_devices", lambda: (0, "no NVIDIA driver (libcuda.so.1)"))
    monkeypatch.setattr("andon.runtime.engine.probe._module", lambda name: False)
    arguments = [] if command == "build" else ["--backend", "tensorrt"]
    arguments += ["--data", "elpv"] if command == "eval" else []
    code, result, text = run(capsys, command, "--bundle", make_bundle(), *arguments)
    assert code == 1 and not result["ok"]
    for word in ("no NVIDIA driver", "tensorrt is not installed", "neither pycuda nor cuda-python", "andon doctor"):
        assert word in text
    assert "Traceback" not in text and len(text.splitlines()) < 24
    assert ("andon verify --bundle" in result["next"]) == (command == "build"), "build has no --backend"
