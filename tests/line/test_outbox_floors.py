"""Floors beside the outbox: numbers of before that no damage and no kill sets back."""

from __future__ import annotations

import errno
import json
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from andon.runtime.mqtt.delivery import published_version
from andon.runtime.outbox import Outbox
from andon.runtime.outbox_floors import Floors, FloorsFile
from andon.runtime.verdict import Ids

from .outboxes import PAGE, SECTOR, damage, fill, fill_disk, root, waiting


def test_what_was_given_after_the_floors_were_written_is_not_given_again_where_the_states_are_lost(
    tmp_path: Path,
) -> None:
    """They are seconds old when a line is killed; what it delivered since then is known to nobody."""
    path, floors = tmp_path / "o.db", tmp_path / "o.db.floors"
    ids = Ids()
    later = Ids(clock_ns=lambda: time.time_ns() + 30 * 10**9)
    with Outbox(path) as outbox:
        outbox.wait(outbox.put("cam0", "verdict", ids.next(), b"{}", ("memory/version", b"7")), 10)
        outbox._keep_floors(sync=True)
        early = floors.read_bytes()
        outbox.wait(outbox.put("cam0", "verdict", last := later.next(), b"{}", ("memory/version", b"8")), 10)
        outbox.done(waiting(outbox))
    floors.write_bytes(early)
    damage(path, root(path, "state") + PAGE - SECTOR, bytes(SECTOR))
    for _ in range(2):
        with Outbox(path) as outbox:
            assert outbox.last_id and outbox.last_id > last and published_version(outbox) > 8


@pytest.mark.parametrize("left", [0, 2])
def test_damage_sets_neither_identifiers_nor_losses_back(tmp_path: Path, left: int) -> None:
    path = tmp_path / "o.db"
    with Outbox(path, max_bytes=20_000) as outbox:
        fill(outbox, 60, size=900)
        messages = waiting(outbox)
        outbox.done(messages[left:])  # those that stay are of a topic that the broker refuses: older than the delivered
        dropped = outbox.stats().dropped
    assert dropped
    (tmp_path / "o.db.floors").unlink(missing_ok=True)  # the file's own knowledge is enough where it can be read
    damage(path, root(path, "message_order"), bytes(SECTOR))
    for _ in range(2):
        with Outbox(path, max_bytes=20_000) as outbox:
            assert outbox.stats().messages == left and outbox.stats().dropped == dropped
            assert Ids(outbox.last_id, clock_ns=lambda: 0).next() > messages[-1].id


def test_what_was_sent_from_memory_on_a_full_disk_is_a_floor_after_a_kill(
    small_disk: Path, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    with Outbox(small_disk / "o.db") as outbox:
        fill(outbox, 3)
        fill_disk(small_disk)
        ids, count = Ids(outbox.last_id), 0
        while not outbox.stats().degraded or count < 300:
            count += 1
            outbox.put("cam0", "verdict", ids.next(), bytes(800), ("memory/version", b"%d" % count))
        eventually(lambda: len(waiting(outbox)) == 3 + count)  # the publisher may have sent all of them
        last = waiting(outbox)[-1].id
        for file in small_disk.glob("o.db*"):  # as kill -9 leaves them
            shutil.copy(file, tmp_path)
    with Outbox(tmp_path / "o.db") as outbox:
        assert Ids(outbox.last_id, clock_ns=lambda: 0).next() > last
        assert published_version(outbox) == count
    with Outbox(tmp_path / "o.db") as outbox:
        assert published_version(outbox) == count, "and it is stored now"


def test_of_two_copies_of_the_floors_one_is_whole_whatever_happens_to_the_other(tmp_path: Path) -> None:
    path = tmp_path / "floors"
    first, second = Floors(Ids().next(), 7, 1, 2), Floors(Ids().next(), 8, 1, 3)
    FloorsFile(path).write(first, sync=False)
    other = FloorsFile(path)
    assert other.read() == first
    other.write(second, sync=True)
    assert FloorsFile(path).read() == second
    for at in (0, PAGE):
        content = bytearray(path.read_bytes())
        content[at : at + 20] = bytes(20)
        path.with_name("damaged").write_bytes(content)
        assert FloorsFile(path.with_name("damaged")).read() in (first, second)
    assert FloorsFile(tmp_path / "none").read() == Floors()


def test_floors_that_a_slower_thread_writes_do_not_set_back_what_another_has_sent(tmp_path: Path) -> None:
    ids = Ids()
    early, late = Floors(ids.next(), 7, 1, 9), Floors(ids.next(), 8, 2, 3)
    floors = FloorsFile(tmp_path / "floors")
    floors.write(late, sync=True)
    floors.write(early, sync=False)  # of before, by a thread that was held up
    assert FloorsFile(tmp_path / "floors").read() == Floors(late.id, 8, 2, 9)


def test_floors_that_the_disk_does_not_take_are_said_once_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, ids = tmp_path / "floors", Ids()
    written, floors = Floors(ids.next(), 7, 1, 2), FloorsFile(path)
    for outage in (1, 2):
        with monkeypatch.context() as full:
            full.setattr("os.pwrite", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
            for _ in range(3):
                floors.write(written, sync=True)
        assert sum("the line may use identifiers and versions again" in text for text in caplog.messages) == outage
        floors.write(written, sync=True)
        assert FloorsFile(path).read() == written
        written = Floors(ids.next(), 8, 1, 2)


def test_floors_of_a_version_that_keeps_more_are_read(tmp_path: Path) -> None:
    path = tmp_path / "floors"
    body = json.dumps([3, "01ARZ3NDEKTSV4RRFFQ69G5FAV", 7, 1, 2, "more"]).encode()
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    assert FloorsFile(path).read() == Floors("01ARZ3NDEKTSV4RRFFQ69G5FAV", 7, 1, 2)
