"""Online calibration measured: a stream with a share of anomalies teaches the memory, then it is held against frozen.

The calibrator is the one that runs on the line (calib/calibrator.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calib.calibrator import Observation, OnlineCalibrator
from ...calib.distance import nearest
from ...calib.errors import CalibrationError
from ...calib.policies import GuardPolicy, MemoryPolicy
from ..report.memory import MemoryView
from .fewshot import FeatureCache, Memory, Progress, rank
from .transport import score

Array = NDArray[Any]
#: Frames of a stream, and of the evaluation after it (METHODS.md F.3).
STREAM, HELD_OUT = 222, 200


@dataclass(frozen=True)
class Setting:
    """One row of the table. transport: score and select with P (foct without CT steps), else plain distance (knn).

    literal: the paper's order, a frame is scored after it has taught the memory.
    """

    name: str
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    guard: GuardPolicy = field(default_factory=GuardPolicy)
    transport: bool = False
    literal: bool = False


PAPER = MemoryPolicy(capacity=100, keep=0.25, selection="transport")
NEAREST = MemoryPolicy(selection="transport")
OPEN = GuardPolicy(gate=False)
#: The default first; then the guard's parts taken away, the paper's choices, and both together.
SETTINGS = (
    Setting("farthest, guard q=.5"),
    Setting("farthest, guard q=.8", guard=GuardPolicy(quantile=0.8)),
    Setting("farthest, q=.5 without anchors", guard=GuardPolicy(local_bound=1e9, global_bound=1e9)),
    Setting("farthest, gate off", guard=OPEN),
    Setting("paper's selection L=800, guard q=.5", NEAREST, transport=True),
    Setting("paper's selection L=100, guard q=.5", PAPER, transport=True),
    Setting("paper: selection L=100, gate off", PAPER, OPEN, transport=True),
    Setting("paper, scored after the update", PAPER, OPEN, transport=True, literal=True),
    Setting("foct, farthest, guard q=.5", transport=True),
)
#: The default with other shares of the frames admitted, to choose the share on validation sets.
QUANTILES = (
    SETTINGS[0],
    Setting("farthest, guard q=.65", guard=GuardPolicy(quantile=0.65)),
    SETTINGS[1],
)


@dataclass(frozen=True)
class Gain:
    """frozen, online: image AUROC before and after the stream, on the same held-out images.

    stream_frozen, stream_online: AUROC of the stream's own frames, each scored as it came.
    bad: share of inserted rows that come from anomalous frames (0 if none was inserted). admitted: share of frames.
    """

    frozen: float
    online: float
    stream_frozen: float
    stream_online: float
    bad: float
    admitted: float


@dataclass(frozen=True)
class Plan:
    """Indices into the cache: the stream in order, which of its frames are anomalous, and the held-out images."""

    stream: Array
    anomalous: Array
    held_out: Array


def plan_stream(cache: FeatureCache, product: str, support: Array, rate: float, seed: int, order: int) -> Plan:
    """A stream of good training images (not the support) and half of the test anomalies; the rest is held out."""
    rng = np.random.default_rng((seed, 31))
    good = rng.permutation(np.setdiff1d(cache.select(product, split="train", good=True), support))
    bad = rng.permutation(cache.select(product, split="test", good=False))
    spare, kept = bad[: len(bad) // 2], bad[len(bad) // 2 :]
    length = STREAM
    if rate < 1:
        length = min(length, int(len(good) / (1 - rate)))
    if rate > 0:
        length = min(length, int(len(spare) / rate))
    count = round(rate * length)
    frames = np.concatenate([spare[:count], good[: length - count]])
    shuffled = np.random.default_rng((seed, order, 37)).permutation(len(frames))
    test_good = rng.permutation(cache.select(product, split="test", good=True))[: HELD_OUT // 2]
    held_out = np.concatenate([test_good, kept[: HELD_OUT // 2]])
    return Plan(frames[shuffled], shuffled < count, held_out)


@dataclass(frozen=True)
class Baseline:
    """Scores with the memory as enrolled: of the stream's frames and of the held-out images."""

    stream: Array
    held_out: Array


def baseline(cache: FeatureCache, memory: Memory, plan: Plan, transport: bool, progress: Progress) -> Baseline:
    """What a frozen memory says; the same for every setting of the same score."""
    return Baseline(
        _image_scores(cache, memory, memory.rows, plan.stream, transport, progress),
        _image_scores(cache, memory, memory.rows, plan.held_out, transport, progress),
    )


@dataclass
class Trace:
    """What happened along a stream, for the report: per frame score, reason and episodic rows; the calibrator."""

    scores: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    calibrator: OnlineCalibrator | None = None


