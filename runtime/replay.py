"""Replays what a bundle proved at export on the engines of this machine (`andon verify`, DESIGN.md 3).

golden/golden.npz: frames uint8 [n, h, w, 3], class_ids int32 [n], score [n], map [n, 1, h, w] and every
``<stage>.<output>`` [n, ...] as torch gave them; each frame starts from the shipped state.
golden/warm.npz: of a program that carries something from frame to frame: score [WARM_ROUNDS n] of the golden frames one
after the other, all of them WARM_ROUNDS times, without a reset between them, and ``state.<name>`` [...] after the last.
golden/gate.npz: what export's decision gate judged by: frames, class_ids, labels int32 [n] (1 defective, 0 good, -1
unknown), score [n] of the FP32 engines and threshold [classes]; logits [n, classes] of a product classifier; of an
alternative score.<program> and threshold.<program>. An enrolled bundle has it of views of the given images, without
defects and alternatives (enrolment/shipped.py).

agreement.py says how near is near enough.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .agreement import (
    LIMITS,
    LOOP,
    Array,
    Rms,
    auroc_drop,
    correlation,
    difference,
    flipped,
    most_flips,
    retold,
    rms_difference,
)
from .bundle import Bundle, read_npz
from .bundlefiles import MAX_FILE_BYTES, inside
from .errors import BundleError
from .manifest import Loop, Manifest, Variant
from .manifest import Step as AnyStep
from .program import Program

Step = Callable[[int], object]
GOLDEN = "golden/golden.npz"
WARM = "golden/warm.npz"
GATE = "golden/gate.npz"
#: So that every product's frames come again, and find what the program carried.
WARM_ROUNDS = 2


@dataclass(frozen=True)
class Check:
    """One line of the verification: `ok` says whether `value` keeps `limit` (None: reported, not limited)."""

    subject: str
    what: str
    value: float
    limit: float | None
    ok: bool


def golden_size(bundle: Bundle, name: str = GOLDEN, of: str = "score") -> int:
    """Number of frames in a golden, warm or gate set, or of those that it has `of`; 0 if the bundle has none."""
    found = _optional(bundle, name, of) if name in bundle.manifest.files else None
    return 0 if found is None else len(found)


def golden_frames(bundle: Bundle) -> tuple[Array, Array]:
    """The golden set's frames [n, h, w, 3] and class indices [n].

    Raises:
        BundleError: the bundle has no golden set.
    """
    data = _read(bundle, GOLDEN, ("frames", "class_ids"))
    return data["frames"], data["class_ids"]


# -- the golden set ----------------------------------------------------------------------------------------------------


def replay_golden(program: Program, step: Step | None = None, *, most: int | None = None) -> list[Check]:
    """Every stage output, map and score of the golden set against the recorded ones, and what follows from them: the
    verdicts at the bundle's thresholds, and the products that a classifier tells.

    Args:
        most: only so many frames, spread over the set; None: all of them.

    Raises:
        BundleError: the bundle has no golden set, or its shapes are not the program's.
        EngineError: a stage failed.
    """
    data = _read(program.bundle, GOLDEN)
    golden = _Golden(program, data)
    for i in _spread(len(data["frames"]), most):
        golden.add(i, *_judge(program, data["frames"][i], int(data["class_ids"][i])))
        if step is not None:
            step(1)
    return golden.checks()


class _Golden:
    """The golden frames judged so far, beside what was recorded of them."""

    def __init__(self, program: Program, data: dict[str, Array]):
        manifest = program.bundle.manifest
        self._program, self._data = program, data
        self._limits = LIMITS[program.variant]
        self._outputs = {name: _steps(manifest, name) for name in data if "." in name}
        self._worst = dict.fromkeys(self._outputs, 0.0)
        read = ["map", *(n for n in _read_outputs(manifest) if n in data and data[n].dtype.kind == "f")]
        self._rms = {name: Rms(data[name]) for name in read if self._limits.read is not None}
        self._indices = {n for n in _read_outputs(manifest) if n in data and data[n].dtype.kind != "f"}
        self._logits: list[Array] = []
        self._scores: list[float] = []
        self._frames: list[int] = []
        self._maps: list[Array] = []
        self._relative = 0.0

    def add(self, i: int, score: float, found: Array) -> None:
        """Frame i gave this score and map."""
        data, logits = self._data, self._program.bundle.manifest.outputs.logits
        self._frames.append(i)
        self._scores.append(score)
        for name in self._outputs:
            value = self._program.read(name)
            self._worst[name] = max(self._worst[name], difference(value, data[name][i]))
            if name in self._rms:
                self._rms[name].add(value, data[name][i])
            if name == logits:
                self._logits.append(np.array(value).reshape(-1))
        if "map" in self._rms:
            self._rms["map"].add(found, data["map"][i].reshape(found.shape))
        error = abs(score - float(data["score"][i])) / max(abs(float(data["score"][i])), 1e-12)
        self._relative = float(np.maximum(self._relative, error))  # unlike max(), keeps what is not a number
        self._maps.append(np.array(found))

    def checks(self) -> list[Check]:
        """What came of it."""
        limits, found = self._limits, []
        for name, value in self._worst.items():
            steps = self._outputs[name]
            if self._data[name].dtype.kind == "f":
                allowed = limits.output if limits.output is None or steps == 1 else min(steps * limits.output, LOOP)
                found.append(_upper(name, "largest relative difference", value, allowed))
            else:  # an index may fall the other way on a near tie
                limited = limits.output is not None or name in self._indices
                found.append(_upper(name, "share of other values", value, limits.index if limited else None))
        found += [_upper(name, "RMS difference", rms.value, limits.read) for name, rms in self._rms.items()]
        found.append(self._score())
        # Of all maps together, as in export's gate: where nothing stands out, a map alone may have .93 in INT8.
        alike, least = correlation(np.stack(self._maps), self._recorded("map").reshape(-1)), limits.correlation
        found.append(Check("map", "correlation", alike, least, alike >= least))
        return found + self._decisions()

    def _recorded(self, name: str) -> Array:
        return self._data[name][self._frames]

    def _score(self) -> Check:
        if self._program.variant == "fp32":
            return _upper("score", "largest relative difference", self._relative, self._limits.score)
        rms = Rms(self._data["score"])
        rms.add(np.array(self._scores), self._recorded("score"))
        return _upper("score", "RMS difference", rms.value, self._limits.score)

    def _decisions(self) -> list[Check]:
        """Of frames whose product has a threshold, and of a classifier."""
        variant, bundle = self._program.variant, self._program.bundle
        ids = self._recorded("class_ids")
        classes, program = bundle.manifest.classes, self._program.name
        sets = {"verdicts": [bundle.threshold(name, program) for name in classes]}
        for camera in bundle.manifest.camera_thresholds:
            sets[f"verdicts at {camera}"] = [bundle.own_threshold(name, program, camera) for name in classes]
        found = []
        for subject, entries in sets.items():
            threshold = np.array([np.nan if entry is None else entry.value for entry in entries])[ids]
            known = np.isfinite(threshold)
            if known.any():
                scores, recorded = np.array(self._scores)[known], self._recorded("score")[known]
                flips = float(np.mean(flipped(variant, scores, recorded, threshold[known])))
                found.append(_upper(subject, "share of flips", flips, most_flips(variant, int(known.sum()))))
        if self._logits:
            recorded = self._recorded(bundle.manifest.outputs.logits or "").reshape(len(self._frames), -1)
            found.append(_products(self._program, np.stack(self._logits), recorded))
        return found


def _read_outputs(manifest: Manifest) -> list[str]:
    """Stage outputs that the runtime reads beside score and map."""
    outputs, memory = manifest.outputs, manifest.memory
    of_memory = []
    if memory:
        of_memory = [memory.candidates, memory.patch_score, memory.transport, memory.nearest, memory.anchor]
    return list(dict.fromkeys(n for n in (outputs.logits, *of_memory, *outputs.telemetry.values()) if n))


def _steps(manifest: Manifest, output: str) -> int:
    """How often the default program calls the stage of an output: its errors may add up over so many steps."""
    stage = output.partition(".")[0]
    return max((s.count for s in manifest.program if isinstance(s, Loop) and s.loop == stage), default=1) or 1


def _spread(count: int, most: int | None) -> list[int]:
    """Indices of at most `most` of `count` frames, the first and the last among them."""
    if most is None or most >= count:
        return list(range(count))
    return sorted({round(float(i)) for i in np.linspace(0, count - 1, most)})


def replay_finite(program: Program, most: int) -> list[Check]:
    """Whether score and map are numbers, where there is nothing to compare with: other programs than the default, and
    bundles without a golden set, for which a grey frame of each product is judged.

    Raises:
        EngineError: a stage failed.
    """
    bundle = program.bundle
    if golden_size(bundle):
        frames, ids = golden_frames(bundle)
        chosen = [(frames[i], int(ids[i])) for i in _spread(len(ids), most)]
    else:
        chosen = [(np.full_like(program.frame, 128), i) for i in range(len(bundle.manifest.classes))]
    bad = 0
    for frame, class_id in chosen:
        score, found = _judge(program, frame, class_id)
        bad += not (np.isfinite(score) and np.isfinite(found).all())
    return [Check("score and map", "frames without a number", bad, 0, bad == 0)]


# -- what is carried from frame to frame -------------------------------------------------------------------------------


def carries(program: Sequence[AnyStep]) -> bool:
    """Whether a program carries anything from frame to frame."""
    return any(isinstance(step, Loop) and (step.persist or step.counter) for step in program)


def carried_states(program: Sequence[AnyStep]) -> list[str]:
    """The states that it carries things in."""
    return [state for step in program if isinstance(step, Loop) for state in step.persist.values()]


def warm_order(frames: int) -> Iterator[int]:
    """Indices of the golden frames in the order in which they are judged without a reset."""
    for _ in range(WARM_ROUNDS):
        yield from range(frames)


def play_warm(program: Program, frames: Array, class_ids: Array, step: Step | None = None) -> dict[str, Array]:
    """Judge golden frames one after the other: the arrays of the warm set, as these engines give them.

    Raises:
        EngineError: a stage failed.
    """
    manifest, scores = program.bundle.manifest, []
    program.reset()
    for i in warm_order(len(frames)):
        np.copyto(program.frame, frames[i])
        scores.append(program.run(int(class_ids[i])).score)
        if step is not None:
            step(1)
    found = {"score": np.array(scores, np.float32)}
    for name in carried_states(manifest.program):
        rows = range(len(manifest.classes)) if manifest.state[name].class_bound else None
        values = [program.read_state(name, row) for row in rows] if rows else program.read_state(name)
        found[f"state.{name}"] = np.asarray(values)
    program.reset()
    return found


def replay_warm(program: Program, step: Step | None = None) -> list[Check]:
    """Scores of frames that find what those before them left, and what the last one leaves.

    Raises:
        BundleError: the bundle has no warm set, or it is not the program's.
        EngineError: a stage failed.
    """
    bundle, limits = program.bundle, LIMITS[program.variant]
    recorded = _read(bundle, WARM)
    found = play_warm(program, *golden_frames(bundle), step)
    if {*found} != {*recorded} or any(found[name].shape != recorded[name].shape for name in found):
        raise BundleError(
            f"{WARM} is not of this program",
            found=", ".join(sorted(recorded)),
            expected=", ".join(f"{name}{list(found[name].shape)}" for name in sorted(found)),
            next_step="export the bundle again: andon export --method METHOD",
        )
    checks = []
    for name, value in found.items():
        limit = limits.score if name == "score" else limits.carried
        checks.append(_upper(f"warm {name}", "RMS difference", rms_difference(value, recorded[name]), limit))
    return checks


# -- the gate set ------------------------------------------------------------------------------------------------------


def gate_programs(bundle: Bundle, variant: Variant) -> list[str]:
    """The programs that the gate set can be replayed with: the default, and alternatives that kept export's gate."""
    if variant == "fp32" or not golden_size(bundle, GATE):
        return ["default"]
    known = _read(bundle, GATE)
    manifest = bundle.manifest
    return [
        "default",
        *(p for p in manifest.alternatives if f"score.{p}" in known and manifest.gated(variant, p)),
    ]


