"""A damaged outbox: the line starts, what is whole is delivered, what is lost is counted, no number goes back."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from andon.runtime import outbox_salvage
from andon.runtime.alarm import AlarmBoard, AlarmRule
from andon.runtime.mqtt.delivery import Delivery, published_version
from andon.runtime.outbox import Outbox
from andon.runtime.verdict import Ids, payload, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from .connection import verdict
from .outboxes import PAGE, SECTOR, damage, fill, fill_disk, root, waiting

COUNT = 24


def store(path: Path, count: int = COUNT) -> str:
    """An outbox as a line leaves it at a stop without a broker; the last identifier."""
    with Outbox(path) as outbox:
        ids, board = Ids(), AlarmBoard("cam0", AlarmRule(k=1, n=1))
        for number in range(count):
            each = verdict(ids, seq=number)
            outbox.put("cam0", "verdict", each.id, payload(each), ("memory/version", b"%d" % (number + 1)))
        Delivery("andon/v1/s/l/st", ["cam0"], None, outbox).alarm(board, board.verdict("NG"), ids)
        outbox.used(last := ids.next())
    return last


def page_of(content: bytes, text: bytes) -> int:
    return content.index(text) // PAGE * PAGE


@pytest.fixture(scope="module")
def stored() -> Iterator[tuple[Path, str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), store(Path(folder) / "o.db")


DAMAGES: dict[str, Callable[[bytearray, int, bytes], None]] = {
    "zeros": lambda content, at, _: content.__setitem__(slice(at, at + SECTOR), bytes(SECTOR)),
    "random": lambda content, at, noise: content.__setitem__(slice(at, at + SECTOR), noise),
    "cut": lambda content, at, _: content.__delitem__(slice(at, None)),
    "page": lambda content, at, _: content.__setitem__(slice(at // PAGE * PAGE, at // PAGE * PAGE + PAGE), bytes(PAGE)),
    "other": lambda content, at, noise: content.__setitem__(
        slice(at, at + SECTOR), content[(other := noise[0] * SECTOR % (len(content) - SECTOR)) : other + SECTOR]
    ),
}


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(sorted(DAMAGES)), where=st.floats(0, 1, exclude_max=True), noise=st.binary(min_size=SECTOR))
def test_wherever_it_is_damaged_the_line_starts_and_nothing_is_lost_in_silence(
    stored: tuple[Path, str], kind: str, where: float, noise: bytes
) -> None:
    folder, last = stored
    with tempfile.TemporaryDirectory() as copied:
        path = Path(shutil.copytree(folder, copied, dirs_exist_ok=True)) / "o.db"
        content = bytearray(path.read_bytes())
        DAMAGES[kind](content, int(where * len(content)) // SECTOR * SECTOR, noise[:SECTOR])
        path.write_bytes(content)
        found = []
        for start in ("first", "second"):
            with Outbox(path) as outbox:
                assert Ids(outbox.last_id, clock_ns=lambda: 0).next() > last
                assert published_version(outbox) >= COUNT
                AlarmBoard("cam0", AlarmRule()).restore(json.loads(outbox.load_state("alarm/cam0") or b"{}"))
                messages = [*waiting(outbox), *outbox.fetch(["cam0"], "alarm", 0, 9)]
                assert len(messages) + outbox.stats().dropped >= COUNT + 1
                if outbox.stats().set_aside:
                    assert start == "first", "once"
                    assert all(whole(m.payload, m.camera, m.kind, m.id) for m in messages)
                found.append((messages, outbox.stats().dropped))
        assert found[0] == found[1]


@pytest.mark.parametrize("size", [8, PAGE], ids=["header", "page"])
def test_of_a_bad_page_only_its_own_messages_are_lost_and_they_are_counted(tmp_path: Path, size: int) -> None:
    path, events = tmp_path / "o.db", []
    with Outbox(path) as outbox:
        keys = fill(outbox, 400, size=700)
        early = waiting(outbox)[60].id
    damage(path, page_of(path.read_bytes(), b'"id":"%s"' % early.encode()), bytes(size))
    with Outbox(path, event=lambda *e: events.append(e)) as outbox:
        saved = [m.key for m in waiting(outbox)]
        lost = 400 - len(saved)
        assert 1 <= lost <= 6 and saved[-1] == keys[-1] and saved == sorted(saved)
        assert (outbox.stats().dropped, outbox.stats().damaged) == (lost, lost)
        assert f"{len(saved)} waiting messages were saved from it, {lost} lost" in events[0][1]
        assert Ids(outbox.last_id).next() > early and outbox.next_key > keys[-1]
    with Outbox(path) as outbox:
        assert (outbox.stats().dropped, outbox.stats().damaged, outbox.stats().set_aside) == (lost, 0, None)


def test_a_line_starts_without_its_states_and_goes_on_above_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    last = store(path)
    damage(path, root(path, "state") + PAGE - SECTOR, bytes(SECTOR))
    with Outbox(path) as outbox:
        assert outbox.stats().messages == COUNT + 1 and outbox.stats().set_aside
        assert Ids(outbox.last_id, clock_ns=lambda: 0).next() > last and published_version(outbox) >= COUNT


def test_an_emptied_file_is_damage_where_messages_were_and_only_there(tmp_path: Path) -> None:
    """As a file system leaves it that wrote the length later than the name."""
    path = tmp_path / "o.db"
    path.touch()
    with Outbox(path) as outbox:
        assert outbox.stats().set_aside is None
        fill(outbox, 7)
    path.write_bytes(b"")
    for start in ("first", "second"):
        with Outbox(path) as outbox:
            assert (outbox.stats().messages, outbox.stats().dropped) == (0, 7)
            assert (outbox.stats().set_aside is None) is (start == "second")
    with Outbox(path) as outbox:
        fill(outbox, 7)
    path.unlink()
    with Outbox(path) as outbox:
        assert outbox.stats().set_aside is None, "who removes the file need not be told"


def test_a_page_that_was_written_to_the_wrong_place_keeps_nothing_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    store(path)
    content = path.read_bytes()
    first, second = (page_of(content, b'"seq":%d,' % number) for number in (0, COUNT - 1))
    damage(path, second, content[first : first + PAGE])
    for start in (1, 2):
        with Outbox(path) as outbox:
            stats = outbox.stats()
            assert stats.messages + stats.dropped == COUNT + 1 and 0 < stats.dropped < 12, f"start {start}"


def test_a_message_that_its_index_has_lost_is_delivered_all_the_same(tmp_path: Path) -> None:
    """quick_check does not see it: it would wait unseen until it is too old."""
    path = tmp_path / "o.db"
    store(path)
    at = root(path, "message_order")
    page = path.read_bytes()[at : at + PAGE]
    damage(path, at + page.index(b"cam0verdict"), b"cam1verdict")
    with Outbox(path) as outbox:
        assert len(waiting(outbox)) == COUNT and outbox.stats().dropped == 0


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE state SET value = CAST('01M83ABC\x01' AS BLOB) WHERE name = 'last_id'",
        "UPDATE state SET value = 5 WHERE name = 'last_id'",
        "INSERT INTO state VALUES ('dropped', 'many')",
        "UPDATE message SET size = 9223372036854775807 WHERE key < 3",
        "UPDATE message SET stored = 1e300 WHERE key = 25",
        "UPDATE message SET stored = 'late' WHERE key = 25",
        "ALTER TABLE state RENAME TO statf",
        "PRAGMA user_version = 0",
    ],
)
def test_what_a_line_never_writes_is_damage_and_no_reason_not_to_start(tmp_path: Path, change: str) -> None:
    path = tmp_path / "o.db"
    last = store(path)
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    with Outbox(path) as outbox:
        stats = outbox.stats()
        assert (stats.messages, stats.dropped) == (COUNT + 1, 0) and stats.oldest_age_s < 60
        assert stats.set_aside
        assert Ids(outbox.last_id, clock_ns=lambda: 0).next() > last and published_version(outbox) >= COUNT


def test_damage_while_running_leaves_what_was_delivered_and_counts_what_is_lost(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    path, events = tmp_path / "o.db", []
    with Outbox(path, event=lambda *e: events.append(e)) as outbox:
        keys = fill(outbox, 100, size=700)
        outbox.done(waiting(outbox)[:10])
        outbox.save_state("memory/version", b"6")
        gone = outbox.put("cam0", "alarm", Ids(outbox.last_id).next(), b"{}", ("memory/version", b"7"))
        assert outbox.wait(gone, 10)
        outbox.done(outbox.fetch(["cam0"], "alarm", 0, 1))
        eventually(lambda: outbox._file.count == 90)
        outbox._file.fold()
        damage(path, page_of(path.read_bytes(), b'"id":"%s"' % waiting(outbox)[40].id.encode()), bytes(8))
        with sqlite3.connect(path) as other:
            other.execute("DELETE FROM state")  # what the run knows it writes again
        commit, calls = outbox._file.commit, []

        def meets_it(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 1:
                raise sqlite3.DatabaseError("database disk image is malformed")
            commit(*args)

        outbox._file.commit = meets_it  # type: ignore[method-assign]
        keys += fill(outbox, 1)
        eventually(lambda: bool(events))
        lost = outbox.stats().damaged
        assert 1 <= lost <= 6 and outbox.stats().dropped == lost
        assert len(waiting(outbox)) == 91 - lost and waiting(outbox)[-1].key == keys[-1]
        last = outbox.last_id
    assert [what for what, _ in events] == ["set_aside"], "and not said to be the caps'"
    (tmp_path / "o.db.floors").unlink()  # the file knows it by itself
    with Outbox(path) as outbox:
        assert outbox.last_id == last and published_version(outbox) == 7


def test_what_was_delivered_is_not_lost_with_its_page_before_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("andon.runtime.outbox._ACK_DELAY", 60.0)
    with Outbox(tmp_path / "o.db") as outbox:
        keys = fill(outbox, 100, size=700)
        outbox._file.fold()
        messages = waiting(outbox)
        path = tmp_path / "o.db"
        damage(path, page_of(path.read_bytes(), b'"id":"%s"' % messages[40].id.encode()), bytes(8))
        outbox.done(messages[20:60])
        keys[20:60] = []
        commit = outbox._file.commit

        def meets_it(*args: Any) -> None:
            outbox._file.commit = commit  # type: ignore[method-assign]
            raise sqlite3.DatabaseError("database disk image is malformed")

        outbox._file.commit = meets_it  # type: ignore[method-assign]
        keys += fill(outbox, 1)
        assert [message.key for message in waiting(outbox)] == keys
        stats = outbox.stats()
        assert stats.set_aside and "60 waiting messages were saved from it, 0 lost" in stats.set_aside
        assert (stats.dropped, stats.damaged, stats.messages) == (0, 0, 61)


def test_on_a_full_disk_the_reserve_goes_to_the_new_file(small_disk: Path) -> None:
    path = small_disk / "o.db"
    with Outbox(path) as outbox:
        keys = fill(outbox, 800, size=700)
    damage(path, root(path, "message_order"), bytes(SECTOR))
    fill_disk(small_disk)
    with Outbox(path) as outbox:
        assert [message.key for message in waiting(outbox)] == keys
        assert outbox.stats().set_aside and outbox.stats().dropped == 0


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_while_the_damaged_file_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    path = tmp_path / "o.db"
    store(path)
    damage(path, root(path, "message_order"), bytes(SECTOR))
    (tmp_path / "o.db-shm").touch()  # of a run that was killed
    rename, moves = Path.rename, []

    def killed(source: Path, target: Path) -> Path:
        if len(moves) == moment:
            raise KeyboardInterrupt
        moves.append(source)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Outbox(path).open()
    monkeypatch.undo()
    with Outbox(path) as outbox:
        assert len(waiting(outbox)) == COUNT and outbox.stats().dropped == 0
    assert not list(tmp_path.glob("*.new*")) and (tmp_path / "o.db.corrupt-1").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_set_aside_before_is_left_alone_and_the_next_one_goes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    path, rename, aside = tmp_path / "o.db", Path.rename, {}

    def until_the_file_is_away(source: Path, target: Path) -> Path:
        rename(source, target)
        raise KeyboardInterrupt

    for number in (1, 2, 3):
        store(path)
        mark = b"%d" % number * SECTOR
        damage(path, root(path, "message_order"), mark)
        aside[f"o.db.corrupt-{number}"] = mark
        if killed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Path, "rename", until_the_file_is_away)
                Outbox(path).open()
            (tmp_path / "o.db-wal").write_bytes(mark)  # what a kill leaves of its log
            aside[f"o.db.corrupt-{number}-wal"] = mark
        with Outbox(path) as outbox:
            assert len(waiting(outbox)) == COUNT * number and outbox.stats().dropped == 0
        assert len(list(tmp_path.glob("*.corrupt-?"))) == number
        assert all(mark in (tmp_path / name).read_bytes() for name, mark in aside.items())


def test_a_message_that_the_disk_has_changed_is_given_up_and_holds_up_nothing(
    line: Any, broker: Any, consumer: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    with line(1) as running:  # where no broker is
        sent = running.send(6)
    # Of the same size, or the start would see it: the end is gone, and what is no JSON.
    damages = {2: "zeroblob(length(payload))", 4: "CAST(replace(payload, 'seq', 'se' || char(7)) AS BLOB)"}
    with sqlite3.connect(tmp_path / "outbox.db") as connection:
        for key, value in damages.items():
            connection.execute(f"UPDATE message SET payload = {value} WHERE key = ?", (key,))
    with line(broker.port) as running:
        fresh = running.send(2)
        expected = [identifier for key, identifier in enumerate(sent, 1) if key not in damages] + fresh
        assert [document["id"] for document in consumer.wait_for("verdict", 6)] == expected
        eventually(lambda: running.outbox.stats().messages == 0)
        stats = running.outbox.stats()
        assert (stats.dropped, stats.damaged, stats.too_large) == (2, 2, 0)
        assert running.delivery.health().trouble() == "messages were lost: damaged on the disk"
        assert running.delivery.health().links["cam0"].connects == 1
    with line(1) as running:
        assert running.outbox.stats().dropped == 2, "the count outlives the process"


def test_a_board_that_the_disk_has_changed_begins_anew(
    start_line: Any, tmp_path: Path, make_images: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Outbox(tmp_path / "state" / "outbox.db") as outbox:
        outbox.save_state("alarm/cam0", b'{"alarms":5}')
    source = {"kind": "folder", "path": str(make_images(tmp_path / "in", [10])), "watch": True}
    running = start_line({"cam0": {"source": source, "product": "mono"}})
    assert running.app.boards["cam0"].active == () and "what was kept of its alarms is damaged" in caplog.text


def test_a_new_file_that_cannot_be_opened_at_once_is_opened_later(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    path = tmp_path / "o.db"
    with Outbox(path) as outbox:
        fill(outbox, 20)
        file = outbox._file
        connect, commit, refusals = file._connect, file.commit, []

        def refuses() -> sqlite3.Connection:
            if file._writer is not None and not refusals:  # the second connection, which reads
                refusals.append("disk I/O error")
                raise sqlite3.OperationalError(refusals[0])
            return connect()

        def meets_it(*args: Any) -> None:
            file.commit = commit  # type: ignore[method-assign]
            raise sqlite3.DatabaseError("database disk image is malformed")

        file._connect, file.commit = refuses, meets_it  # type: ignore[method-assign]
        fill(outbox, 1)
        assert refusals
        eventually(lambda: len(waiting(outbox)) == 21)


def test_what_is_lost_is_counted_in_one_pass_over_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, passes = tmp_path / "o.db", []
    with Outbox(path) as outbox:
        fill(outbox, 200, size=700)
        early = waiting(outbox)[60].id
    damage(path, page_of(path.read_bytes(), b'"id":"%s"' % early.encode()), bytes(8))
    damage(path, root(path, "message_order"), bytes(SECTOR))

    def counted(*values: Any, **options: Any) -> Any:
        passes.extend(value for value in values if isinstance(value, set))
        return max(*values, **options)

    monkeypatch.setattr(outbox_salvage, "max", counted, raising=False)
    saved = outbox_salvage.salvage(path)
    assert 0 < saved.lost < 20 and len(passes) <= 2


def test_what_damage_took_is_not_said_to_be_the_caps_where_the_file_is_replaced_at_the_second_try(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    path, events = tmp_path / "o.db", []
    with Outbox(path, event=lambda *e: events.append(e)) as outbox:
        fill(outbox, 100, size=700)
        file = outbox._file
        file.fold()
        damage(path, page_of(path.read_bytes(), b'"id":"%s"' % waiting(outbox)[40].id.encode()), bytes(8))
        move, commit = file._replacement.put_in_place, file.commit

        def refuses() -> Path:
            file._replacement.put_in_place = move  # type: ignore[method-assign]
            raise OSError(errno.ENOSPC, "no space")

        def meets_it(*args: Any) -> None:
            file.commit = commit  # type: ignore[method-assign]
            raise sqlite3.DatabaseError("database disk image is malformed")

        file._replacement.put_in_place, file.commit = refuses, meets_it  # type: ignore[method-assign]
        fill(outbox, 1)
        eventually(lambda: len(events) == 3)
        assert outbox.stats().damaged == 101 - len(waiting(outbox)) > 0
    assert sorted(what for what, _ in events) == ["degraded", "recovered", "set_aside"], "set aside, not dropped"
