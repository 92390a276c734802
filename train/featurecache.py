"""The folder of cached features: who uses an entry, and which entries go when there are too many bytes.

An entry is a folder; ``<entry>.lock`` beside it is held exclusively while the entry is written or removed, and shared
while it is used. Locks go with the process that holds them, so a killed one leaves nothing locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ..runtime.errors import ConfigError
from .errors import TrainingError

LIMIT = "ANDON_CACHE_LIMIT"
DEFAULT_LIMIT = "20 GB"
#: Written last into an entry and removed first; its time stamp is that of the entry's last use.
INDEX = "index.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Lease:
    """A hold on an entry: shared from the start, and given back when the object is gone."""

    def __init__(self, entry: Path):
        self._handle = os.open(_lock_of(entry), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._close = weakref.finalize(self, os.close, self._handle)
        self.share()

    def share(self) -> None:
        """Wait until nobody writes or removes the entry, and let nobody begin to."""
        fcntl.flock(self._handle, fcntl.LOCK_SH)

    def own(self) -> None:
        """Wait until nobody else has the entry. Others may have had it in between: look again at what is there."""
        fcntl.flock(self._handle, fcntl.LOCK_EX)


def limit() -> int | None:
    """Bytes that the cache may hold: $ANDON_CACHE_LIMIT, as in "500 MB", "20 GB" or "off" (None); 20 GB if not set.

    Raises:
        ConfigError: it is something else.
    """
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    if text.strip().lower() == "off":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        step = f"set {LIMIT} to one of these, or unset it for {DEFAULT_LIMIT}"
        raise ConfigError(f"{LIMIT} is not a size", found=text, expected="500 MB, 20 GB, off, ...", next_step=step)
    return int(float(match[1]) * _UNITS[match[2].upper()])


def reserve(path: Path) -> None:
    """Take room on the disk for all of a file that is to be written through a memory map.

    Such a file has holes; on a full disk the first write into one is no error but the signal SIGBUS, which ends the
    process without a word.

    Raises:
        TrainingError: there is not so much room.
    """
    size = path.stat().st_size
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            return
        raise TrainingError(
            f"the feature cache {path.parent.parent} cannot be written",
            found=error.strerror,
            expected=f"room for {_size(size)}",
            next_step=f"make room there, set ANDON_CACHE to a folder on another disk, or {LIMIT} to less",
        ) from error
    finally:
        os.close(handle)


def used(entry: Path) -> None:
    """Note that an entry is used now."""
    os.utime(entry / INDEX)


def prune(root: Path, most: int | None) -> list[Path]:
    """Remove entries that nobody uses, the longest unused first, until at most `most` bytes are left; which ones.

    What it removes it says on stderr. What killed processes left half written goes the same way.
    """
    if most is None:
        return []
    entries = sorted(_measured(root))
    total = sum(size for _, size, _ in entries)
    gone: list[Path] = []
    freed, latest = 0, 0.0
    for moment, size, entry in entries:
        if total - freed <= most:
            break
        with _free(entry) as free:
            if free and entry.exists():
                (entry / INDEX).unlink(missing_ok=True)
                shutil.rmtree(entry, ignore_errors=True)
                gone.append(entry)
                freed, latest = freed + size, moment
    if gone:
        what = f"{len(gone)} unused entr{'y' if len(gone) == 1 else 'ies'} of {_size(freed)} removed"
        when = f"last used {datetime.fromtimestamp(latest):%Y-%m-%d %H:%M} or before"
        left = f"{_size(total - freed)} left, {LIMIT} is {_size(most)}"
        print(f"feature cache {root}: {what}, {when}; {left}", file=sys.stderr)
    return gone


def _measured(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Last use, bytes and path of each entry, and of what is left of one."""
    for entry in root.iterdir():
        if not entry.is_dir():
            continue
        try:
            files = [path.stat() for path in entry.iterdir()]
            moment = (entry / INDEX if (entry / INDEX).exists() else entry).stat().st_mtime
        except FileNotFoundError:  # another process removes it
            continue
        yield moment, sum(file.st_size for file in files), entry


@contextmanager
def _free(entry: Path) -> Iterator[bool]:
    """Hold an entry that nobody uses; False if somebody does."""
    handle = os.open(_lock_of(entry), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _lock_of(entry: Path) -> Path:
    """The lock of an entry, and of its unfinished copies `<entry>.tmp-...`."""
    return entry.with_name(f"{entry.name.partition('.')[0]}.lock")


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
