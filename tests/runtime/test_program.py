"""The executor against a plain Python loop: counts odd and even, several carries and tables, classes, persistence."""

from __future__ import annotations

import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.engine.onnxruntime import OnnxRuntimeBackend
from andon.runtime.errors import BundleError, ConfigError, EngineError
from andon.runtime.program import Program
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import ENCODE, SCORE, build  # type: ignore[import-not-found]

#: Two carries that feed each other, two tables, one per-class state; `aux` is not carried.
STEP = """step (float[1,3] u, float[2,2] v, float[3] coef, float[1] gain, float[1,3] w, float[1,3] h)
    => (float[1,3] u_next, float[2,2] v_next, float[1,3] aux) {
    uc = Mul(u, coef)
    uw = Add(uc, w)
    u_next = Add(uw, h)
    vg = Mul(v, gain)
    s = ReduceMax<keepdims=1>(u)
    s2 = Squeeze(s, axis)
    v_next = Add(vg, s2)
    aux = Sub(u_next, u)
}"""
FINAL = """score (float[1,3] u, float[2,2] v, float[1,3] old) => (float[1,1,1,3] map, float[1] score) {
    shape = Constant<value = int64[4] {1,1,1,3}>()
    d = Sub(u, old)
    map = Reshape(d, shape)
    m = ReduceMax<keepdims=0>(v)
    one = Constant<value = int64[1] {1}>()
    score = Reshape(m, one)
}"""
RNG = np.random.default_rng(0)
STATE = {
    "u0": RNG.normal(size=(1, 3)).astype(np.float32),
    "v0": RNG.normal(size=(2, 2, 2)).astype(np.float32),
    "w": RNG.normal(size=(2, 1, 3)).astype(np.float32),
}
TABLES = {
    "coef": RNG.uniform(0.5, 1.1, size=(9, 3)).astype(np.float32),
    "gain": RNG.uniform(0.5, 1.1, size=(12, 1)).astype(np.float32),
}


def looped(
    root: Path, count: int, *, persist: bool, counter: bool, read_old: bool, final_u: str = "step.u_next"
) -> Bundle:
    """encode -> step x count -> score. read_old: score also reads the persistent state as it was before the frame."""
    step = {
        "loop": "step",
        "count": count,
        "carry": {"u_next": "u", "v_next": "v"},
        "init": {"u": "state:u0", "v": "class:v0"},
        "tables": {"coef": "coef", "gain": "gain"},
        "persist": {"u": "u0", "v": "v0"} if persist else {},
        "counter": "t" if counter else None,
    }
    sources = {"u": "carry", "v": "carry", "coef": "table", "gain": "table", "w": "class:w", "h": "encode.u"}
    final = {"u": final_u, "v": "step.v_next", "old": "state:u0" if read_old else "encode.u"}
    path = build(
        root,
        stages={"encode": (ENCODE, {"image": "frame"}), "step": (STEP, sources), "score": (FINAL, final)},
        program=[{"run": "encode"}, step, {"run": "score"}],
        state=STATE,
        tables=TABLES,
        class_bound=("v0", "w"),
    )
    return Bundle.load(path)