def gate_lacks(bundle: Bundle) -> list[str]:
    """What a gate set cannot show: without defects there is no AUROC to keep, far from a threshold nothing flips."""
    data, found = _read(bundle, GATE, ("labels", "score", "threshold", "class_ids")), []
    if not (data["labels"] == 1).any():
        found.append(
            "whether defects still stand out (the gate set has none that is known, as one from `andon enroll`)"
        )
    over = data["score"] > data["threshold"][data["class_ids"]]
    if over.all() or not over.any():
        side = "above" if over.all() else "below"
        found.append(f"verdicts of both kinds (all scores of the gate set lie {side} their threshold)")
    return found


def replay_gate(program: Program, step: Step | None = None) -> list[Check]:
    """The decisions of export's gate: share of flips, of products that a classifier tells otherwise (where the set has
    its logits), and the drop of AUROC per product where labels are known.

    Raises:
        BundleError: the bundle has no gate set.
        EngineError: a stage failed.
    """
    bundle, limits = program.bundle, LIMITS[program.variant]
    other = "" if program.name == "default" else f".{program.name}"
    data = _read(bundle, GATE, ("frames", "class_ids", "labels", f"score{other}", f"threshold{other}"))
    full, classifier = data[f"score{other}"], bundle.manifest.outputs.logits
    told = None if other or classifier is None else _optional(bundle, GATE, "logits")
    scores, logits = np.empty(len(full)), []
    for i, (frame, class_id) in enumerate(zip(data["frames"], data["class_ids"], strict=True)):
        scores[i] = _judge(program, frame, int(class_id))[0]
        if told is not None and classifier is not None:
            logits.append(np.array(program.read(classifier)).reshape(-1))
        if step is not None:
            step(1)
    threshold = data[f"threshold{other}"][data["class_ids"]]
    flips = float(np.mean(flipped(program.variant, scores, full, threshold)))
    of = f"{program.name}: " if other else ""
    checks = [_upper(f"{of}decisions", "share of flips", flips, most_flips(program.variant, len(scores)))]
    if told is not None:
        checks.append(_products(program, np.stack(logits), told))
    for index, product in enumerate(bundle.manifest.classes):
        mine = (data["class_ids"] == index) & (data["labels"] >= 0) & np.isfinite(scores)
        drop = auroc_drop(full[mine], scores[mine], data["labels"][mine] == 1)
        if drop is not None:
            checks.append(_upper(f"{of}{product}", "AUROC drop", drop[0], limits.auroc_drop + 2 * drop[1]))
    return checks


