"""A bundle's files, packed or not: how many, how large, nowhere but in its directory; and how a new one comes to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from .errors import BundleError, ConfigError
from .workfolder import work_folder

MAX_FILE_BYTES = 4 << 30
MAX_TOTAL_BYTES = 8 << 30
MAX_FILES = 4096
COPY_AGAIN = "copy the bundle again from the machine that exported it"


def inside(root: Path, name: str) -> Path:
    """The file `name` of a bundle; refuses anything that could lie outside its directory.

    Raises:
        BundleError: the path is absolute, has `..`, a backslash or a drive, or passes through a symbolic link.
    """
    pure = PurePosixPath(name)
    plain = name and "\\" not in name and ":" not in name and "\0" not in name
    if not plain or pure.is_absolute() or ".." in pure.parts or name != pure.as_posix():
        raise BundleError(
            "a path in the bundle leaves its directory",
            found=name,
            expected="a relative path without '..'",
            next_step="do not use this bundle; " + COPY_AGAIN,
        )
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(
                "a file of the bundle is a symbolic link",
                found=name,
                expected="a plain file",
                next_step="do not use this bundle; " + COPY_AGAIN,
            )
    return path


def require_new(target: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: `target` exists.
    """
    if target.exists():
        raise ConfigError(
            f"{target} exists", found="a file or folder", expected="a new name", next_step="give another --out"
        )


@contextmanager
def new_bundle(target: Path) -> Iterator[Path]:
    """A temporary directory on the disk of `target` that becomes `target` when the block ends without an error.

    Raises:
        ConfigError: `target` exists already.
    """
    require_new(target)
    with work_folder(target) as work:
        building = work / ".new"  # hidden: a line's pattern may reach it, and it may have a manifest already
        building.mkdir(0o700)
        yield building
        building.chmod(0o755)
        building.rename(target)