class Reference:
    """The same program as a plain Python loop."""

    def __init__(self, count: int, *, persist: bool, counter: bool, read_old: bool):
        self.count, self.persist, self.counter, self.read_old = count, persist, counter, read_old
        self.u0, self.v0 = STATE["u0"].copy(), STATE["v0"].copy()
        self.t = {0: 0, 1: 0}

    def run(self, frame: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        h = frame.astype(np.float32).mean(axis=(0, 1), dtype=np.float32)[None] * np.float32(0.01)
        u, v = self.u0, self.v0[c]
        start = min(self.t[c if self.persist else 0], 9 - self.count) if self.counter else 0
        for k in range(self.count):
            coef, gain = TABLES["coef"][start + k], TABLES["gain"][start + k]
            u, v = u * coef + STATE["w"][c] + h, v * gain + u.max()
        old = self.u0 if self.read_old else h
        if self.persist:
            self.u0 = u
            self.v0 = np.stack([v if i == c else self.v0[i] for i in range(2)])
        self.t[c if self.persist else 0] += self.count
        return u, v, (u - old)[0]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 9),
    persist=st.booleans(),
    counter=st.booleans(),
    read_old=st.booleans(),
    products=st.lists(st.integers(0, 1), min_size=1, max_size=6),
)
def test_program_equals_a_plain_python_loop(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    persist: bool,
    counter: bool,
    read_old: bool,
    products: list[int],
) -> None:
    flags: dict[str, Any] = {"persist": persist, "counter": counter, "read_old": read_old}
    bundle = looped(tmp_path_factory.mktemp("b") / "bundle", count, **flags)
    reference = Reference(count, **flags)
    frames = np.random.default_rng(1).integers(0, 255, (len(products), 4, 4, 3), np.uint8)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        for frame, product in zip(frames, products, strict=True):
            np.copyto(program.frame, frame)
            result = program.run(product)
            u, v, residual = reference.run(frame, product)
            np.testing.assert_allclose(program.read("step.u_next"), u, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(program.read("step.v_next"), v, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(result.map[0], residual, rtol=2e-5, atol=1e-5)
            assert result.score == pytest.approx(v.max(), rel=2e-5)
            np.testing.assert_allclose(program.read_state("u0"), reference.u0, rtol=2e-5, atol=1e-6)
            for c in (0, 1):
                np.testing.assert_allclose(program.read_state("v0", c), reference.v0[c], rtol=2e-5, atol=1e-6)


def test_a_program_binds_constants_of_its_own(tmp_path: Path) -> None:
    """One engine, two programs: what a run names in `inputs` is bound instead of the stage's source, for it alone."""
    encode: dict[str, Any] = {"run": "encode"}
    path = build(
        tmp_path / "bundle",
        stages={"encode": (ENCODE, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})},
        program=[encode, {"run": "score"}],
        alternatives={"other": [encode, {"run": "score", "inputs": {"u": "class:w"}}]},
        state={"w": STATE["w"]},
        class_bound=("w",),
    )
    bundle = Bundle.load(path)
    for name, expected in (("default", np.full((2, 3), 0.0)), ("other", STATE["w"][:, 0])):
        with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend, program=name) as program:
            program.frame[:] = 0
            for c in (0, 1):
                np.testing.assert_allclose(program.run(c).map[0], expected[c], atol=1e-6)


