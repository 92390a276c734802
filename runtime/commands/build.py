"""`andon build`: the TensorRT plans of a bundle, built on this device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engine.build import Built
from ..engine.plans import CACHE, default_cache
from ..engine.probe import require_tensorrt
from ..engine.target import BuildOptions, with_dla
from ..errors import EngineError, quoted
from . import numbers, options


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon build`."""
    options.add_bundle(parser)
    parser.add_argument(
        "--variant", choices=("auto", "all", *options.VARIANTS), default="auto", help="auto: fp16 if the bundle has it"
    )
    parser.add_argument(
        "--workspace", type=numbers.count, default=1024, metavar="MB", help="scratch memory limit (1024)"
    )
    parser.add_argument("--optimization-level", type=int, choices=range(6), metavar="0..5", help="TensorRT's effort")
    parser.add_argument("--dla", nargs="+", default=[], metavar="STAGE", help="put these stages on the DLA")
    parser.add_argument("--dla-core", type=numbers.natural, default=0, metavar="N", help="which DLA (0)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"as {CACHE}=DIR: plans in DIR/plans (default {default_cache()})"
    )
    parser.add_argument("--force", action="store_true", help="build again what is there")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it. Stages whose plan is there are skipped, so it goes on where it was interrupted.

    Raises:
        EngineError: TensorRT cannot be used here (the message says what is missing), or refuses a stage; or a plan
            cannot be kept.
        BundleError: the bundle cannot be used.
    """
    with Bundle.load(args.bundle) as bundle:
        shown = quoted(args.bundle)
        require_tensorrt(f"go on without plans: andon verify --bundle {shown} --backend onnxruntime")
        from ..engine.tensorrt import TensorRTBackend

        manifest = bundle.manifest
        level = args.optimization_level
        wanted = BuildOptions(args.workspace, level, dla_core=args.dla_core)
        wanted = with_dla(wanted, frozenset(args.dla), manifest.stages.__contains__)
        variants = (
            manifest.variants if args.variant == "all" else (options.choose_variant(args.variant, bundle, "tensorrt"),)
        )
        with TensorRTBackend(default_cache(args.cache), wanted) as backend:
            backend.plans.force = args.force
            for variant in variants:
                for name, stage in manifest.stages.items():
                    path = bundle.stage_path(name, variant)
                    backend.open(name, stage, path, variant)
                    built = backend.plans.built[-1]
                    # What was built here is what a run uses, also where it was built before by other options.
                    _print(_kept(built, backend.plans.keep_options(name, path, variant)))
            plans = backend.plans.built
        if args.bundle.is_file():
            print(f"{shown} is packed: the trtexec lines work where the ONNX files in it are unpacked")
        where = "" if args.cache is None else f"{CACHE}={quoted(args.cache)} "  # else it builds them again, elsewhere
        print(f"next: {where}andon verify --bundle {shown} --backend tensorrt")
        return {"ok": True, "bundle": bundle.id, "plans": [_plain(b) for b in plans]}


def _kept(built: Built, options: bool) -> Built:
    """A line runs with a plan that the disk refused; here it was built to be kept, and its options with it."""
    if not (built.kept and options):
        raise EngineError(
            f"the plan of stage {built.stage}, or what it was built with, cannot be kept",
            found=f"{built.plan.parent} does not take it",
            expected=f"a folder that this user can write, with room for {built.bytes / 1e6:.0f} MB",
            next_step=f"make room, or set {CACHE} to a folder elsewhere, for andon run too",
        )
    return built


def _print(built: Built) -> None:
    size = f"{built.bytes / 1e6:.1f} MB"
    what = f"built in {built.seconds:.0f} s ({built.reason})" if built.seconds else "is there"
    print(f"{built.stage} {built.variant}: {what}, {size}\n  {built.plan}\n  same by hand: {built.trtexec}")
    if built.dla_fallback:
        print(f"  on the GPU instead of the DLA: {', '.join(built.dla_fallback)}")


def _plain(built: Built) -> dict[str, Any]:
    return {**built.__dict__, "plan": str(built.plan), "dla_fallback": list(built.dla_fallback)}
