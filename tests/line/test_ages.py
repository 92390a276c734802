"""How old frames are said to be: in order, after pauses of their reader, and with time stamps of another clock."""

from __future__ import annotations

import threading
import time

import pytest
from andon.runtime.slot import LanePolicy, Slots, Trigger
from andon.runtime.source import make_source
from andon.runtime.source.ages import MAX_AGE, Ages
from andon.runtime.source.camera import Camera
from andon.runtime.types import Frame

from .sources import camera


class Reader:
    """Pulls frames and asks how old they are, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ages = Ages(self.now)

    def pull(self, stamped: float | None, *, pause: float = 0.0, wait: float = 0.0) -> float:
        self.now += pause
        asked, self.now = self.now, self.now + wait
        self.ages.pulled(asked, self.now, waited=wait > 0)
        return self.ages.age(stamped)


def test_frames_that_waited_for_their_reader_are_old_until_it_has_caught_up() -> None:
    reader = Reader()
    assert reader.pull(0.1, wait=0.1) == 0.1
    assert reader.pull(30.0, pause=30.0) == 30.0
    # A decoder works them off, most of them not at once, and not evenly.
    late = [30.0 - 0.05 * index + 0.5 * (index % 3) for index in range(1, 581)]
    assert [reader.pull(age, pause=0.01, wait=0.04 if index % 4 else 0.0) for index, age in enumerate(late)] == late
    assert reader.pull(0.1, wait=0.1) == 0.1
    assert reader.pull(MAX_AGE + 0.2, wait=0.1) == 0.0, "caught up: nothing excuses this one"


def test_time_stamps_of_another_clock_are_not_believed() -> None:
    reader = Reader()
    assert [reader.pull(stamped, pause=0.1, wait=0.1) for stamped in (3600.0, -20.0, 1.8e10, 0.2)] == [0, 0, 0, 0.2]
    jumped = [reader.pull(3600.0 + index, pause=0.2) for index in range(5)]
    assert jumped == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6]), "no older than what the sink and its thread can hold"
    drifting = [reader.pull(4.9 + 0.01 * index, pause=0.001, wait=0.099) for index in range(100)]
    assert drifting[:10] == pytest.approx([4.9 + 0.01 * index for index in range(10)]) and set(drifting[11:]) == {0.0}


def test_without_time_stamps_a_frame_is_as_old_as_it_may_have_lain_in_the_sink() -> None:
    reader = Reader()
    assert reader.pull(None, pause=3.0, wait=0.1) == 0.0
    assert [reader.pull(None, pause=pause) for pause in (8.0, 0.1, 0.1, 0.1)] == pytest.approx([8.0, 8.1, 8.2, 0.3])
    assert reader.pull(None, pause=0.1, wait=0.1) == 0.0


def test_a_picture_from_before_the_trigger_is_not_its_parts_however_long_the_line_was_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when engines take long to open: the frames of that time wait in the pipeline, and are older than they look."""
    monkeypatch.setattr("andon.runtime.source.ages.MAX_AGE", 0.3)
    config = camera({"kind": "test", "width": 64, "height": 48, "fps": 20}, product="a", drop="block")
    slots = Slots({"cam": LanePolicy("block", 1)})
    came = threading.Event()
    running = Camera("cam", config, make_source("cam", config), slots, lambda state: came.set())
    running.start()
    try:
        assert came.wait(60)
        time.sleep(2.0)  # nobody takes a frame
        at = time.monotonic()
        slots.trigger("cam", Trigger("B", at, at + 60))
        before = []
        while isinstance(item := slots.take(60), Frame) and item.part_id is None:
            before.append(item.monotonic)
        assert isinstance(item, Frame) and item.part_id == "B" and item.monotonic >= at
        assert len(before) >= 30 and max(before) < at, "the pictures of two seconds"
        assert before == sorted(before)
    finally:
        running.stop()
        slots.close()
        assert running.join(30)
