"""The outbox's caps: by bytes and by age, whatever the clock says; what they drop is counted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from andon.runtime.outbox import Outbox

from .outboxes import YEAR, Clocks, Events, fill, waiting


def test_byte_cap_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    events: Events = []
    with Outbox(tmp_path / "o.db", max_bytes=1020, event=lambda *e: events.append(e)) as outbox:
        keys = fill(outbox, 20) + fill(outbox, 5)
        kept = [m.key for m in waiting(outbox)]
        stats = outbox.stats()
        assert kept == keys[-len(kept) :] and 9 <= len(kept) <= 10
        assert stats.dropped == 25 - len(kept) and stats.bytes <= 1020
    assert sum(int(text.split()[0]) for what, text in events if what == "dropped") == stats.dropped, (
        "those of the last minute are said at the stop"
    )
    with Outbox(tmp_path / "o.db") as outbox:
        assert outbox.stats().dropped == stats.dropped, "the count outlives the process"


def test_age_cap_goes_by_time_passed_not_by_the_clock(tmp_path: Path) -> None:
    clocks = Clocks()
    with clocks.open(tmp_path / "o.db") as outbox:
        fill(outbox, 3)
        clocks.wall += 10 * YEAR  # the clock is set while we run: nothing has aged
        fill(outbox, 2)
        clocks.wall -= 20 * YEAR
        clocks.run(1800)
        fill(outbox, 1)
        assert len(waiting(outbox)) == 6 and outbox.stats().oldest_age_s == 1800
    clocks.restart(off=7200)
    with clocks.open(tmp_path / "o.db") as outbox:
        fill(outbox, 1)
        assert len(waiting(outbox)) == 7 and outbox.stats().oldest_age_s == 1800
        clocks.run(1801)
        fill(outbox, 1)
        assert len(waiting(outbox)) == 3 and outbox.stats().dropped == 5


def test_what_is_too_old_goes_without_a_message_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    monkeypatch.setattr("andon.runtime.outbox._HOUSEKEEPING", 0.05)
    clocks = Clocks()
    with clocks.open(tmp_path / "o.db") as outbox:
        fill(outbox, 3)
        clocks.run(3601)
        eventually(lambda: outbox.stats().messages == 0)
        assert outbox.stats().dropped == 3


def test_what_was_judged_under_a_wrong_clock_is_kept_at_the_next_start(tmp_path: Path) -> None:
    """A computer without a battery for its clock boots in 1970 and loses power before the network is there."""
    clocks = Clocks(wall=60.0)
    with clocks.open(tmp_path / "o.db") as outbox:
        keys = fill(outbox, 5)
    clocks.restart(off=50 * YEAR)
    with clocks.open(tmp_path / "o.db") as outbox:
        keys += fill(outbox, 5)
        clocks.wall = 60.0
        keys += fill(outbox, 5)
    clocks.restart(off=0.0)
    with clocks.open(tmp_path / "o.db") as outbox:
        fill(outbox, 1)
        assert [m.key for m in waiting(outbox)][:-1] == keys and outbox.stats().dropped == 0


@pytest.mark.parametrize(
    "stored", ["60.0 + key", "4e9 + key", "1.7e9 - 600 + key", "CASE WHEN key > 5 THEN 60.0 ELSE 1.7e9 END"]
)
def test_a_file_of_an_earlier_version_loses_nothing_whatever_clock_it_went_by(tmp_path: Path, stored: str) -> None:
    """They stored the wall clock's time; one that was set back between two runs stands behind a greater one."""
    clocks = Clocks()
    with clocks.open(tmp_path / "o.db") as outbox:
        keys = fill(outbox, 10)
    with sqlite3.connect(tmp_path / "o.db") as connection:
        connection.execute(f"UPDATE message SET stored = {stored}")
    for off in (86400, -2 * YEAR, 30 * YEAR):
        clocks.restart(off)
        with clocks.open(tmp_path / "o.db") as outbox:
            keys += fill(outbox, 1)
            assert [m.key for m in waiting(outbox)] == keys and outbox.stats().dropped == 0
            outbox.done(waiting(outbox)[:3])
            del keys[:3]
    clocks.restart(0.0)
    with clocks.open(tmp_path / "o.db") as outbox:
        clocks.run(3601)
        keys = fill(outbox, 1)
        assert [m.key for m in waiting(outbox)] == keys, "and they age from here on"
