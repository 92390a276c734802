"""The TensorRT backend on a real GPU: the same programs, the same numbers, one graph a frame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.base import Backend
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.program import Program
from andon.runtime.replay import WARM, golden_size, replay_gate, replay_golden, replay_warm

from ..runtime.test_program import looped  # type: ignore[import-not-found]


def tensorrt(cache: Path, **options: Any) -> Backend:
    from andon.runtime.engine.tensorrt import TensorRTBackend

    return TensorRTBackend(cache, **options)


def play(bundle: Bundle, backend: Backend) -> list[np.ndarray]:
    frames = np.random.default_rng(3).integers(0, 255, (6, 4, 4, 3), np.uint8)
    seen = []
    with Program(bundle, backend) as program:
        for i, frame in enumerate(frames):
            np.copyto(program.frame, frame)
            result = program.run(i % 2)
            program.frame.fill(255)
            seen += [result.map.copy(), program.read("step.u_next").copy(), program.read_state("v0", 1)]
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("graphs", [True, False])
def test_loops_give_what_onnxruntime_gives(tmp_path: Path, cache: Path, count: int, graphs: bool) -> None:
    bundle = looped(tmp_path / "bundle", count, persist=True, counter=count > 1, read_old=count == 3)
    with OnnxRuntimeBackend(threads=1) as reference:
        expected = play(bundle, reference)
    with tensorrt(cache, graphs=graphs) as backend:
        for found, wanted in zip(play(bundle, backend), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_frame_is_captured_as_one_graph(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = looped(tmp_path / "bundle", 8, persist=False, counter=False, read_old=False)
    with tensorrt(cache) as backend, Program(bundle, backend) as program:
        for _ in range(4):
            program.run(0)
        assert "cannot be captured" not in caplog.text
        ran = [frame for frame in backend._frames if frame._warm]  # type: ignore[attr-defined]
        assert len(ran) == 1, "those of a product that is told by itself did not run"
        assert ran[0]._replay is not None


@pytest.mark.skipif("ANDON_DEVICE_BUNDLE" not in os.environ, reason="NOT RUN: ANDON_DEVICE_BUNDLE names no bundle")
def test_an_exported_bundle_keeps_its_decisions(cache: Path) -> None:
    with Bundle.load(os.environ["ANDON_DEVICE_BUNDLE"]) as bundle, tensorrt(cache) as backend:
        for variant in bundle.manifest.variants:
            with Program(bundle, backend, variant) as program:
                warm = replay_warm(program) if golden_size(bundle, WARM) else []
                failed = [check for check in (*replay_golden(program), *warm, *replay_gate(program)) if not check.ok]
                assert not failed
