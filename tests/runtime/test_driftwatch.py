"""The drift watch of a line: with and without a memory that learns, over restarts, rollbacks and changes of program."""

from __future__ import annotations

import numpy as np
import pytest
from andon.runtime.driftwatch import DriftWatch
from andon.runtime.errors import ConfigError
from andon.runtime.memoryconfig import DriftConfig, MemoryConfig

from .memorystation import DRIFTS, drift_up


def test_a_bundle_without_use_of_its_memory_still_warns_of_drift(station):
    config = MemoryConfig(enabled=False, drift=DriftConfig(reference=10, window=10, alpha=0.01))
    line = station(config)
    rng = np.random.default_rng(0)
    for _ in range(25):
        line.see(int(rng.integers(100, 103)))
    assert line.memory.version("a") is None and line.memory.drift("cam") == {}
    for _ in range(12):
        line.see(int(rng.integers(104, 106)))
    assert "scores moved up" in line.memory.drift("cam")["a"]
    assert line.memory.drift("other") == {}
    with pytest.raises(ConfigError, match="no memory to command"):
        line.memory.command("freeze", {})
    line.close()
    again = station(config)
    assert again.memory.drift("cam")
    again.memory.command("reset", {})
    assert again.memory.drift("cam") == {}
    for _ in range(25):
        again.see(int(rng.integers(104, 106)))
    assert again.memory.drift("cam") == {}, "a new lamp is the new reference"


def test_a_drift_reference_is_of_one_program(station):
    line = station(DRIFTS)
    for _ in range(12):
        line.see(100, label="NG")
    line.close()
    other = station(DRIFTS, program="other")
    for _ in range(12):
        other.see(105, label="NG")
    assert other.memory.drift("cam") == {}, "its scores are higher because they are another program's"


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


def test_a_rollback_takes_the_drift_warning_back(station):
    line = station(DRIFTS)
    drift_up(line, np.random.default_rng(0))
    line.memory.command("rollback", {"version": 0})
    assert line.memory.drift("cam") == {} and line.memory.describe()["drift"] == []


def test_a_drift_warning_ends_where_drift_is_not_watched(station):
    line = station(DRIFTS)
    drift_up(line, np.random.default_rng(0))
    line.close()
    assert station(DRIFTS).memory.drift("cam"), "it survives a restart"
    again = station(DRIFTS.model_copy(update={"drift": DriftConfig(enabled=False)}))
    assert again.memory.drift("cam") == {} and again.memory.describe()["drift_score"] == {}


def test_pictures_of_a_camera_that_runs_freely_are_not_counted_one_by_one(station):
    line = station(DRIFTS)
    for index in range(30):
        line.see(100 + index // 10, label="NG", named=False)
    assert not line.memory._drift.monitors["cam/a"].complete
    line.memory._offer()
    line.memory._saver.flush()
    (restored,) = station(DRIFTS).memory._drift.monitors.values()
    assert len(restored.spacing.state()["measuring"]) == 30, "what was measured outlives a power cut"
    for _ in range(12):
        line.see(100, product="b", label="NG")
    assert line.memory._drift.monitors["cam/b"].complete


def test_what_counts_of_a_camera_that_runs_freely_is_said_when_it_is_known(caplog):
    caplog.set_level("INFO")
    rng, watch = np.random.default_rng(0), DriftWatch(DriftConfig())
    for level in rng.normal(size=600):
        for _ in range(3):
            watch.observe("cam", "nut", level + rng.normal(0, 0.1), False)
            watch.observe("cam2", "nut", level, True)
    every = watch.monitors["cam/nut"].spacing.stride
    said = [record.message for record in caplog.records]
    assert said == [f"camera cam: drift reference of nut taken; one score in {every} to {2 * every} counts"]


def test_each_product_of_a_camera_drifts_for_itself():
    watch = DriftWatch(DriftConfig(reference=10, window=10, alpha=0.01))
    for level in range(10):
        for where in ("cam/bolt", "cam/nut", "cam2/nut"):
            watch.observe(*where.split("/"), level, True)
    for level in range(20, 30):
        watch.observe("cam", "nut", level, True)
    assert list(watch.warnings("cam")) == ["nut"] and watch.warnings("cam2") == {}
    for level in range(20, 30):
        watch.observe("cam", "bolt", level, True)
        watch.observe("cam2", "nut", level, True)
    assert sorted(watch.warnings("cam")) == ["bolt", "nut"]
    assert watch.warnings("cam")["nut"] == "nut: scores moved up, KS 1.00 against 0.68"
    watch.reset("cam")
    assert watch.warnings("cam") == {} and list(watch.warnings("cam2")) == ["nut"]
    assert not watch.monitors["cam/bolt"].complete and watch.monitors["cam2/nut"].complete


@pytest.mark.parametrize("enabled", [False, True])
def test_a_new_reference_leaves_what_was_learnt(station, enabled):
    config = DRIFTS.model_copy(update={"enabled": enabled})
    line, rng = station(config), np.random.default_rng(0)
    for _ in range(12):
        line.see(int(rng.integers(100, 103)))
    for _ in range(12):
        line.see(int(rng.integers(106, 109)), label="NG")
    learnt, version = line.memory.describe().get("rows"), line.memory.version("a")
    assert line.memory.drift("cam") and (not enabled or learnt["a"] > 0)
    answer = line.memory.command("reference", {"camera": "other"})
    assert answer["drift"] == ["cam/a"], "another camera's is its own"
    answer = line.memory.command("reference", {"camera": "cam", "by": "Ada"})
    assert answer["drift"] == [] and answer.get("rows") == learnt and answer["version"] == version
    last = line.memory._audit.entries()[-1]
    assert (last["action"], last["camera"], last["by"]) == ("reference", "cam", "Ada")
    again = station(config)  # after a power cut
    assert again.memory.drift("cam") == {} and again.memory.describe().get("rows") == learnt
    for _ in range(25):
        again.see(int(rng.integers(106, 109)), label="NG")
    assert again.memory.drift("cam") == {}, "what was a drift is usual now"


@pytest.mark.parametrize("enabled", [False, True])
def test_no_new_reference_where_drift_is_not_watched(station, enabled):
    line = station(DRIFTS.model_copy(update={"enabled": enabled, "drift": DriftConfig(enabled=False)}))
    with pytest.raises(ConfigError, match="watches no drift"):
        line.memory.command("reference", {"camera": "cam"})
