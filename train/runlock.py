"""One process a run: its folder is locked from its start, or its resumption, to its end."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import quoted
from .errors import CheckpointError

LOCK = "run.lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold an existing folder's lock; the lock goes with the process, the file with the block.

    Raises:
        CheckpointError: another process has it.
    """
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise CheckpointError(
                f"{folder} is in use by pid {owner or 'unknown'}",
                found="a training that is running",
                expected="a folder that no training uses",
                next_step=f"wait for it or end it, then andon train --resume {quoted(folder)}; or give another --out",
            ) from error
        if _is(handle, path):
            break
        os.close(handle)  # its last owner has removed it in between
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    """True if the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
