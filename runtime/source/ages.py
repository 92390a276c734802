"""How old a frame is when the pipeline hands it out: a frame that lay there while its reader was busy is not new."""

from __future__ import annotations

from collections import deque

#: Seconds that a frame may spend in the pipeline without our doing; beyond it the source's clock is not the pipeline's.
MAX_AGE = 5.0
#: Frames that wait here while the reader is busy: two in the sink and the one that its thread is about to hand over.
_WAITING = 3


class Ages:
    """Tells an age that is due to the reader's own pauses (drop: block) from time stamps of another clock.

    Elements before the sink may hold many frames more (a jitter buffer, sockets), and after a pause it takes as long as
    it takes until they are worked off. So an age is believed up to MAX_AGE more than the pauses that held frames up, of
    which no more can be left than the last frame was old.
    """

    def __init__(self, now: float):
        """now: monotonic seconds at which the pipeline was opened."""
        self._last = now
        self._late = 0.0
        self._lain: deque[float] = deque(maxlen=_WAITING)

    def pulled(self, asked: float, came: float, *, waited: bool) -> None:
        """The reader asked at `asked` and had its answer at `came`; `waited`: no frame lay there at once."""
        if waited:
            self._lain.clear()
        else:
            self._lain.append(asked - self._last)
            self._late += asked - self._last
        self._last = came

    def age(self, stamped: float | None) -> float:
        """Seconds since the capture of the frame that was pulled last; asked once for each.

        stamped: its age by its time stamp, None without one. Where that cannot be, the longest that it may have lain in
        the sink counts: a frame must not be taken for a later one.
        """
        if stamped is not None and 0 <= stamped <= MAX_AGE + self._late:
            self._late = min(self._late, stamped)  # no more of it can be left
            return stamped
        if stamped is not None:
            self._late = 0.0
        return sum(self._lain)
