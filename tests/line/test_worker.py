"""The judging thread at its edges: a command that comes too late, and an end that does not go well."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import Mock

import pytest
from andon.runtime import worker as module
from andon.runtime.errors import CalibrationError, EngineError, NotNowError
from andon.runtime.slot import LanePolicy, Slots
from andon.runtime.worker import LineWorker


def make(close: Any = lambda: None) -> tuple[LineWorker, Slots, threading.Event]:
    slots, finished = Slots({"cam0": LanePolicy("block", 1, False)}), threading.Event()
    parts = (Mock(), {}, Mock(), Mock())  # delivery, boards, ids, state: nothing is judged here
    return LineWorker(lambda bundle: (Mock(), None), close, slots, *parts, on_finished=finished.set), slots, finished


def test_a_command_that_was_refused_for_lateness_does_not_happen_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.01)
    line, slots, finished = make()
    happened = Mock()
    with pytest.raises(NotNowError, match="did not get to it"):
        line.call(happened)  # its thread does not run yet
    line.start()
    assert line.wait_ready(10)
    slots.close()
    assert finished.wait(10) and line.join(10)
    assert not happened.called and line.failure is None


def test_a_command_that_takes_too_long_once_begun_is_not_to_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_TIMEOUT", 0.01)
    line, slots, finished = make()
    begun, gate = threading.Event(), threading.Event()
    line.start()
    assert line.wait_ready(10)
    post = line.post

    def post_and_see_it_begun(function: Any) -> Any:
        future = post(function)
        assert begun.wait(10)
        return future

    monkeypatch.setattr(line, "post", post_and_see_it_begun)
    with pytest.raises(EngineError, match="not done") as refusal:
        line.call(lambda: begun.set() or gate.wait(10))
    assert not isinstance(refusal.value, NotNowError)
    gate.set()
    slots.close()
    assert finished.wait(10) and line.join(10)


@pytest.mark.parametrize("error", [CalibrationError("the memory cannot be written"), OSError("disk full")])
def test_a_close_that_fails_ends_the_line_with_that_failure(error: Exception) -> None:
    line, slots, finished = make(Mock(side_effect=error))
    line.start()
    assert line.wait_ready(10)
    slots.close()
    assert finished.wait(10) and line.join(10)
    assert line.failure is not None and str(error) in str(line.failure)
