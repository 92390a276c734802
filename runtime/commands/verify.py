"""`andon verify`: does this machine's engine give what the export proved?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..calibrated import other_engines
from ..engine.select import open_backend
from ..manifest import Variant
from ..program import Program
from ..promise import promise
from ..replay import (
    GATE,
    WARM,
    Check,
    carries,
    gate_lacks,
    gate_programs,
    golden_size,
    replay_gate,
    replay_golden,
    replay_warm,
)
from . import options


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon verify`."""
    options.add_bundle(parser)
    options.add_engine(parser, program=False, auto="every one that the bundle has")
    parser.add_argument("--no-gate", action="store_true", help="golden set only, without the decision gate")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it for the chosen variant, or for every variant of the bundle.

    Raises:
        AndonError: bundle or engine cannot be used.
    """
    checks: dict[Variant, list[Check]] = {}
    with Bundle.load(args.bundle) as bundle, open_backend(args.backend, threads=args.threads) as backend:
        variants = bundle.manifest.variants if args.variant == "auto" else (args.variant,)
        golden, warm = golden_size(bundle), golden_size(bundle, WARM)
        gate = 0 if args.no_gate else golden_size(bundle, GATE)
        programs = {variant: gate_programs(bundle, variant) if gate else ["default"] for variant in variants}
        frames = (golden + warm) * len(variants) + gate * sum(map(len, programs.values()))
        with options.progress(frames, "verify", "frame") as bar:
            for variant, names in programs.items():
                checks[variant] = []
                for name in names:
                    with Program(bundle, backend, variant, name) as program:
                        if name == "default":
                            checks[variant] += replay_golden(program, bar.update)
                            checks[variant] += replay_warm(program, bar.update) if warm else []
                        if gate:
                            checks[variant] += replay_gate(program, bar.update)
        ok = all(check.ok for group in checks.values() for check in group)
        print(f"{bundle.manifest.name} ({bundle.id}) on {backend.name}, {golden} golden, {gate} gate frames")
        print(_table(checks))
        unchecked = _unchecked(bundle, gate, args.no_gate, warm, programs)
        for text in unchecked:
            print(f"NOT CHECKED: {text}")
        names = options.program_names(bundle)
        warnings = [str(each) for variant in variants for each in other_engines(bundle, names, variant, backend.name)]
        for text in warnings:
            print(f"warning: {text}")
        chosen: dict[str, list[str]] = {}
        for camera, product, name, entry in bundle.manifest.calibrated():
            if not entry.promises:
                chosen.setdefault(name, []).append(product if camera is None else f"{product} at {camera}")
                print(f"threshold of {chosen[name][-1]}, program {name}: {entry.value:.4g}, {promise(entry)}")
        print("verified" if ok else "NOT verified: do not run this bundle on this machine")
        return {
            "ok": ok,
            "bundle": bundle.id,
            "backend": backend.name,
            "not_checked": unchecked,
            "warnings": warnings,
            "by_hand": chosen,
            "checks": {variant: [_plain(check) for check in group] for variant, group in checks.items()},
        }


def _unchecked(
    bundle: Bundle, gate: int, unwanted: bool, warm: int, programs: Mapping[Variant, Sequence[str]]
) -> list[str]:
    """What there is nothing to compare with."""
    found = []
    if not gate:
        why = "--no-gate" if unwanted else "the bundle has no gate set, as one that an earlier version enrolled"
        found.append(f"decisions beyond the golden set's ({why})")
    elif bundle.manifest.outputs.logits and not golden_size(bundle, GATE, "logits"):
        found.append("the products that the classifier tells, beyond the golden set's (the gate set has none)")
    found += gate_lacks(bundle) if gate else []
    if others := _left_out(bundle, programs) if gate else []:
        found.append(f"what the programs {', '.join(others)} decide (the gate set has none of their scores)")
    if carries(bundle.manifest.program) and not warm:
        found.append("what is carried from frame to frame (the bundle has no warm set)")
    return found


def _left_out(bundle: Bundle, programs: Mapping[Variant, Sequence[str]]) -> list[str]:
    """Alternatives that export's gate let pass in a reduced precision and that the gate set cannot be replayed with."""
    manifest = bundle.manifest
    reduced = [variant for variant in programs if variant != "fp32"]
    return [p for p in manifest.alternatives if any(manifest.gated(v, p) and p not in programs[v] for v in reduced)]


def _plain(check: Check) -> dict[str, Any]:
    return {**asdict(check), "value": check.value if np.isfinite(check.value) else None}


def _table(checks: dict[Variant, list[Check]]) -> str:
    lines = []
    for variant, group in checks.items():
        width = max(len(check.subject) for check in group)
        for check in group:
            limit = "" if check.limit is None else f"limit {check.limit:.3g}"
            verdict = "ok" if check.ok else "FAILED"
            lines.append(
                f"{variant}  {check.subject:<{width}}  {check.what:<27}  {check.value:<10.3g}  {limit:<13}  {verdict}"
            )
    return "\n".join(lines)
