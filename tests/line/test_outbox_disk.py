"""The outbox on a disk that refuses: what is stored, what is deleted, what is lost and said."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from andon.runtime.outbox import Outbox
from andon.runtime.verdict import Ids

from .outboxes import Clocks, Events, fill, waiting


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = Path(tempfile.mkdtemp(prefix="andon-small-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"DISK FULL IS NOT TESTED HERE: mount is refused ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
    shutil.rmtree(place, ignore_errors=True)


def test_full_disk(small_disk: Path, eventually: Callable[..., None]) -> None:
    events: Events = []
    with Outbox(small_disk / "o.db", event=lambda *e: events.append(e)) as outbox:
        ids = Ids()
        keys = [outbox.put("cam0", "verdict", ids.next(), b"x" * 2000) for _ in range(2500)]  # 5 MB
        eventually(lambda: outbox.stats().degraded is not None)
        assert "full" in str(outbox.stats().degraded) and [what for what, _ in events] == ["degraded"]
        eventually(lambda: [m.key for m in waiting(outbox)] == keys)  # offered from memory, in order, none missing
        assert outbox.stats().messages == 2500
        outbox.done(waiting(outbox)[:2000])
        eventually(lambda: outbox.stats().degraded is None)
        assert [m.key for m in waiting(outbox)] == keys[2000:] and events[-1][0] == "recovered"
        assert outbox.stats().dropped == 0
    with Outbox(small_disk / "o.db") as outbox:
        assert [m.key for m in waiting(outbox)] == keys[2000:]


def test_a_clock_that_is_set_writes_nothing_on_a_nearly_full_disk(
    small_disk: Path, eventually: Callable[..., None]
) -> None:
    clocks = Clocks()
    with clocks.open(small_disk / "o.db") as outbox:
        fill(outbox, 3000, size=500)
        clocks.wall += 3600
        fill(outbox, 1)
        assert outbox.stats().degraded is None
        outbox.done(waiting(outbox))
        eventually(lambda: outbox._file.count == 0)
    with clocks.open(small_disk / "o.db") as outbox:
        assert waiting(outbox) == [], "what was acknowledged is not sent again"


def test_memory_is_bounded_while_the_disk_refuses(tmp_path: Path, eventually: Callable[..., None]) -> None:
    with Outbox(tmp_path / "o.db", memory_bytes=10_000) as outbox:
        commit = outbox._file.commit

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        outbox._file.commit = full  # type: ignore[method-assign]
        ids = Ids()
        keys = [outbox.put("cam0", "verdict", ids.next(), b"x" * 1000) for _ in range(30)]
        eventually(lambda: outbox.stats().degraded is not None)
        assert [m.key for m in waiting(outbox)] == keys[-10:] and outbox.stats().dropped == 20
        outbox._file.commit = commit  # type: ignore[method-assign]
        assert outbox.wait(keys[-1], 5)
