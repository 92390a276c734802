"""Slots: fairness, drop policy, and that every announced part gets exactly one item."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest
from andon.runtime.errors import ConfigError, NotNowError
from andon.runtime.slot import MAX_WAITING, LanePolicy, Missed, Slots, Trigger
from andon.runtime.types import Frame
from hypothesis import given, settings
from hypothesis import strategies as st

IMAGE = np.zeros((2, 2, 3), np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def frame(camera: str = "a", at: float = 100.0, **fields: Any) -> Frame:
    return Frame(camera, 0, datetime.now(timezone.utc), at, IMAGE, **fields)


def drain(slots: Slots) -> list[Frame | Missed]:
    items = []
    while (item := slots.take(0)) is not None:
        items.append(item)
    return items


def test_the_latest_frame_replaces_and_is_counted() -> None:
    slots = Slots({"a": LanePolicy()})
    for _ in range(5):
        slots.put(frame())
    (item,) = drain(slots)
    assert item.seq == 5
    counts = slots.counts()["a"]
    assert (counts.offered, counts.taken, counts.dropped) == (5, 1, 4)


def test_a_frame_with_a_part_id_is_never_dropped_in_silence() -> None:
    slots = Slots({"a": LanePolicy()})
    slots.put(frame(part_id="p1"))
    slots.put(frame())
    (item,) = drain(slots)
    assert item.part_id == "p1" and isinstance(item, Frame), "a frame of nobody gives way"
    slots.put(frame(part_id="p2"))
    slots.put(frame(part_id="p3"))
    first, second = drain(slots)
    assert isinstance(first, Missed) and (first.part_id, first.reason) == ("p2", "overload")
    assert isinstance(second, Frame) and second.part_id == "p3"


def test_only_what_is_taken_counts_as_served() -> None:
    """The watchdog goes by it: parts displaced, missed by a camera or without a frame are nobody's progress."""
    clock = Clock()
    slots = Slots({"a": LanePolicy(), "b": LanePolicy()}, clock)
    for number in range(5):
        slots.put(frame(part_id=f"p{number}"))
    slots.put(frame("b"))
    slots.trigger("b", Trigger("late", at=200.0, deadline=201.0))
    clock.now = 300.0
    slots.put(frame("b", at=150.0))
    assert slots.counts()["a"].missed == 4 and slots.counts()["b"].missed == 1 and slots.served == 0
    taken = drain(slots)
    assert len(taken) == slots.served == 7


def test_another_policy_lets_go_of_a_producer_that_waits() -> None:
    slots = Slots({"a": LanePolicy(drop="block")})
    assert slots.put(frame(part_id="0"))
    producer = threading.Thread(target=lambda: slots.put(frame(part_id="1")), daemon=True)
    producer.start()
    slots.configure("a", LanePolicy(queue=2))
    producer.join(5)
    assert not producer.is_alive()
    slots.close()
    assert [item.part_id for item in drain(slots)] == ["0", "1"], "what waits is kept"


def test_blocking_waits_for_room_and_close_lets_go() -> None:
    slots = Slots({"a": LanePolicy(drop="block")})
    results: list[bool] = []

    def produce() -> None:
        results.extend(slots.put(frame(part_id=str(index))) for index in range(4))

    producer = threading.Thread(target=produce)
    producer.start()
    taken = [slots.take(5) for _ in range(2)]
    time.sleep(0.1)
    assert results.count(True) <= 3
    slots.close()
    producer.join(5)
    assert not producer.is_alive()
    assert [item.part_id for item in taken + drain(slots)] == ["0", "1", "2"]
    assert results == [True, True, True, False]
    assert slots.drained


@pytest.mark.parametrize("drop", ["latest", "block"])
def test_a_missed_item_is_delivered_in_order(drop: Any) -> None:
    slots = Slots({"a": LanePolicy(drop=drop, queue=3)})
    slots.put(frame(part_id="1"))
    slots.put(Missed("a", 0, "bad_frame", datetime.now(timezone.utc), 100.0, part_id="2"))
    slots.put(frame(part_id="3"))
    items = drain(slots)
    assert [(item.part_id, item.seq) for item in items] == [("1", 1), ("2", 2), ("3", 3)]


# -- triggers ----------------------------------------------------------------------------------------------------------


def triggered() -> tuple[Slots, Clock]:
    clock = Clock()
    return Slots({"a": LanePolicy(queue=8, triggered_only=True)}, clock), clock


