"""andon bench: stages, overhead, and what is compared with torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from andon.runtime.commands import bench

from . import trtdouble
from .conftest import ENGINE, run  # type: ignore[import-not-found]
from .parts import golden

MakeBundle = Callable[..., Path]


def test_bench_reports_stages_overhead_and_why_there_is_no_torch(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle(npz={"golden/golden.npz": golden([10, 40])})
    code, result, text = run(capsys, "bench", "--bundle", root, "--frames", 5, "--warmup", 2, *ENGINE)
    assert code == 0 and set(result["latency_ms"]) == {"encode", "score", "total"}
    assert result["threads"] == 1 and result["executor_overhead"] > 0 and result["peak_rss_mb"] > 10
    assert result["torch_ms"] is None and "enrolled without a checkpoint" in text


def test_bench_times_the_preprocessing_of_a_cameras_frames(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden frames have the network's size already, so the rest shows nothing of what a large camera costs."""
    shapes: list[tuple[int, ...]] = []
    actual = bench.resize

    def resize(image: Any, *arguments: Any, **named: Any) -> Any:
        shapes.append(image.shape)
        return actual(image, *arguments, **named)

    monkeypatch.setattr(bench, "resize", resize)
    root = make_bundle(npz={"golden/golden.npz": golden([10, 40])})
    arguments = ("bench", "--bundle", root, "--frames", 5, "--warmup", 0, *ENGINE)
    code, result, text = run(capsys, *arguments, "--camera", "640x360")
    assert code == 0 and set(shapes) == {(360, 640, 3)} and len(shapes) >= 5
    assert 0 < result["preprocess_ms"]["p50"] <= result["preprocess_ms"]["p99"] and "from 640x360" in text
    assert "p95        p99\n" in text and "ms p99, on the thread that judges" in text
    assert run(capsys, *arguments)[1]["preprocess_ms"] is None
    code, _, text = run(capsys, *arguments, "--camera", "640")
    assert code != 0 and "'640' is no size, as 1920x1080" in text


def test_bench_compares_no_other_program_with_torch(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch model computes the default program: of a shorter one the engines' speed-up would be the sampler's."""
    torch_side = SimpleNamespace(load=lambda: lambda *_: nullcontext(lambda frame, product: 0.0))
    monkeypatch.setattr(bench, "entry_points", lambda group: [torch_side])
    root = make_bundle(
        alternatives={"short": [{"run": "encode"}, {"run": "score"}]},
        checkpoint_sha256="0" * 64,
        npz={"golden/golden.npz": golden([10, 40])},
    )
    for program, compared in (("default", True), ("short", False)):
        arguments = ("--program", program, "--frames", 3, "--warmup", 0)
        code, result, text = run(capsys, "bench", "--bundle", root, *arguments, *ENGINE)
        assert code == 0 and (result["speedup_over_torch"] is not None) == compared
        assert compared or "computes the default program, not short" in text


def test_bench_says_what_runs_where(
    world: trtdouble.World, make_bundle: MakeBundle, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The torch model stays on the CPU where the engines are the GPU's."""
    torch_side = SimpleNamespace(load=lambda: lambda *_: nullcontext(lambda frame, product: 0.0))
    monkeypatch.setattr(bench, "entry_points", lambda group: [torch_side])
    monkeypatch.setenv("ANDON_CACHE", str(cache))
    root = make_bundle(checkpoint_sha256="0" * 64, npz={"golden/golden.npz": golden([10, 40])})
    for backend in ("tensorrt", "onnxruntime"):
        arguments = ("--frames", 3, "--warmup", 0, "--threads", 1, "--backend", backend)
        text = run(capsys, "bench", "--bundle", root, *arguments)[2]
        assert "torch model on the CPU, 1 threads: " in text and f"the engines ({backend}) are" in text
