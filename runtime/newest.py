"""Which of several bundles was exported, and of one export calibrated, last: by the manifest, not by files' times."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, MAX_MANIFEST_BYTES
from .manifest import Manifest
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
    manifest that can be read. Of one export, packed or copied, what has thresholds comes first, then what was
    calibrated last, then a folder, as a .tar beside it cannot be calibrated. Times of files decide after that.
    """

    def age(path: Path) -> tuple[float, bool, float, bool, float, str]:
        document, touched = _document(path), path.stat().st_mtime
        created, thresholds = _time(document.get("created")), _thresholds(document)
        calibrated = [when.timestamp() for each in thresholds if (when := _time(each.get("set_at")))]
        exported = touched if created is None else created.timestamp()
        return exported, bool(thresholds), max(calibrated, default=0.0), path.is_dir(), touched, path.name

    return sorted(bundles, key=age, reverse=True)


def export_time(older: Iterable[Path]) -> datetime:
    """When a bundle is exported now that is to be newer than these, in UTC and whole seconds.

    It is the time, unless that is not set yet, as on a device without a battery before it has reached the network.
    """
    return _later(_time(_document(path).get("created")) for path in older)


def calibration_time(manifest: Manifest) -> str:
    """The time of a calibration now, RFC 3339 in whole seconds: later than the last one whatever the clock says."""
    before = [_time(threshold.set_at) for *_, threshold in manifest.calibrated()]
    return _later(before).isoformat().replace("+00:00", "Z")


def _later(times: Iterable[datetime | None]) -> datetime:
    after = [when + timedelta(seconds=1) for when in times if when is not None]
    return max([datetime.now(timezone.utc), *after]).astimezone(timezone.utc).replace(microsecond=0)


def _time(text: object) -> datetime | None:
    """A time of a manifest; None where it says none."""
    if not isinstance(text, str):
        return None
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=timezone.utc)


def _thresholds(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all products, programs and cameras, in a manifest that nobody has checked yet."""
    products = [document.get("thresholds"), *_objects(document.get("camera_thresholds"))]
    return [threshold for each in products for programs in _objects(each) for threshold in _objects(programs)]


def _objects(found: object) -> list[dict[str, Any]]:
    """The objects in an object."""
    return [each for each in found.values() if isinstance(each, dict)] if isinstance(found, dict) else []


def _document(path: Path) -> dict[str, Any]:
    """The manifest, unchecked; empty where there is none that can be read."""
    try:
        document = json.loads(_manifest(path))
    except (OSError, *DAMAGED, ValueError, KeyError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


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
