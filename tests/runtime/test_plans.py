"""Plans of TensorRT on a double of it (trtdouble.py): when they are built, kept and let go, and with which options."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.probe import l4t_release
from andon.runtime.engine.target import BuildOptions
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.errors import EngineError
from andon.runtime.program import Program

from . import trtdouble
from .conftest import run  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]


def open_all(bundle: Bundle, cache: Path, options: BuildOptions | None = None) -> list[Any]:
    with TensorRTBackend(cache, options) as backend, Program(bundle, backend):
        return list(backend.plans.built)


def test_a_plan_is_built_once_and_rebuilt_when_it_does_not_fit(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(make_bundle())

    def there() -> bool:
        with TensorRTBackend(cache) as backend:
            return backend.plans.has("encode", bundle.stage_path("encode", "fp32"), "fp32")

    assert not there() and world.builds == 0, "looking builds nothing"
    first = open_all(bundle, cache)
    assert there()
    assert [(b.stage, b.reason) for b in first] == [("encode", "there is none yet"), ("score", "there is none yet")]
    assert all(b.reason == "" and b.seconds == 0 for b in open_all(bundle, cache)) and world.builds == 2
    other = open_all(bundle, cache, BuildOptions(workspace_mb=64))
    assert "options was" in other[0].reason and "workspace_mb" in other[0].reason
    plan = first[0].plan
    plan.write_bytes(plan.read_bytes()[:-1])
    assert open_all(bundle, cache)[0].reason == "the plan was changed or cut short"
    plan.with_suffix(".json").unlink()
    assert open_all(bundle, cache)[0].reason == "its sidecar is missing or says something else"
    sidecar = json.loads(plan.with_suffix(".json").read_text())
    assert sidecar["tensorrt"] == "10.3.0" and sidecar["gpu"] == "Orin (double)" and sidecar["sm"] == "8.7"
    trtdouble.install(monkeypatch, "10.13.2")
    assert "tensorrt was 10.3.0" in open_all(bundle, cache)[0].reason


def test_a_plan_is_of_one_module_and_of_one_way_of_building(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that came along with a cloned disk, or stayed when Andon was updated."""
    bundle = Bundle.load(make_bundle())
    open_all(bundle, cache)
    world.memory -= 400 << 20  # what the system keeps for itself is not another module
    assert open_all(bundle, cache)[0].reason == ""
    world.multiprocessors, world.memory = 16, 64 << 30
    reason = open_all(bundle, cache)[0].reason
    assert "multiprocessors was 8" in reason and "memory_gib was 8" in reason
    monkeypatch.setattr("andon.runtime.engine.build.RECIPE", 2)
    assert "recipe was 1" in open_all(bundle, cache)[0].reason


@pytest.mark.parametrize("full", [False, True])
def test_plans_that_cannot_be_kept_are_used_all_the_same(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any,
    capsys: pytest.CaptureFixture[str], full: bool,
) -> None:  # fmt: skip
    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    root = make_bundle()
    if full:
        monkeypatch.setattr("andon.runtime.engine.build.os.fsync", refuse)
    else:
        cache.touch()  # where the folder should be, so that not even root can write there
    with Bundle.load(root) as bundle, TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        assert np.isfinite(program.run(0).score)
    assert "cannot be kept" in caplog.text and not list(cache.parent.rglob("*.tmp")), "half a plan takes no room"
    code, _, text = run(capsys, "build", "--bundle", root, "--cache", cache)
    assert code == 1 and "cannot be kept" in text and "Traceback" not in text


