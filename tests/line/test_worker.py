"""The judging thread at its edges: a command that comes too late, and an end that does not go well."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import Mock

import pytest
from andon.runtime import worker as module
from andon.runtime.alarm import AlarmBoard
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


def test_each_product_that_drifts_raises_the_cameras_alarm() -> None:
    """As a memory tells it after every frame; bolt drifts, then nut as well, then bolt no more."""
    board = AlarmBoard("cam0")
    line, drifted = make_with(board)
    tell = line._tell_drift

    def said() -> list[tuple[str, str, str]]:
        tell("cam0")
        tell("cam0")  # the next frame, with nothing new
        events = [event for call in line._delivery.alarm.call_args_list for event in call.args[1]]
        line._delivery.alarm.reset_mock()
        return [(event.before, event.alarm.state, event.alarm.detail) for event in events]

    assert said() == []
    drifted["bolt"] = "bolt: up"
    assert said() == [("cleared", "raised", "bolt: up")]
    board.acknowledge("drift")
    drifted["nut"] = "nut: up"
    assert said() == [("acknowledged", "raised", "bolt: up; nut: up")]
    del drifted["bolt"]
    assert said() == [("raised", "raised", "nut: up")]
    drifted["bolt"] = "bolt: up"
    assert said() == [("raised", "raised", "nut: up; bolt: up")]
    drifted.clear()
    assert said() == [("raised", "latched", "nut: up; bolt: up")]


def test_what_was_acknowledged_before_a_restart_is_not_raised_by_it() -> None:
    board = AlarmBoard("cam0")
    board.condition("drift", True, "bolt: up")
    board.acknowledge("drift")
    line, drifted = make_with(board)
    drifted["bolt"] = "bolt: had moved up"
    line._tell_drift("cam0")
    assert not line._delivery.alarm.called
    drifted["nut"] = "nut: up"
    line._tell_drift("cam0")
    assert board.active[0].state == "raised"


def make_with(board: AlarmBoard) -> tuple[Any, dict[str, str]]:
    """A worker of this board whose memory says what is in the dictionary of drift."""
    slots, drifted = Slots({"cam0": LanePolicy("block", 1, False)}), dict[str, str]()
    line = LineWorker(lambda bundle: (Mock(), None), lambda: None, slots, Mock(), {"cam0": board}, Mock(), Mock())
    line.memory = Mock(drift=lambda camera: dict(drifted))
    return line, drifted


def test_failures_of_the_engines_before_do_not_count_against_new_ones() -> None:
    line, slots, finished = make()
    line.start()
    assert line.wait_ready(10)
    watches = [line.call(lambda: line._engine_watch)]
    line.call(lambda: line.reopen(Mock()))
    watches.append(line.call(lambda: line._engine_watch))
    assert watches[0] is not watches[1]
    slots.close()
    assert finished.wait(10) and line.join(10)


def test_a_line_that_stops_begins_no_build() -> None:
    line, slots, finished = make()
    line.start()
    assert line.wait_ready(10)
    slots.close()
    with pytest.raises(NotNowError, match="stopping"):
        line.reopen(Mock())
    assert line.opened and not line.give_up()
    assert finished.wait(10) and line.join(10)