def test_a_frame_allocates_nothing_in_the_executor(tmp_path: Path) -> None:
    """No tensor and nothing that stays: what a frame leaves behind is bounded by the one Result it returns."""
    bundle = looped(tmp_path / "bundle", 8, persist=True, counter=True, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        for _ in range(20):
            program.run(0)
        tracemalloc.start()
        program.run(0)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(200):
            program.run(0)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 512, "memory grows from frame to frame"
    assert peak - before < 4096, "a frame makes more than a few Python objects"


def test_stage_inputs_are_the_producers_buffers(tmp_path: Path) -> None:
    """Zero copies between stages: what `step` wrote last is, as memory, what `score` reads."""
    bundle = looped(tmp_path / "bundle", 3, persist=False, counter=False, read_old=False)
    bound: list[tuple[str, dict[str, int]]] = []

    class Spy(OnnxRuntimeBackend):
        def open(self, name: str, *rest: Any) -> Any:
            engine = super().open(name, *rest)
            prepare = engine.prepare

            def spy(bindings: Any) -> Any:
                bound.append((name, {key: buffer.host.ctypes.data for key, buffer in bindings.items()}))
                return prepare(bindings)

            engine.prepare = spy  # type: ignore[method-assign]
            return engine

    with Spy(threads=1) as backend, Program(bundle, backend) as program:
        program.run(1)
        program.run(1)
        (_, encode), *steps, (_, score) = bound
        assert [name for name, _ in bound] == ["encode", "step", "step", "step", "score"]  # prepared once
        program.run(0)
        assert [name for name, _ in bound[5:]] == ["step", "step", "step"]  # only what binds the class differs
        assert all(step["h"] == encode["u"] for _, step in steps)
        for (_, earlier), (_, later) in pairwise(steps):
            assert (later["u"], later["v"]) == (earlier["u_next"], earlier["v_next"])
        assert (score["u"], score["v"]) == (steps[-1][1]["u_next"], steps[-1][1]["v_next"])
        addresses = {step[name] for _, step in steps for name in ("u_next", "v_next")}
        assert len(addresses) == 4  # ping-pong: two buffers a carry, however many steps
        assert all(address % 64 == 0 for step in (encode, score) for address in step.values())


def test_the_last_step_writes_a_persistent_state_in_place(tmp_path: Path) -> None:
    class Counting(OnnxRuntimeBackend):
        copies = 0

        def copy(self, target: Any, source: Any) -> Any:
            self.copies += 1
            return super().copy(target, source)

    for count, read_old, copies in ((1, False, 2), (2, False, 0), (3, False, 0), (2, True, 1)):
        bundle = looped(tmp_path / f"{count}{read_old}", count, persist=True, counter=False, read_old=read_old)
        counting = Counting(threads=1)
        with counting as backend, Program(bundle, backend) as program:
            program.run(0)
            assert counting.copies == copies


def test_states_can_be_written_between_frames(tmp_path: Path) -> None:
    bundle = looped(tmp_path / "bundle", 2, persist=False, counter=False, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        before = program.run(1).score
        program.write_state("v0", np.full((1, 2), 100, np.float32), slice(1, 2), class_index=1)
        assert program.read_state("v0", 1)[1].tolist() == [100, 100]
        assert program.run(1).score > before + 10
        assert program.read_state("v0", 0) == pytest.approx(STATE["v0"][0])
        for bad in (np.zeros((2, 2), np.float64), np.zeros((3, 2), np.float32)):
            with pytest.raises(EngineError, match="cannot take these values"):
                program.write_state("v0", bad)
        with pytest.raises(EngineError, match="has no state x"):
            program.write_state("x", np.zeros(1, np.float32))


def test_reset_brings_back_what_persists_whatever_became_of_the_folder(tmp_path: Path) -> None:
    """Another model is copied over the bundle of a running line, and then it is removed."""
    bundle = looped(tmp_path / "bundle", 3, persist=True, counter=True, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        first = program.run(0).score
        assert program.run(0).score != first
        program.reset()
        assert program.run(0).score == first
        for file in {entry.file for entry in bundle.manifest.state.values()}:
            arrays = dict(np.load(bundle.root / file))
            np.savez(bundle.root / file, **{name: array + 1 for name, array in arrays.items()})
        program.reset()
        assert program.run(0).score == first
        shutil.rmtree(bundle.root)
        program.reset()
        assert program.run(0).score == first


def test_an_engine_that_fails_is_named_and_leaves_no_half_written_state(tmp_path: Path) -> None:
    bundle = looped(tmp_path / "bundle", 3, persist=True, counter=True, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        first = program.run(0).score
        engine = program._engines["score"]
        session, engine._errors = engine._session, (*engine._errors, ZeroDivisionError)  # type: ignore[attr-defined]
        compiled = program._compiler._compiled.pop(0)

        class Broken:
            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def run_with_iobinding(self, binding: Any) -> None:
                raise ZeroDivisionError("device lost")

        engine._session = Broken()  # type: ignore[attr-defined]
        program._compiler._launches.clear()
        with pytest.raises(EngineError, match=r"stage score failed in onnxruntime\n.*device lost"):
            program.run(0)
        program._compiler._compiled[0] = compiled
        assert program.run(0).score == first


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    bundle = looped(tmp_path / "bundle", 1, persist=False, counter=False, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        with pytest.raises(EngineError, match="has no value yet"):
            program.read("encode.u")
        with pytest.raises(ConfigError, match="no such product index"):
            program.run(2)
        program.run(0)
        with pytest.raises(EngineError, match=r"no output encode\.x"):
            program.read("encode.x")


SWAP = """swap (float[1,3] p, float[1,3] q, float[1,3] h) => (float[1,3] p_next, float[1,3] q_next) {
    k = Constant<value = float {0.5}>()
    pk = Mul(p, k)
    p_next = Add(pk, h)
    q_next = Sub(q, pk)
}"""
TAIL = """tail (float[1,3] r, float[1,3] h) => (float[1,3] r_next, float[1,3] seen) {
    seen = Sub(r, h)
    r_next = Add(r, h)
}"""
SUM = """score (float[1,3] p, float[1,3] q, float[1,3] r) => (float[1,1,1,3] map, float[1] score) {
    pq = Add(p, q)
    s = Add(pq, r)
    shape = Constant<value = int64[4] {1,1,1,3}>()
    map = Reshape(s, shape)
    score = ReduceMax<axes=[1], keepdims=0>(s)
}"""


#: A loop of 0 steps may keep its own state only; test_wiring_of_loops has the refusal.
CHAINS = [(n, m, crossed) for n in range(5) for m in range(4) for crossed in (False, True) if n or not crossed]


@pytest.mark.parametrize("swap_first", [True, False])
@pytest.mark.parametrize(("first", "second", "crossed"), CHAINS)
def test_two_loops_in_a_chain_that_persist_each_others_values(
    tmp_path: Path, first: int, second: int, crossed: bool, swap_first: bool
) -> None:
    """Crossed: p starts from x and is kept in y, q the other way round. The loop `tail` starts from x too, before or
    after the other may have written it, and with 0 steps hands it on: the score must see the value from before."""
    kept = {"p": "y", "q": "x"} if crossed else {"p": "x", "q": "y"}
    state = {name: np.full((1, 3), value, np.float32) for name, value in (("x", 0.25), ("y", -0.75))}
    loops: list[dict[str, Any]] = [
        {
            "loop": "swap",
            "count": first,
            "carry": {"p_next": "p", "q_next": "q"},
            "init": {"p": "state:x", "q": "state:y"},
            "persist": kept,
        },
        {"loop": "tail", "count": second, "carry": {"r_next": "r"}, "init": {"r": "state:x"}},
    ]
    path = build(
        tmp_path / "bundle",
        stages={
            "encode": (ENCODE, {"image": "frame"}),
            "swap": (SWAP, {"p": "carry", "q": "carry", "h": "encode.u"}),
            "tail": (TAIL, {"r": "carry", "h": "encode.u"}),
            "score": (SUM, {"p": "swap.p_next", "q": "swap.q_next", "r": "tail.r_next"}),
        },
        program=[{"run": "encode"}, *(loops if swap_first else loops[::-1]), {"run": "score"}],
        state=state,
    )
    x, y = state["x"], state["y"]
    with OnnxRuntimeBackend(threads=1) as backend, Program(Bundle.load(path), backend) as program:
        for level in (10, 90, 200):
            program.frame.fill(level)
            result = program.run(0)
            h, p, q, r = np.float32(level * 0.01), x, y, x
            for _ in range(first):
                p, q = p * np.float32(0.5) + h, q - p * np.float32(0.5)
            for _ in range(second):
                r = r + h
            np.testing.assert_allclose(result.map[0], (p + q + r)[0], rtol=1e-5, atol=1e-6)
            x, y = (q, p) if crossed else (p, q)
            np.testing.assert_allclose(program.read_state("x"), x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(program.read_state("y"), y, rtol=1e-5, atol=1e-6)


WIRED: dict[str, Any] = {
    "loop": "swap",
    "count": 2,
    "carry": {"p_next": "p", "q_next": "q"},
    "init": {"p": "state:x", "q": "state:y"},
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"count": 0, "persist": {"p": "y"}}, "a loop of 0 steps over swap persists another state's value"),
        ({"persist": {"p": "x", "q": "x"}}, "two loops persist in one state"),
        ({"persist": {"h": "x"}}, "persists but is not carried"),
        ({"persist": {"p": "z"}}, "persists in an unknown state"),
        ({"carry": {"p_next": "p", "q_next": "p"}}, "does not bind its carries"),
        ({"carry": {"nothing": "p", "q_next": "q"}}, "carries an unknown output"),
        ({"init": {"p": "state:x"}}, "does not bind its init"),
        ({"init": {"p": "state:x", "q": "carry"}}, "cannot start from a carry"),
        ({"counter": "t"}, "counts steps but has no table"),
    ],
)
def test_wiring_of_loops(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(BundleError, match=match):
        Bundle.load(
            build(
                tmp_path / "bundle",
                stages={
                    "encode": (ENCODE, {"image": "frame"}),
                    "swap": (SWAP, {"p": "carry", "q": "carry", "h": "encode.u"}),
                    "score": (SCORE, {"u": "swap.p_next"}),
                },
                program=[{"run": "encode"}, {**WIRED, **change}, {"run": "score"}],
                state={name: np.zeros((1, 3), np.float32) for name in "xy"},
            )
        )


def test_a_loop_of_0_steps_has_no_outputs_but_its_carries(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a loop of 0 steps never writes"):
        looped(tmp_path / "bundle", 0, persist=False, counter=False, read_old=False, final_u="step.aux")


def test_a_table_must_have_a_row_for_every_step(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="table coef has too few rows"):
        looped(tmp_path / "bundle", 10, persist=False, counter=False, read_old=False)


def test_timings_are_of_the_last_frame_alone(tmp_path: Path) -> None:
    bundle = looped(tmp_path / "bundle", 4, persist=False, counter=False, read_old=False)
    with OnnxRuntimeBackend(threads=1) as backend, Program(bundle, backend) as program:
        for _ in range(50):
            start = perf_counter()
            program.run(0)
            wall = (perf_counter() - start) * 1e3
            assert 0 < sum(program.stage_ms.values()) <= wall
        assert list(program.stage_ms) == ["encode", "step", "score"]


def test_a_classifier_that_needs_to_know_the_class_is_none(tmp_path: Path) -> None:
    """`auto` runs the steps up to the logits first: a per-class state before them would have to be guessed."""
    encode = ENCODE.replace("image) =>", "image, float[1,3] w) =>").replace(
        "u = Mul(m, k)", "mk = Mul(m, k)\n    u = Add(mk, w)"
    )
    path = build(
        tmp_path / "bundle",
        stages={
            "encode": (encode, {"image": "frame", "w": "class:w"}),
            "score": (SCORE, {"u": "encode.u"}),
        },
        program=[{"run": "encode"}, {"run": "score"}],
        state={"w": STATE["w"]},
        class_bound=("w",),
    )
    with OnnxRuntimeBackend(threads=1) as backend, Program(Bundle.load(path), backend) as program:
        assert program.run(0).logits is None
        with pytest.raises(ConfigError, match="cannot tell the product by itself"):
            program.run(None)
