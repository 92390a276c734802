"""An engine that fails for good ends the line; one that fails now and then does not."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest
from andon.runtime.detector import Judgement as Scored
from andon.runtime.enginewatch import EngineWatch
from andon.runtime.judgement import Judgement
from andon.runtime.types import Verdict


def judged(reason: str, scored: Scored | None = None) -> Judgement:
    now = datetime.now(timezone.utc)
    label: Any = "OK" if reason == "score_within_threshold" else "UNKNOWN"
    return Judgement(Verdict("1", "cam0", 1, now, now, label, reason), scored, detail="error 700")


FAILED, NO_FRAME = judged("engine_error"), judged("no_frame")
BAD = judged("bad_frame", Scored("UNKNOWN", "bad_frame", "a", 0))
GOOD = judged("score_within_threshold", Scored("OK", "", "a", 0, 0.1, map=np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(
    ("frames", "gap", "ends"),
    [
        ([FAILED] * 4, 100.0, False),  # a slow line waits for its fifth part
        ([FAILED] * 5, 100.0, True),
        ([FAILED] * 30, 1.0, False),  # 29 seconds from the first to the last
        ([FAILED] * 31, 1.0, True),
        ([FAILED] * 30 + [GOOD] + [FAILED] * 30, 1.0, False),
        ([FAILED] * 15 + [NO_FRAME, BAD] + [FAILED] * 14, 1.0, True),  # these did not ask the engine
        ([GOOD, NO_FRAME, BAD] * 50, 10.0, False),
    ],
)
def test_only_a_run_of_failures_that_lasts_ends_the_line(frames: list[Judgement], gap: float, ends: bool) -> None:
    now = 1000.0
    watch = EngineWatch(clock=lambda: now)
    said = []
    for frame in frames:
        said.append(watch.look(frame))
        now += gap
    assert (said[-1] is not None) == ends and not any(said[:-1])
    if ends:
        assert said[-1].found == "error 700"
