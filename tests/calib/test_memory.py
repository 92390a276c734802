"""Episodic memory: capacity, mask, cycle, labels, versions; as properties over random histories."""

from __future__ import annotations

import numpy as np
import pytest
from andon.calib.distance import nearest
from andon.calib.errors import CalibrationError
from andon.calib.memory import EpisodicMemory, select_farthest, select_transport
from andon.calib.policies import MemoryPolicy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

D = 4
SEMANTIC = 6


def make(policy=None, spare=40, labels=False):
    rng = np.random.default_rng(0)
    bank = np.zeros((SEMANTIC + spare, D), np.float32)
    bank[: SEMANTIC - 1] = rng.standard_normal((SEMANTIC - 1, D))
    valid = np.zeros(len(bank), np.float32)
    valid[: SEMANTIC - 1] = 1
    foreground = np.zeros(len(bank), np.float32) if labels else None
    return EpisodicMemory(bank, valid, SEMANTIC, policy or MemoryPolicy(capacity=20, keep=0.5), foreground)


def test_length_cycle_of_the_paper():
    memory = make(MemoryPolicy(capacity=100, keep=0.25, per_frame=50), spare=100)
    rng = np.random.default_rng(1)
    changes = [memory.admit(rng.standard_normal((50, D)), k) for k in range(5)]
    assert [c.length for c in changes] == [50, 25, 75, 25, 75]
    assert [c.compressed for c in changes] == [False, True, False, True, False]
    assert [c.version for c in changes] == [1, 2, 3, 4, 5]


def test_compression_keeps_the_spread():
    memory = make(MemoryPolicy(capacity=12, keep=0.5))
    cluster, outlier = np.zeros((11, D)), np.full((1, D), 100.0)
    memory.admit(np.concatenate([cluster + np.arange(11)[:, None] * 1e-3, outlier]), 1)
    assert memory.length == 6
    assert nearest(outlier.astype(np.float32), memory.episodic)[0][0] < 1e-3


def test_changed_rows_are_reported_so_that_a_write_of_them_is_enough():
    memory = make()
    device = memory.bank.copy()
    rng = np.random.default_rng(2)
    for k in range(9):
        change = memory.admit(rng.standard_normal((7, D)), k)
        device[change.start : change.stop] = memory.bank[change.start : change.stop]
        assert (device == memory.bank).all()


def test_labels_and_origins_follow_their_rows_through_compression():
    memory = make(MemoryPolicy(capacity=20, keep=0.5), labels=True)
    rng = np.random.default_rng(3)
    for origin in range(1, 6):
        rows = rng.standard_normal((7, D)).astype(np.float32)
        rows[:, 0] = origin
        memory.admit(rows, origin, np.full(7, origin % 2, np.float32))
    rows = memory.episodic[:, 0].astype(int)
    assert (memory.origin[: memory.length] == rows).all()
    assert (memory.foreground[SEMANTIC : SEMANTIC + memory.length] == rows % 2).all()


def test_selection_rules():
    score = np.array([1, 5, 3, 5], np.float32)
    assert select_farthest(score, 3).tolist() == [1, 3, 2]
    transport = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    front = np.array([True, False, True, False, False])
    assert select_transport(transport, front, 1, 2).tolist() == [0, 1, 3]
    eligible = np.array([False, True, True, True, True])
    assert select_transport(transport, front, 1, 2, eligible).tolist() == [2, 1, 3]


def test_a_reset_gives_back_what_was_shipped_labels_too():
    memory, shipped = make(labels=True), make(labels=True)
    memory.admit(np.ones((5, D)), 1, np.ones(5, np.float32))
    memory.reset()
    for name in ("bank", "valid", "foreground", "origin"):
        assert getattr(memory, name).tobytes() == getattr(shipped, name).tobytes(), name
    assert (memory.length, memory.version) == (0, 2)


@pytest.mark.parametrize(
    "rows", [np.zeros(D), np.zeros((3, D + 1)), np.zeros((0, D)), np.full((2, D), np.nan), np.full((1, D), np.inf)]
)
def test_bad_rows_are_refused_and_change_nothing(rows):
    memory = make()
    before, version = memory.bank.copy(), memory.version
    with pytest.raises(CalibrationError, match="cannot enter"):
        memory.admit(rows, 1)
    assert (memory.bank == before).all() and memory.version == version


