"""The order of score and update on the line: score first by default, FOCT's order by configuration."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from itertools import count

import numpy as np
import pytest
from andon.runtime.errors import ConfigError, EngineError
from andon.runtime.judge import Judge
from andon.runtime.lineconfig import CameraConfig, JudgeConfig, load_line
from andon.runtime.memoryconfig import GuardConfig, MemoryConfig
from andon.runtime.overrides import Overrides
from andon.runtime.types import Frame

from .memorystation import CONFIG, DRIFTS, Station

PAPER = CONFIG.model_copy(update={"order": "update_first"})


class Judged(Station):
    """The judging thread's order of calls, with the real judge."""

    def __init__(self, bundle_path, folder, config, smoothing=None):
        super().__init__(bundle_path, folder / "memory", config)
        camera = CameraConfig(source={"kind": "test"}, product="a", smoothing=smoothing)
        names = count(1)
        settings = JudgeConfig(thresholds={"a": 50.0})
        self.judge = Judge(
            self.detector, {"cam": camera}, settings, Overrides(folder), lambda: str(next(names)), self.memory
        )
        self.runs = 0
        run = self.detector.program.run

        def counted(class_index=None):
            self.runs += 1
            return run(class_index)

        self.detector.program.run = counted

    def see(self, value):
        """The verdict of a picture of one shade."""
        self.seq += 1
        image = np.full((4, 4, 3), value, np.uint8)
        frame = Frame("cam", self.seq, datetime.now(timezone.utc), 0.0, image, part_id=str(self.seq))
        judgement = self.judge.judge(frame)
        self.memory.after_frame(self.detector.program, judgement, frame)
        return judgement.verdict


@pytest.fixture
def judged(memory_bundle, tmp_path):
    opened = []
    bundle = memory_bundle()

    def make(config=CONFIG, **more):
        opened.append(Judged(bundle, tmp_path / f"state{len(opened)}", config, **more))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_by_default_a_frame_is_scored_first():
    assert MemoryConfig().order == CONFIG.order == "score_first"


def test_the_orders_differ_by_the_frame_that_taught(judged):
    """Two frames warm up; the third teaches. Only in the paper's order is it at no distance from itself."""
    shades = (104, 104, 104, 104)
    first, paper = judged(), judged(PAPER)
    verdicts = [first.see(shade) for shade in shades]
    assert [v.score for v in verdicts] == [12, 12, 12, 0]
    assert [v.memory_version for v in verdicts] == [0, 0, 0, 1], "the version that the score is of"
    assert first.runs == 4
    verdicts = [paper.see(shade) for shade in shades]
    assert [v.score for v in verdicts] == [12, 12, 0, 0]
    assert [v.memory_version for v in verdicts] == [0, 0, 1, 2]
    assert paper.runs == 6, "only what taught is scored twice"
    for line in (first, paper):
        assert line.memory.describe()["frames"]["admitted"] == 2
        assert (line.detector.program.read_state("bank") == first.detector.program.read_state("bank")).all()
    taught = [e["verdict"] for e in paper.memory._audit.entries() if e["action"] == "admit"]
    assert taught == ["3", "4"]
    assert [line.memory.describe()["order"] for line in (first, paper)] == ["score_first", "update_first"]


def test_a_defect_that_teaches_first_is_judged_good_only_without_the_gate(judged):
    """Why the paper's order is not the default: a defect matched against itself has no distance."""
    gated = judged(PAPER)
    for _ in range(3):
        gated.see(104)
    runs = gated.runs
    verdict = gated.see(160)
    assert (verdict.label, verdict.score, gated.runs - runs) == ("NG", 150, 1)
    assert gated.memory.describe()["frames"]["not_ok"] == 1
    ungated = judged(PAPER.model_copy(update={"guard": GuardConfig(gate=False)}))
    assert (ungated.see(160).label, ungated.see(160).score) == ("OK", 0)
    scored_first = judged(CONFIG.model_copy(update={"guard": GuardConfig(gate=False)}))
    assert [scored_first.see(160).score for _ in range(2)] == [150, 0]


