"""The outbox: nothing lost, order kept, caps counted, damage and full disks survived."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from andon.runtime.errors import DeliveryError
from andon.runtime.outbox import Outbox
from andon.runtime.stored import Stored
from andon.runtime.verdict import Ids
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from .outboxes import YEAR, Clocks, Events, fill, waiting


def test_committed_before_it_is_offered(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        gate = threading.Lock()
        commit = outbox._file.commit

        def slow(*args: object) -> None:
            with gate:
                commit(*args)

        outbox._file.commit = slow  # type: ignore[method-assign]
        with gate:
            key = outbox.put("cam0", "verdict", Ids().next(), b"{}")
            assert not outbox.wait(key, 0.2) and waiting(outbox) == []
        assert outbox.wait(key, 5) and [m.key for m in waiting(outbox)] == [key]


def test_only_who_waits_for_a_camera_is_woken_by_its_messages(tmp_path: Path) -> None:
    """Each camera has a connection of its own: woken by every message they would all ask the file each time."""
    woken: list[str] = []
    with Outbox(tmp_path / "o.db") as outbox:
        for name, cameras in (("cam0", ["cam0"]), ("both", ["cam0", "cam1"]), ("any", None)):
            outbox.listen(lambda name=name: woken.append(name), cameras)
        for camera in ("cam0", "cam1", "cam2"):
            assert outbox.wait(outbox.put(camera, "verdict", Ids().next(), b"{}"), 5)
    assert woken == ["cam0", "both", "any", "both", "any", "any"]


def test_whoever_waits_is_woken_while_the_disk_refuses(
    tmp_path: Path, eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory only is sent from there."""
    woken = threading.Event()
    with Outbox(tmp_path / "o.db") as outbox:
        outbox.listen(woken.set, ["cam1"])
        with monkeypatch.context() as full:
            full.setattr(outbox._file, "commit", Mock(side_effect=sqlite3.OperationalError("disk is full")))
            outbox.put("cam0", "verdict", Ids().next(), b"{}")
            outbox.put("cam1", "verdict", Ids().next(), b"{}")
            eventually(woken.is_set)
            assert len(outbox.fetch(["cam1"], "verdict", 0, 10)) == 1