def test_half_a_plan_of_a_killed_process_goes_and_one_that_is_being_written_stays(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path
) -> None:
    script = (
        "import os, signal, sys, pathlib\n"
        "from andon.runtime.engine import build\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build._replace(pathlib.Path(sys.argv[1]), bytes(1 << 20))"
    )
    killed = subprocess.run([sys.executable, "-c", script, cache / "encode.fp32.0123.plan"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    with (cache / "score.fp32.4567.plan.1.tmp").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert all(built.kept for built in open_all(Bundle.load(make_bundle()), cache))
    assert not left.exists() and [path.name for path in cache.glob("*.tmp")] == [Path(other.name).name]


def test_the_plans_unused_for_longest_go_but_none_in_use_and_none_of_the_program_that_opens(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Plans of a dozen bundles fill a Jetson's disk; a line that has run for months used its own months ago."""
    bundle = Bundle.load(make_bundle())
    running, idle = (BuildOptions(workspace_mb=mb) for mb in (64, 128))
    kept, gone = ({b.plan for b in open_all(bundle, cache, options)} for options in (running, idle))
    with TensorRTBackend(cache, running) as backend, Program(bundle, backend):
        for plan in kept:
            os.utime(plan, (1, 1))
        monkeypatch.setenv("ANDON_CACHE_LIMIT", "1")
        new = {b.plan for b in open_all(bundle, cache)}
        assert {*cache.glob("*.plan")} == kept | new and not any(p.with_suffix(".json").exists() for p in gone)
    assert "2 unused entries of" in caplog.text and f"plans in {cache}" in caplog.text
    encode, score = sorted(new)
    encode.unlink()
    os.utime(score, (1, 1))
    assert [b.reason != "" for b in open_all(bundle, cache)] == [True, False], "it was still to be loaded"
    assert {*cache.glob("*.plan")} == new, "nobody uses the others any more"
    monkeypatch.setenv("ANDON_CACHE_LIMIT", "off")
    assert open_all(bundle, cache, idle) and {*cache.glob("*.plan")} == new | gone


def test_why_there_is_no_plan_is_said_although_others_are_being_removed(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process keeps the folder to its limit at that moment."""
    bundle, listed = Bundle.load(make_bundle()), Path.glob
    open_all(bundle, cache, BuildOptions(workspace_mb=64))

    def then_gone(path: Path, pattern: str) -> list[Path]:
        found = list(listed(path, pattern))
        for plan in found:
            plan.unlink()
            plan.with_suffix(".json").unlink()
        return found

    monkeypatch.setattr(Path, "glob", then_gone)
    assert {built.reason for built in open_all(bundle, cache)} == {"there is none yet"}


def test_a_plan_of_another_user_is_built_again(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, read = Bundle.load(make_bundle()), Path.read_bytes
    open_all(bundle, cache)

    def refuse(path: Path) -> bytes:
        if path.parent == cache:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert {b.reason for b in open_all(bundle, cache)} == {"it cannot be read: Permission denied"}


def test_a_plan_that_does_not_deserialise_is_rebuilt(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.load(make_bundle())
    open_all(bundle, cache)
    world.refuse_plan = True
    with caplog.at_level(logging.INFO), pytest.raises(EngineError, match="just built does not deserialise"):
        open_all(bundle, cache)
    assert "it does not deserialise: the plan was made by another version" in caplog.text


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("[optimizer] Could not find any implementation for node MatMul_3.", "a --workspace of more than 1024 MB"),
        ("Some tactics do not have sufficient workspace memory to run.", "a --workspace of more than 1024 MB"),
        ("Requested amount of GPU memory (9 bytes) could not be allocated.", "a --workspace of less than 1024 MB"),
        ("[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)", "the device is out of memory"),
        ("Error Code 2: OutOfMemory (no further information)", "the device is out of memory"),
    ],
)
def test_a_build_that_ran_out_of_memory_is_not_told_to_use_more(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, said: str, advice: str
) -> None:
    world.refuse_build, world.refuse_build_with = True, said
    with pytest.raises(EngineError) as refused:
        open_all(Bundle.load(make_bundle()), cache)
    assert advice in str(refused.value.next_step) and refused.value.found == said


def test_an_interrupted_build_goes_on_at_the_next_stage(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path
) -> None:
    bundle = Bundle.load(make_bundle())
    world.interrupt_build_of = "map"
    with pytest.raises(KeyboardInterrupt):
        open_all(bundle, cache)
    world.interrupt_build_of = ""
    assert [bool(b.seconds) for b in open_all(bundle, cache)] == [False, True]
    assert not list(cache.glob("*.tmp"))


def test_ctrl_c_ends_a_build_without_passing_through_tensorrt(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("andon.runtime.engine.progress.BuildProgress.step", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        open_all(Bundle.load(make_bundle()), cache)
    assert "trtdouble" not in str(caught.traceback[-1].path) and not list(cache.glob("*.plan"))


def test_precision_flags_of_each_version(
    monkeypatch: pytest.MonkeyPatch, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = Bundle.load(make_bundle())
    for version, network_flags, precision in (
        ("8.6.1", 1 << 0, {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}),
        ("10.3.0", 1 << 1, set()),
        ("11.4.0", 1 << 1, set()),
    ):
        world = trtdouble.install(monkeypatch, version)
        built = open_all(bundle, tmp_path / version)
        assert world.network.flags == network_flags  # type: ignore[attr-defined]
        assert world.config.flags == precision, "TF32 is off"  # type: ignore[attr-defined]
        held = [world.network.get_layer(i).set for i in range(2)]  # type: ignore[attr-defined]
        assert held == ([["DataType.HALF"]] * 2 if version == "8.6.1" else [[], []])
        assert ("--stronglyTyped" in built[0].trtexec) == (version == "10.3.0")
        assert "--noTF32" in built[0].trtexec


def test_dla_names_the_layers_that_fall_back(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    bundle = Bundle.load(make_bundle())
    options = BuildOptions(dla=frozenset({"encode"}))
    with pytest.raises(EngineError, match=r"stage encode cannot go on the DLA\n.*0 DLA cores with TensorRT 10\.3"):
        open_all(bundle, cache, options)
    world.dla_cores = 2
    encode, score = open_all(bundle, cache, options)
    assert encode.dla_fallback == ("topk",) and "--useDLACore=0" in encode.trtexec
    assert score.dla_fallback == () and "DLA" not in score.trtexec


def test_jetson_linux_release(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    assert l4t_release(release) == ""
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release(release) == "36.4.3"


def test_a_plan_without_its_sidecar_is_not_there(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    """`andon check` would build it, and says that it builds nothing."""
    bundle = Bundle.load(make_bundle())
    open_all(bundle, cache)[0].plan.with_suffix(".json").unlink()
    with TensorRTBackend(cache) as backend:
        assert not backend.plans.has("encode", bundle.stage_path("encode", "fp32"), "fp32")
        assert backend.plans.has("score", bundle.stage_path("score", "fp32"), "fp32")


def test_the_trtexec_line_is_one_that_a_shell_takes(
    world: trtdouble.World, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    built = open_all(Bundle.load(make_bundle()), tmp_path / "my plans")[0]
    assert f"--saveEngine={built.plan}" in shlex.split(built.trtexec)
