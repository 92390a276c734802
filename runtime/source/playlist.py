"""Image files as parts on a line: which files, in which order, with which part id and product."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..dataset import open_dataset
from ..errors import SourceError
from ..images import IMAGE_SUFFIXES, on_disk, read_rgb
from ..sourceconfig import DatasetSource, FolderSource
from ..verdict import readable
from .base import Array, EndOfSource, Shot


class Content:
    """What a file held when it was taken, until it is decoded: the bytes of one picture at most are kept."""

    def __init__(self, data: bytes):
        self.digest = _digest(data).digest()
        self._data: bytes | None = data

    def pop(self) -> bytes | None:
        """The bytes, once: whoever decodes again reads again."""
        data, self._data = self._data, None
        return data


@dataclass(frozen=True)
class Part:
    """One image file and whose picture it is. part_id, product: readable, though the file's name may not be UTF-8.

    content: of a watched folder's file, which is read to tell it from a later one; None where that failed.
    """

    path: Path
    part_id: str
    product: str | None = None
    content: Content | None = None

    def load(self) -> Array:
        """uint8 [h, w, 3] RGB; SourceError where it cannot be read or decoded. A watched folder's file is read once."""
        return read_rgb(self.path, None if self.content is None else self.content.pop())


def parts(config: FolderSource | DatasetSource) -> list[Part]:
    """The images of a folder or data set, in playing order.

    Raises:
        SourceError: there is no such folder or data set, or no image in it (a watched folder may be empty).
    """
    if isinstance(config, DatasetSource):
        samples = open_dataset(config.data).select(split=config.split).samples
        if config.limit is not None and config.limit < len(samples):
            samples = tuple(samples[index * len(samples) // config.limit] for index in range(config.limit))
        found = [
            Part(sample.path, readable(Path(sample.key).with_suffix("").as_posix()), readable(sample.product))
            for sample in samples
        ]
        where = f"data set {config.data}, split {config.split}"
    else:
        found = [_part(path) for path in sorted(map(Path, _listing(config))) if on_disk(path)]
        where = f"{config.path} with pattern {config.pattern}"
        if config.watch:
            return found
    if not found:
        raise SourceError(
            f"no image in {where}",
            found="0 images",
            expected=f"at least one {', '.join(IMAGE_SUFFIXES)}",
            next_step="put images there, or name another folder or pattern; watch: true waits for them",
        )
    return found


def _listing(config: FolderSource) -> Iterator[str]:
    """Paths that fit the pattern, in no order; of files and more. None is looked at: a watched folder may hold many."""
    root = config.path
    if not root.is_dir():
        raise SourceError(
            f"no folder {root}",
            found="a file" if root.exists() else "nothing",
            expected="a folder of images",
            next_step="name an existing folder of images as source.path",
        )
    name = config.pattern.removeprefix("**/")
    if not name or "/" in name or "**" in name:
        yield from map(str, root.glob(config.pattern))
        return
    fits = re.compile(fnmatch.translate(name)).match
    for folder, folders, names in os.walk(root, onerror=_unless_forbidden):  # many times as fast as glob
        yield from (os.path.join(folder, each) for each in names if fits(each))  # noqa: PTH118 - a Path each is slow
        if name == config.pattern:  # no **/
            folders.clear()


def _unless_forbidden(error: OSError) -> None:
    """A folder that may not be read, or went away meanwhile, is left out, as glob does; a share that fails is told."""
    if not isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError)):
        raise error


def _part(path: Path, content: Content | None = None) -> Part:
    return Part(path, readable(path.stem), content=content)


def playing(config: FolderSource | DatasetSource) -> Iterator[Part]:
    """The parts in order, again and again with `loop`."""
    while True:
        yield from parts(config)
        if not config.loop:
            return


#: Size in bytes, time of the last change of content and of the last change at all (it also tells a file that was moved
#: away and back), in ns.
_Mark = tuple[int, int, int]
#: Files that stay which one look compares with what was taken: the latest, and so many others in turn. Thousands may
#: lie there, on a share that answers slowly, and are listed several times a second.
_LATEST, _IN_TURN = 64, 512
#: Files that one look reads, whose content tells what their size and time do not: a chmod or a backup touches them all.
_READ = 8
_CHUNK = 1 << 20


