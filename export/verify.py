"""What an export must prove before it ships (DESIGN.md 3): parity with torch, and unchanged decisions.

Scores come from the executor and the engine that the line uses, so what is verified is what is deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from ..runtime.agreement import LIMITS, difference, flipped, most_flips, retold, rms_difference
from ..runtime.bundle import Bundle
from ..runtime.classifier import RIGHT_PRODUCT, shown
from ..runtime.engine.onnxruntime import OnnxRuntimeBackend
from ..runtime.manifest import Loop, Manifest, Variant
from ..runtime.program import Program
from .frames import Frames
from .stage import StagedModel, Whole
from .walk import Array, Walk, programs, torch_call

#: Largest relative score difference between the torch model and the FP32 engines; the device's replay keeps the same
SCORE_PARITY = LIMITS["fp32"].score or 0.0
#: Share of map pixels that may differ more: where two codes of a vector quantiser are equally near, rounding picks one
#: (about one token in 300,000), and the map changes around it. Scores and verdicts have no such allowance.
MAP_OUTLIERS = 1e-3
#: Quantile of held-out good scores that decisions are compared at (METHODS.md 0.6)
QUANTILE = 0.995


@dataclass(frozen=True)
class Gate:
    """Limits of a reduced variant against FP32 (METHODS.md 6.3). score and map: of the RMS difference, over the RMS."""

    flips: float
    auroc_drop: float
    map_correlation: float
    rank_correlation: float
    score: float
    map: float


def _gate(variant: Variant, rank_correlation: float) -> Gate:
    """The limits that `andon verify` holds the device's engines to; ranks are compared at export only."""
    limits = LIMITS[variant]
    read = limits.read if limits.read is not None else limits.score
    return Gate(limits.flips, limits.auroc_drop, limits.correlation, rank_correlation, limits.score, read)


GATES: Mapping[Variant, Gate] = {"fp16": _gate("fp16", 0.995), "int8": _gate("int8", 0.98)}


@dataclass(frozen=True)
class Check:
    """One line of the verification table; `ok` says whether `value` keeps `limit`.

    required: whether the export is refused if not; else the line is a warning.
    """

    subject: str
    what: str
    value: float
    limit: str
    ok: bool
    note: str = ""
    required: bool = True

    @property
    def refused(self) -> bool:
        """Whether this is a reason to refuse the export."""
        return self.required and not self.ok


@dataclass(frozen=True)
class Scored:
    """Scores [n] and maps [n, h, w] of a set of frames; logits [n, classes] where the program tells the product."""

    score: Array
    map: Array
    logits: Array | None = None


# -- the deployed side -------------------------------------------------------------------------------------------------


