"""Folders of what can be made again (features, plans): who uses an entry, and which go when there are too many bytes.

Each entry has a file whose lock is held shared while the entry is used, and exclusively while it is written or removed.
Locks go with the process that holds them, so a killed one leaves nothing locked.
"""

from __future__ import annotations

import fcntl
import inspect
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError

LIMIT = "ANDON_CACHE_LIMIT"
DEFAULT_LIMIT = "20 GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Lease:
    """A hold on an entry: shared from the start, and given back when the object is gone.

    Args:
        lock: the file that is locked.
        create: make it if it is not there; False where it is the entry's own.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, lock: Path, *, create: bool = True):
        self._handle = _open(lock, create)
        self.release = weakref.finalize(self, os.close, self._handle)
        self.share()

    def share(self) -> None:
        """Wait until nobody writes or removes the entry, and let nobody begin to."""
        fcntl.flock(self._handle, fcntl.LOCK_SH)

    def own(self) -> None:
        """Wait until nobody else has the entry. Others may have had it in between: look again at what is there."""
        fcntl.flock(self._handle, fcntl.LOCK_EX)


class Entry(NamedTuple):
    """moment: of its last use, seconds since 1970. size: bytes. lock: its file for locks. paths: what it is made of,
    files or folders, in the order in which they go: first that without which the rest is never used."""

    moment: float
    size: int
    lock: Path
    paths: tuple[Path, ...]


def code_of(*functions: Callable[..., object]) -> str:
    """Source of the modules that these functions are from: what they make is made anew when it is another."""
    return "\n".join(inspect.getsource(sys.modules[function.__module__]) for function in functions)


def limit(default: str = DEFAULT_LIMIT) -> int | None:
    """Bytes that a cache may hold: $ANDON_CACHE_LIMIT, as in "500 MB", "20 GB" or "off" (None); `default` if not set.

    Raises:
        ConfigError: it is something else.
    """
    text = os.environ.get(LIMIT) or default
    if text.strip().lower() == "off":
        return None
    if (size := size_of(text)) is None:
        step = f"set {LIMIT} to one of these, or unset it for {default}"
        raise ConfigError(f"{LIMIT} is not a size", found=text, expected="500 MB, 20 GB, off, ...", next_step=step)
    return size


def size_of(text: str) -> int | None:
    """Bytes, as in "500 MB", "2.5GB" or "1000"; None where it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()])


def used(path: Path) -> None:
    """Note that an entry is used now, whose last use is this file's time stamp; of another user's nothing is noted."""
    with suppress(OSError):
        os.utime(path)


def prune(entries: Iterable[Entry], most: int | None, name: str, say: Callable[[str], object] | None = None) -> None:
    """Remove entries that nobody uses, the longest unused first, until at most `most` bytes are left (None: none).

    name: of the cache, for the message. say: takes it; default: stderr. What another user must remove stays.
    """
    if most is None:
        return
    known = sorted(entries)
    total = sum(entry.size for entry in known)
    freed, count, latest = 0, 0, 0.0
    for entry in known:
        if total - freed <= most:
            break
        with _free(entry) as free:
            if free and _remove(entry.paths):
                freed, count, latest = freed + entry.size, count + 1, entry.moment
    if count:
        what = f"{count} unused entr{'y' if count == 1 else 'ies'} of {size_text(freed)} removed"
        when = f"last used {datetime.fromtimestamp(latest):%Y-%m-%d %H:%M} or before"
        text = f"{name}: {what}, {when}; {size_text(total - freed)} left, {LIMIT} is {size_text(most)}"
        (say or _stderr)(text)


def remove_unfinished(files: Iterable[Path]) -> None:
    """Remove half-written files of processes that were killed; who still writes one holds a lock on it."""
    for path in files:
        with _free(Entry(0.0, 0, path, (path,))) as free:
            if free:
                _remove((path,))


def size_text(count: int) -> str:
    """Bytes in words: "1.5 GB"."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _open(lock: Path, create: bool) -> int:
    how = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    return os.open(lock, how | os.O_CLOEXEC, 0o666)


@contextmanager
def _free(entry: Entry) -> Iterator[bool]:
    """Hold an entry that nobody uses; False if somebody does, or it is gone or another user's."""
    try:
        handle = _open(entry.lock, entry.lock not in entry.paths)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _remove(paths: tuple[Path, ...]) -> bool:
    """Whether this removed the last of them, which holds the bytes."""
    try:
        for path in paths[:-1]:
            path.unlink(missing_ok=True)
        if paths[-1].is_dir():
            shutil.rmtree(paths[-1], ignore_errors=True)
        else:
            paths[-1].unlink()
    except OSError:
        return False
    return True