def test_shipped_arrays_that_make_no_memory_are_refused():
    bank, valid = np.ones((8, D), np.float32), np.ones(8, np.float32)
    policy = MemoryPolicy(capacity=4)
    EpisodicMemory(bank, valid, 4, policy)
    with pytest.raises(CalibrationError, match="capacity"):
        EpisodicMemory(bank, valid, 4, MemoryPolicy(capacity=5))
    with pytest.raises(CalibrationError, match="fit each other"):
        EpisodicMemory(bank, valid[:7], 4, policy)
    for rows in (0, 8):
        with pytest.raises(CalibrationError, match="fit each other"):
            EpisodicMemory(bank, valid, rows, policy)
    with pytest.raises(CalibrationError, match="mask"):
        EpisodicMemory(bank, np.array([0.5, 1, 1, 1, 0, 0, 0, 0]), 4, policy)
    with pytest.raises(CalibrationError, match="finite"):
        EpisodicMemory(np.where(np.arange(8)[:, None] == 2, np.nan, bank), valid, 4, policy)
    with pytest.raises(CalibrationError, match="mask"):
        EpisodicMemory(bank, np.array([1, 1, 1, 1, 0, 1, 0, 0]), 4, policy)
    with pytest.raises(CalibrationError, match="semantic"):
        EpisodicMemory(bank, np.array([0, 0, 0, 0, 1, 0, 0, 0]), 4, policy)
    for wrong in (
        {"keep": 1.0},
        {"keep": 0.0},
        {"capacity": 0},
        {"per_frame": 0},
        {"foreground": -1},
        {"background": -1},
    ):
        with pytest.raises(CalibrationError, match="policy"):
            MemoryPolicy(**wrong)
    assert MemoryPolicy(capacity=1, per_frame=1, foreground=0, background=0).compressed == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 99))
def test_save_and_restore_is_bit_exact(sizes, seed):
    rng = np.random.default_rng(seed)
    memory = make(labels=True)
    for k, size in enumerate(sizes):
        memory.admit(rng.standard_normal((size, D)), k, rng.integers(0, 2, size))
    other = make(labels=True)
    other.admit(rng.standard_normal((5, D)), 77)
    other.restore(memory.state())
    for name in ("bank", "valid", "foreground", "origin"):
        assert getattr(other, name).tobytes() == getattr(memory, name).tobytes()
    assert other.version == memory.version


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": np.ones((3, D + 1), np.float32)},
        {"rows": np.ones(3, np.float32)},
        {"rows": np.full((3, D), np.nan, np.float32)},
        {"origin": np.zeros(2, np.int64)},
        {"foreground": np.zeros(0, np.float32)},
        {
            name: np.ones((41, *shape), np.float32)
            for name, shape in (("rows", (D,)), ("origin", ()), ("foreground", ()))
        },
    ],
    ids=["wider", "flat", "not finite", "origins", "no labels", "more than there is room for"],
)
def test_a_saved_memory_that_does_not_fit_is_refused_and_changes_nothing(wrong):
    memory = make(labels=True)
    memory.admit(np.ones((3, D)), 1)
    saved = memory.state()
    memory.admit(np.zeros((2, D)), 2)
    before = memory.state()
    with pytest.raises(CalibrationError, match="does not fit this bundle"):
        memory.restore({**saved, **wrong})
    assert all((memory.state()[name] == value).all() for name, value in before.items()), "it is as it was"
    memory.restore(saved)
    assert memory.length == 3 and memory.version == 1
    plain = make()
    plain.restore({**saved, "foreground": np.zeros(0, np.float32)})
    assert plain.length == 3, "a memory without labels needs none"


class History(RuleBasedStateMachine):
    """Any history of admissions, restores and resets keeps the promises of the arrays."""

    @initialize()
    def start(self):
        self.memory = make(MemoryPolicy(capacity=15, keep=0.4), spare=15)
        self.semantic = self.memory.bank[:SEMANTIC].copy()
        self.saved = []
        self.version = 0
        self.rng = np.random.default_rng(0)

    @rule(size=st.integers(1, 30))
    def admit(self, size):
        change = self.memory.admit(self.rng.standard_normal((size, D)), size)
        assert change.version == self.version + 1
        self.version = change.version

    @rule()
    def save(self):
        self.saved.append(self.memory.state())

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def roll_back(self, data):
        state = data.draw(st.sampled_from(self.saved))
        self.version += 1
        self.memory.restore(state, version=self.version)
        assert (self.memory.episodic == state["rows"]).all()

    @rule()
    def reset(self):
        self.memory.reset()
        self.version += 1
        assert self.memory.length == 0

    @invariant()
    def promises(self):
        memory = self.memory
        assert memory.bank.shape == (SEMANTIC + 15, D)
        assert (memory.bank[:SEMANTIC] == self.semantic).all()
        assert memory.length < 15
        assert memory.version == self.version
        tail = memory.valid[SEMANTIC:]
        assert tail[: memory.length].all() and not tail[memory.length :].any()
        assert (memory.bank[memory.valid == 0] == 0).all()
        assert (memory.origin[: memory.length] >= 0).all() and (memory.origin[memory.length :] == -1).all()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