def test_kept_over_a_restart_until_acknowledged(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        keys = fill(outbox, 10)
        outbox.done(waiting(outbox)[:4])
        last = outbox.last_id
    with Outbox(tmp_path / "o.db") as outbox:
        assert [m.key for m in waiting(outbox)] == keys[4:] and outbox.last_id == last
        assert outbox.next_key == keys[-1] + 1 and outbox.stats().messages == 6
        outbox.done(waiting(outbox))
    with Outbox(tmp_path / "o.db") as outbox:
        assert waiting(outbox) == [] and outbox.stats().bytes == 0
        assert outbox.last_id == last, "the floor of identifiers outlives the messages"


def test_an_identifier_that_no_message_carries_is_a_floor_all_the_same(tmp_path: Path) -> None:
    ids = Ids(clock_ns=lambda: 0)
    first, second, third = (ids.next() for _ in range(3))
    with Outbox(tmp_path / "o.db") as outbox:
        outbox.used(third)
        outbox.used(second)  # another camera's connection, a moment late
        outbox.wait(outbox.put("cam0", "verdict", first, b"{}"), 10)
    with Outbox(tmp_path / "o.db") as outbox:
        assert outbox.last_id == third


def test_identifiers_that_come_out_of_order_do_not_set_their_floor_back(tmp_path: Path) -> None:
    """Whoever gives identifiers and whoever stores them are threads of their own."""
    ids = Ids(clock_ns=lambda: 0)
    first, second, third = (ids.next() for _ in range(3))
    with Outbox(tmp_path / "o.db") as outbox:
        for identifier in (third, first):
            outbox.wait(outbox.put("cam0", "verdict", identifier, b"{}"), 10)
            assert outbox.last_id == third
        outbox.put("cam0", "verdict", second, b"{}")
    with Outbox(tmp_path / "o.db") as outbox:
        assert outbox.last_id == third


def test_what_the_broker_takes_from_memory_while_it_is_being_stored_is_not_delivered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    monkeypatch.setattr("andon.runtime.outbox._RETRY", 0.01)
    with Outbox(tmp_path / "o.db") as outbox:
        commit, sent = outbox._file.commit, []

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        def stores(*args: object) -> None:
            outbox._file.commit = commit  # type: ignore[method-assign]
            commit(*args)
            outbox.done(sent)  # by a connection's thread, before the writer has noted that they are stored

        outbox._file.commit = full  # type: ignore[method-assign]
        keys = [outbox.put("cam0", "verdict", Ids().next(), b"{}") for _ in range(3)]
        eventually(lambda: [message.key for message in waiting(outbox)] == keys)
        sent += waiting(outbox)[:2]
        outbox._file.commit = stores  # type: ignore[method-assign]
        assert outbox.wait(keys[-1], 10)
        assert [message.key for message in waiting(outbox)] == keys[2:] and outbox.stats().messages == 1
    with Outbox(tmp_path / "o.db") as outbox:
        assert [message.key for message in waiting(outbox)] == keys[2:]


def test_nothing_that_waits_is_no_bytes_and_no_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the acknowledged rows have left the file: a run's closing summary looks at that moment."""
    monkeypatch.setattr("andon.runtime.outbox._ACK_DELAY", 60.0)
    with Outbox(tmp_path / "o.db") as outbox:
        fill(outbox, 5)
        messages = waiting(outbox)
        outbox.done(messages[:2])
        rest = outbox.stats()
        assert (rest.messages, rest.bytes) == (3, sum(len(m.payload) for m in messages[2:]))
        outbox.done(messages[2:])
        stats = outbox.stats()
        assert outbox._file.bytes > 0, "the file deletes them later, many at a time"
        assert (stats.messages, stats.bytes, stats.oldest_age_s) == (0, 0, 0.0)


def test_every_camera_and_kind_reads_its_own(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        ids = Ids()
        for index in range(6):
            outbox.put(f"cam{index % 2}", "alarm" if index > 3 else "verdict", ids.next(), b"%d" % index)
        outbox.wait(6, 5)
        assert [m.payload for m in outbox.fetch(["cam0"], "verdict", 0, 9)] == [b"0", b"2"]
        assert [m.payload for m in outbox.fetch(["cam1", "cam0"], "verdict", 1, 2)] == [b"1", b"2"]
        assert [m.payload for m in outbox.fetch(["cam1"], "alarm", 0, 9)] == [b"5"]
        assert outbox.cameras() == ["cam0", "cam1"]


def test_states_are_kept(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        outbox.put("cam0", "alarm", Ids().next(), b"{}", ("alarm/cam0", b"{}"))
        outbox.save_state("seq", b"17")
        assert outbox.load_state("seq") == b"17"
    with Outbox(tmp_path / "o.db") as outbox:
        assert outbox.load_state("alarm/cam0") == b"{}" and outbox.load_state("seq") == b"17"
        assert outbox.load_state("nothing") is None


def test_one_process_per_file(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db"), pytest.raises(DeliveryError, match="in use"):
        Outbox(tmp_path / "o.db").open()
    with Outbox(tmp_path / "o.db"):
        pass


def test_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        fill(outbox, 1)
    with sqlite3.connect(tmp_path / "o.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(DeliveryError, match="version 99"):
        Outbox(tmp_path / "o.db").open()
    assert list(tmp_path.glob("*corrupt*")) == []


def test_an_outbox_that_is_being_closed_takes_nothing(tmp_path: Path) -> None:
    """The writer may have looked for the last time: what came then would be neither stored nor refused."""
    taken: list[bool] = []
    with Outbox(tmp_path / "o.db") as outbox:
        commit = outbox._file.commit

        def late(*args: object) -> None:
            outbox._file.commit = commit  # type: ignore[method-assign]
            with outbox._lock:
                outbox._lock.wait_for(lambda: outbox._stopping, 10)
            try:
                outbox.put("cam0", "verdict", Ids().next(), b"{}")
                taken.append(True)
            except DeliveryError:
                taken.append(False)
            commit(*args)

        outbox._file.commit = late  # type: ignore[method-assign]
        outbox.put("cam0", "verdict", Ids().next(), b"{}")
    assert taken == [False]


@pytest.mark.parametrize("before", [None, ("alarm/cam0", b"{}")])
def test_a_state_that_is_saved_during_the_last_commit_is_kept(tmp_path: Path, before: tuple[str, bytes] | None) -> None:
    """Of the part that was judged last: the board of alarms moves on after its verdict is handed over."""
    with Outbox(tmp_path / "o.db") as outbox:
        commit = outbox._file.commit

        def late(*args: object) -> None:
            outbox._file.commit = commit  # type: ignore[method-assign]
            with outbox._lock:
                outbox._lock.wait_for(lambda: outbox._stopping, 10)
            outbox.save_state("alarm/cam0", b'{"alarms":[]}')
            commit(*args)

        outbox._file.commit = late  # type: ignore[method-assign]
        outbox.put("cam0", "verdict", Ids().next(), b"{}", before)
    with Outbox(tmp_path / "o.db") as outbox:
        assert outbox.load_state("alarm/cam0") == b'{"alarms":[]}'


def test_closed_outbox_takes_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.db")
    with pytest.raises(DeliveryError, match="closed"):
        outbox.put("cam0", "verdict", Ids().next(), b"")


@pytest.mark.parametrize("damage", ["garbage", "middle", "truncated"])
def test_damaged_file_is_set_aside_and_what_is_left_is_saved(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "o.db"
    with Outbox(path) as outbox:
        keys = fill(outbox, 400)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "garbage":
        content = bytearray(os.urandom(8192))
    elif damage == "middle":
        content[middle : middle + 12288] = os.urandom(12288)
    else:
        del content[middle:]
    path.write_bytes(content)
    events: Events = []
    with Outbox(path, event=lambda *e: events.append(e)) as outbox:
        assert [what for what, _ in events] == ["set_aside"] and (tmp_path / "o.db.corrupt-1").exists()
        saved = [m.key for m in waiting(outbox)]
        assert saved == sorted({*saved} & {*keys}) and (saved or damage == "garbage")
        assert damage != "middle" or saved[-1] == keys[-1], "what is behind the damage is saved, too"
        assert len(saved) + outbox.stats().dropped == 400, "and what is not is counted"
        assert "o.db.corrupt-1" in str(outbox.stats().set_aside)
        fill(outbox, 5)
        assert len(waiting(outbox)) == len(saved) + 5


def test_damage_while_running_loses_nothing_that_can_be_read(tmp_path: Path) -> None:
    events: Events = []
    with Outbox(tmp_path / "o.db", event=lambda *e: events.append(e)) as outbox:
        fill(outbox, 20)
        commit = outbox._file.commit
        calls = []

        def broken(*args: object) -> None:
            calls.append(args)
            if len(calls) == 1:
                raise sqlite3.DatabaseError("database disk image is malformed")
            commit(*args)

        outbox._file.commit = broken  # type: ignore[method-assign]
        fill(outbox, 3)
        assert [what for what, _ in events] == ["set_aside"] and len(waiting(outbox)) == 23


def test_defect_of_the_writer_is_said_and_survived(
    tmp_path: Path, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Outbox(tmp_path / "o.db") as outbox:
        commit = outbox._file.commit

        def broken(*_: object) -> None:
            raise ZeroDivisionError("oh")

        outbox._file.commit = broken  # type: ignore[method-assign]
        key = outbox.put("cam0", "verdict", Ids().next(), b"{}")
        eventually(lambda: "ZeroDivisionError" in (outbox.stats().degraded or ""))
        assert [m.key for m in waiting(outbox)] == [key]
        outbox._file.commit = commit  # type: ignore[method-assign]
        assert outbox.wait(key, 5) and outbox.stats().degraded is None
    words = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [(level, text.split(":")[0]) for level, text in words if text.startswith("outbox ")] == [
        ("ERROR", "outbox degraded"),
        ("INFO", "outbox recovered"),
    ]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeliveryError, match="state"):
        Outbox(tmp_path / "file" / "o.db").open()


class OutboxMachine(RuleBasedStateMachine):
    """Put, acknowledge in any order, restart, set the clock: what waits is what was put and not acknowledged, in order.

    Only what was in an open outbox for longer than the age cap may be missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = patch("andon.runtime.outbox._HOUSEKEEPING", 3600.0)  # the caps are enforced with each message only
        self.patch.start()
        self.folder = tempfile.TemporaryDirectory()
        self.clocks = Clocks()
        self.outbox = self.clocks.open(Path(self.folder.name) / "o.db").open()
        self.ids = Ids()
        self.expected: dict[int, bytes] = {}
        self.aged: dict[int, float] = {}

    @rule(payload=st.binary(max_size=300), camera=st.sampled_from(["a", "b"]))
    def put(self, payload: bytes, camera: str) -> None:
        key = self.outbox.put(camera, "verdict", self.ids.next(), payload)
        assert self.outbox.wait(key, 10)
        assert not self.expected or key > max(self.expected)
        self.expected[key], self.aged[key] = payload, 0.0

    @rule(seconds=st.floats(0, 2000))
    def run(self, seconds: float) -> None:
        self.clocks.run(seconds)
        self.aged = {key: age + seconds for key, age in self.aged.items()}

    @rule(wall=st.floats(0, 4e9))
    def set_clock(self, wall: float) -> None:
        self.clocks.wall = wall

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        if self.expected:
            keys = data.draw(st.lists(st.sampled_from(sorted(self.expected)), unique=True))
            self.outbox.done(self.message(key) for key in keys)
            for key in keys:
                del self.expected[key]

    @rule(off=st.floats(0, 2 * YEAR))
    def restart(self, off: float) -> None:
        self.outbox.close()
        self.clocks.restart(off)
        self.outbox = self.clocks.open(Path(self.folder.name) / "o.db").open()

    @invariant()
    def exactly_what_waits(self) -> None:
        found = self.outbox.fetch(["a", "b"], "verdict", 0, 10_000)
        for key in self.expected.keys() - {m.key for m in found}:
            assert self.aged[key] > 3600, "dropped before its time"
            del self.expected[key]
        assert [(m.key, m.payload) for m in found] == sorted(self.expected.items())
        small = self.outbox.fetch(["a", "b"], "verdict", 0, 2)
        assert small == found[:2]
        stats = self.outbox.stats()
        assert (stats.messages, stats.bytes) == (len(self.expected), sum(map(len, self.expected.values())))

    def message(self, key: int) -> Stored:
        return next(m for m in self.outbox.fetch(["a", "b"], "verdict", key - 1, 1))

    def teardown(self) -> None:
        self.outbox.close()
        self.patch.stop()
        self.folder.cleanup()


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_writer_ends_with_the_outbox(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o.db") as outbox:
        fill(outbox, 1)
        time.sleep(0)
    assert not any(thread.name == "andon-outbox" for thread in threading.enumerate())