def run_stream(
    cache: FeatureCache,
    memory: Memory,
    plan: Plan,
    setting: Setting,
    before: Baseline,
    progress: Progress,
    trace: Trace | None = None,
) -> Gain:
    """Teach a fresh calibrator with the stream and measure what it changed; `trace` is filled if given."""
    calibrator = _calibrator(memory, setting)
    scores = np.empty(len(plan.stream))
    inserted = wrong = admitted = 0
    for position, index in enumerate(plan.stream):
        seen = _observe(cache, memory, calibrator.memory.rows, int(index), setting.transport)
        outcome = calibrator.observe(seen)
        scores[position] = seen.score
        if setting.literal:
            scores[position] = _observe(cache, memory, calibrator.memory.rows, int(index), setting.transport).score
        if trace is not None:
            trace.scores.append(float(scores[position]))
            trace.reasons.append(outcome.decision.reason)
            trace.rows.append(calibrator.memory.length)
        if outcome.change is not None:
            if trace is not None:
                trace.admitted.append(position)
            admitted += 1
            inserted += outcome.change.added
            wrong += outcome.change.added * int(plan.anomalous[position])
        progress(1)
    if trace is not None:
        trace.calibrator = calibrator
    held = np.array([not cache.dataset.samples[i].good for i in plan.held_out])
    after = _image_scores(cache, memory, calibrator.memory.rows, plan.held_out, setting.transport, progress)
    return Gain(
        rank(held, before.held_out),
        rank(held, after),
        rank(plan.anomalous, before.stream),
        rank(plan.anomalous, scores),
        wrong / inserted if inserted else 0.0,
        admitted / len(plan.stream),
    )


def view_stream(
    cache: FeatureCache, memory: Memory, plan: Plan, setting: Setting, before: Baseline, title: str, about: str
) -> MemoryView:
    """One stream as the report shows it. about: of which draw; which images the figures are of is added to it."""
    trace = Trace()
    gain = run_stream(cache, memory, plan, setting, before, lambda n: None, trace)
    if trace.calibrator is None:
        raise CalibrationError("the stream has no frame", found=len(plan.stream), expected="at least one")
    held = trace.calibrator.memory
    wrong = plan.anomalous[np.array(trace.admitted, int)] if trace.admitted else np.zeros(0, bool)
    level = [float(np.median(nearest(cache[int(i)] - memory.center, memory.rows)[0])) for i in plan.stream]
    bad = sum(not cache.dataset.samples[i].good for i in plan.held_out)
    anomalous, when = int(plan.anomalous.sum()), "after" if setting.literal else "before"
    about += (
        f" The stream has {len(plan.stream)} frames: {len(plan.stream) - anomalous} good training images and "
        f"{anomalous} defective test images. AUROC is of the test images that were held out of it, "
        f"{len(plan.held_out) - bad} good and {bad} defective. The charts are of the stream: each frame's score with "
        f"the memory as enrolled, and with the memory as it had become {when} the frame taught it, on the same scale."
    )
    return MemoryView(
        title,
        about,
        memory.rows,
        held.episodic,
        wrong[held.origin[: held.length] - 1] if len(wrong) else np.zeros(0, bool),
        before.stream,
        np.array(trace.scores),
        plan.anomalous,
        np.array(level),
        np.array(trace.rows),
        trace.reasons,
        (
            (f"{gain.frozen:.3f}", "image AUROC before"),
            (f"{gain.online:.3f}", "image AUROC after"),
            (f"{gain.admitted:.1%}", "of the frames taught"),
            (f"{gain.bad:.1%}", "of the new rows: from anomalous frames"),
        ),
    )


def _calibrator(memory: Memory, setting: Setting) -> OnlineCalibrator:
    count = len(memory.rows)
    bank = np.zeros((count + setting.memory.capacity, memory.rows.shape[1]), np.float32)
    labels = np.zeros(len(bank), np.float32)
    bank[:count], labels[:count] = memory.rows, memory.foreground
    valid = (np.arange(len(bank)) < count).astype(np.float32)
    return OnlineCalibrator.create(bank, valid, count, setting.memory, setting.guard, labels)


def _observe(cache: FeatureCache, memory: Memory, rows: Array, index: int, transport: bool) -> Observation:
    patches = cache[index] - memory.center
    if not transport:
        distance, _ = nearest(patches, rows)
        return Observation(float(distance.max()), patches, distance)
    found = score(memory.navigator, patches, rows)
    return Observation(float(found.score.max()), patches, found.score, found.transport, found.matched)


def _image_scores(
    cache: FeatureCache, memory: Memory, rows: Array, indices: Array, transport: bool, progress: Progress
) -> Array:
    scores = np.empty(len(indices))
    for position, index in enumerate(indices):
        scores[position] = _observe(cache, memory, rows, int(index), transport).score
        progress(1)
    return scores