def test_the_first_frame_captured_after_the_trigger_is_the_parts() -> None:
    slots, _ = triggered()
    slots.trigger("a", Trigger("p1", at=100.5, deadline=102))
    assert not slots.wanted("a", 100.4)
    slots.put(frame(at=100.4))
    assert slots.wanted("a", 100.6)
    slots.put(frame(at=100.6))
    slots.put(frame(at=100.7))
    (item,) = drain(slots)
    assert (item.part_id, item.monotonic) == ("p1", 100.6)
    assert slots.counts()["a"].untriggered == 3


def test_triggers_wait_in_order_and_bring_their_product() -> None:
    slots, _ = triggered()
    slots.trigger("a", Trigger("p1", 100.0, 105.0, product="mono"))
    slots.trigger("a", Trigger("p2", 100.1, 105.0))
    slots.put(frame(at=101))
    slots.put(frame(at=102, product="poly"))
    assert [(item.part_id, item.product) for item in drain(slots)] == [("p1", "mono"), ("p2", "poly")]


def test_a_part_is_of_the_product_that_was_expected_when_it_was_announced() -> None:
    slots, clock = triggered()
    for part in "p1", "p2", "p3", "p4":
        slots.trigger("a", Trigger(part, 100.0, 105.0, product="asked" if part == "p3" else None, expected="old"))
    slots.put(frame(at=101))
    slots.put(frame(at=101, product="the frame's"))
    slots.put(frame(at=101, product="the frame's"))
    clock.now = 105
    products = [(item.part_id, item.product) for item in drain(slots)]
    assert products == [("p1", "old"), ("p2", "the frame's"), ("p3", "asked"), ("p4", "old")]


def test_a_picture_that_cannot_be_read_is_the_parts_and_not_the_next_one() -> None:
    slots, _ = triggered()
    bad = Missed("a", 0, "bad_frame", datetime.now(timezone.utc), 101.0, path="p1.png")
    early = Missed("a", 0, "bad_frame", datetime.now(timezone.utc), 99.0)
    stale = Missed("a", 0, "camera_stale", datetime.now(timezone.utc), 101.0)
    for part in "p1", "p2":
        slots.trigger("a", Trigger(part, 100.0, 105.0))
    for item in early, stale, bad, frame(at=101.5):
        slots.put(item)
    assert [(item.part_id, item.monotonic) for item in drain(slots)] == [
        (None, 99.0),
        (None, 101.0),
        ("p1", 101.0),
        ("p2", 101.5),
    ]


def test_a_trigger_without_a_frame_is_no_frame_at_its_deadline() -> None:
    slots, clock = triggered()
    slots.trigger("a", Trigger("p1", 100.0, 101.0))
    clock.now = 100.9
    assert drain(slots) == []
    clock.now = 101.0
    (item,) = drain(slots)
    assert isinstance(item, Missed) and (item.reason, item.part_id) == ("no_frame", "p1")
    slots.put(frame(at=101.1))
    assert drain(slots) == [], "the late frame is nobody's"


def test_the_deadline_wakes_a_waiting_consumer() -> None:
    slots = Slots({"a": LanePolicy(triggered_only=True)})
    now = time.monotonic()
    slots.trigger("a", Trigger("p1", now, now + 0.2))
    item = slots.take(10)
    assert isinstance(item, Missed) and item.reason == "no_frame"
    assert 0.15 <= time.monotonic() - now < 5


def test_a_frame_that_waited_past_its_deadline_is_missed() -> None:
    clock = Clock()
    slots = Slots({"a": LanePolicy()}, clock)
    slots.put(frame(part_id="p", deadline=100.2))
    clock.now = 100.3
    (item,) = drain(slots)
    assert isinstance(item, Missed) and (item.reason, item.part_id) == ("deadline_missed", "p")


def test_closing_answers_the_triggers_that_wait() -> None:
    slots, _ = triggered()
    slots.trigger("a", Trigger("p1", 100.0, 1000.0))
    slots.close()
    assert [(item.reason, item.part_id) for item in drain(slots)] == [("no_frame", "p1")]
    with pytest.raises(NotNowError, match="is stopping"):
        slots.trigger("a", Trigger("p2", 100.0, 1000.0))


def test_every_part_that_is_announced_while_nothing_is_judged_gets_its_item() -> None:
    """As while engines are built, for minutes: each waits, and one that could not is refused."""
    slots, clock = triggered()
    taken, refused = [], 0
    for number in range(MAX_WAITING + 100):
        clock.now += 0.005
        try:
            slots.trigger("a", Trigger(f"p{number}", clock.now, clock.now + 1))
        except NotNowError as error:
            assert "no more triggers" in str(error)
            refused += 1
        else:
            taken.append(f"p{number}")
        if number % 2:
            slots.put(frame(at=clock.now))
    assert refused == 100 and len(taken) == MAX_WAITING
    clock.now += 10
    assert sorted(str(item.part_id) for item in drain(slots)) == sorted(taken)
    assert slots.counts()["a"].lost == 0
    slots.trigger("a", Trigger("later", clock.now, clock.now + 1))


