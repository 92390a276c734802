"""The decision gate of the short alternative programs in reduced precision, on the frames of the gate set.

A failure refuses nothing: the stages' precision is chosen by the default program. It is recorded which programs have
passed in which variant; the device warns of the others (Manifest.gated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.manifest import Loop, Manifest, Step, Variant
from . import verify
from .frames import Frames
from .verify import Check
from .walk import Array

#: Stage calls a frame of the longest program that is gated: a diffusion of 50 calls would take longer than the export.
CALLS = 16
#: Good frames that a program's threshold is set on, more where products are more
GOOD_FRAMES = 32


@dataclass(frozen=True)
class Alternatives:
    """What the gate said.

    gated: variant -> programs that kept their decisions, the default first. record: for report.json.
    reference: score.<program> [n] and threshold.<program> [classes] of the FP32 engines, for gate.npz.
    """

    gated: dict[Variant, list[str]] = field(default_factory=dict)
    record: dict[Variant, dict[str, Any]] = field(default_factory=dict)
    reference: dict[str, Array] = field(default_factory=dict)


def judge(
    root: Path,
    manifest: Manifest,
    rounded: Callable[[Manifest, Variant], Manifest],
    good: Frames,
    gate: Frames,
    say: Callable[[str], None],
) -> Alternatives:
    """Hold the alternatives of every reduced variant against FP32.

    Args:
        root: the bundle under construction.
        rounded: gives the manifest of files that round as a GPU does.
        good: held-out good frames of every product, for thresholds.
        gate: the frames of gate.npz.
    """
    variants = [v for v in manifest.variants if v != "fp32"]
    found = Alternatives({v: ["default"] for v in variants}, {v: {} for v in variants})
    for program, steps in manifest.alternatives.items() if variants else ():
        calls = _calls(steps)
        if calls > CALLS:
            say(f"program {program}: {calls} stage calls a frame, its reduced variants are not gated")
            for variant in variants:
                found.record[variant][program] = {"gated": False, "why": f"{calls} calls a frame, more than {CALLS}"}
            continue
        say(f"program {program}: decisions on {len(gate)} frames")
        scores = verify.run_engines(root, manifest, "fp32", good, program).score
        threshold = verify.thresholds(scores, good.class_ids, len(manifest.classes))
        full = verify.run_engines(root, manifest, "fp32", gate, program)
        found.reference.update({f"score.{program}": full.score, f"threshold.{program}": threshold})
        for variant in variants:
            made = verify.run_engines(root, rounded(manifest, variant), variant, gate, program)
            shipped = verify.run_engines(root, manifest, variant, gate, program)
            checks = verify.decisions(variant, made, full, gate, threshold, manifest.classes)
            checks.append(verify.flips_as_shipped(variant, shipped, full, gate, threshold, len(gate)))
            checks = [replace(check, subject=f"program {program} {variant}") for check in checks]
            kept = verify.passed(checks)
            found.record[variant][program] = {"gated": kept, "checks": verify.record(checks)}
            if kept:
                found.gated[variant].append(program)
            else:
                say(f"{variant}: program {program} does not keep its decisions, run it in FP32: {_failed(checks)}")
    return found


def _calls(steps: Sequence[Step]) -> int:
    return sum(step.count if isinstance(step, Loop) else 1 for step in steps)


def _failed(checks: Sequence[Check]) -> str:
    return ", ".join(f"{c.what} {c.value:.3g} (limit {c.limit})" for c in checks if not c.ok)