def _products(program: Program, logits: Array, recorded: Array) -> Check:
    share = float(np.mean(retold(program.variant, logits, recorded)))
    return _upper("products told", "share of others", share, most_flips(program.variant, len(logits)))


def _judge(program: Program, frame: Array, class_id: int) -> tuple[float, Array]:
    program.reset()
    np.copyto(program.frame, frame)
    result = program.run(class_id)
    return result.score, result.map


def _upper(subject: str, what: str, value: float, limit: float | None) -> Check:
    return Check(subject, what, value, limit, bool(np.isfinite(value)) and (limit is None or value <= limit))


def _optional(bundle: Bundle, name: str, key: str) -> Array | None:
    """An array that not every bundle has."""
    try:
        with zipfile.ZipFile(inside(bundle.root, name)) as archive:
            there = f"{key}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        there = True  # _read says what is wrong
    return _read(bundle, name, (key,))[key] if there else None


def _read(bundle: Bundle, name: str, keys: tuple[str, ...] | None = None) -> dict[str, Array]:
    if name not in bundle.manifest.files:
        raise BundleError(
            f"the bundle has no {name}",
            found=", ".join(sorted(bundle.manifest.files)),
            expected=name,
            next_step="export the bundle again: andon export --method METHOD",
        )
    return read_npz(inside(bundle.root, name), keys, limit=MAX_FILE_BYTES)
