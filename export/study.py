"""`andon eval --all`: every method on every set, over seeds, and the results page made of the records.

Each run is a command of its own (`andon train`, `andon export`, `andon eval`), so that what is recorded can be repeated
by hand and memory is given back. Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..runtime.commands.numbers import count
from ..runtime.errors import AndonError, ConfigError
from ..runtime.results import Record, load_results, merge_results
from ..train.registry import list_methods
from .results_page import write_page, write_validation

_NO_LIMIT = "schedule.max_seconds=null"
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "F1_max")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the study, added to those of `andon eval`."""
    group = parser.add_argument_group("study (--all)")
    group.add_argument(
        "--all", nargs="*", metavar="SET", help="train, export and evaluate on these sets; none: page only"
    )
    group.add_argument("--methods", nargs="+", metavar="NAME", help="only these; default: all that train")
    group.add_argument("--study-seeds", type=count, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    group.add_argument("--no-train", action="store_true", help="record the finished runs in --runs, train none")
    group.add_argument(
        "--untrained", action="store_true", help="the control: the same with a random backbone, one seed"
    )
    group.add_argument(
        "--study-set", nargs="+", default=[], metavar="KEY=VALUE", help="train with these settings, recorded beside it"
    )
    group.add_argument("--validation", action="store_true", help="validation sets: quality alone, a page of its own")
    group.add_argument("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="where the runs are kept")
    group.add_argument("--results", type=Path, default=Path("docs/results.json"), metavar="FILE", help="the records")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing, record it, write the page beside the records.

    Raises:
        AndonError: a run failed; what was recorded before stays.
    """
    methods = args.methods or [m for m in list_methods() if m != "foct"]  # foct enrols: its study is --few-shot
    for data in args.all:
        for method in methods:
            for seed in range(1 if args.untrained else args.study_seeds):
                cost = seed == 0 and data == args.all[0] and not args.validation
                merge_results(args.results, _one(method, data, seed, args, cost=cost))
    records = load_results(args.results)
    page = (write_validation if args.validation else write_page)(records, args.results.with_suffix(".md"))
    print(f"{len(records)} records in {args.results}, page {page}")
    return {"ok": True, "records": len(records), "page": str(page)}


def _one(method: str, data: str, seed: int, args: argparse.Namespace, *, cost: bool) -> Iterator[Record]:
    """Records of one run: quality of the torch model, and what a frame costs the engines if asked (it is the same
    for every set and seed)."""
    name = data if data == "elpv" else Path(data).resolve().name
    shown = data if data == "elpv" else f"$ANDON_DATA/{name}"
    control = ["backbone.weights=random:0"] if args.untrained else []
    options = [part for pair in (*control, *args.study_set) for part in ("--set", pair)]
    # A time limit is no setting of the model: without it a slow machine gives what a fast one does.
    labels = ["untrained backbone"] * args.untrained + [s for s in args.study_set if s != _NO_LIMIT]
    setting = {"setting": ", ".join(labels)} if labels else {}
    out = args.runs / "-".join((method, name, str(seed), *(re.sub(r"[^\w.=]+", "_", label) for label in labels)))
    command = ["train", "--method", method, "--data", data, "--seed", str(seed), *options]
    if not (out / "metrics.json").is_file():
        if args.no_train:
            return
        _andon([*command, "--out", str(out)])
    text = " ".join(["andon", *command]).replace(data, shown)
    base = {"method": method, "set": name, "shots": None, "seed": seed, **setting}
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["products"]
    yield from _quality(metrics, {**base, "command": text})
    if cost and not setting:
        exported = f"{text}; andon export --method {method}"
        yield from _engines(method, data, out, {**base, "command": f"{exported}; andon bench"})
        if args.samplers:
            yield from _samplers(data, out / "bundle", args.limit, {**base, "command": exported})


def _quality(products: dict[str, dict[str, float | None]], base: dict[str, Any]) -> Iterator[Record]:
    for product, metrics in products.items():
        for metric in METRICS:
            value = metrics.get(metric)
            if value is not None:
                yield {**base, "product": product, "metric": metric, "value": round(value, 4)}


def _engines(method: str, data: str, checkpoint: Path, base: dict[str, Any]) -> Iterator[Record]:
    """Cost of a frame: parameters, multiply-accumulates, and milliseconds of the FP32 engines on this CPU."""
    from ..runtime.bundle import Bundle
    from .cost import stage_cost

    kept = checkpoint / "bundle"
    if not kept.exists():
        _andon(["export", "--method", method, "--checkpoint", str(checkpoint), "--data", data, "--out", str(kept)])
    with Bundle.load(kept) as bundle:
        counts = {_stage(step): getattr(step, "count", 1) for step in bundle.manifest.program}
        costs = {name: stage_cost(bundle.stage_path(name, "fp32")) for name in counts}
        state = sum(s.size for s in bundle.manifest.state.values())
    yield {
        **base,
        "product": None,
        "metric": "GMAC",
        "value": round(sum(costs[n][0] * counts[n] for n in counts) / 1e9, 4),
    }
    yield {**base, "product": None, "metric": "parameters", "value": sum(c[1] for c in costs.values())}
    yield {**base, "product": None, "metric": "state_elements", "value": state}
    bench = _andon(["bench", "--bundle", str(kept), "--json", "--no-torch"])
    yield {**base, "product": None, "metric": "cpu_ms", "value": round(bench["latency_ms"]["total"]["p50"], 3)}


def _samplers(data: str, bundle: Path, limit: int | None, base: dict[str, Any]) -> Iterator[Record]:
    """Quality and cost of every program of the bundle through the engines: a diffusion method's samplers."""
    few = ["--limit", str(limit)] if limit else []
    found = _andon(["eval", "--bundle", str(bundle), "--data", data, "--samplers", *few, "--json"])["samplers"]
    command = " ".join([f"{base['command']}; andon eval --samplers", *few])
    for name, result in found.items():
        row = {**base, "command": command, "setting": f"sampler {name}"}
        for product, metrics in result["products"].items():
            if (value := metrics["image_AUROC"]) is not None:
                yield {**row, "product": product, "metric": "image_AUROC", "value": round(value, 4)}
        took = result["latency_ms"]["total"]["p50"]
        yield {**row, "product": None, "metric": "ms_a_frame", "value": round(took, 2)}


def _stage(step: Any) -> str:
    name: str = step.run if hasattr(step, "run") else step.loop
    return name


def _andon(arguments: Sequence[str]) -> dict[str, Any]:
    """Run one command and return its JSON, if it was asked for.

    Raises:
        AndonError: it failed.
    """
    print("$ andon", *arguments, flush=True)
    wants = "--json" in arguments
    done = subprocess.run(
        [sys.executable, "-m", "andon.cli", *arguments],
        env=os.environ,
        stdout=subprocess.PIPE if wants else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AndonError(
            f"andon {arguments[0]} failed in the study", found=f"exit code {done.returncode}", next_step="see above"
        )
    if not wants:
        return {}
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ConfigError(f"andon {arguments[0]} --json printed no JSON", found=done.stdout[-200:]) from error
    return result
