"""A folder beside what is being made, on the same disk: gone when that is done, or, where its process was killed, with
the next one beside it.

Unlike the system's place for temporary files (tempfolder.py) this may be a share that other machines write to, too. So
each such folder says whose it is, in a file that its process holds locked. The lock alone proves nothing (some shares
keep locks to one machine), nor does a process's number (containers have their own): a folder goes only where it is of
this very machine, and either of this start of it and its lock is free, or of an earlier start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)
#: In each such folder: {"boot": ..., "machine": ...}, written when it is locked. A folder without it is nobody's known.
OWNER = "andon-work.json"
_BOOT, _CARDS = Path("/proc/sys/kernel/random/boot_id"), Path("/sys/class/net")
_LARGEST = 4096


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, removed with the block; what killed processes have left there goes first.

    Raises:
        OSError: none can be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    handle = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _sign(handle)
        yield folder
    finally:
        _clear(folder)
        os.close(handle)


def _sign(handle: int) -> None:
    """Say whose it is, once it is locked; where locks are not known nothing is said, and nobody removes it."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, json.dumps({"boot": _boot(), "machine": _machine()}).encode())


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the folders that dead processes of this machine have left in `parent`, and say so in one line."""
    removed = [owner.parent for owner in sorted(parent.glob(f".*/{OWNER}")) if _remove(owner)]
    if removed:
        names = ", ".join(folder.name for folder in removed)
        log.warning("removed from %s what killed processes had begun: %s", parent, names)
    return removed


def _remove(owner: Path) -> bool:
    """Whether this folder was abandoned, and is gone."""
    folder = owner.parent
    try:
        if folder.is_symlink():
            return False
        handle = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # another user's, or gone
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _ours(os.read(handle, _LARGEST)):
            return False
        _clear(folder)
        return not folder.exists()
    except OSError:  # somebody has it, or locks are not known here
        return False
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove it as far as that goes, last the file by which the next one knows it."""
    for path in [] if not folder.is_dir() else folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != OWNER:
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] in ([], [OWNER]):
            shutil.rmtree(folder)


def _ours(text: bytes) -> bool:
    """Whether a lock that is free tells that a folder's process is dead: of this machine's one start, or an earlier."""
    try:
        said = json.loads(text)
        boot, machine = str(said["boot"]), str(said["machine"])
    except (ValueError, KeyError, TypeError):  # nothing: it is being made, or cannot be locked
        return False
    return bool(_boot()) and boot != "" and (boot == _boot() or (machine != "" and machine == _machine()))


def _boot() -> str:
    """The machine's start, which containers share; empty where the system does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _machine() -> str:
    """One machine's over its starts: a hash of its name and network cards, as copies of one system image share all
    else; empty where no card is seen (in most containers)."""
    cards = []
    with suppress(OSError):
        for card in sorted(_CARDS.iterdir()):
            with suppress(OSError):
                if (card / "device").exists():  # not a bridge or tunnel, which others have with one address
                    cards.append((card / "address").read_text().strip())
    return hashlib.sha256("\n".join([socket.gethostname(), *cards]).encode()).hexdigest() if cards else ""