def run_engines(
    root: Path,
    manifest: Manifest,
    variant: Variant,
    frames: Frames,
    program: str = "default",
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """Judge frames with the executor and onnxruntime, each from the shipped state."""
    bundle = Bundle(root, root, manifest, digest="")
    with OnnxRuntimeBackend() as backend, Program(bundle, backend, variant, program) as executor:
        scores, maps, logits = [], [], []
        for image, class_id in zip(frames.images, frames.class_ids, strict=True):
            executor.reset()
            executor.frame[...] = image
            result = executor.run(int(class_id))
            scores.append(result.score)
            maps.append(np.array(result.map))
            if result.logits is not None:
                logits.append(np.array(result.logits))
            if progress is not None:
                progress(1)
    return Scored(np.array(scores), np.stack(maps), np.stack(logits) if logits else None)


def thresholds(scores: Array, class_ids: Array, classes: int) -> Array:
    """Per class, the QUANTILE of held-out good scores: float64 [classes]."""
    return np.array([np.quantile(scores[class_ids == c], QUANTILE) for c in range(classes)])


# -- parity with torch -------------------------------------------------------------------------------------------------


def stage_parity(root: Path, manifest: Manifest, staged: StagedModel, frames: Frames) -> list[Check]:
    """Every stage's FP32 file against its torch module, on the inputs that real frames give it.

    Of a loop the first and the last step of each frame are compared.
    """
    sessions = {name: _session(root / stage.files["fp32"]) for name, stage in manifest.stages.items()}
    worst: dict[tuple[str, str], float] = {
        (stage.name, output): -1.0 for stage in staged.stages for output in stage.outputs
    }
    last = {s.loop: s.count - 1 for steps in programs(staged).values() for s in steps if isinstance(s, Loop)}

    def compare(stage: str, step: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        if step not in (0, last.get(stage, 0)):
            return
        values = sessions[stage].run(list(outputs), dict(inputs))
        for (name, reference), value in zip(outputs.items(), values, strict=True):
            worst[stage, name] = max(worst[stage, name], difference(value, reference))

    for program in programs(staged):
        walk = Walk(staged, torch_call(staged), program, trace=compare)
        for image, class_id in zip(frames.images, frames.class_ids, strict=True):
            walk.reset()
            walk.frame(image[None], int(class_id))
    return [
        Check(f"{s.name}.{o}", "torch parity", worst[s.name, o], f"<= {s.tolerance:g}", worst[s.name, o] <= s.tolerance)
        for s in staged.stages
        for o in s.outputs
        if worst[s.name, o] >= 0  # a loop of 0 steps in every program never runs
    ]


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def reference(model: Whole, frames: Frames) -> Scored:
    """The torch model's own scores, image by image."""
    scores, maps = [], []
    with torch.no_grad():
        for image, class_id in zip(frames.images, frames.class_ids, strict=True):
            result = model(torch.from_numpy(image[None]), torch.tensor([int(class_id)]))
            scores.append(float(result.score[0]))
            maps.append(result.map[0].float().numpy())
    return Scored(np.array(scores), np.stack(maps))


def model_parity(engine: Scored, torch_model: Scored, frames: Frames, threshold: Array) -> list[Check]:
    """The whole program on FP32 engines against the torch model."""
    scale = np.maximum(np.abs(torch_model.score), 1e-6)
    worst = float(np.max(np.abs(engine.score - torch_model.score) / scale))
    worst = worst if np.isfinite(worst) else float("inf")
    flips = int(np.sum(flipped("fp32", engine.score, torch_model.score, threshold[frames.class_ids])))
    where = f"{len(frames)} frames: {frames.source}"
    checks = [
        Check("program fp32", "score, relative to torch", worst, f"< {SCORE_PARITY:g}", worst < SCORE_PARITY, where),
        Check("program fp32", "verdict flips to torch", flips, "0", flips == 0, where),
    ]
    if engine.map.shape == torch_model.map.shape:
        apart = np.abs(engine.map - torch_model.map) / max(float(np.abs(torch_model.map).max()), 1e-12)
        error = float(np.quantile(np.nan_to_num(apart, nan=np.inf), 1 - MAP_OUTLIERS))
        name = f"map, relative to torch, {1 - MAP_OUTLIERS:.1%} of pixels"
        checks.append(Check("program fp32", name, error, f"< {SCORE_PARITY:g}", error < SCORE_PARITY))
    return checks


def alternatives_parity(root: Path, manifest: Manifest, staged: StagedModel, frames: Frames) -> list[Check]:
    """The alternative programs on FP32 engines against their walk in torch."""
    checks = []
    for program in staged.alternatives:
        engine = run_engines(root, manifest, "fp32", frames, program)
        walk = Walk(staged, torch_call(staged), program)
        scores = []
        for image, class_id in zip(frames.images, frames.class_ids, strict=True):
            walk.reset()
            scores.append(float(walk.frame(image[None], int(class_id))[staged.outputs.score][0]))
        error = difference(engine.score, np.array(scores))
        checks.append(
            Check(f"program {program}", "score, relative to torch", error, f"< {SCORE_PARITY:g}", error < SCORE_PARITY)
        )
    return checks


# -- decisions of a reduced variant ------------------------------------------------------------------------------------


def auroc(scores: Array, frames: Frames) -> dict[int, float]:
    """Image AUROC per class that has both labels."""
    out = {}
    for c in np.unique(frames.class_ids):
        mine = frames.class_ids == c
        if len(np.unique(frames.labels[mine])) == 2 and np.isfinite(scores[mine]).all():
            out[int(c)] = float(roc_auc_score(frames.labels[mine], scores[mine]))
    return out


def decisions(
    variant: Variant, reduced: Scored, full: Scored, frames: Frames, threshold: Array, classes: Sequence[str]
) -> list[Check]:
    """The decision gate: `reduced` against `full` (FP32 engines) at the FP32 thresholds."""
    gate = GATES[variant]
    subject = f"program {variant}"
    finite = bool(np.isfinite(reduced.score).all() and np.isfinite(reduced.map).all())
    checks = [Check(subject, "finite", float(finite), "1", finite)]
    if not finite:
        return checks
    flips = int(np.sum(flipped(variant, reduced.score, full.score, threshold[frames.class_ids])))
    share = flips / len(frames)
    note = f"{flips} of {len(frames)}; {frames.source}"
    checks.append(Check(subject, "verdict flips", share, f"<= {gate.flips:g}", share <= gate.flips, note))
    before, after = auroc(full.score, frames), auroc(reduced.score, frames)
    for c, value in before.items():
        drop = value - after[c]
        # On a small set one pair in another order is more than the limit; one pair is not a loss that can be measured.
        allowed = max(gate.auroc_drop, 1.001 / _pairs(frames, c))
        note = f"{classes[c]}: {value:.4f} to {after[c]:.4f}"
        checks.append(Check(subject, "AUROC drop", drop, f"<= {allowed:.2g}", drop <= allowed, note))
    for what, value, least in (
        ("map correlation", _correlation(reduced.map, full.map), gate.map_correlation),
        ("score rank correlation", _rank_correlation(reduced.score, full.score), gate.rank_correlation),
    ):
        checks.append(Check(subject, what, value, f">= {least:g}", value >= least))
    for what, value, most in (
        ("score, RMS difference", rms_difference(reduced.score, full.score), gate.score),
        ("map, RMS difference", rms_difference(reduced.map, full.map), gate.map),
    ):
        checks.append(Check(subject, what, value, f"<= {most:g}", value <= most))
    if full.logits is not None and reduced.logits is not None:
        share = float(np.mean(retold(variant, reduced.logits, full.logits)))
        most = most_flips(variant, len(frames))
        checks.append(Check(subject, "other products told", share, f"<= {most:.2g}", share <= most))
    return checks


def flips_as_shipped(
    variant: Variant, shipped: Scored, full: Scored, frames: Frames, threshold: Array, of: int, note: str = ""
) -> Check:
    """The files as the line's engine runs them: they may change as many verdicts as the gate allows `of` frames."""
    flips = int(np.sum(flipped(variant, shipped.score, full.score, threshold[frames.class_ids])))
    allowed = int(np.ceil(GATES[variant].flips * of))
    return Check(f"program {variant}", "flips, files as shipped", flips, f"<= {allowed}", flips <= allowed, note)


def classifier(good: Scored, frames: Frames, classes: Sequence[str]) -> tuple[list[Check], dict[str, tuple[int, int]]]:
    """How many held-out good frames the product classifier tells right (METHODS.md 1.3): a line of the table that is no
    reason to refuse, as most lines name their product, and the counts by product for the manifest.

    Both empty where the program has no classifier, or there is only one product.
    """
    if good.logits is None or len(classes) < 2:
        return [], {}
    right = good.logits.argmax(1) == frames.class_ids
    groups = {product: right[frames.class_ids == i] for i, product in enumerate(classes)}
    counts = {product: (int(of.sum()), len(of)) for product, of in groups.items()}
    least = min(told / of for told, of in counts.values())
    note = f"held-out good frames: {shown(counts)}"
    limit, ok = f">= {RIGHT_PRODUCT:g}", least >= RIGHT_PRODUCT
    return [Check("classifier", "right product, least share", least, limit, ok, note, required=False)], counts


def _pairs(frames: Frames, c: int) -> int:
    """Pairs of a good and a defective frame of a class: the steps that its AUROC is made of."""
    labels = frames.labels[frames.class_ids == c]
    return int((labels == 0).sum()) * int((labels == 1).sum())


def _correlation(a: Array, b: Array) -> float:
    """Pearson correlation over all pixels of all maps; 1 where both are constant and equal."""
    x, y = a.ravel() - a.mean(), b.ravel() - b.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0 else float(np.allclose(a, b))


def _rank_correlation(a: Array, b: Array) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float(np.allclose(a, b, rtol=1e-2))
    return float(spearmanr(a, b).statistic)


def distance(reduced: Scored, full: Scored) -> float:
    """How far a variant's scores are from FP32, relative to their spread: what a fall-back has to mend."""
    if not np.isfinite(reduced.score).all():
        return float("inf")
    return float(np.mean(np.abs(reduced.score - full.score)) / max(float(full.score.std()), 1e-12))


def passed(checks: Sequence[Check]) -> bool:
    """True if every check holds that has to."""
    return not any(check.refused for check in checks)


def table(checks: Sequence[Check]) -> str:
    """The verification table, for people."""
    rows = [("", "check", "value", "limit", "note")]
    rows += [(_mark(c), f"{c.subject}: {c.what}", f"{c.value:.3g}", c.limit, c.note) for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ("  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _mark(check: Check) -> str:
    return "ok" if check.ok else "FAIL" if check.required else "warn"


def record(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For report.json. A value that is not finite is written as text."""
    found = [asdict(c) | ({} if np.isfinite(c.value) else {"value": str(c.value)}) for c in checks]
    return [{key: value for key, value in each.items() if (key, value) != ("required", True)} for each in found]
