"""Online calibration on a real program: what is written reaches the next frame, and what may not teach does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from andon.runtime.bundle import Bundle
from andon.runtime.errors import BundleError, EngineError
from andon.runtime.judgement import Judgement
from andon.runtime.types import Frame, Verdict

from .memorystation import Station


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


def test_the_guard_goes_by_the_engines_anchors_where_the_bundle_has_them(memory_bundle, tmp_path, monkeypatch):
    """Of a bundle that has none, as those of earlier versions, the host computes them: the 2-norm here."""

    def anchors(bundle, folder):
        line, found = Station(bundle, tmp_path / folder), []
        guard = line.memory._banks.calibrators[0].guard
        judge = guard.judge
        monkeypatch.setattr(guard, "judge", lambda score, seen: (found.append(np.array(seen)), judge(score, seen))[1])
        for _ in range(5):
            line.see(104)
        assert line.see(104) == 0, "the memory knows it by now, its semantic part does not"
        line.close()
        return np.unique(found)

    np.testing.assert_allclose(anchors(memory_bundle(), "host"), 4 * 3**0.5, rtol=1e-6)
    monkeypatch.setattr("andon.calib.calibrator.nearest", lambda *_: pytest.fail("computed again"))
    assert anchors(memory_bundle(anchor="score.anchor"), "engine").tolist() == [12]


@pytest.mark.parametrize("output", ["features.patches", "score.score", "score.nothing"])
def test_anchors_that_are_not_one_distance_for_each_patch_are_refused(memory_bundle, output):
    with pytest.raises(BundleError, match="output anchor"):
        Bundle.load(memory_bundle(anchor=output))


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
