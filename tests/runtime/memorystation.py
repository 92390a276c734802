"""A small bundle with a memory, and a station that drives the memory as the judge does."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
from andon.runtime.bundle import Bundle
from andon.runtime.detector import Detector
from andon.runtime.engine.select import open_backend
from andon.runtime.judgement import Judgement
from andon.runtime.manifest import Threshold
from andon.runtime.memory import LineMemory
from andon.runtime.memoryconfig import DriftConfig, GuardConfig, MemoryConfig
from andon.runtime.types import Frame, Verdict

SEMANTIC, SPARE = 2, 6

#: uint8 frame [1,4,4,3] -> 16 patches of 3 numbers
FEATURES = """features (uint8[1,4,4,3] image) => (float[16,3] patches) {
    x = Cast<to=1>(image)
    shape = Constant<value = int64[2] {16,3}>()
    patches = Reshape(x, shape)
}"""
#: distance to the nearest valid row, and to the nearest semantic one, 1-norm, as memory methods do it with the 2-norm
SCORE = f"""score (float[16,3] patches, float[{SEMANTIC + SPARE},3] bank, float[{SEMANTIC + SPARE}] valid)
 => (float[1,1,4,4] map, float[1] score, float[16] patch_score, float[16] anchor) {{
    one = Constant<value = float {{1.0}}>()
    far = Constant<value = float {{10000.0}}>()
    empty = Sub(one, valid)
    penalty = Mul(empty, far)
    middle = Constant<value = int64[1] {{1}}>()
    rows = Unsqueeze(patches, middle)
    gap = Sub(rows, bank)
    size = Abs(gap)
    last = Constant<value = int64[1] {{2}}>()
    distance = ReduceSum<keepdims=0>(size, last)
    masked = Add(distance, penalty)
    patch_score = ReduceMin<axes=[1], keepdims=0>(masked)
    first = Constant<value = int64[1] {{0}}>()
    semantic = Constant<value = int64[1] {{{SEMANTIC}}}>()
    known = Slice(masked, first, semantic, middle)
    anchor = ReduceMin<axes=[1], keepdims=0>(known)
    shape = Constant<value = int64[4] {{1,1,4,4}}>()
    map = Reshape(patch_score, shape)
    score = ReduceMax<axes=[0], keepdims=1>(patch_score)
}}"""

GUARD = GuardConfig(share=1.0, warmup=2, window=5, quantile=1.0, local_bound=1e6, global_bound=1e6)
CONFIG = MemoryConfig(enabled=True, per_frame=2, guard=GUARD, save_every=3600, snapshot_every=1)
DRIFTS = CONFIG.model_copy(update={"drift": DriftConfig(reference=10, window=10, alpha=0.01)})


def memory_parts(classes=("a", "b"), per_class=True, anchor=None):
    """What conftest.build makes a bundle with a memory of. anchor: the output that the manifest names as such."""
    bank = np.zeros((len(classes), SEMANTIC + SPARE, 3), np.float32)
    bank[:, 0], bank[:, 1] = 100.0, 110.0
    valid = np.zeros(bank.shape[:2], np.float32)
    valid[:, :SEMANTIC] = 1
    kind = "class" if per_class else "state"
    return {
        "classes": classes,
        "stages": {
            "features": (FEATURES, {"image": "frame"}),
            "score": (
                SCORE,
                {"patches": "features.patches", "bank": f"{kind}:bank", "valid": f"{kind}:valid"},
            ),
        },
        "program": [{"run": "features"}, {"run": "score"}],
        "alternatives": {"other": [{"run": "features"}, {"run": "score"}]},
        "state": {"bank": bank if per_class else bank[0], "valid": valid if per_class else valid[0]},
        "class_bound": ("bank", "valid") if per_class else (),
        "outputs": {"score": "score.score", "map": "score.map"},
        "memory": {
            "bank": "bank",
            "valid": "valid",
            "semantic_rows": SEMANTIC,
            "episodic_rows": SPARE,
            "candidates": "features.patches",
            "patch_score": "score.patch_score",
            "per_class": per_class,
            "anchor": anchor,
        },
    }


class Station:
    """Detector, memory and the judge's call order."""

    def __init__(self, bundle_path, folder, config=CONFIG, program="default"):
        self.bundle = Bundle.load(bundle_path)
        self.backend = open_backend("onnxruntime", threads=1)
        self.backend.__enter__()
        self.detector = Detector(self.bundle, self.backend, program=program)
        for product in self.bundle.manifest.classes:
            promise = Threshold(value=50.0, false_alarm_rate=0.01, samples=1)
            self.detector.set_threshold(product, promise)
        self.memory = LineMemory(self.detector.program, config, folder)
        self.seq = 0

    def see(self, value, product="a", label=None, named=True):
        """Score a picture of one shade and let the memory see it; named: with a part id, as a trigger gives it."""
        image = np.full((4, 4, 3), value, np.uint8)
        scored = self.detector.judge_image(image, product)
        now = datetime.now(timezone.utc)
        self.seq += 1
        verdict = Verdict(str(self.seq), "cam", self.seq, now, now, label or scored.label, "", product=product)
        frame = Frame("cam", self.seq, now, 0.0, image, part_id=str(self.seq) if named else None)
        self.memory.after_frame(self.detector.program, Judgement(verdict, scored), frame)
        return scored.score

    def close(self):
        self.memory.close()
        self.detector.close()
        self.backend.close()


def drift_up(line, rng):
    """25 usual scores, a snapshot, then larger ones until the monitor warns."""
    for _ in range(25):
        line.see(int(rng.integers(100, 103)), label="NG")
    line.memory.command("snapshot", {})
    for _ in range(12):
        line.see(int(rng.integers(104, 106)), label="NG")
    assert line.memory.drift("cam")