class Seen:
    """The files of a watched folder that were taken, by what tells one from a later one of its name.

    A file that is gone was consumed, or its share is away and will come back with the same file: an unmounted share
    leaves an empty folder. So what is gone is remembered: all of it while nothing at all is there, else the latest.
    """

    def __init__(self, remembered: int = 10_000):
        self._remembered = remembered
        # With the hash of the content; None where it could not be read.
        self._here: dict[str, tuple[_Mark, bytes | None]] = {}
        self._gone: dict[str, tuple[_Mark, bytes | None]] = {}
        self._turn: list[str] = []

    def new(self, listing: Iterable[str]) -> list[Path]:
        """The image files of a listing that were not taken, by name, and those that were written anew since."""
        present = {path for path in listing if path.lower().endswith(IMAGE_SUFFIXES)}
        for path in [path for path in self._here if path not in present]:
            self._gone[path] = self._here.pop(path)
        for path in [path for path in self._gone if path in present]:
            taken = self._gone.pop(path)
            if taken[0] == _mark(Path(path)):
                self._here[path] = taken
        self._forget_rewritten()
        fresh = sorted(path for path in map(Path, present - self._here.keys()) if on_disk(path))
        if self._here or fresh:
            for path in list(self._gone)[: max(0, len(self._gone) - self._remembered)]:
                del self._gone[path]
        return fresh

    def _forget_rewritten(self) -> None:
        """A file of other size or time of content is another picture: many cameras write one name again and again.

        Where both are as before and only the time of the last change at all is not, the content says: a camera without
        a clock gives all pictures one time, and a backup or chmod touches a picture that stays the same. The inode says
        nothing, some shares make it up anew.
        """
        if not self._turn:
            self._turn = list(self._here)
        looked = dict.fromkeys([*itertools.islice(reversed(self._here), _LATEST), *self._turn[-_IN_TURN:]])
        del self._turn[-_IN_TURN:]
        read = 0
        for path in looked:
            mark = _mark(Path(path)) if path in self._here else None
            if mark is None or mark == self._here[path][0]:
                continue
            taken, content = self._here[path]
            if mark[:2] == taken[:2]:
                if read == _READ:  # at a later look
                    continue
                read += 1
                present = _content(Path(path))
                if present is None:
                    continue
                if present == content:
                    self._here[path] = mark, content
                    continue
            del self._here[path]

    def take(self, path: Path, mark: _Mark) -> Content | None:
        """This file is taken, with what it holds: the picture that is judged is the one that is remembered.

        None: it cannot be read, which whoever judges it will say.
        """
        try:
            content = Content(path.read_bytes())
        except (OSError, MemoryError):
            content = None
        self._here[str(path)] = mark, None if content is None else content.digest
        return content


def _mark(path: Path) -> _Mark | None:
    """None where the file has just been taken away."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _content(path: Path) -> bytes | None:
    """Hash of what a file holds now; None where it cannot be read."""
    digest = _digest()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.digest()


def watching(config: FolderSource, seen: Seen) -> Iterator[Part | None]:
    """New files once nobody has written to them between two looks; None: no more for now. `seen` is kept up to date.

    The size alone does not tell: some writers set it first.
    """
    before: dict[Path, _Mark] = {}
    while True:
        marks: dict[Path, _Mark] = {}
        for path in seen.new(_listing(config)):
            if (mark := _mark(path)) is None:
                continue
            if before.get(path) == mark:
                yield _part(path, seen.take(path, mark))
            else:
                marks[path] = mark
        before = marks
        yield None


class FolderPlayer:
    """Plays image files without a pipeline: at a rate, or as fast as the line takes them."""

    def __init__(self, config: FolderSource | DatasetSource):
        self._config = config
        self._playing: Iterator[Part | None] = iter(())
        self._seen = Seen()  # outlives a share that goes away and comes back
        self._due = 0.0

    def check(self) -> str:
        """See :class:`Source`."""
        return f"{len(parts(self._config))} images"

    def open(self) -> None:
        """See :class:`Source`."""
        parts(self._config)
        if isinstance(self._config, FolderSource) and self._config.watch:
            self._playing = watching(self._config, self._seen)
        else:
            self._playing = playing(self._config)
        self._due = time.monotonic()

    def read(self, timeout: float) -> Shot | None:
        """See :class:`Source`."""
        wait = self._due - time.monotonic()
        if wait > 0:
            time.sleep(min(wait, timeout))
            if wait > timeout:
                return None
        part = next(self._playing, _END)
        if part is _END:
            raise EndOfSource
        if part is None:
            time.sleep(timeout)
            return None
        if self._config.fps is not None:
            self._due = max(self._due + 1 / self._config.fps, time.monotonic() - 1)
        return Shot(load=part.load, part_id=part.part_id, product=part.product, path=str(part.path))

    def close(self) -> None:
        """See :class:`Source`."""
        self._playing = iter(())


_END = Part(Path(), "")
