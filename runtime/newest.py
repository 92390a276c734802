"""Which of several bundles was exported last: by its manifest, whatever touched the files since."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

from .bundle import MANIFEST, MAX_MANIFEST_BYTES
from .unpack import DAMAGED

#: What an export (.tmp) and copying programs call a file that is not whole.
_PARTS = (".tmp", ".part", ".partial", ".filepart")


def may_be_bundle(path: Path) -> bool:
    """Whether what a pattern matches is to be looked at: not what is still being written, and no link to nothing.

    A folder gets its manifest last from an export, and may lack it while it is copied here.
    """
    if path.name.startswith(".") or path.suffix in _PARTS:
        return False
    if not path.is_dir():
        return path.is_file()
    try:
        return (path / MANIFEST).is_file()
    except PermissionError:  # another user's: as an old one it must not stop the line, as the newest it is told
        return True


def newest(bundles: Iterable[Path]) -> Path:
    """The bundle (folder or .tar) that was exported last; at least one must be given."""
    return newest_first(bundles)[0]


def newest_first(bundles: Iterable[Path]) -> list[Path]:
    """Bundles (folders or .tar) by when they were exported.

    A calibration writes to an old bundle and a copy makes new files, so times of files count only where there is no
    manifest that can be read, and between exports of the same second.
    """

    def age(path: Path) -> tuple[float, float, str]:
        created, touched = _created(path), path.stat().st_mtime
        return touched if created is None else created.timestamp(), touched, path.name

    return sorted(bundles, key=age, reverse=True)


def export_time(older: Iterable[Path]) -> datetime:
    """When a bundle is exported now that is to be newer than these, in UTC and whole seconds.

    It is the time, unless that is not set yet, as on a device without a battery before it has reached the network.
    """
    times = [created + timedelta(seconds=1) for path in older if (created := _created(path)) is not None]
    return max([datetime.now(timezone.utc), *times]).astimezone(timezone.utc).replace(microsecond=0)


def _created(path: Path) -> datetime | None:
    """What the manifest says; None where there is none that says it."""
    try:
        created = datetime.fromisoformat(json.loads(_manifest(path))["created"].replace("Z", "+00:00"))
    except (OSError, *DAMAGED, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return created if created.tzinfo else created.replace(tzinfo=timezone.utc)


def _manifest(path: Path) -> bytes:
    if path.is_dir():
        with (path / MANIFEST).open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES)
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if member.isreg() and name == MANIFEST and "/" not in folder and member.size <= MAX_MANIFEST_BYTES:
                file_in_tar = archive.extractfile(member)
                if file_in_tar is not None:
                    with file_in_tar:
                        return file_in_tar.read()
    raise KeyError(MANIFEST)
