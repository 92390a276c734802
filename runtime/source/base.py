"""What a camera thread asks of a source, and what a source gives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class EndOfSource(Exception):
    """There is nothing more to come: the last file was played, or the pipeline sent end-of-stream."""


def utc_now() -> datetime:
    """Capture time of something that has just arrived."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Shot:
    """One picture, not yet copied or decoded: skipping one costs nothing.

    load: gives uint8 [height, width, 3] RGB, C-contiguous, once; SourceError when it cannot be decoded.
    captured, monotonic: when it was taken, as wall clock and in seconds of time.monotonic().
    """

    load: Callable[[], Array]
    captured: datetime = field(default_factory=utc_now)
    monotonic: float = field(default_factory=time.monotonic)
    part_id: str | None = None
    product: str | None = None
    path: str | None = None


class Source(Protocol):
    """A camera, or something that plays one. One thread owns it: opens, reads and closes it any number of times."""

    def check(self) -> str:
        """Say what would be opened, without opening it.

        Raises:
            SourceError: it can never be opened as configured (a pipeline that is refused, a folder that is not there).
        """
        ...

    def open(self) -> None:
        """Start delivering. SourceError when that fails now; it may succeed later."""
        ...

    def read(self, timeout: float) -> Shot | None:
        """The next picture, or None when none came within `timeout` seconds.

        Raises:
            EndOfSource: the source has ended.
            SourceError: the source broke.
        """
        ...

    def close(self) -> None:
        """Stop delivering and free everything; also after a failed open, also twice."""
        ...
