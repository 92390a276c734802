"""`make bench`: the numbers Andon promises, measured by its own commands: against torch, delivery, start-up.

Every measurement is made three times in processes of their own; the median counts, the range is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from .machine import ROOT, machine, newest_bundle, software, table

RUNS = 3
#: Starts `andon` as a line device has it: the workstation's packages cannot be imported.
DEVICE = """import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "timm", "onnx")))
from andon.cli import main
sys.exit(main())"""


@dataclass(frozen=True)
class Target:
    """One number that was promised. value: of one run's JSON; met: against the median; shown: how to write it."""

    what: str
    command: str
    value: Callable[[dict[str, Any]], float]
    promise: str
    met: Callable[[float], bool]
    shown: str


def _targets(threads: int) -> list[Target]:
    engines = f"engines-{threads}"
    return [
        Target(
            f"engines against torch, {threads} thread(s)",
            engines,
            lambda run: run["speedup_over_torch"],
            "at least 2x",
            lambda value: value >= 2,
            "{:.2f}x",
        ),
        Target(
            f"one frame through the engines, {threads} thread(s), p50",
            engines,
            lambda run: run["latency_ms"]["total"]["p50"],
            "",
            lambda value: True,
            "{:.1f} ms",
        ),
        Target(
            f"executor and binding, share of the stages, {threads} thread(s)",
            engines,
            lambda run: 100 * run["executor_overhead"],
            "below 5 %",
            lambda value: value < 5,
            "{:.2f} %",
        ),
    ]


#: Of the delivery path and of a line's start; those of the engines depend on the thread counts.
LINE = [
    Target(
        "delivery, judge to PUBACK",
        "delivery",
        lambda run: run["delivery"]["verdicts_per_second"],
        "at least 1,000/s",
        lambda value: value >= 1000,
        "{:.0f}/s",
    ),
    Target(
        "latency that delivery adds at 50/s, p95",
        "delivery",
        lambda run: run["delivery"]["latency_ms"]["p95"],
        "below 20 ms",
        lambda value: value < 20,
        "{:.1f} ms",
    ),
    Target(
        "first verdict after the start of `andon run`",
        "line",
        lambda run: run["first_verdict_s"],
        "within 3 s",
        lambda value: value <= 3,
        "{:.2f} s",
    ),
    Target(
        "resident memory of the demo line, peak",
        "line",
        lambda run: run["memory_mb"]["peak"],
        "at most 400 MB",
        lambda value: value <= 400,
        "{:.0f} MB",
    ),
    Target("frames per second of the demo line", "line", lambda run: run["fps"], "", lambda value: True, "{:.1f}"),
]


