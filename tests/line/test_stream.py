"""The place in the outbox over refusals: nothing lost, nothing overtaken, one probe at a time."""

from __future__ import annotations

import pytest
from andon.runtime.mqtt import stream as module
from andon.runtime.mqtt.stream import Stream
from andon.runtime.stored import Stored
from hypothesis import given
from hypothesis import strategies as st


class Box:
    """An outbox of messages 1..count that forgets what was acknowledged."""

    def __init__(self, count: int):
        self.left = {key: Stored(key, "cam0", "verdict", str(key), b"{}") for key in range(1, count + 1)}

    def fetch(self, after: int, limit: int) -> list[Stored]:
        return [message for key, message in sorted(self.left.items()) if key > after][:limit]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_in_order_up_to_the_window() -> None:
    stream = Stream("verdict", Box(5).fetch, boundary=3)
    first = [stream.next(room) for room in (2, 1, 0)]
    assert [m and m.key for m in first] == [1, 2, None]
    assert stream.replayed(first[0]) and not stream.replayed(Stored(3, "cam0", "verdict", "3", b""))


def test_a_window_larger_than_one_reading_is_filled() -> None:
    stream = Stream("verdict", Box(100).fetch, boundary=1)
    assert [message and message.key for message in (stream.next(1) for _ in range(101))] == [*range(1, 101), None]


def test_refusal_holds_probes_and_goes_on(clock: list[float]) -> None:
    box = Box(4)
    stream = Stream("verdict", box.fetch, boundary=1)
    one, two, three = (stream.next(9) for _ in range(3))
    assert stream.refused(one, "Not authorized") and not stream.refused(two, "Not authorized")
    assert stream.next(9) is None, "the third is still on its way"
    stream.refused(three, "Not authorized")
    assert stream.next(9) is None, "on hold"
    clock[0] = 1.0
    probe = stream.next(9)
    assert probe.key == 1 and stream.replayed(probe) and stream.next(9) is None, "one probe at a time"
    stream.refused(probe, "Not authorized")
    clock[0] = 2.5
    assert stream.next(9) is None, "the hold has doubled"
    clock[0] = 3.0
    probe = stream.next(9)
    del box.left[probe.key]
    assert stream.acknowledged(probe)
    rest = [stream.next(9) for _ in range(4)]
    assert [m and m.key for m in rest] == [2, 3, 4, None]
    assert [stream.replayed(m) for m in rest[:3]] == [True, True, False]
    stream.refused(rest[2], "Not authorized")
    for message in rest[:2]:
        stream.given_up(message)
    clock[0] = 3.9
    assert stream.next(9) is None
    clock[0] = 4.0
    probe = stream.next(9)
    assert probe.key == 4, "a hold is short again after an answer, and what was given up is not waited for"
    assert stream.replayed(probe), "what comes again is told from what is new, be it the last"


@given(count=st.integers(1, 30), answers=st.lists(st.booleans(), max_size=80), window=st.integers(1, 8))
def test_everything_is_taken_once_whatever_is_refused(count: int, answers: list[bool], window: int) -> None:
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: now[0])
        box, taken, flying = Box(count), [], []
        stream = Stream("verdict", box.fetch, boundary=1)
        pending = iter(answers)
        for _ in range(2000):
            while (message := stream.next(window - len(flying))) is not None:
                assert message.key not in {m.key for m in flying}, "offered twice at once"
                flying.append(message)
            if not flying:
                if not box.left:
                    break
                now[0] += 1.0
                continue
            message = flying.pop(0)
            if next(pending, True):
                del box.left[message.key]
                taken.append(message.key)
                stream.acknowledged(message)
            else:
                stream.refused(message, "no")
        assert sorted(taken) == list(range(1, count + 1)) and len(set(taken)) == count
