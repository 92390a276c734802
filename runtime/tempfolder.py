"""Temporary folders that do not outlive a killed process for long: the next one of their kind removes them.

A service that is killed and started again, time and again, would fill its disk with them. Who uses a folder holds a
lock on it, which goes with the process; systemd-tmpfiles, too, keeps away from a folder that is locked.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


class TemporaryFolder:
    """A new folder in the system's place for temporary files, removed by `cleanup` or with this object.

    Those of the same name that nobody uses any more, left by killed processes, are removed first. Earlier versions
    locked none and called theirs otherwise (andon-NAME-...): these are not touched.

    Attributes:
        name: its path.

    Raises:
        OSError: none can be made.
    """

    def __init__(self, name: str):
        prefix = f"andon-{name}."
        _remove_abandoned(prefix)
        self._folder, self._lock = _held(prefix)
        self.name = self._folder.name

    def cleanup(self) -> None:
        """Remove it; harmless twice."""
        self._folder.cleanup()
        self._lock()


def _held(prefix: str) -> tuple[tempfile.TemporaryDirectory[str], Callable[[], object]]:
    """A new folder, and what gives its lock back; it has none where file systems know none, and nobody removes it."""
    while True:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
        with suppress(FileNotFoundError):
            handle = os.open(folder.name, os.O_RDONLY | os.O_DIRECTORY)
            lock = weakref.finalize(folder, os.close, handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH)
            if Path(folder.name).is_dir():
                return folder, lock
            lock()
        folder.cleanup()  # another process took it for abandoned before it was locked


def _remove_abandoned(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
            log.info("%s, which a killed process has left, is removed", path)
        finally:
            os.close(handle)