def test_a_frozen_memory_scores_once(judged):
    line = judged(PAPER)
    for _ in range(2):
        line.see(104)
    line.memory.command("freeze", {})
    assert (line.see(104).score, line.runs) == (12, 3)


@pytest.mark.parametrize("order", ["score_first", "update_first"])
def test_the_drift_watch_takes_the_score_of_before_the_update(judged, order):
    """Else what has taught would be at no distance in the reference, and the first frames after a freeze a warning."""
    line = judged(DRIFTS.model_copy(update={"order": order}))
    for _ in range(4):
        line.see(104)
    assert line.memory._drift.arrays()["drift.cam/a.reference"].tolist() == [12, 12, 12, 0]
    line.memory.command("freeze", {})
    for _ in range(20):
        line.see(104)
    assert line.memory.drift("cam") == {}


def test_a_drift_reference_of_second_scores_is_not_taken_over(judged):
    """Versions before the watch took the first score; their snapshots do not say which it was."""
    config = DRIFTS.model_copy(update={"order": "update_first"})
    line = judged(config)
    for _ in range(4):
        line.see(104)
    line.close()
    newest, _ = line.memory._store.latest()
    for path in line.memory._store.folder.glob("*.snapshot"):
        path.unlink()
    meta = {key: value for key, value in newest.meta.items() if key != "watched"}
    line.memory._store.save(newest.arrays, meta, "last")
    again = Station(line.bundle.path, line.memory._store.folder, config)
    assert again.memory.describe()["rows"]["a"] > 0 and again.memory._drift.monitors == {}
    again.close()
    line.memory._store.save(newest.arrays, newest.meta, "last")
    again = Station(line.bundle.path, line.memory._store.folder, config)
    assert list(again.memory._drift.monitors) == ["cam/a"]
    again.close()


def test_what_is_scored_twice_has_taken_the_time_of_both(judged, monkeypatch):
    line = judged(PAPER)
    score = line.detector.judge_image
    monkeypatch.setattr(line.detector, "judge_image", lambda *given: replace(score(*given), latency_ms={"judge": 5.0}))
    assert [line.see(104).latency_ms["judge"] for _ in range(3)] == [5, 5, 10]


def test_smoothing_counts_a_frame_once(judged):
    line = judged(PAPER, smoothing=0.5)
    assert [line.see(shade).score for shade in (104, 104, 104)] == [12, 12, 6]


def test_a_memory_in_trouble_leaves_the_verdict(judged, monkeypatch, caplog):
    line = judged(PAPER)
    for _ in range(2):
        line.see(104)

    def fail(*args, **kwargs):
        raise EngineError("no transport output")

    monkeypatch.setattr(line.memory, "teach", fail)
    for _ in range(2):
        assert line.see(104).score == 12
        assert caplog.text.count("no transport output") == 1, "said at once, and once"


def test_an_engine_that_takes_no_update_is_unknown_at_once(judged, monkeypatch):
    line = judged(PAPER)
    for _ in range(2):
        line.see(104)

    def refuse(*args, **kwargs):
        raise EngineError("copy failed")

    monkeypatch.setattr(line.detector.program, "write_state", refuse)
    assert (line.see(104).label, line.see(104).reason) == ("UNKNOWN", "memory_unusable")


def test_a_line_configuration_sets_the_order(tmp_path):
    text = "site: s\nline: l\nstation: t\ncameras: {cam: {source: {kind: test}}}\nmemory: {enabled: true, order: %s}\n"
    path = tmp_path / "line.yaml"
    path.write_text(text % "update_first")
    assert load_line(path).memory.order == "update_first"
    path.write_text(text % "literal")
    with pytest.raises(ConfigError, match="order"):
        load_line(path)