def test_parts_that_cannot_be_refused_and_are_too_many_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("andon.runtime.slot.MAX_WAITING", 3)
    slots = Slots({"a": LanePolicy()})
    for _ in range(2):
        for number in range(10):
            slots.put(frame(part_id=f"p{number}"))
        assert [item.part_id for item in drain(slots)] == ["p6", "p7", "p8", "p9"]
    counts = slots.counts()["a"]
    assert (counts.lost, counts.offered, counts.taken, counts.dropped) == (12, 20, 2, 18)
    assert caplog.text.count("from p0 on the oldest get no verdict") == 2, "once each time"


def test_a_trigger_for_an_unknown_camera_is_refused() -> None:
    slots, _ = triggered()
    with pytest.raises(ConfigError, match="no camera 'b'"):
        slots.trigger("b", Trigger("p", 0, 1))


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("trigger"), st.floats(0, 2), st.floats(0.1, 3)),
        st.tuples(st.just("frame"), st.floats(0, 1), st.just(0.0)),
        st.tuples(st.just("bad"), st.floats(0, 1), st.just(0.0)),
        st.tuples(st.just("wait"), st.floats(0, 2), st.just(0.0)),
        st.tuples(st.just("take"), st.just(0.0), st.just(0.0)),
    ),
    max_size=60,
)


@given(events=EVENTS, queue=st.integers(1, 4), only=st.booleans())
@settings(deadline=None)
def test_every_trigger_gets_exactly_one_item(events: list[Any], queue: int, only: bool) -> None:
    clock = Clock()
    slots = Slots({"a": LanePolicy(queue=queue, triggered_only=only)}, clock)
    announced: dict[str, float] = {}
    items: list[Frame | Missed] = []
    for kind, first, second in events:
        if kind == "trigger":
            part = f"p{len(announced)}"
            announced[part] = clock.now + first
            slots.trigger("a", Trigger(part, clock.now + first, clock.now + first + second))
        elif kind == "frame":
            slots.put(frame(at=clock.now - first))
        elif kind == "bad":
            slots.put(Missed("a", 0, "bad_frame", datetime.now(timezone.utc), clock.now - first))
        elif kind == "wait":
            clock.now += first
        elif (item := slots.take(0)) is not None:
            items.append(item)
    slots.close()
    items += drain(slots)
    seen = Counter(item.part_id for item in items if item.part_id)
    assert seen == Counter(announced.keys())
    for item in items:
        if isinstance(item, Frame) and item.part_id:
            assert item.monotonic >= announced[item.part_id]
    counts = slots.counts()["a"]
    assert counts.offered == counts.taken + counts.dropped + counts.untriggered
    seqs = [item.seq for item in items]
    assert len(set(seqs)) == len(seqs)


# -- fairness ----------------------------------------------------------------------------------------------------------


@given(
    plan=st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), max_size=4), min_size=1, max_size=30),
    queue=st.integers(1, 3),
)
@settings(deadline=None)
def test_no_camera_is_served_twice_while_another_waits(plan: list[dict[str, int]], queue: int) -> None:
    """Between two services of a camera every camera that had something all along is served."""
    slots = Slots({name: LanePolicy(queue=queue) for name in "abcd"})
    since: dict[str, set[str]] = defaultdict(set)
    for arrivals in plan:
        for name, count in arrivals.items():
            for _ in range(count):
                slots.put(frame(name))
        waiting = {name for name in "abcd" if slots.waiting(name)}
        item = slots.take(0)
        if item is None:
            assert not waiting
            continue
        starved = since[item.camera] & waiting
        assert not starved - {item.camera}, f"{item.camera} again before {starved}"
        since[item.camera] = waiting - {item.camera}
        for name in "abcd":
            if name != item.camera:
                since[name] = (since[name] & waiting) - {item.camera}


def test_many_threads_lose_nothing() -> None:
    names = [f"c{index}" for index in range(6)]
    slots = Slots({name: LanePolicy(drop="block", queue=2) for name in names})
    each = 300

    def produce(name: str) -> None:
        for index in range(each):
            slots.put(frame(name, part_id=str(index)))

    threads = [threading.Thread(target=produce, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    taken: dict[str, list[str | None]] = defaultdict(list)
    for _ in range(each * len(names)):
        item = slots.take(10)
        assert item is not None
        taken[item.camera].append(item.part_id)
    for thread in threads:
        thread.join(5)
    assert all(taken[name] == [str(index) for index in range(each)] for name in names)
