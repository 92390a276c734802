"""Attacks on the memory and honest drift, on a stream of synthetic patches whose geometry is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from andon.calib.calibrator import Observation, OnlineCalibrator
from andon.calib.distance import nearest
from andon.calib.errors import CalibrationError
from andon.calib.guard import AdmissionGuard
from andon.calib.policies import GuardPolicy, MemoryPolicy

PATCHES, D, SEMANTIC = 100, 8, 100
DEFECT = slice(40, 44)


class Line:
    """Patches of good parts around fixed places; a defect moves four of them, light moves all of them."""

    def __init__(self, gate, seed=0):
        self.rng = np.random.default_rng(seed)
        self.places = self.rng.normal(0, 3, (PATCHES, D)).astype(np.float32)
        self.direction = np.ones(D, np.float32) / np.sqrt(D)
        bank = np.zeros((SEMANTIC + 200, D), np.float32)
        bank[:SEMANTIC] = self.part()
        valid = (np.arange(len(bank)) < SEMANTIC).astype(np.float32)
        self.calibrator = OnlineCalibrator.create(
            bank, valid, SEMANTIC, MemoryPolicy(capacity=200, per_frame=20), GuardPolicy(gate=gate)
        )

    def part(self, defect=0.0, light=0.0):
        patches = self.places + self.rng.normal(0, 0.3, (PATCHES, D)).astype(np.float32)
        patches[DEFECT] += defect * 10 * self.direction
        return patches + light * self.direction

    def score(self, patches):
        return float(nearest(patches, self.calibrator.memory.rows)[0].max())

    def frozen_score(self, patches):
        return float(nearest(patches, self.calibrator.memory.semantic)[0].max())

    def see(self, patches):
        distance, _ = nearest(patches, self.calibrator.memory.rows)
        return self.calibrator.observe(Observation(float(distance.max()), patches, distance))

    def run_in(self, frames=60):
        for _ in range(frames):
            self.see(self.part())

    def threshold(self):
        """The largest score of 100 good parts with the memory as it is."""
        return max(self.score(self.part()) for _ in range(100))


def absorbed(line, threshold):
    """Share of full defects that pass as good."""
    return np.mean([line.score(line.part(defect=1.0)) <= threshold for _ in range(20)])


@pytest.mark.parametrize(("gate", "expected"), [(True, 0.0), (False, 1.0)])
def test_slow_drift_attack(gate, expected):
    """A defect that fades in over 500 frames, in every frame: the relative gate alone would follow it."""
    line = Line(gate)
    line.run_in()
    threshold = line.threshold()
    for k in range(500):
        line.see(line.part(defect=k / 500))
    assert absorbed(line, threshold) == expected
    if gate:
        assert line.calibrator.counts["anchor_local"] > 0


def test_slow_drift_is_stopped_by_the_anchor_not_by_the_score_gate():
    """The same attack with the anchors wide open is absorbed, so it is the anchor that the test above tests."""
    line = Line(True)
    line.calibrator.guard = AdmissionGuard(GuardPolicy(local_bound=1e6, global_bound=1e6, quantile=1.0))
    line.run_in()
    threshold = line.threshold()
    for k in range(500):
        line.see(line.part(defect=k / 500))
    assert absorbed(line, threshold) > 0.8


@pytest.mark.parametrize(("gate", "expected"), [(True, 0.0), (False, 1.0)])
def test_burst_attack(gate, expected):
    """Forty full defects in a row."""
    line = Line(gate)
    line.run_in()
    threshold = line.threshold()
    for _ in range(40):
        line.see(line.part(defect=1.0))
    assert absorbed(line, threshold) == expected


def test_light_is_followed_and_a_frozen_memory_raises_false_alarms():
    line = Line(True)
    line.run_in()
    threshold = line.threshold()
    for k in range(400):
        line.see(line.part(light=1.2 * k / 400))
    drifted = [line.part(light=1.2) for _ in range(200)]
    followed = np.mean([line.score(p) > threshold for p in drifted])
    frozen_threshold = max(line.frozen_score(line.part()) for _ in range(100))
    frozen = np.mean([line.frozen_score(p) > frozen_threshold for p in drifted])
    assert followed <= 0.02 < 0.2 < frozen
    assert line.score(line.part(light=1.2, defect=1.0)) > threshold


def test_light_beyond_the_global_anchor_is_refused():
    line = Line(True)
    line.run_in()
    version = line.calibrator.memory.version
    for _ in range(300):
        line.see(line.part(light=8))
    assert line.calibrator.counts["anchor_global"] > 0
    assert line.calibrator.memory.version == version


def test_anchors_that_the_program_gives_decide_as_those_computed_here(monkeypatch):
    """On frames of every kind: what is decided, and what is in the memory after it."""

    def run(given):
        line, decided = Line(True), []
        for k in range(400):
            patches = line.part(defect=max(0, k - 200) / 400, light=8 if k % 40 == 39 else 0)
            distance, semantic = nearest(patches, line.calibrator.memory.rows)[0], line.calibrator.memory.semantic
            anchored = nearest(patches, semantic)[0] if given else None
            seen = Observation(float(distance.max()), patches, distance, anchored=anchored)
            decided.append(line.calibrator.observe(seen).decision)
        return decided, line.calibrator.memory.bank, line.calibrator.counts

    decided, bank, counts = run(given=False)
    assert {"admitted", "warmup", "score", "anchor_local"} <= counts.keys(), counts
    monkeypatch.setattr("andon.calib.calibrator.nearest", lambda *_: pytest.fail("computed again"))
    again, same, _ = run(given=True)
    assert [each.reason for each in again] == [each.reason for each in decided] and np.array_equal(same, bank)
    # Not bit for bit: products of matrices round as their arrays happen to be aligned.
    np.testing.assert_allclose([each.found for each in again], [each.found for each in decided], rtol=1e-4)


def test_frozen_untrusted_and_not_finite_frames_teach_nothing():
    line = Line(True)
    line.run_in()
    version, patches = line.calibrator.memory.version, line.part()
    distance, _ = nearest(patches, line.calibrator.memory.rows)
    seen = Observation(0.0, patches, distance)
    assert line.calibrator.observe(seen, trusted=False).decision.reason == "not_ok"
    broken = Observation(float("nan"), patches, distance)
    assert line.calibrator.observe(broken).decision.reason == "not_finite"
    line.calibrator.frozen = True
    assert line.calibrator.observe(seen).decision.reason == "frozen"
    assert line.calibrator.memory.version == version
    line.calibrator.frozen = False
    assert line.calibrator.observe(seen).decision.admit


def test_one_patch_that_is_not_a_number_teaches_nothing_and_moves_no_limit():
    """A baseline with one would compare with nothing from then on, and every defect pass."""
    guard, patches = AdmissionGuard(GuardPolicy(warmup=1)), np.array([1.0, 2.0, 5.0])
    guard.judge(1.0, patches)
    before = guard.anchor_limits()
    for wrong in (np.nan, np.inf):
        assert guard.judge(0.5, np.array([1.0, wrong, 5.0])).reason == "not_finite"
        assert guard.judge(wrong, patches).reason == "not_finite"
    assert guard.anchor_limits() == before and guard.state()["scores"].tolist() == [1.0]
    assert AdmissionGuard(GuardPolicy(gate=False)).judge(np.nan, None).reason == "not_finite"


def test_what_lies_on_a_limit_passes_and_the_decision_says_found_and_limit():
    policy = GuardPolicy(quantile=0.5, window=4, warmup=2, local_bound=1.5, global_bound=3.0)

    def decided(score, patches):
        guard = AdmissionGuard(policy)
        warm = [guard.judge(s, np.array([1.0, 2.0, 4.0])) for s in (1.0, 3.0)]
        assert [(d.reason, d.found, d.limit) for d in warm] == [("warmup", 1, 2), ("warmup", 2, 2)]
        assert guard.score_limit() == 2 and guard.anchor_limits() == (3.0, 6.0)
        decision = guard.judge(score, np.array(patches))
        return decision.admit, decision.reason, decision.found, decision.limit

    assert decided(2.0, [1.0, 2.0, 5.0]) == (True, "admitted", 2.0, 2.0)
    assert decided(2.1, [1.0, 2.0, 5.0]) == (False, "score", 2.1, 2.0)
    assert decided(2.0, [1.0, 2.0, 5.5]) == (False, "anchor_local", 3.5, 3.0)
    assert decided(2.0, [1.0, 6.0, 9.0]) == (True, "admitted", 2.0, 2.0)
    assert decided(2.0, [1.0, 6.5, 9.0]) == (False, "anchor_global", 6.5, 6.0)
    off = AdmissionGuard(GuardPolicy(gate=False)).judge(9.0, None)
    assert (off.admit, off.reason, off.found, off.limit) == (True, "admitted", 9.0, np.inf)
    guard = AdmissionGuard(policy)
    for score in (1.0, 3.0):
        guard.judge(score, np.array([1.0, 2.0, 4.0]))
    with pytest.raises(CalibrationError, match="distances to the semantic memory"):
        guard.judge(2.0, None)


def test_the_baseline_is_of_the_first_frames_and_the_score_gate_of_the_latest():
    policy = GuardPolicy(window=3, warmup=1)
    guard, longer = AdmissionGuard(policy), AdmissionGuard(GuardPolicy(window=5, warmup=1))
    for each in (guard, longer):
        for score in (1.0, 2.0, 3.0, 4.0, 5.0):
            each.judge(score, np.array([score, score, 3 * score]))
    assert {name: array.tolist() for name, array in guard.state().items()} == {
        "scores": [3, 4, 5], "level": [1, 2, 3], "excess": [2, 4, 6],
    }  # fmt: skip
    assert not guard.needs_anchor()
    again = AdmissionGuard(policy)
    again.restore(longer.state())
    assert all(again.state()[name].tolist() == array.tolist() for name, array in guard.state().items())
    again.reset()
    assert again.needs_anchor() and not any(array.size for array in again.state().values())


def test_score_gate_admits_the_quantile_it_promises():
    guard = AdmissionGuard(GuardPolicy(quantile=0.8, window=50, local_bound=1e9, global_bound=1e9))
    rng = np.random.default_rng(0)
    admitted = [guard.judge(float(rng.normal()), np.ones(4)).admit for _ in range(3000)]
    assert np.mean(admitted) == pytest.approx(0.8, abs=0.03)
    assert not any(admitted[:10])


def test_cap_per_frame():
    policy = MemoryPolicy(capacity=100, per_frame=50)
    assert AdmissionGuard(GuardPolicy()).rows_per_frame(policy.per_frame, policy.capacity) == 25
    assert AdmissionGuard(GuardPolicy(gate=False)).rows_per_frame(policy.per_frame, policy.capacity) == 50
    assert AdmissionGuard(GuardPolicy(share=0.001)).rows_per_frame(policy.per_frame, policy.capacity) == 1


def test_gate_off_follows_the_papers_length_cycle():
    line = Line(False)
    line.calibrator = OnlineCalibrator.create(
        line.calibrator.memory.bank,
        line.calibrator.memory.valid,
        SEMANTIC,
        MemoryPolicy(capacity=100, keep=0.25, per_frame=50),
        GuardPolicy(gate=False),
    )
    lengths = []
    for _ in range(6):
        line.see(line.part())
        lengths.append(line.calibrator.memory.length)
    assert lengths == [50, 25, 75, 25, 75, 25]


def transport_line(gate, **guard):
    """Foreground patches 0..49 match row 0, background ones row 1."""
    bank = np.zeros((2 + 100, D), np.float32)
    bank[1] = 1
    valid = (np.arange(102) < 2).astype(np.float32)
    labels = np.zeros(102, np.float32)
    labels[0] = 1
    policy = MemoryPolicy(capacity=100, selection="transport", foreground=3, background=5)
    return OnlineCalibrator.create(
        bank, valid, 2, policy, GuardPolicy(gate=gate, local_bound=1e9, global_bound=1e9, **guard), labels
    )


def test_what_a_usual_patch_scores_follows_the_frames_that_teach():
    """It says which patches a reduced gate may take: where none is usual, the frame teaches nothing."""
    calibrator, rng = transport_line(True, warmup=1, quantile=1.0), np.random.default_rng(0)

    def seen(score, patches):
        matched = np.repeat([0, 1], 50).astype(np.int32)
        features = rng.normal(size=(100, D)).astype(np.float32)
        outcome = calibrator.observe(Observation(score, features, np.full(100, patches), rng.random(100), matched))
        return outcome.decision.reason, float(calibrator.state()["typical_patch"])

    assert seen(9.0, 5.0) == ("warmup", pytest.approx(np.nan, nan_ok=True)), "who does not teach does not count"
    assert seen(1.0, 1.0) == ("admitted", 1.0) and seen(1.0, 0.5) == ("admitted", 0.975)
    version, admissions = calibrator.memory.version, calibrator.admissions
    reason, typical = seen(1.0, 1.1)
    assert reason == "no_candidate" and typical == pytest.approx(0.95 * 0.975 + 0.05 * 1.1)
    assert (calibrator.memory.version, calibrator.admissions) == (version, admissions) == (2, 2)
    assert dict(calibrator.counts) == {"warmup": 1, "admitted": 2, "no_candidate": 1}
    assert calibrator.memory.origin[:16].tolist() == [1] * 8 + [2] * 8
    calibrator.reset()
    assert seen(1.0, 3.0)[0] == "warmup" and seen(1.0, 3.0) == ("admitted", 3.0), "everything anew"


def test_the_share_of_one_frame_bounds_transport_too():
    calibrator, rng = transport_line(True, warmup=1, share=0.04), np.random.default_rng(0)
    for _ in range(2):
        patches, matched = rng.normal(size=(100, D)).astype(np.float32), np.repeat([0, 1], 50).astype(np.int32)
        outcome = calibrator.observe(Observation(1.0, patches, np.ones(100), rng.random(100), matched))
    assert len(outcome.patches) == 4 == calibrator.memory.length


def test_a_frame_that_cannot_teach_is_counted_as_if_it_had_been_seen():
    calibrator = Line(True).calibrator
    assert calibrator.turns_away(trusted=False) and calibrator.counts == {"not_ok": 1}
    assert not calibrator.turns_away() and calibrator.counts == {"not_ok": 1}
    calibrator.frozen = True
    assert calibrator.turns_away() and calibrator.counts == {"not_ok": 1, "frozen": 1}
    ungated = Line(False).calibrator
    assert not ungated.turns_away(trusted=False) and not ungated.counts, "the paper's way: every frame teaches"


def test_transport_selection_takes_both_labels_and_needs_probabilities():
    calibrator = transport_line(False)
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(100, D)).astype(np.float32)
    transport, matched = rng.random(100), np.repeat([0, 1], 50).astype(np.int32)
    outcome = calibrator.observe(Observation(1.0, patches, rng.random(100), transport, matched))
    front, back = outcome.patches[:3], outcome.patches[3:]
    assert (front < 50).all() and (back >= 50).all() and len(back) == 5
    assert transport[front].min() >= np.sort(transport[:50])[-3]
    assert calibrator.memory.foreground[2:10].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(CalibrationError, match="transport"):
        calibrator.observe(Observation(1.0, patches, rng.random(100)))


def test_gate_keeps_an_anomaly_with_high_transport_probability_out():
    """METHODS.md 5.4: P is relative, an anomalous patch may have the highest. Its score gives it away."""
    for gate, enters in ((True, False), (False, True)):
        calibrator = transport_line(gate)
        rng = np.random.default_rng(1)
        for _ in range(20):
            patches = rng.normal(size=(100, D)).astype(np.float32)
            score, transport = np.full(100, 1.0), np.full(100, 0.4)
            patches[7], score[7], transport[7] = 9.0, 1.1, 0.9
            matched = np.repeat([0, 1], 50).astype(np.int32)
            calibrator.observe(Observation(1.1, patches, score, transport, matched))
        assert (calibrator.memory.episodic == 9.0).all(axis=1).any() == enters


def test_state_survives_save_and_restore_bit_exact():
    line, other = Line(True), Line(True, seed=5)
    line.run_in(30)
    other.calibrator.memory.bank[:SEMANTIC] = line.calibrator.memory.bank[:SEMANTIC]
    other.calibrator.restore(line.calibrator.state())
    frames = [line.part() for _ in range(40)]
    for patches in frames:
        a, b = line.see(patches), other.see(patches)
        assert a.decision == b.decision
    assert line.calibrator.memory.bank.tobytes() == other.calibrator.memory.bank.tobytes()
    assert all(
        x.tobytes() == y.tobytes()
        for (_, x), (_, y) in zip(
            sorted(line.calibrator.state().items()), sorted(other.calibrator.state().items()), strict=True
        )
    )


def test_incomplete_state_is_refused_and_changes_nothing():
    line = Line(True)
    line.run_in(30)
    before = line.calibrator.state()
    for name in before:
        broken = {k: v for k, v in before.items() if k != name}
        with pytest.raises(CalibrationError, match="incomplete"):
            line.calibrator.restore(broken)
    assert all((before[k] == v).all() or k == "typical_patch" for k, v in line.calibrator.state().items())


def test_policies_out_of_range_are_refused():
    for wrong in (
        {"quantile": 0},
        {"warmup": 0},
        {"warmup": 60},
        {"share": 2},
        {"share": 0},
        {"local_bound": 0},
        {"global_bound": 0},
    ):
        with pytest.raises(CalibrationError, match="guard policy"):
            GuardPolicy(**wrong)
    for edge in ({"quantile": 1}, {"warmup": 1}, {"warmup": 50}, {"share": 1}, {"local_bound": 0.1}):
        GuardPolicy(**edge)


def test_versions_only_grow():
    line = Line(False)
    versions = []
    for _ in range(5):
        line.see(line.part())
        versions.append(line.calibrator.memory.version)
    line.calibrator.reset()
    versions.append(line.calibrator.memory.version)
    assert all(b > a for a, b in pairwise(versions))
