"""Reduced-precision variants of a bundle: stage files, the decision gate, per-stage fall-back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.manifest import Manifest, Stage, Variant
from . import bundle, verify
from .frames import Evidence
from .onnx import StageGraph
from .precision import Fp16Graph, keep_fp32, simulate, to_fp16
from .quantize import BETWEEN, int8_errors, quantisable, to_int8
from .ranges import RangeReport, measure
from .sensitivity import followers, fp16_errors, root_sum_square, select
from .stage import StageDef, StagedModel
from .storage import fp16_storage_error, int8_storage_errors, short_names, storable, store_fp16
from .verify import Check, Scored
from .walk import Array, Walk, torch_call

#: Good frames run for range analysis and INT8 calibration, and calls of one stage kept of them
CALIBRATION_FRAMES = 32
SAMPLES = 64
#: Frames next to the threshold that candidates for a fall-back are ranked on
RANKING_FRAMES = 24
#: Error that narrow products may cost a stage's outputs (relative RMS), loosest first; None: whatever it is
BUDGETS: Mapping[Variant, tuple[float | None, ...]] = {
    "fp16": (None, 0.004, 0.0015),
    "int8": (0.08, 0.056, 0.04, 0.028, 0.02),
}
#: The same for a stage of an INT8 variant whose weights are stored as INT8 and that computes nothing so: activations
#: cost most of what INT8 costs, weights weigh most
STORED_BUDGET = 0.028
#: Calls of a stage that the error is measured on
SENSITIVITY_CALLS = 4
#: Where the graphs that round on the CPU as a GPU does lie while the bundle is built
ROUNDED = "rounded"


@dataclass
class Reduced:
    """What became of a variant. fallbacks: stage -> why it uses a wider file. tried: each gate verdict on the way."""

    checks: list[Check] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, Fp16Graph] = field(default_factory=dict)
    ranges: dict[str, RangeReport] = field(default_factory=dict)
    quantised: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    widened: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def replace(self, stage: str, other: Reduced) -> None:
        """Take over what another one knows of a stage's narrow products and constants, which may be nothing."""
        for kind in ("quantised", "stored", "graphs"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            mine.pop(stage, None)
            mine |= {name: found for name, found in theirs.items() if name == stage}

    def record(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "fallbacks": self.fallbacks,
            "fp32_nodes": {name: dict(g.fp32) for name, g in self.graphs.items()},
            "clipped_constants": {name: list(g.clipped) for name, g in self.graphs.items() if g.clipped},
            "ranges": {name: r.record() for name, r in self.ranges.items()},
            "quantised": _written(self.quantised),
            "stored": _written(self.stored),
            "widened": _written(self.widened),
            "tried": self.tried,
        }


@dataclass(frozen=True)
class _Wider:
    """A stage's entry with a wider file. reduced: what was found out while it was made; None if the file was there."""

    stage: str
    entry: Stage
    what: str
    reduced: Reduced | None = None


class Reducer:
    """Adds variants to a bundle under construction; range analysis and calibration inputs are shared by them."""

    def __init__(
        self,
        root: Path,
        staged: StagedModel,
        graphs: Mapping[str, StageGraph],
        evidence: Evidence,
        fp32_stages: frozenset[str],
        say: Callable[[str], None],
    ):
        self._root = root
        self._staged = staged
        self._graphs = graphs
        self._evidence = evidence
        self._fp32_stages = fp32_stages
        self._say = say
        self._samples = self._record()
        self._ranges = {name: measure(graphs[name].model, calls) for name, calls in self._samples.items()}
        self._errors: dict[str, dict[str, float]] = {}
        self._storage_errors: dict[str, dict[str, float]] = {}
        self._fp16_errors: dict[str, dict[str, float]] = {}

    def _record(self) -> dict[str, list[dict[str, Array]]]:
        """Stage inputs on good frames; of more calls than SAMPLES (loops) an even choice."""
        self._say("ranges of all tensors on good frames")
        calls: dict[str, list[dict[str, Array]]] = {stage.name: [] for stage in self._staged.stages}

        def keep(stage: str, step: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
            calls[stage].append({name: np.array(array) for name, array in inputs.items()})

        walk = Walk(self._staged, torch_call(self._staged), trace=keep)
        good = self._evidence.good
        for i in np.unique(np.linspace(0, len(good) - 1, min(CALIBRATION_FRAMES, len(good))).astype(int)):
            walk.reset()
            walk.frame(good.images[i : i + 1], int(good.class_ids[i]))
            for name, kept in calls.items():
                if len(kept) > 4 * SAMPLES:
                    calls[name] = kept[::2]
        return {name: kept[:: -(-len(kept) // SAMPLES)] for name, kept in calls.items() if kept}

    def add(self, manifest: Manifest, variant: Variant, full: Scored, threshold: Array) -> tuple[Manifest, Reduced]:
        """Make the variant's files and let the gate judge them, widening stage by stage where it fails.

        Ever smaller error budgets are tried first: fewer products of a stage are narrow.
        Returns the manifest with the variant, and what happened; its checks may fail even with all fall-backs.
        """
        reduced = Reduced(ranges=dict(self._ranges))
        for budget in BUDGETS[variant]:
            self._say(f"{variant}: converting" + (f", error budget {budget:g} a stage" if budget else ""))
            stages = dict(manifest.stages)
            for stage in self._staged.stages:
                stages[stage.name] = self._convert(stage, stages[stage.name], variant, budget, reduced)
            made = manifest.model_copy(update={"stages": stages, "variants": (*manifest.variants, variant)})
            if self._gate(made, variant, budget, full, threshold, reduced):
                return made, reduced
        return self._fall_back(made, variant, full, threshold, reduced), reduced

    def _gate(
        self,
        manifest: Manifest,
        variant: Variant,
        budget: float | None,
        full: Scored,
        threshold: Array,
        reduced: Reduced,
    ) -> bool:
        self._say(f"{variant}: decisions on {len(self._evidence.labelled)} frames")
        reduced.checks = self._judge(manifest, variant, full, threshold)
        attempt = {"budget": budget, "fallbacks": sorted(reduced.fallbacks), "checks": verify.record(reduced.checks)}
        reduced.tried.append(attempt)
        return verify.passed(reduced.checks)

    def _fall_back(
        self, manifest: Manifest, variant: Variant, full: Scored, threshold: Array, reduced: Reduced
    ) -> Manifest:
        """Widen stage by stage, always the one that mends most, until the gate passes or nothing is left to widen."""
        while True:
            wider = self._widest_gain(manifest, variant, full, threshold, reduced)
            if wider is None:
                break
            reason = f"the decision gate failed in {variant}: " + ", ".join(
                f"{c.what} {c.value:.3g} (limit {c.limit})" for c in reduced.checks if not c.ok
            )
            self._say(f"{variant}: stage {wider.stage} falls back to {wider.what}")
            reduced.fallbacks[wider.stage] = reason
            reduced.replace(wider.stage, wider.reduced or Reduced())
            manifest = _with_entry(manifest, wider, variant, reason)
            if self._gate(manifest, variant, None, full, threshold, reduced):
                break
        return manifest

    def _convert(
        self,
        stage: StageDef,
        entry: Stage,
        variant: Variant,
        budget: float | None,
        reduced: Reduced,
        stored_only: bool = False,
    ) -> Stage:
        """The stage's entry with a file of this variant, which may be a wider one by design.

        stored_only: INT8 is how weights are stored, nothing is computed in it.
        """
        graph = self._graphs[stage.name]
        ranges = self._ranges[stage.name].nodes if stage.name in self._ranges else {}
        keep = keep_fp32(graph.model, graph.islands, ranges)
        why = None
        if stage.name in self._fp32_stages:
            why = "kept in FP32 by request (--fp32-stage)"
        elif stage.name not in self._samples:
            why = "no program runs this stage, so its ranges are not known"
        if why:
            return _entry(entry, variant, entry.files["fp32"], len(graph.model.graph.node), why)
        chosen: list[str] = []
        stored: list[str] = []
        if "" in stage.fp32:
            why = "FP32 throughout by design (METHODS.md 6.1)"
        elif variant == "int8" and budget is not None:
            chosen = [] if stored_only else self._chosen(stage, keep, budget, reduced)
            stored = self._stored(stage.name, keep, chosen, budget, reduced)
        half = variant == "int8" and not chosen and not stored
        if variant == "fp16" and budget is not None and not why:
            keep |= self._widened(stage.name, keep, budget, reduced)
        if half and "fp16" in entry.files:
            why = entry.fallback.get("fp16") or "nothing to quantise here: FP16"
            return _entry(entry, variant, entry.files["fp16"], entry.fp32_nodes.get("fp16", 0), why)
        if variant == "fp16" or half:
            converted = to_fp16(graph.model, keep)
            name = "fp16"
            why = why or ("nothing to quantise here: FP16" if half else None)
        else:
            converted = to_int8(graph.model, keep, self._samples[stage.name], chosen, stored)
            name = "int8w" if stored_only else "int8"
        converted, small = self._small(stage.name, converted, budget, reduced)
        if "" in stage.fp32:
            if not small:
                return _entry(entry, variant, entry.files["fp32"], len(graph.model.graph.node), why)
            why = f"{why}; its large constants are stored as FP16"
        reduced.graphs[stage.name] = converted
        file = bundle.save_stage(self._root, stage.name, name, short_names(converted.model))
        rounded = self._root / ROUNDED / Path(file).name
        rounded.parent.mkdir(exist_ok=True)
        rounded.write_bytes(simulate(converted.model).SerializeToString())
        return _entry(entry, variant, file, len(converted.fp32), why)

    def _small(
        self, stage: str, converted: Fp16Graph, budget: float | None, reduced: Reduced
    ) -> tuple[Fp16Graph, bool]:
        """The graph with the constants of its FP32 nodes stored as FP16 if that keeps half the budget, and whether."""
        small = store_fp16(converted)
        if small is converted:
            return converted, False
        error = fp16_storage_error(converted, small, self._few(stage))
        taken = budget is None or error <= 0.5 * budget
        reduced.stored.setdefault(stage, {})["fp16"] = {"error": round(error, 7), "taken": taken}
        return (small, True) if taken else (converted, False)

    def _stored(
        self, stage: str, keep: Mapping[str, str], chosen: list[str], budget: float, reduced: Reduced
    ) -> list[str]:
        """Nodes that are not computed in INT8 but whose weights are stored so, within the error budget."""
        model = self._graphs[stage].model
        errors = self._storage_errors.setdefault(stage, {})
        candidates = storable(model, keep, chosen)
        unknown = [name for name in candidates if name not in errors]
        errors |= int8_storage_errors(model, unknown, self._few(stage)) if unknown else {}
        stored = select(model, {name: errors[name] for name in candidates}, budget)
        if candidates:
            reduced.stored.setdefault(stage, {})["int8"] = {
                "budget": budget,
                "nodes": len(stored),
                "of": len(candidates),
                "error": round(root_sum_square({name: errors[name] for name in stored}), 5),
            }
        return stored

    def _chosen(self, stage: StageDef, keep: Mapping[str, str], budget: float, reduced: Reduced) -> list[str]:
        """The products of a stage that INT8 takes within the error budget."""
        model = self._graphs[stage.name].model
        candidates = quantisable(model, keep) if stage.int8 else []
        if not candidates:
            return []
        if stage.name not in self._errors:
            some = self._few(stage.name)
            self._errors[stage.name] = int8_errors(model, candidates, self._ranges[stage.name].tensors, some)
        errors = self._errors[stage.name]
        chosen = select(model, errors, budget)
        reduced.quantised[stage.name] = {
            "budget": budget,
            "nodes": len(chosen),
            "of": len(candidates),
            "left_in_fp16": {name: round(errors[name], 5) for name in candidates if name not in chosen},
        }
        return chosen

    def _widened(self, stage: str, keep: Mapping[str, str], budget: float, reduced: Reduced) -> dict[str, str]:
        """Products that stay FP32 so that FP16 costs the stage no more than the budget, and what follows them."""
        model = self._graphs[stage].model
        if stage not in self._fp16_errors:
            self._fp16_errors[stage] = fp16_errors(model, keep, self._few(stage))
        errors = self._fp16_errors[stage]
        narrow = select(model, errors, budget)
        wide = {name: f"FP16 alone costs {errors[name]:.1e}" for name in errors if name not in narrow}
        reduced.widened[stage] = {"budget": budget, "error": root_sum_square(errors), "nodes": wide}
        return {**wide, **followers(model, {**keep, **wide}, BETWEEN)}

    def _few(self, stage: str) -> list[dict[str, Array]]:
        calls = self._samples[stage]
        return calls[:: max(1, len(calls) // SENSITIVITY_CALLS)][:SENSITIVITY_CALLS]

    def _judge(self, manifest: Manifest, variant: Variant, full: Scored, threshold: Array) -> list[Check]:
        """The gate on all labelled frames with GPU rounding, and the shipped files beside it on a few."""
        frames = self._evidence.labelled
        rounded = verify.run_engines(self._root, self.rounded(manifest, variant), variant, frames)
        checks = verify.decisions(variant, rounded, full, frames, threshold, self._staged.classes)
        few = np.argsort(np.abs(full.score - threshold[frames.class_ids]))[:RANKING_FRAMES]
        some, target = frames.select(few), Scored(full.score[few], full.map[few])
        shipped = verify.run_engines(self._root, manifest, variant, some)
        note = f"of the {len(few)} frames nearest to the threshold, run by onnxruntime as shipped"
        return [*checks, verify.flips_as_shipped(variant, shipped, target, some, threshold, len(frames), note)]

    def rounded(self, manifest: Manifest, variant: Variant) -> Manifest:
        """The manifest with files that round on the CPU as a GPU does, where the variant has any."""
        stages = {}
        for name, stage in manifest.stages.items():
            file = stage.files[variant]
            rounded = f"{ROUNDED}/{Path(file).name}"
            files = {**stage.files, variant: rounded if (self._root / rounded).is_file() else file}
            stages[name] = stage.model_copy(update={"files": files})
        return manifest.model_copy(update={"stages": stages})

    def _widest_gain(
        self, manifest: Manifest, variant: Variant, full: Scored, threshold: Array, reduced: Reduced
    ) -> _Wider | None:
        """The stage whose next wider file brings the scores near the threshold closest to FP32, or None."""
        frames = self._evidence.labelled
        near = np.argsort(np.abs(full.score - threshold[frames.class_ids]))[:RANKING_FRAMES]
        some, target = frames.select(near), Scored(full.score[near], full.map[near])
        best: tuple[float, _Wider] | None = None
        for stage in self._staged.stages:
            wider = self._wider(stage, manifest.stages[stage.name], variant, reduced)
            if wider is None:
                continue
            candidate = _with_entry(manifest, wider, variant, "candidate")
            rounded = self.rounded(candidate, variant)
            left = verify.distance(verify.run_engines(self._root, rounded, variant, some), target)
            if best is None or left < best[0]:
                best = (left, wider)
        return None if best is None else best[1]

    def _wider(self, stage: StageDef, entry: Stage, variant: Variant, reduced: Reduced) -> _Wider | None:
        """The next wider file of a stage: INT8 to INT8 weights, to FP16 (if that is made), to FP32; None from FP32."""
        now = entry.files[variant]
        if now == entry.files["fp32"]:
            return None
        if variant == "int8" and reduced.quantised.get(stage.name, {}).get("nodes"):
            made = Reduced()
            weights = self._convert(stage, entry, variant, STORED_BUDGET, made, stored_only=True)
            if made.stored.get(stage.name, {}).get("int8", {}).get("nodes"):
                return _Wider(stage.name, weights, "weights stored as INT8, computed in FP16", made)
        if (half := entry.files.get("fp16")) not in (None, now):
            return _Wider(stage.name, _entry(entry, variant, half, entry.fp32_nodes.get("fp16", 0), None), "FP16")
        nodes = len(self._graphs[stage.name].model.graph.node)
        return _Wider(stage.name, _entry(entry, variant, entry.files["fp32"], nodes, None), "FP32")


def _written(value: Any) -> Any:
    """For JSON, which has no number that is not finite: those are written as text, here and in verify.record."""
    if isinstance(value, dict):
        return {key: _written(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _entry(entry: Stage, variant: Variant, file: str, fp32_nodes: int, why: str | None) -> Stage:
    return entry.model_copy(
        update={
            "files": {**entry.files, variant: file},
            "fp32_nodes": {**entry.fp32_nodes, variant: fp32_nodes},
            "fallback": {**entry.fallback, **({variant: why} if why else {})},
        }
    )


def _with_entry(manifest: Manifest, wider: _Wider, variant: Variant, why: str) -> Manifest:
    entry = wider.entry.model_copy(update={"fallback": {**wider.entry.fallback, variant: why}})
    return manifest.model_copy(update={"stages": {**manifest.stages, wider.stage: entry}})
