"""What FOCT's loop costs beside its features, and what the executor allocates per frame, for any enrolled foct bundle.

    python -m measure.ctcost --bundle BUNDLE

Stages are timed by the CPU time of the thread that runs them (one engine thread), so the ratio of two stages of a frame
holds on a busy machine too. Memory is Python's and numpy's, traced over frames after the first.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path

import numpy as np
from andon.runtime import program as executor
from andon.runtime.bundle import Bundle
from andon.runtime.engine.select import open_backend
from andon.runtime.program import Program
from andon.runtime.replay import golden_frames

PROMISED = 1.5


def stage_times(program: Program, frames: np.ndarray, count: int, warmup: int) -> dict[str, np.ndarray]:
    """[count] CPU milliseconds of each stage."""
    rows = []
    for index in range(warmup + count):
        np.copyto(program.frame, frames[index % len(frames)])
        program.run(0)
        rows.append(program.stage_ms)
    return {name: np.array([row[name] for row in rows[warmup:]]) for name in rows[0]}


def allocated(program: Program, count: int) -> tuple[float, int]:
    """Bytes that stay per frame, and the peak within `count` frames."""
    tracemalloc.start()
    program.run(0)
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for _ in range(count):
        program.run(0)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / count, peak - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    executor.perf_counter = time.thread_time
    with (
        Bundle.load(args.bundle) as bundle,
        open_backend("onnxruntime", threads=1) as backend,
        Program(bundle, backend) as program,
    ):
        times = stage_times(program, golden_frames(bundle)[0], args.frames, 10)
        stays, peak = allocated(program, args.frames)
    ratio = times["ct_step"] / times["foct_features"]
    for name, values in times.items():
        print(f"{name:16} {np.median(values):7.2f} ms CPU, p95 {np.percentile(values, 95):.2f}")
    print(f"ct_step / foct_features: {np.median(ratio):.2f}, p95 {np.percentile(ratio, 95):.2f} (at most {PROMISED})")
    print(f"executor: {stays:.1f} bytes stay per frame, {peak} bytes at the peak of {args.frames} frames")


if __name__ == "__main__":
    main()
