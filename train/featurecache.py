"""The folder of cached features, kept to a limit by andon.runtime.diskcache.

An entry is a folder; ``<entry>.lock`` beside it is its lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ..runtime.diskcache import LIMIT, Entry, Lease, size_text
from ..runtime.diskcache import prune as prune_entries
from .errors import TrainingError

#: Written last into an entry and removed first; its time stamp is that of the entry's last use.
INDEX = "index.json"


def lease(entry: Path) -> Lease:
    """A hold on an entry, which need not be there yet."""
    return Lease(_lock_of(entry))


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
            expected=f"room for {size_text(size)}",
            next_step=f"make room there, set ANDON_CACHE to a folder on another disk, or {LIMIT} to less",
        ) from error
    finally:
        os.close(handle)


def prune(root: Path, most: int | None) -> None:
    """Keep the folder to `most` bytes. What killed processes left half written goes the same way."""
    prune_entries(_measured(root), most, f"feature cache {root}")


def _measured(root: Path) -> Iterator[Entry]:
    """Each entry, and what is left of one."""
    for entry in root.iterdir():
        if not entry.is_dir():
            continue
        index = entry / INDEX
        try:
            files = [path.stat() for path in entry.iterdir()]
            moment = (index if index.exists() else entry).stat().st_mtime
        except FileNotFoundError:  # another process removes it
            continue
        yield Entry(moment, sum(file.st_size for file in files), _lock_of(entry), (index, entry))


def _lock_of(entry: Path) -> Path:
    """The lock of an entry, and of its unfinished copies `<entry>.tmp-...`."""
    return entry.with_name(f"{entry.name.partition('.')[0]}.lock")
