"""Online calibration on a real program: what is written reaches the next frame, survives a restart, obeys commands."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from andon.calib.snapshots import SnapshotStore
from andon.runtime.autosave import Autosave
from andon.runtime.bundle import Bundle
from andon.runtime.detector import Detector
from andon.runtime.engine.select import open_backend
from andon.runtime.errors import CalibrationError, ConfigError, EngineError
from andon.runtime.judge import Judgement
from andon.runtime.manifest import Threshold
from andon.runtime.memory import LineMemory
from andon.runtime.memoryconfig import DriftConfig, GuardConfig, MemoryConfig
from andon.runtime.types import Frame, Verdict
from hypothesis import given, settings
from hypothesis import strategies as st

SEMANTIC, SPARE = 2, 6

#: uint8 frame [1,4,4,3] -> 16 patches of 3 numbers
FEATURES = """features (uint8[1,4,4,3] image) => (float[16,3] patches) {
    x = Cast<to=1>(image)
    shape = Constant<value = int64[2] {16,3}>()
    patches = Reshape(x, shape)
}"""
#: distance to the nearest valid row, 1-norm, as memory methods do it with the 2-norm
SCORE = f"""score (float[16,3] patches, float[{SEMANTIC + SPARE},3] bank, float[{SEMANTIC + SPARE}] valid)
 => (float[1,1,4,4] map, float[1] score, float[16] patch_score) {{
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
    shape = Constant<value = int64[4] {{1,1,4,4}}>()
    map = Reshape(patch_score, shape)
    score = ReduceMax<axes=[0], keepdims=1>(patch_score)
}}"""

GUARD = GuardConfig(share=1.0, warmup=2, window=5, quantile=1.0, local_bound=1e6, global_bound=1e6)
CONFIG = MemoryConfig(enabled=True, per_frame=2, guard=GUARD, save_every=3600, snapshot_every=1)
DRIFTS = CONFIG.model_copy(update={"drift": DriftConfig(reference=10, window=10, alpha=0.01)})


def memory_parts(classes=("a", "b"), per_class=True):
    """What conftest.build makes a bundle with a memory of."""
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
        },
    }


@pytest.fixture
def memory_bundle(make_bundle):
    return lambda *parts, **more: make_bundle(**memory_parts(*parts, **more))


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

    def see(self, value, product="a", label=None):
        image = np.full((4, 4, 3), value, np.uint8)
        scored = self.detector.judge_image(image, product)
        now = datetime.now(timezone.utc)
        self.seq += 1
        verdict = Verdict(str(self.seq), "cam", self.seq, now, now, label or scored.label, "", product=product)
        frame = Frame("cam", self.seq, now, 0.0, image)
        self.memory.after_frame(self.detector.program, Judgement(verdict, scored), frame)
        return scored.score

    def close(self):
        self.memory.close()
        self.detector.close()
        self.backend.close()


@pytest.fixture
def station(memory_bundle, tmp_path):
    opened = []

    def make(config=CONFIG, bundle=None, program="default"):
        if not hasattr(make, "bundle"):
            make.bundle = memory_bundle()
        opened.append(Station(bundle or make.bundle, tmp_path / "state", config, program))
        return opened[-1]

    yield make
    for each in opened:
        if each.detector.program._engines:
            each.close()


def test_an_accepted_frame_lowers_the_next_score_and_counts_a_version(station):
    line = station()
    assert [line.see(104) for _ in range(2)] == [12, 12]
    assert line.memory.version("a") == 0
    assert line.see(104) == 12  # scored before the update, with the memory as it was
    assert line.memory.version("a") == 1
    assert line.see(104) == 0
    assert line.see(104, "b") == 12, "each product has its own memory"


def test_an_ng_frame_teaches_nothing(station):
    line = station()
    for _ in range(5):
        line.see(104)
    version = line.memory.version("a")
    assert line.see(160) == 150
    assert line.see(160) == 150
    assert line.memory.version("a") == version
    assert line.memory.describe()["frames"]["not_ok"] == 2


def test_patches_are_not_fetched_of_a_frame_that_cannot_teach(station, monkeypatch):
    line = station()
    fetched, read = [], line.detector.program.read
    monkeypatch.setattr(line.detector.program, "read", lambda name: (fetched.append(name), read(name))[1])
    line.see(104, label="NG")
    line.memory.command("freeze", {})
    line.see(104)
    assert fetched == [] and line.memory.describe()["frames"] == {"not_ok": 1, "frozen": 1}
    line.memory.command("unfreeze", {})
    line.see(104)
    assert fetched


def test_what_is_offered_for_saving_is_the_present_state_and_copied_only_where_it_changed(station):
    line = station()

    def offered():
        for calibrator, index in zip(line.memory._banks.calibrators, "01", strict=True):
            for name, value in calibrator.state().items():
                np.testing.assert_array_equal(line.memory._saver._pending[0][f"{index}.{name}"], value, err_msg=name)
        return line.memory._saver._pending[0]

    for product in "aabbab":
        line.see(104, product)
    before = offered()
    line.see(105)
    line.see(160, "b")  # teaches nothing, but a calibrator may have looked at it
    line.see(105)
    after = offered()
    assert before["0.memory.rows"] is not after["0.memory.rows"]
    line.see(103)
    last = offered()
    assert last["1.memory.rows"] is after["1.memory.rows"], "the other product is not copied again"
    line.memory._saver.flush()
    for command in ("freeze", "unfreeze", "reset"):
        line.memory.command(command, {})
        line.memory._offer()
        offered()


def test_restart_goes_on_where_it_stopped(station):
    line = station()
    for value in (104, 105, 104, 103):
        line.see(value)
    version, rows = line.memory.version("a"), line.memory.describe()["rows"]
    line.close()
    again = station()
    assert again.memory.version("a") == version
    assert again.memory.describe()["rows"] == rows
    assert again.see(104) == 0


def test_freeze_unfreeze(station):
    line = station()
    for _ in range(2):
        line.see(104)
    assert line.memory.command("freeze", {"by": "ann"})["frozen"]
    line.see(104)
    assert line.memory.version("a") == 0
    line.close()
    again = station()
    assert again.memory.describe()["frozen"], "a frozen memory stays frozen over a restart"
    assert not again.memory.command("unfreeze", {})["frozen"]
    again.see(104)
    assert again.memory.version("a") == 1


def test_snapshot_rollback_and_reset_reach_the_engine(station):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    line.see(120, label="OK")
    line.see(120, label="OK")
    assert line.see(120) == 0
    versions = line.memory.version("a")
    result = line.memory.command("rollback", {"version": 1})
    assert result["version"] == versions + 1
    assert line.see(120, label="NG") == 30
    assert line.see(104, label="NG") == 0
    line.memory.command("reset", {})
    assert line.see(104, label="NG") == 12
    assert line.memory.version("a") == versions + 2


def test_a_command_outlives_a_power_cut_right_after_its_answer(station):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("freeze", {})
    after = station()  # the first one never closes, and its next save is an hour away
    assert after.memory.describe()["frozen"] and after.memory.describe()["rows"]["a"] == 2
    after.memory.command("reset", {})
    assert station().memory.describe()["rows"]["a"] == 0, "what had been learnt wrongly is not back"


def test_rollback_without_a_version_takes_the_newest_older_one(station):
    line = station()
    with pytest.raises(CalibrationError, match="no older version"):
        line.memory.command("rollback", {})
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    line.see(108)
    line.memory.command("rollback", {})
    assert line.memory.describe()["rows"]["a"] == 2
    with pytest.raises(CalibrationError, match="no such version"):
        line.memory.command("rollback", {"version": 99})
    with pytest.raises(ConfigError, match="no memory action"):
        line.memory.command("explode", {})


def test_the_snapshots_of_an_answer_are_the_versions_that_rollback_takes(station, tmp_path):
    line = station()
    for value in (104, 104, 104, 105):
        line.see(value)
    line.memory.command("snapshot", {})
    line.memory.command("snapshot", {})
    line.see(106)
    answer = line.memory.command("freeze", {})  # it saves
    assert answer["snapshots"] == [3, 2]
    for version in answer["snapshots"]:
        line.memory.command("rollback", {"version": version})
    (tmp_path / "state" / "pinned-0000000099.snapshot").write_bytes(b"half")
    assert line.memory.describe()["snapshots"] == [5, 4, 3, 2], "what cannot be read is not offered"


def poisoned(station):
    """A line with four saved versions of 1 to 4 rows, the last of which has learnt a defect, then scored 0."""
    line = station(CONFIG.model_copy(update={"per_frame": 1, "snapshot_every": 3600}))
    for value in (104, 104, 104, 105, 106, 150, 150):  # the guard takes the second of two that are alike
        line.see(value, label="OK")
        line.memory.command("snapshot", {})
    assert line.memory.version("a") == line.memory.describe()["rows"]["a"] == 4 and line.see(150, label="NG") == 0
    return line


def test_no_number_of_rollbacks_brings_back_what_the_first_took_out(station):
    line, rows = poisoned(station), []
    for _ in range(3):
        line.memory.command("rollback", {})
        assert line.see(150, label="NG") > 0
        rows.append(line.memory.describe()["rows"]["a"])
    assert rows == [3, 2, 1], "each goes on from where the one before went"


def test_what_was_rolled_back_stays_out_when_the_memory_learns_on(station):
    line = poisoned(station)
    line.memory.command("rollback", {})
    for value in (103, 102, 101):  # the ring's next turn is an hour away: of these only the two newest are saved
        line.see(value)
        line.memory._saver.flush()
    line.close()
    line = station()
    for _ in range(5):
        line.memory.command("rollback", {})
        assert line.see(150, label="NG") > 0
        if line.memory.describe()["rows"]["a"] == 0:
            break
    assert line.memory.describe()["rows"]["a"] == 0, "down to what was enrolled"
    with pytest.raises(CalibrationError, match="no older version"):
        line.memory.command("rollback", {})
    line.memory.command("rollback", {"version": 4})
    assert line.see(150, label="NG") == 0, "by its number it can be had again"
    line.memory.command("rollback", {})
    assert line.memory.describe()["rows"]["a"] == 3 and line.see(150, label="NG") > 0


def test_audit_says_what_was_admitted_from_which_frame_and_why(station):
    line = station()
    for _ in range(3):
        line.see(104)
    entry = [e for e in line.memory._audit.entries() if e["action"] == "admit"][-1]
    assert entry["camera"] == "cam" and entry["seq"] == 3 and entry["verdict"] == "3"
    assert entry["version"] == 1 and entry["product"] == "a" and len(entry["patches"]) == 2
    assert entry["score"] == 12 and entry["limit"] == 12 and "quantile" in entry["why"]


def test_damaged_newest_snapshot_is_passed_over(station, tmp_path, caplog):
    line = station()
    for _ in range(3):
        line.see(104)
    line.memory.command("snapshot", {})
    line.see(108)
    line.close()
    newest = max((tmp_path / "state").glob("*.snapshot"), key=lambda p: int(p.stem.split("-")[1]))
    newest.write_bytes(newest.read_bytes()[:-9])
    again = station()
    assert again.memory.describe()["rows"]["a"] == 2, "the state of version 1"
    assert again.memory.version("a") == 3, "under a new number, for 2 was in use"
    assert "is not used" in caplog.text


def test_a_number_that_was_published_is_not_used_again_where_no_snapshot_is_left(station, tmp_path):
    line = station()
    for value in (104, 105, 104, 108):
        line.see(value)
    assert line.memory.version("a") == 2 and not list((tmp_path / "state").glob("*.snapshot"))
    again = station()  # the first one was killed within its first minute
    assert again.memory.version("a") == 3 and again.memory.describe()["rows"]["a"] == 0
    assert station().memory.version("a") == 3, "nothing has changed since"


def test_state_of_another_bundle_is_refused(station, memory_bundle, caplog):
    line = station()
    for _ in range(3):
        line.see(104)
    line.close()
    other = station(bundle=memory_bundle(("x", "y")))
    assert other.memory.describe()["rows"] == {"x": 0, "y": 0}
    assert other.memory.version("x") == 2, "the numbers of a state folder go on, whatever is in them"
    assert "another bundle" in caplog.text


def test_shared_memory_of_several_products(memory_bundle, tmp_path):
    line = Station(memory_bundle(per_class=False), tmp_path / "s")
    for _ in range(3):
        line.see(104, "a")
    assert line.see(104, "b") == 0
    line.close()


def test_an_engine_that_takes_no_update_makes_the_product_unjudgeable(station, monkeypatch):
    line = station()
    for _ in range(2):
        line.see(104)
    assert line.memory.unusable("a") is None

    def refuse(*args, **kwargs):
        raise EngineError("copy failed")

    monkeypatch.setattr(line.detector.program, "write_state", refuse)
    line.see(104)
    assert "copy failed" in line.memory.unusable("a")
    assert line.memory.unusable("b") is None
    monkeypatch.undo()
    line.memory.command("reset", {})
    assert line.memory.unusable("a") is None


def test_a_bundle_without_use_of_its_memory_still_warns_of_drift(station):
    config = MemoryConfig(enabled=False, drift=DriftConfig(reference=10, window=10, alpha=0.01))
    line = station(config)
    rng = np.random.default_rng(0)
    for _ in range(25):
        line.see(int(rng.integers(100, 103)))
    assert line.memory.version("a") is None and line.memory.drift("cam") is None
    for _ in range(12):
        line.see(int(rng.integers(104, 106)))
    assert "scores moved up" in line.memory.drift("cam")
    assert line.memory.drift("other") is None
    with pytest.raises(ConfigError, match="no memory to command"):
        line.memory.command("freeze", {})
    line.close()
    again = station(config)
    assert again.memory.drift("cam") is not None
    again.memory.command("reset", {})
    assert again.memory.drift("cam") is None
    for _ in range(25):
        again.see(int(rng.integers(104, 106)))
    assert again.memory.drift("cam") is None, "a new lamp is the new reference"


def test_a_drift_reference_is_of_one_program(station):
    line = station(DRIFTS)
    for _ in range(12):
        line.see(100, label="NG")
    line.close()
    other = station(DRIFTS, program="other")
    for _ in range(12):
        other.see(105, label="NG")
    assert other.memory.drift("cam") is None, "its scores are higher because they are another program's"


@pytest.mark.parametrize("enabled", [False, True])
def test_the_drift_watch_outlives_a_power_cut_where_nothing_is_learnt(station, enabled):
    config = DRIFTS.model_copy(update={"enabled": enabled})
    line, rng = station(config), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)), label="NG")
    line.memory._saver.flush()  # as every minute
    again = station(config)  # the first one never closes
    for _ in range(12):
        again.see(int(rng.integers(104, 106)), label="NG")
    assert again.memory.drift("cam"), "held against the reference of before, not against scores that have moved"
    again.memory._saver.flush()
    assert station(config).memory.drift("cam"), "a warning that stands is not taken for gone"


def test_a_memory_that_is_switched_off_is_there_when_it_is_switched_on_again(station, caplog):
    line, rng = station(DRIFTS), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)))
    rows, version = line.memory.describe()["rows"]["a"], line.memory.version("a")
    assert rows > 0
    line.close()
    off = DRIFTS.model_copy(update={"enabled": False})
    for _ in range(9):  # more often than snapshots are kept
        line = station(off)
        line.see(101)
        line.close()
    line = station(off)
    for _ in range(12):
        line.see(int(rng.integers(106, 109)), label="NG")
    assert line.memory.drift("cam"), "held against the reference of before"
    line.close()
    line = station(DRIFTS)
    assert (line.memory.describe()["rows"]["a"], line.memory.version("a")) == (rows, version)
    assert line.memory.drift("cam") and "another bundle" not in caplog.text


def test_a_memory_that_is_switched_on_later_starts_as_enrolled(station):
    off = DRIFTS.model_copy(update={"enabled": False})
    line = station(off)
    for _ in range(12):
        line.see(101, label="NG")
    line.close()
    line = station(DRIFTS)
    assert line.memory.describe()["rows"]["a"] == 0 and line.memory._drift.monitors["cam/a"].complete


def drift_up(line, rng):
    """25 usual scores, a snapshot, then larger ones until the monitor warns."""
    for _ in range(25):
        line.see(int(rng.integers(100, 103)), label="NG")
    line.memory.command("snapshot", {})
    for _ in range(12):
        line.see(int(rng.integers(104, 106)), label="NG")
    assert line.memory.drift("cam")


def test_a_rollback_takes_the_drift_warning_back(station):
    line = station(DRIFTS)
    drift_up(line, np.random.default_rng(0))
    line.memory.command("rollback", {"version": 0})
    assert line.memory.drift("cam") is None and line.memory.describe()["drift"] == []


def test_a_drift_warning_ends_where_drift_is_not_watched(station):
    line = station(DRIFTS)
    drift_up(line, np.random.default_rng(0))
    line.close()
    assert station(DRIFTS).memory.drift("cam"), "it survives a restart"
    again = station(DRIFTS.model_copy(update={"drift": DriftConfig(enabled=False)}))
    assert again.memory.drift("cam") is None and again.memory.describe()["drift_score"] == {}


def test_frames_without_a_score_are_left_alone(station):
    line = station()
    now = datetime.now(timezone.utc)
    verdict = Verdict("1", "cam", 1, now, now, "UNKNOWN", "engine_error")
    frame = Frame("cam", 1, now, 0.0, np.zeros((4, 4, 3), np.uint8))
    line.memory.after_frame(line.detector.program, Judgement(verdict), frame)
    scored = line.detector.judge_image(np.full((4, 4, 3), 104, np.uint8), "a")
    broken = replace(scored, score=float("nan"))
    line.memory.after_frame(line.detector.program, Judgement(verdict, broken), frame)
    assert line.memory.describe()["frames"] == {}


def test_an_audit_log_that_cannot_be_written_costs_nothing_but_its_lines(station, monkeypatch, caplog):
    line = station()
    line.memory._audit.limit = 300

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("andon.calib.snapshots.write_atomic", full)
        for value in (104, 104, 104, 105, 106):
            line.see(value)
        assert line.memory.command("freeze", {})["frozen"]
    line.memory.command("unfreeze", {})
    line.see(103)
    assert line.memory.version("a") == 4
    assert line.memory._saver._pending[1]["version"] == 4, "what was learnt is offered for saving"
    line.close()
    assert [r.message for r in caplog.records if "audit log" in r.message and r.levelname == "ERROR"] != []
    assert station().memory.version("a") == 4


@pytest.mark.parametrize("method", ["write", "sync", "close"])
def test_no_trouble_of_the_audit_log_reaches_the_line(station, monkeypatch, caplog, method):
    line = station(DRIFTS)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(line.memory._audit, method, refuse)
    drift_up(line, np.random.default_rng(0))
    version = line.memory.command("reset", {})["version"]
    line.close()
    said = [r.message for r in caplog.records if "audit log" in r.message and r.levelname == "ERROR"]
    assert said and "No space left" in said[0] and str(line.memory._audit.path) in said[0]
    assert method != "write" or len(said) == 1, "once"
    monkeypatch.undo()
    line.memory._audit.close()
    assert station(DRIFTS).memory.version("a") == version


def test_the_audit_log_is_on_the_disk_before_the_snapshot_that_it_explains(station, monkeypatch):
    line, calls = station(), []
    for owner, name in ((line.memory._audit, "sync"), (line.memory._store, "save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    for _ in range(3):
        line.see(104)
    line.memory._saver.flush()
    assert calls == ["sync", "save"]


def test_a_state_folder_that_is_removed_is_made_again(station, tmp_path):
    line = station()
    for _ in range(3):
        line.see(104)
    shutil.rmtree(tmp_path / "state")
    assert line.memory.describe()["snapshots"] == []
    line.see(105)
    line.close()
    assert "admit" in (tmp_path / "state" / "audit.jsonl").read_text()
    assert station().memory.version("a") == 2


@pytest.mark.parametrize("error", [CalibrationError("no room"), OSError(5, "Input/output error"), ValueError("what?")])
def test_autosave_outlives_whatever_goes_wrong(error, caplog):
    saved, failures = threading.Event(), [error, error, error]

    class Disk:
        def age(self, kind):
            return None

        def usable(self, kind):
            return iter(())

        def save(self, arrays, meta, kind):
            if failures:
                raise failures.pop()
            saved.set()

    caplog.set_level("INFO")
    saver = Autosave(Disk(), 0.01, 3600)
    saver.offer({}, {})
    assert saved.wait(10)
    saver.close()
    said = [record.message for record in caplog.records]
    assert said == [f"memory is not being saved: {error}", "memory is saved again"]


def age_snapshots(folder, seconds):
    """As if every snapshot had been written so much earlier."""
    for path in folder.glob("*.snapshot"):
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - seconds))


MOMENTS = st.tuples(st.sampled_from(["save", "restart"]), st.integers(0, 12), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(MOMENTS, max_size=25))
def test_neither_restarts_nor_standing_still_push_history_out(tmp_path_factory, moments):
    """The ring is what its rule says, whenever the line is restarted; a restart loses nothing.

    moments: what happens, after how many hundred seconds, with which memory.
    """
    folder, every, keep, now = tmp_path_factory.mktemp("s"), 1000.0, 3, 0.0

    def start():
        return Autosave(SnapshotStore(folder, {}, keep), 3600, every, lambda: now, lambda a: {"rows": a["rows"]})

    saver, expected, taken = start(), [], None
    for frames, (what, hundreds, value) in enumerate(moments):
        now += 100.0 * hundreds
        age_snapshots(folder, 100.0 * hundreds)
        saver.offer({"rows": np.full(2, value), "guard": np.array(frames)}, {"frames": frames})
        if what == "save":
            saver.flush()
        else:
            saver.close()
            saver = start()
        if (taken is None or now - taken >= every) and expected[-1:] != [value]:
            expected, taken = [*expected, value], now
        store = SnapshotStore(folder, {}, keep)
        assert [int(kept.arrays["rows"][0]) for kept in store.usable("ring")] == expected[: -keep - 1 : -1]
        assert store.latest()[0].meta == {"frames": frames}, "whatever the ring takes, what was offered is saved"
    saver.close()


def test_a_clock_that_was_set_back_neither_pushes_history_out_nor_ends_it(tmp_path):
    now = 0.0
    store = SnapshotStore(tmp_path, {}, keep=2)
    for value in range(5):
        saver = Autosave(store, 3600, 1000, lambda: now)
        saver.offer({"rows": np.array(value)}, {})
        saver.close()
        age_snapshots(tmp_path, -(10.0**8))
    assert [int(kept.arrays["rows"]) for kept in store.usable("ring")] == [0]
    saver = Autosave(store, 3600, 1000, lambda: now)
    now += 1000
    saver.offer({"rows": np.array(5)}, {})
    saver.close()
    assert [int(kept.arrays["rows"]) for kept in store.usable("ring")] == [5, 0]


def test_quick_restarts_leave_something_to_roll_back_to(station, tmp_path):
    config = CONFIG.model_copy(update={"snapshot_every": 900, "snapshots": 2})
    line = station(config)
    for _ in range(3):
        line.see(104)
    line.close()
    age_snapshots(tmp_path / "state", 1000)
    for shade in (105, 106, 107, 108):  # each start goes on learning
        line = station(config)
        line.see(shade)
        line.close()
    line = station(config)
    assert line.memory.version("a") == 5
    line.memory.command("rollback", {"version": 1})
    assert line.memory.describe()["rows"]["a"] == 2


def test_a_memory_that_stands_still_keeps_its_history(station, tmp_path):
    line = station(CONFIG.model_copy(update={"snapshot_every": 1e-9}))  # the ring's turn comes with every save
    for _ in range(3):
        line.see(104)
    for _ in range(4):
        line.memory.command("freeze", {})  # it saves
        line.see(104)
    assert len(list((tmp_path / "state").glob("ring-*"))) == 1


def test_autosave_writes_while_the_line_runs(memory_bundle, tmp_path):
    line = Station(memory_bundle(), tmp_path / "s", CONFIG.model_copy(update={"save_every": 0.02}))
    for _ in range(3):
        line.see(104)
    for _ in range(200):
        if line.memory._store.numbers():
            break
        line.memory._saver._stop.wait(0.02)
    snapshot, _ = line.memory._store.latest()
    assert snapshot.meta["version"] == 1
    line.close()
