"""A bundle that comes as a .tar, from wherever: unpacked without trusting a single member of it."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import IO

from .bundlefiles import COPY_AGAIN, MAX_FILE_BYTES, MAX_FILES, MAX_TOTAL_BYTES, inside
from .errors import BundleError

_CHUNK = 1 << 20


def unpack(path: Path, target: Path) -> Path:
    """Unpack a .tar of plain files and folders; the bundle is at its root or in its single top folder.

    target: an empty directory. Returns the bundle's root in it.

    Raises:
        BundleError: it is no .tar, too large, or holds links, devices or paths that leave the directory.
    """
    total = 0
    try:
        with tarfile.open(path) as archive:
            for count, member in enumerate(archive):
                total += member.size
                _check_member(member, count, total)
                if member.name.strip("./") == "" or member.isdir():
                    continue
                place = inside(target, _relative(member.name))
                place.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                if source is not None:
                    with source, place.open("xb") as out:
                        _copy(source, out)
    except (tarfile.TarError, EOFError, FileExistsError, NotADirectoryError) as error:
        # tarfile tells of an unknown format in a line for each that it has tried.
        found = "no tar archive" if "\n" in str(error) else error
        raise BundleError(
            f"{path} cannot be unpacked", found=found, expected="a .tar of a bundle", next_step=COPY_AGAIN
        ) from error
    tops = list(target.iterdir())
    return tops[0] if len(tops) == 1 and tops[0].is_dir() else target


def _check_member(member: tarfile.TarInfo, count: int, total: int) -> None:
    if not (member.isreg() or member.isdir()):
        raise BundleError(
            "the .tar holds something that is not a plain file or folder",
            found=member.name,
            expected="files and folders only",
            next_step="do not use this bundle; " + COPY_AGAIN,
        )
    if count >= MAX_FILES or member.size > MAX_FILE_BYTES or total > MAX_TOTAL_BYTES:
        raise BundleError("the .tar is too large", found=f"{total} bytes", expected=f"<= {MAX_TOTAL_BYTES} bytes")


def _relative(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def _copy(source: IO[bytes], out: IO[bytes]) -> None:
    while chunk := source.read(_CHUNK):
        out.write(chunk)