def main(argv: list[str] | None = None) -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the newest under bundles/")
    parser.add_argument("--checkpoint", type=Path, help="its checkpoint; default: found under runs/")
    parser.add_argument("--frames", type=int, default=60, help="frames that are timed, and that the line judges")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page here")
    args = parser.parse_args(argv)
    bundle = args.bundle or newest_bundle()
    counts = sorted({1, len(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="andon-bench-") as folder:
        commands = _commands(bundle, args, counts, Path(folder))
        psutil.cpu_percent()  # starts the measurement of the machine's load
        runs = _measure(commands, Path(folder))
    targets = [*(target for threads in counts for target in _targets(threads)), *LINE]
    page = _page(runs, targets)
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")
    return 0


def _commands(bundle: Path, args: argparse.Namespace, counts: list[int], folder: Path) -> dict[str, list[str]]:
    """Name -> command. The line is the demo's, with the state folder elsewhere."""
    document = yaml.safe_load((ROOT / "configs/lines/demo.yaml").read_text(encoding="utf-8"))
    document |= {"bundle": str(bundle.absolute()), "state": str(folder / "state")}
    (folder / "line.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    andon = [sys.executable, "-m", "andon.cli"]
    checkpoint = [] if args.checkpoint is None else ["--checkpoint", str(args.checkpoint)]
    bench = [*andon, "bench", "--bundle", str(bundle), "--frames", str(args.frames), *checkpoint, "--json"]
    line = ["run", "--config", str(folder / "line.yaml"), "--max-frames", str(args.frames), "--log-level", "warning"]
    return {
        **{f"engines-{threads}": [*bench, "--threads", str(threads)] for threads in counts},
        "delivery": [*andon, "bench", "--delivery", "--json"],
        "line": [sys.executable, "-c", DEVICE, *line, "--json"],
    }


def _measure(commands: dict[str, list[str]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each command's JSON, RUNS times, in turn, with the share of CPU that others took meanwhile as `others`.

    Raises:
        SystemExit: one fails; with what it said.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    # On a busy machine torch's spinning threads would wait for each other for milliseconds: that flatters the engines.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with tqdm(total=RUNS * len(commands), desc="bench", unit="run") as bar:
        for _ in range(RUNS):
            for name, command in commands.items():
                bar.set_postfix_str(name)
                before, system = os.times(), psutil.cpu_times()
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                runs[name].append({**result, "others": _others(before, system)})
                bar.update(1)
    return runs


def _others(before: os.times_result, system: Any) -> float:
    """Share of the machine's CPU time since then that neither went to our child processes nor was idle."""
    now, after = os.times(), psutil.cpu_times()
    own = now.children_user + now.children_system - before.children_user - before.children_system
    idle = after.idle + after.iowait - system.idle - system.iowait
    available = (now.elapsed - before.elapsed) * (psutil.cpu_count() or 1)
    return max(0.0, 1 - (own + idle) / available)


def _page(runs: dict[str, list[dict[str, Any]]], targets: list[Target]) -> str:
    engines = next(values[0] for name, values in runs.items() if name.startswith("engines"))
    others = [run["others"] for values in runs.values() for run in values]
    rows = []
    for target in targets:
        found = [target.value(run) for run in runs[target.command]]
        if None in found:
            why = "no checkpoint of the bundle under runs/ to compare with? give --checkpoint DIR"
            sys.exit(f"bench: {target.what} was not measured: {why}")
        values = sorted(found)
        middle = median(values)
        spread = f"{target.shown.format(values[0])} to {target.shown.format(values[-1])}"
        verdict = "" if not target.promise else "yes" if target.met(middle) else "**no**"
        rows.append([target.what, target.promise, target.shown.format(middle), spread, verdict])
    stages = {name: runs[name][0]["latency_ms"] for name in runs if name.startswith("engines")}
    parts = [
        "# Bench",
        f"Medians of {RUNS} runs, each in a process of its own, with a bundle of `{engines['method']}` on "
        f"{engines['backend']}, {engines['variant']}. Repeat it with",
        "    make bench",
        f"{machine()}; {software()}. Other processes took {median(others):.0%} of the machine's CPU time meanwhile "
        f"(median; {min(others):.0%} to {max(others):.0%}).",
        table(["", "promised", "measured", "range", "kept"], rows),
        "## Where a frame's time goes",
        table(
            ["stage", *(f"{name.removeprefix('engines-')} thread(s), p50, p95 ms" for name in stages)], _stages(stages)
        ),
        "## The commands",
        _COMMANDS.format(frames=engines["frames"]),
    ]
    return "\n\n".join(parts) + "\n"


_COMMANDS = """    andon bench --bundle BUNDLE --threads N --frames {frames}
    andon bench --delivery
    andon run --config configs/lines/demo.yaml --max-frames {frames}

All with OMP_WAIT_POLICY=PASSIVE. The first judges frames with torch and with the engines in turn, in one process. The
second fsyncs its outbox and has a mosquitto of its own. The third runs with torch, torchvision, timm and onnx blocked,
as on a device; start-up (Python's own included) and memory are from its closing summary."""


def _stages(stages: dict[str, Any]) -> list[list[str]]:
    names = list(next(iter(stages.values())))
    return [
        [stage, *(f"{latency[stage]['p50']:.2f}, {latency[stage]['p95']:.2f}" for latency in stages.values())]
        for stage in names
    ]


if __name__ == "__main__":
    sys.exit(main())
