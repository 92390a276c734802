"""The TensorRT backend when CUDA or TensorRT refuse, on doubles of them: what is said, and that nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.tensorrt import TensorRTBackend
from andon.runtime.errors import ConfigError, EngineError
from andon.runtime.program import Program

from . import trtdouble
from .test_program import looped  # type: ignore[import-not-found]

MakeBundle = Callable[..., Path]
BINDINGS = pytest.mark.parametrize("bindings", ["pycuda", "cuda-python"])


@BINDINGS
def test_a_backend_that_does_not_open_leaves_no_context_on_its_thread(
    monkeypatch: pytest.MonkeyPatch, cache: Path, bindings: str
) -> None:
    """pycuda ends the process when a thread ends that has one."""
    world = trtdouble.install(monkeypatch, bindings=bindings)
    world.refuse_stream = True
    with pytest.raises(EngineError, match=bindings):
        TensorRTBackend(cache)
    world.refuse_stream, world.refuse_start = False, True
    with pytest.raises(EngineError, match=r"TensorRT does not start(.|\n)*nullptr; CUDA initialization failure"):
        TensorRTBackend(cache)
    world.refuse_start = False
    monkeypatch.setenv("ANDON_CACHE_LIMIT", "lots")
    with pytest.raises(ConfigError, match="lots"):
        TensorRTBackend(cache)
    assert world.pushed == 0


def test_a_builder_that_does_not_start_says_so(world: trtdouble.World, make_bundle: MakeBundle, cache: Path) -> None:
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend:
        world.refuse_start = True
        with pytest.raises(EngineError, match="TensorRT does not start"):
            Program(bundle, backend)


@BINDINGS
def test_after_a_fault_of_the_device_the_first_error_is_told_and_everything_is_let_go(
    monkeypatch: pytest.MonkeyPatch, make_bundle: MakeBundle, cache: Path, bindings: str
) -> None:
    """Every later call fails with the same code, those of the clean-up too."""
    world = trtdouble.install(monkeypatch, bindings=bindings)
    with Bundle.load(make_bundle()) as bundle, TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        program.run(0)
        world.refuse_execute = True
        upload = backend.upload

        def upload_last(*arguments: object) -> None:
            upload(*arguments)  # type: ignore[arg-type]
            world.fault = True

        monkeypatch.setattr(backend, "upload", upload_last)
        with pytest.raises(EngineError, match="stage encode failed in TensorRT"):
            program.run(0)
    assert world.pushed == 0


def test_what_a_loop_carries_starts_afresh_although_it_could_not_at_the_fault(
    world: trtdouble.World, tmp_path: Path, cache: Path
) -> None:
    bundle = looped(tmp_path / "bundle", 3, persist=True, counter=True, read_old=False)
    with TensorRTBackend(cache) as backend, Program(bundle, backend) as program:
        program.frame.fill(40)
        first = program.run(0).map.copy()
        assert not np.array_equal(program.run(0).map, first), "a frame does change what the next one gives"
        world.fault = True
        for _ in range(2):
            with pytest.raises(EngineError, match="illegal memory access"):
                program.run(0)
        world.fault = False
        program.frame.fill(40)
        np.testing.assert_array_equal(program.run(0).map, first)
