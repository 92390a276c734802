"""The TensorRT backend on a double of tensorrt and CUDA (trtdouble.py says what that can and cannot show)."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import re
import shlex
import tarfile
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.cli import main
from andon.runtime.bundle import Bundle
from andon.runtime.engine.base import Backend
from andon.runtime.engine.build import BuildOptions, l4t_release
from andon.runtime.engine.cuda import CudaPython
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.errors import EngineError
from andon.runtime.program import Program

from ..device import test_on_device as device  # type: ignore[import-not-found]
from . import trtdouble
from .conftest import ENCODE, SCORE  # type: ignore[import-not-found]
from .parts import gate, golden  # type: ignore[import-not-found]
from .test_program import looped  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
FRAMES = np.random.default_rng(3).integers(0, 255, (7, 4, 4, 3), np.uint8)
PRODUCTS = (0, 0, 1, 0, 1, 1, 0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> trtdouble.World:
    return trtdouble.install(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "plans"


def play(bundle: Bundle, backend: Backend, **options: Any) -> list[Any]:
    """Everything a program gives over some frames of two products."""
    seen = []
    with Program(bundle, backend, **options) as program:
        for frame, product in zip(FRAMES, PRODUCTS, strict=True):
            np.copyto(program.frame, frame)
            result = program.run(product)
            program.frame.fill(255)  # a new camera frame may arrive as soon as run() has returned
            seen.append((result.score, result.map.tolist(), program.read("step.aux").tolist()))
        seen.append(program.read_state("v0", 1).tolist())
    return seen


@pytest.mark.parametrize(
    ("version", "bindings"),
    [("8.6.1", "pycuda"), ("10.3.0", "pycuda"), ("10.13.2", "cuda-python"), ("11.4.0", "pycuda")],
)
@pytest.mark.parametrize(
    ("count", "persist", "counter", "read_old"),
    [
        (1, True, False, False),
        (2, True, True, False),
        (3, True, True, True),
        (4, False, False, False),
        (7, True, True, False),
    ],
)
def test_programs_give_what_onnxruntime_gives(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    bindings: str,
    count: int,
    persist: bool,
    counter: bool,
    read_old: bool,
) -> None:
    bundle = looped(tmp_path / "bundle", count, persist=persist, counter=counter, read_old=read_old)
    with OnnxRuntimeBackend(threads=1) as reference:
        expected = play(bundle, reference)
    world = trtdouble.install(monkeypatch, version, bindings)
    for graphs in (True, False):
        with TensorRTBackend(tmp_path / "plans", graphs=graphs) as backend:
            assert play(bundle, backend) == expected
            assert play(bundle, backend, per_stage=True) == expected
        assert world.blocks == {}, "memory is freed with the backend"
    assert world.builds == 3 and world.graph_launches > 0


def test_auto_product_runs_the_head_once(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        for _ in range(4):
            for channel in (0, 1):
                program.frame.fill(0)
                program.frame[:, :, channel] = 200
                world.executed.clear()
                assert program.run(None).class_index == channel
                assert [name for name, _ in world.executed] == ["u", "map"]
        assert set(program.stage_ms) == {"frame"} and program.stage_ms["frame"] > 0


def test_buffers_are_allocated_once_and_a_frame_is_one_graph_launch(
    world: trtdouble.World, tmp_path: Path, cache: Path
) -> None:
    bundle = looped(tmp_path / "bundle", 5, persist=True, counter=True, read_old=False)
    with TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        for product in (0, 0, 1, 1):  # a plain and a captured frame each
            program.run(product)
        mallocs, enqueues, launches, contexts = world.mallocs, world.enqueues, world.graph_launches, world.contexts
        for product in (0, 1, 1, 0):
            program.run(product)
        assert (world.mallocs, world.enqueues, world.contexts) == (mallocs, enqueues, contexts)
        assert world.graph_launches == launches + 4
        assert len(world.scratch) == 1, "all contexts compute in one block"


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0"])
def test_the_double_keeps_what_is_asked_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """Where it would not, the test of tests/device could not pass on a device either."""
    trtdouble.install(monkeypatch, version)
    device.test_a_frame_is_captured_as_one_graph(tmp_path, tmp_path / "plans", caplog)


def test_pointers_rebind_in_loops(world: trtdouble.World, tmp_path: Path, cache: Path) -> None:
    bundle = looped(tmp_path / "bundle", 4, persist=False, counter=False, read_old=False)
    with TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        for product in (0, 1, 0, 1, 0, 1):  # plain, captured, replayed
            world.executed.clear()
            program.run(product)
            (_, encode), *steps, (_, score) = world.executed
            for (_, earlier), (_, later) in pairwise(steps):
                assert (later["u"], later["v"]) == (earlier["u_next"], earlier["v_next"])
                assert later["coef"] - earlier["coef"] == 256  # a row of 12 bytes, padded
            assert {step["h"] for _, step in steps} == {encode["u"]}
            assert (score["u"], score["v"]) == (steps[-1][1]["u_next"], steps[-1][1]["v_next"])
            assert len({step["w"] for _, step in steps}) == 1
            rows = program._tensors.states["w"]
            assert steps[0][1]["w"] == rows[product].address  # type: ignore[attr-defined]


def test_rows_of_a_state_are_written_where_they_belong(world: trtdouble.World, tmp_path: Path, cache: Path) -> None:
    bundle = looped(tmp_path / "bundle", 2, persist=False, counter=False, read_old=False)
    with TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        before = program.read_state("v0", 1)
        program.write_state("v0", np.full((1, 2), 7, np.float32), slice(1, 2), class_index=1)
        assert program.read_state("v0", 1).tolist() == [before[0].tolist(), [7, 7]]
        with pytest.raises(EngineError, match="past the end"):
            backend.upload(program._tensors.state("v0", 1), np.zeros((2, 2), np.float32), start=1)


def test_a_frame_that_cannot_be_captured_is_launched_plainly(
    world: trtdouble.World, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = looped(tmp_path / "bundle", 2, persist=True, counter=False, read_old=False)
    with OnnxRuntimeBackend(threads=1) as reference:
        expected = play(bundle, reference)
    world.refuse_capture = True
    with caplog.at_level(logging.WARNING), TensorRTBackend(cache) as backend:
        assert play(bundle, backend) == expected
    assert world.graph_launches == 0
    assert [r.message for r in caplog.records if "cannot be captured" in r.message] and "901" in caplog.text


# -- errors ------------------------------------------------------------------------------------------------------------


def test_tensorrts_own_words_reach_the_user(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend:
        with Program(bundle, backend) as program:
            world.refuse_execute = True
            with pytest.raises(EngineError, match=r"stage encode failed in TensorRT\n.*illegal memory access"):
                program.run(0)
        world.refuse_execute, world.refuse_build, backend.plans.force = False, True, True
        with pytest.raises(EngineError, match=r"cannot build stage encode.*\n.*no implementation for node MatMul_3"):
            Program(bundle, backend)


def test_a_refused_operator_is_named_with_its_node(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path
) -> None:
    score = SCORE.replace(
        "score = ReduceMax<axes=[1], keepdims=0>(u)",
        "one = Constant<value = float[1,1,1] {1}>()\n    d = Det(one)\n    m = ReduceMax<axes=[1], keepdims=0>(u)\n"
        "    score = Mul(m, d)",
    )
    root = make_bundle(stages={"encode": (ENCODE, {"image": "frame"}), "score": (score, {"u": "encode.u"})})
    with (
        Bundle.load(root) as bundle,
        TensorRTBackend(cache) as backend,
        pytest.raises(EngineError, match=r"parser refuses score\.fp32\.onnx\n.*no importer for operator Det"),
    ):
        Program(bundle, backend)


def test_another_thread_is_refused(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        caught: list[Exception] = []

        def elsewhere() -> None:
            try:
                program.run(0)
            except EngineError as error:
                caught.append(error)

        thread = threading.Thread(target=elsewhere, name="camera")
        thread.start()
        thread.join()
        assert caught and "another thread" in str(caught[0]) and "camera" in str(caught[0])


# -- plans -------------------------------------------------------------------------------------------------------------


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


def test_a_closed_program_leaves_no_contexts(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend:
        for _ in range(3):
            with Program(bundle, backend) as program:
                for _ in range(3):
                    program.run(0)
            del program
            assert len(backend._frames) == 0


def test_cuda_pythons_names_exist_in_the_real_module() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="NOT RUN: cuda-python is not installed here")
    source = inspect.getsource(CudaPython)
    names = set(re.findall(r'self\._call\(\s*"(cu\w+)"', source)) | set(re.findall(r"attributes\.(\w+)", source))
    assert len(names) > 15
    missing = [n for n in names if not hasattr(driver, n) and not hasattr(driver.CUdevice_attribute, n)]
    assert not missing


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


# -- commands ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main([str(a) for a in arguments] + ["--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.out + captured.err


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
