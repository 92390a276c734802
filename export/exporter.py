"""From a cut to a verified bundle: ONNX, precision variants, parity, gates with fall-back, golden set, manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.bundlefiles import new_bundle
from ..runtime.classifier import RECORD
from ..runtime.errors import AndonError, ConfigError
from ..runtime.manifest import Manifest, Stage, Variant
from ..train.method import AnomalyModel
from . import alternatives, bundle, shipped, trtcheck, verify
from .alternatives import Alternatives
from .frames import Evidence, Frames, thin
from .onnx import StageGraph, export_stage
from .reduce import ROUNDED, Reduced, Reducer
from .stage import StagedModel
from .verify import Check, Scored
from .walk import Array, examples

#: Frames of the golden set, and of the gate set that travels along; where products are more, one of each
GOLDEN_FRAMES = 8
GATE_FRAMES = 64
GATE_BYTES = 12 << 20
#: Frames on which the torch model is compared with the engines (one of each product at least), and each stage with its
#: module, in every program
MODEL_FRAMES = 48
STAGE_FRAMES = 6

Say = Callable[[str], None]


class GateError(AndonError):
    """The export does not keep what it promises; `checks` is the verification table."""

    def __init__(self, checks: list[Check], kept: str):
        self.checks = checks
        failed = [c for c in checks if c.refused]
        super().__init__(
            f"the export failed {len(failed)} of {len(checks)} checks\n{verify.table(failed)}",
            found=", ".join(f"{c.subject} {c.what} {c.value:.3g}" for c in failed[:3]),
            expected=", ".join(c.limit for c in failed[:3]),
            next_step=kept,
        )


@dataclass(frozen=True)
class Request:
    """What to export. variants: besides fp32; fp32_stages: stages that stay FP32 in every variant."""

    out: Path | None = None
    variants: tuple[Variant, ...] = ()
    fp32_stages: frozenset[str] = frozenset()


@dataclass
class Export:
    """A finished export. seconds: time per phase."""

    path: Path
    manifest: Manifest
    report: dict[str, Any]
    checks: list[Check]
    seconds: dict[str, float] = field(default_factory=dict)


def export_bundle(
    model: AnomalyModel,
    staged: StagedModel,
    evidence: Evidence,
    provenance: bundle.Provenance,
    request: Request,
    say: Say = lambda text: None,
) -> Export:
    """Export, verify and write a bundle; nothing is left behind when it fails.

    Raises:
        ConfigError: the cut, the request or the target path cannot be used.
        GateError: a stage or the program does not match torch, a precision variant changes decisions even with
            fall-backs, or TensorRT does not take a stage.
    """
    unknown = request.fp32_stages - {stage.name for stage in staged.stages}
    if unknown:
        raise ConfigError(
            "--fp32-stage names a stage that is not there",
            found=", ".join(sorted(unknown)),
            expected=", ".join(stage.name for stage in staged.stages),
        )
    target = request.out or bundle.default_path(staged.method, provenance)
    shipped.require_warm_starts(staged)
    with new_bundle(target) as root:
        run = _Run(root, model, staged, evidence, request, say)
        export = run.export(target, provenance)
    export.path = target
    return export


class _Run:
    """One export in its temporary directory."""

    def __init__(
        self, root: Path, model: AnomalyModel, staged: StagedModel, evidence: Evidence, request: Request, say: Say
    ):
        self._root = root
        self._model = model
        self._staged = staged
        self._evidence = evidence
        self._request = request
        self._say = say
        self._checks: list[Check] = []
        self._told_right: dict[str, tuple[int, int]] = {}
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def export(self, target: Path, provenance: bundle.Provenance) -> Export:
        graphs = self._graphs()
        manifest = self._fp32(target.name, provenance, graphs)
        self._say("stages against torch, on real frames")
        frames = _spread(self._evidence.labelled, STAGE_FRAMES)
        self._checks += verify.stage_parity(self._root, manifest, self._staged, frames)
        self._refuse_failures("mend the cut: the stage does not compute what its torch module does")
        full, threshold = self._program(manifest)
        self._lap("parity")
        reduced: dict[Variant, Reduced] = {}
        gate = self._gate_frames()
        others = Alternatives()
        if self._request.variants:
            reducer = Reducer(self._root, self._staged, graphs, self._evidence, self._request.fp32_stages, self._say)
            for variant in self._request.variants:
                manifest, reduced[variant] = reducer.add(manifest, variant, full, threshold)
                self._checks += reduced[variant].checks
                self._lap(variant)
        self._checks += trtcheck.checks(self._root, manifest)
        self._refuse_failures("give --fp32-stage for the stage at fault, or leave the variant out")
        if self._request.variants:
            good = _spread(self._evidence.good, max(alternatives.GOOD_FRAMES, len(self._staged.classes)))
            frames = self._evidence.labelled.select(gate)
            others = alternatives.judge(self._root, manifest, reducer.rounded, good, frames, self._say)
            self._lap("alternative programs")
        labelled = self._evidence.labelled
        shipped.write_golden(self._root, self._staged, _spread(labelled, max(GOLDEN_FRAMES, len(self._staged.classes))))
        shipped.write_gate(self._root, labelled, gate, full, threshold, others.reference)
        self._say("golden and gate set on the files as they ship")
        self._checks += shipped.replay(self._root, manifest)
        self._refuse_failures(
            "leave the variant out, or give --fp32-stage for the stage at fault; where fp32 fails, mend the cut: "
            "andon verify would refuse this bundle"
        )
        kept: dict[str, Any] = {"holdout": list(provenance.holdout), "constants": list(provenance.constants)}
        if provenance.fingerprints:
            kept["fingerprints"] = dict(provenance.fingerprints)
        if provenance.parts:
            kept["parts"] = list(provenance.parts)
        if provenance.group_by:
            kept["group_by"] = provenance.group_by
        if provenance.pictures:
            kept["pictures"] = dict(provenance.pictures)
        report = self._report(manifest, reduced, threshold) | {"alternatives": others.record} | kept
        shutil.rmtree(self._root / ROUNDED, ignore_errors=True)
        manifest = bundle.finish(self._root, manifest, report, self._summary(manifest, reduced, others))
        self._lap("golden set and bundle")
        return Export(target, manifest, report, self._checks, self._seconds)

    def _graphs(self) -> dict[str, StageGraph]:
        graphs = {}
        seen = examples(self._staged, self._evidence.good.images[:1])
        for stage in self._staged.stages:
            self._say(f"stage {stage.name} to ONNX")
            graphs[stage.name] = export_stage(stage, *seen[stage.name])
        self._lap("onnx")
        return graphs

    def _fp32(self, name: str, provenance: bundle.Provenance, graphs: Mapping[str, StageGraph]) -> Manifest:
        stages: dict[str, Stage] = {}
        for stage in self._staged.stages:
            model = graphs[stage.name].model
            stages[stage.name] = bundle.describe_stage(
                stage, model, bundle.save_stage(self._root, stage.name, "fp32", model)
            )
        if self._staged.state:
            bundle.save_npz(self._root, bundle.STATE_FILE, self._staged.state)
        if self._staged.tables:
            bundle.save_npz(self._root, bundle.TABLE_FILE, self._staged.tables)
        return bundle.draft(self._staged, name, provenance, stages)

    def _program(self, manifest: Manifest) -> tuple[Scored, Array]:
        """FP32 engines on all frames; the torch model beside them on some."""
        evidence = self._evidence
        self._say(f"FP32 engines on {len(evidence.good)} good and {len(evidence.labelled)} labelled frames")
        good = verify.run_engines(self._root, manifest, "fp32", evidence.good)
        threshold = verify.thresholds(good.score, evidence.good.class_ids, len(self._staged.classes))
        told, self._told_right = verify.classifier(good, evidence.good, self._staged.classes)
        self._checks += told
        full = verify.run_engines(self._root, manifest, "fp32", evidence.labelled)
        self._say("the torch model beside them")
        chosen = _indices(evidence.labelled, max(MODEL_FRAMES, len(self._staged.classes)))
        some = evidence.labelled.select(chosen)
        torch_side = verify.reference(self._staged.whole or self._model.eval(), some)
        engine_side = Scored(full.score[chosen], full.map[chosen])
        self._checks += verify.model_parity(engine_side, torch_side, some, threshold)
        self._checks += verify.alternatives_parity(self._root, manifest, self._staged, _ends(some))
        self._refuse_failures("mend the cut: the program does not compute what the torch model does")
        return full, threshold

    def _refuse_failures(self, next_step: str) -> None:
        if not verify.passed(self._checks):
            raise GateError(self._checks, next_step)

    def _gate_frames(self) -> list[int]:
        """Which labelled frames travel along."""
        labelled = self._evidence.labelled
        least = max(GOLDEN_FRAMES, len(self._staged.classes))
        return _indices(labelled, max(least, min(GATE_FRAMES, GATE_BYTES // labelled.images[0].nbytes)))

    def _report(self, manifest: Manifest, reduced: Mapping[Variant, Reduced], threshold: Array) -> dict[str, Any]:
        evidence = self._evidence
        return {
            "method": self._staged.method,
            "evidence": {
                "good": {"frames": len(evidence.good), "source": evidence.good.source},
                "labelled": {"frames": len(evidence.labelled), "source": evidence.labelled.source},
            },
            "checks": verify.record(self._checks),
            "thresholds": dict(zip(self._staged.classes, map(float, threshold), strict=True)),
            "gates": {variant: vars(verify.GATES[variant]) for variant in reduced},
            "variants": {variant: r.record() for variant, r in reduced.items()},
            "bytes": bundle.variant_bytes(self._root, manifest),
            "tensorrt": trtcheck.versions(),
        }

    def _summary(
        self, manifest: Manifest, reduced: Mapping[Variant, Reduced], others: Alternatives
    ) -> dict[str, object]:
        worst = {f"{c.subject}: {c.what}": float(c.value) for c in self._checks if c.subject.startswith("program")}
        return {
            "passed": True,
            "checks": len(self._checks),
            "program": worst,
            "bytes": bundle.variant_bytes(self._root, manifest),
            "fallbacks": {variant: dict(r.fallbacks) for variant, r in reduced.items()},
            "gated": others.gated,
            **({RECORD: self._told_right} if self._told_right else {}),
        }

    def _lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = round(now - self._started, 2)
        self._started = now


def _indices(frames: Frames, count: int) -> list[int]:
    """Indices of at most `count` frames, evenly from every (product, label), evenly spaced within it, in order.

    Products come first: each has constants of its own, which nothing has looked at where no frame is its.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(frames.class_ids.tolist(), frames.labels.tolist(), strict=True)):
        groups.setdefault(key, []).append(i)
    turns: dict[tuple[int, tuple[int, int]], list[int]] = {}
    products = sorted({product for product, _ in groups})
    for place, product in enumerate(products):
        labels = sorted(label for owner, label in groups if owner == product)
        for turn in range(len(labels)):  # good ones of this product and defective ones of the next, then the others
            key = (product, labels[(turn + place) % len(labels)])
            turns[turn, key] = groups[key]
    return sorted(thin({turn: turns[turn] for turn in sorted(turns)}, count))


def _spread(frames: Frames, count: int) -> Frames:
    return frames.select(_indices(frames, count))


def _ends(frames: Frames) -> Frames:
    """The first frame and the last, which are of two products where there are two."""
    return frames.select(sorted({0, len(frames) - 1}))
