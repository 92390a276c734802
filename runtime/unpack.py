"""A bundle that comes as a .tar, from wherever: unpacked without trusting a single member of it."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from pathlib import Path
from typing import IO

from .bundlefiles import COPY_AGAIN, MAX_FILE_BYTES, MAX_FILES, MAX_TOTAL_BYTES, inside
from .errors import BundleError

_CHUNK = 1 << 20
#: What reading an archive that is not whole raises
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
#: Bytes behind the last member that must be zeros, or not there
_TAIL = 1 << 16


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
                place = _place(target, member.name.removeprefix("./").rstrip("/"))
                place.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                if source is not None:
                    with source, place.open("xb") as out:
                        _copy(source, out)
            _check_end(archive)
    except (*DAMAGED, FileExistsError, NotADirectoryError) as error:
        # tarfile tells of an unknown format in a line for each that it has tried.
        raise _cannot(path, "no tar archive" if "\n" in str(error) else error) from error
    except OSError as error:
        if error.errno is not None:  # a full disk, a file without permission
            raise
        raise _cannot(path, error) from error  # bz2 says so what zlib and lzma have errors of their own for
    tops = list(target.iterdir())
    return tops[0] if len(tops) == 1 and tops[0].is_dir() else target


def _cannot(path: Path, found: object) -> BundleError:
    return BundleError(f"{path} cannot be unpacked", found=found, expected="a .tar of a bundle", next_step=COPY_AGAIN)


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


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive that goes on: tarfile takes a member's damaged head for the end, as if the rest were not there.

    Raises:
        ReadError: there is something else than zeros.
    """
    if archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        if any(archive.fileobj.read(_TAIL)):
            raise tarfile.ReadError(f"what follows byte {archive.offset} of the archive is no file of it")


def _place(target: Path, name: str) -> Path:
    """Where a member goes. The top folder may have any name that a folder can have, as a bundle's folder may; how what
    is in it may be named is the manifest's matter.

    Raises:
        BundleError: it leaves the directory.
    """
    top, _, rest = name.partition("/")
    if not rest or top in ("", ".", "..") or "\0" in top:
        return inside(target, name)
    return inside(target / top, rest)


def _copy(source: IO[bytes], out: IO[bytes]) -> None:
    while chunk := source.read(_CHUNK):
        out.write(chunk)
