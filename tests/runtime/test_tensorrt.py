"""The TensorRT backend on a double of tensorrt and CUDA (trtdouble.py says what that can and cannot show)."""

from __future__ import annotations

import inspect
import logging
import re
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.detector import Detector
from andon.runtime.engine.base import Backend
from andon.runtime.engine.cuda import CudaPython
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.errors import EngineError
from andon.runtime.program import Program

from ..device import test_on_device as device  # type: ignore[import-not-found]
from . import trtdouble
from .conftest import ENCODE, SCORE  # type: ignore[import-not-found]
from .test_program import looped  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
FRAMES = np.random.default_rng(3).integers(0, 255, (7, 4, 4, 3), np.uint8)
PRODUCTS = (0, 0, 1, 0, 1, 1, 0)


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


@pytest.mark.parametrize("classifier", [True, False])
def test_after_a_warm_up_no_product_makes_anything_ready(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, classifier: bool
) -> None:
    outputs = {"score": "score.score", "map": "score.map"}
    root = make_bundle() if classifier else make_bundle(outputs=outputs)
    with Bundle.load(root) as bundle, TensorRTBackend(cache) as backend, Detector(bundle, backend) as detector:
        detector.warm_up(["a", "a", "auto", "of another bundle"])
        prepared, launches = (world.contexts, world.enqueues, world.mallocs), world.graph_launches
        for channel in (0, 1) if classifier else (0,):
            image = np.zeros((4, 4, 3), np.uint8)
            image[:, :, channel] = 200
            assert detector.judge_image(image, "auto" if classifier else "a").class_index == channel
        detector.judge_image(image, "a")
        assert (world.contexts, world.enqueues, world.mallocs) == prepared and world.graph_launches > launches


def test_a_warm_up_leaves_nothing_in_what_persists(world: trtdouble.World, tmp_path: Path, cache: Path) -> None:
    bundle = looped(tmp_path / "bundle", 3, persist=True, counter=True, read_old=False)
    scores = []
    for products in ([], ["a"]):
        with TensorRTBackend(cache) as backend, Detector(bundle, backend) as detector:
            detector.warm_up(products)
            scores.append([detector.judge_image(frame, "a").score for frame in FRAMES])
    assert scores[0] == scores[1] and len(set(scores[0])) > 1


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


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_was_written_into_a_state_is_the_callers_again(
    world: trtdouble.World, tmp_path: Path, cache: Path, order: Any
) -> None:
    """The memory goes on with its rows, which are not page-locked; CUDA may read those late."""
    bundle = looped(tmp_path / "bundle", 2, persist=False, counter=False, read_old=False)
    with TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        values = np.arange(4, dtype=np.float32).reshape(2, 2).copy(order=order)
        program.write_state("v0", values)
        values.fill(9)
        assert program.read_state("v0", 0).tolist() == [[0, 1], [2, 3]]


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
    names = set(re.findall(r'self\._call\(\s*"(cu\w+)"', source)) | set(re.findall(r"kinds\.(\w+)", source))
    assert len(names) > 15
    missing = [n for n in names if not hasattr(driver, n) and not hasattr(driver.CUdevice_attribute, n)]
    assert not missing
