"""`andon bench`: where a frame's time goes, what the executor adds, and how that compares with the torch model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np

from ..bundle import Bundle
from ..engine.base import Array, Backend
from ..engine.select import open_backend
from ..errors import AndonError, ConfigError
from ..evaluation import latency_table, percentiles
from ..manifest import Preprocess, Variant
from ..preprocess import resize
from ..process import resident_memory
from ..program import Program
from ..replay import golden_frames
from . import numbers, options

#: Entry point group of the torch side: a context manager (weights hash, checkpoint or None, threads) -> judge function
REFERENCE = "andon.reference"
Judge = Callable[[Array, int], float]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon bench`."""
    options.add_bundle(parser, required=False)
    options.add_engine(parser)
    parser.add_argument(
        "--delivery", action="store_true", help="time verdicts to the broker's acknowledgement instead; needs no bundle"
    )
    parser.add_argument("--frames", type=numbers.count, default=100, metavar="N", help="frames to time (100)")
    parser.add_argument("--warmup", type=numbers.natural, default=10, metavar="N", help="frames before them (10)")
    parser.add_argument(
        "--camera", type=numbers.size, metavar="WxH", help="also time the preprocessing of frames of this size"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="the bundle's checkpoint; default: found by hash"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave the torch model out")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it on the golden frames, torch and engines in turn in the same process.

    Raises:
        AndonError: bundle or engine cannot be used, a checkpoint that was named is not the bundle's, or options are
            given beside --delivery.
    """
    if args.delivery:
        _alone(args)
        return _delivery()
    if args.bundle is None:
        raise AndonError("which bundle?", next_step="andon bench --bundle DIR, or andon bench --delivery")
    started = perf_counter()
    with Bundle.load(args.bundle) as bundle, open_backend(args.backend, threads=args.threads) as backend:
        variant = options.choose_variant(args.variant, bundle, backend.name)
        threads = getattr(backend, "threads", 1)
        frames, class_ids = golden_frames(bundle)
        with Program(bundle, backend, variant, args.program) as program:
            opened = perf_counter() - started
            for i in range(args.warmup):
                _frame(program, frames, class_ids, i)
            resident = resident_memory()["peak"]
            with ExitStack() as stack:
                judge, why = _reference(stack, bundle, args, threads)
                latency, torch_ms = _measure(program, judge, frames, class_ids, args.frames)
        split = _split(bundle, backend, variant, args, frames, class_ids) if backend.asynchronous else {}
        result: dict[str, Any] = {
            "ok": True,
            "bundle": bundle.id,
            "method": bundle.manifest.method,
            "backend": backend.name,
            "variant": variant,
            "program": args.program,
            "threads": threads,
            "frames": args.frames,
            "open_s": opened,
            "peak_rss_mb": resident,
            "latency_ms": percentiles(latency),
            "stages_apart_ms": percentiles(split),
            "camera": args.camera,
            "preprocess_ms": None
            if args.camera is None
            else _preprocess(frames, args.camera, bundle.manifest.preprocess, args.frames),
            **_overhead(latency),
            **_against_torch(latency, torch_ms),
        }
    _print(result, latency, split, why)
    return result


def _alone(args: argparse.Namespace) -> None:
    """Refuse options of the engines' benchmark beside --delivery, which has neither engines nor frames of a bundle.

    Raises:
        ConfigError: naming them.
    """
    parser = argparse.ArgumentParser()
    configure(parser)
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(parser.parse_args([])).items()
        if name != "delivery" and getattr(args, name) != value
    ]
    if given:
        raise ConfigError(
            f"--delivery times no engines, so {' and '.join(given)} cannot be heeded",
            found=f"--delivery and {', '.join(given)}",
            expected="--delivery alone, or a bundle's engines without it",
            next_step="andon bench --delivery, or leave --delivery out",
        )


def _delivery() -> dict[str, Any]:
    from ..mqtt.bench import delivery_benchmark

    result = delivery_benchmark()
    latency = result["latency_ms"]
    print(f"judge to PUBACK: {result['verdicts_per_second']:.0f} verdicts/s over {result['count']}")
    shown = ", ".join(f"{name} {value:.2f} ms" for name, value in latency.items())
    print(f"at {result['rate']:g} verdicts/s: {shown}")
    return {"ok": True, "delivery": result}


def _measure(
    program: Program, judge: Judge | None, frames: Array, class_ids: Array, count: int
) -> tuple[dict[str, Array], Array | None]:
    """Per-frame timings of the program, and of the torch model, one frame each in turn so that both see the same
    machine."""
    timings: list[dict[str, float]] = []
    reference = np.zeros(count)
    if judge is not None:
        judge(frames[:1], int(class_ids[0]))  # torch's own warm-up
    with options.progress(count, "bench", "frame") as bar:
        for i in range(count):
            timings.append(_frame(program, frames, class_ids, i))
            if judge is not None:
                k = i % len(frames)
                start = perf_counter()
                judge(frames[k : k + 1], int(class_ids[k]))
                reference[i] = (perf_counter() - start) * 1e3
            bar.update(1)
    latency = {name: np.array([t[name] for t in timings]) for name in timings[0]}
    return latency, None if judge is None else reference


def _split(
    bundle: Bundle, backend: Backend, variant: Variant, args: argparse.Namespace, frames: Array, class_ids: Array
) -> dict[str, Array]:
    """Stage by stage on an asynchronous backend, waiting after each: where a frame's time goes, not what it takes."""
    with Program(bundle, backend, variant, args.program, per_stage=True) as program:
        for i in range(args.warmup):
            _frame(program, frames, class_ids, i)
        return _measure(program, None, frames, class_ids, args.frames)[0]


def _preprocess(frames: Array, size: tuple[int, int], preprocess: Preprocess, count: int) -> dict[str, float]:
    """What it takes to bring a camera's frame to the network's size: percentiles in milliseconds. The golden frames
    have that size already."""
    pictures = [cv2.resize(frame.reshape(frame.shape[-3:]), size) for frame in frames[:4]]
    out = np.empty((preprocess.height, preprocess.width, 3), np.uint8)
    taken = np.zeros(count)
    for i in range(-1, count):  # the first also fetches the pages of what it needs
        start = perf_counter()
        resize(pictures[i % len(pictures)], preprocess, out=out)
        if i >= 0:
            taken[i] = (perf_counter() - start) * 1e3
    return percentiles({"preprocess": taken})["preprocess"]


def _frame(program: Program, frames: Array, class_ids: Array, i: int) -> dict[str, float]:
    np.copyto(program.frame, frames[i % len(frames)])
    start = perf_counter()
    program.run(int(class_ids[i % len(frames)]))
    total = (perf_counter() - start) * 1e3
    return {**program.stage_ms, "total": total}


def _overhead(latency: dict[str, Array]) -> dict[str, float]:
    """What a frame takes beyond its stages: the executor itself, and reading score, map and logits."""
    stages = sum(values for name, values in latency.items() if name != "total")
    extra = latency["total"] - stages
    return {
        "stages_ms": float(np.median(stages)),
        "executor_overhead_ms": float(np.median(extra)),
        "executor_overhead": float(np.median(extra / stages)),
    }


def _against_torch(latency: dict[str, Array], torch_ms: Array | None) -> dict[str, Any]:
    if torch_ms is None:
        return {"torch_ms": None, "speedup_over_torch": None}
    speedup = float(np.median(torch_ms) / np.median(latency["total"]))
    return {"torch_ms": percentiles({"torch": torch_ms})["torch"], "speedup_over_torch": speedup}


def _reference(stack: ExitStack, bundle: Bundle, args: argparse.Namespace, threads: int) -> tuple[Judge | None, str]:
    """The torch model as a function of (frame, class index), open until the stack closes; or None and why not."""
    points = entry_points(group=REFERENCE)
    if args.no_torch:
        return None, "left out (--no-torch)"
    if args.program != "default":
        return None, f"it computes the default program, not {args.program}"
    if not points or find_spec("torch") is None:
        return None, "torch is not installed here"
    if not bundle.manifest.checkpoint_sha256:
        return None, "the bundle was enrolled without a checkpoint"
    opener = next(iter(points)).load()
    try:
        return stack.enter_context(opener(bundle.manifest.checkpoint_sha256, args.checkpoint, threads)), ""
    except AndonError as error:
        if args.checkpoint is not None:
            raise
        return None, f"{error.what} (name its folder with --checkpoint)"


def _print(result: dict[str, Any], latency: dict[str, Array], split: dict[str, Array], why: str) -> None:
    print(f"{result['method']} {result['bundle']} on {result['backend']} {result['variant']}, ", end="")
    print(f"program {result['program']}, {result['threads']} threads, {result['frames']} frames")
    print(latency_table(latency))
    if split:
        print("stage by stage, waiting after each:")
        print(latency_table(split))
    if result["preprocess_ms"] is not None:
        width, height = result["camera"]
        p50, p99 = (result["preprocess_ms"][key] for key in ("p50", "p99"))
        taken = f"{p50:.2f} ms p50, {p99:.2f} ms p99"
        print(f"and preprocessing of each frame, from {width}x{height}: {taken}, on the thread that judges")
    share, extra = result["executor_overhead"], result["executor_overhead_ms"]
    print(f"executor: {extra * 1e3:.0f} us a frame, {share:.2%} of its stages")
    print(f"opened in {result['open_s']:.2f} s, {result['peak_rss_mb']:.0f} MB resident at most")
    if result["torch_ms"] is None:
        print(f"torch model: not measured, {why}")
    else:
        speedup, threads = result["speedup_over_torch"], result["threads"]
        # Where the engines run on the GPU that is a comparison of devices, not of engines.
        print(
            f"torch model on the CPU, {threads} threads: {result['torch_ms']['p50']:.2f} ms p50; "
            f"the engines ({result['backend']}) are {speedup:.1f}x as fast"
        )
