"""Which scores are of different parts where nothing names these: how far apart they are, whether the line stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Scores that the measurement is made on.
MEASURED = 200
#: Rank correlation of neighbours up to which they count as unrelated: 2.4 standard errors, which unrelated ones exceed
#: one time in 120; that only makes the watch slower.
_UNRELATED = 0.17
#: A measurement ends here at the latest: parts that stay in view for 4,000 pictures.
_LONGEST = 2048
#: Pauses vary with the fractions of k times this, so that they never keep step with a machine of several cavities.
_GOLDEN = (5**0.5 - 1) / 2


class Spacing:
    """Picks scores of a camera that runs freely, so that those picked are of different parts.

    A part that is in view for 25 pictures gives 25 scores that are nearly one. So the first scores are measured: while
    neighbours resemble each other, every second one is left out, and the pauses doubled. What remains, thinned once
    more for safety, counts, and from then on one score after each such pause.

    Attributes:
        stride: shortest pause, in scores; the longest is twice that.
        measured: whether the measurement is done.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.measured = False
        self._scores: list[float] = []
        self._skip = 0
        self._picked = 0

    def pick(self, score: float) -> Sequence[float]:
        """The scores that count now: all that the measurement leaves as it ends, later this one or none."""
        if self._skip > 0:
            self._skip -= 1
            return ()
        self._picked += 1
        self._skip = self.stride + int(self.stride * (self._picked * _GOLDEN % 1)) - 1
        if self.measured:
            return (score,)
        self._scores.append(score)
        return self._measure() if len(self._scores) == MEASURED else ()

    def _measure(self) -> Sequence[float]:
        if neighbours(self._scores) > _UNRELATED and self.stride < _LONGEST:
            self._scores = self._scores[::2]
            self.stride *= 2
            return ()
        # Where neighbours were related, some of those that remain still are, and 200 scores do not show how many.
        step = 1 if self.stride == 1 else 2
        picked, self._scores = self._scores[::step], []
        self.stride *= step
        self.measured = True
        return picked

    def state(self) -> dict[str, Array]:
        """What :meth:`restore` takes."""
        return {
            "stride": np.array(self.stride),
            "measured": np.array(self.measured),
            "measuring": np.array(self._scores, np.float64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what :meth:`state` gave; the next score is picked."""
        self.stride, self.measured = int(state["stride"]), bool(state["measured"])
        self._scores = [float(x) for x in state["measuring"]][: MEASURED - 1]
        self._skip = self._picked = 0


def neighbours(scores: Sequence[float]) -> float:
    """Correlation of each score's rank with the next one's, -1..1; 0 where all are equal."""
    _, where, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # The mean rank of equal scores, or those of a constant camera would seem to rise.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    ranks = ranks - ranks.mean()
    scale = float(ranks @ ranks)
    return float(ranks[1:] @ ranks[:-1]) / scale if scale > 0 else 0.0


class Pace:
    """Whether scores that were picked are of few parts after all: the line stood while they were measured, or one part
    was in view throughout, so that nothing but noise told them apart; or the line has become much slower.

    Scores of one part are nearly equal, those a while apart are not. A step or a trend of them does neither: it moves
    few of the differences, and medians are compared. Every score is looked at, and every 4th, 16th and 64th.
    """

    _LAG = MEASURED // 8
    _NEAR = 0.4  # as a share; of different parts it is 1, give or take a tenth

    def __init__(self) -> None:
        self._count = 0
        self._scores: dict[int, list[float]] = {1: [], 4: [], 16: [], 64: []}

    def add(self, score: float) -> bool:
        """Whether the latest scores, this one included, show that."""
        few = False
        for every, scores in self._scores.items():
            if self._count % every == 0:
                scores.append(score)
                if len(scores) == MEASURED:
                    near, far = (_difference(scores, lag) for lag in (1, self._LAG))
                    few |= near < self._NEAR * far
                    del scores[: MEASURED // 2]
        self._count += 1
        return few


def _difference(scores: Sequence[float], lag: int) -> float:
    """Median difference of scores that are so far apart."""
    values = np.asarray(scores)
    return float(np.median(np.abs(values[lag:] - values[:-lag])))


class Standstill:
    """Whether one scene has been in view for a while, as it is where a line stops: its score is then no new part's.

    Args:
        reference: scores of different parts, in their order. How little ten in a row differ there tells how little they
            must differ to be one scene; where parts differ no more than pictures of one do, that is never found.
    """

    RUN = 10

    def __init__(self, reference: Sequence[float]) -> None:
        self._last: deque[float] = deque(maxlen=self.RUN)
        self._least = 0.0
        if len(reference) >= self.RUN:
            ranges = np.ptp(np.lib.stride_tricks.sliding_window_view(np.asarray(reference), self.RUN), axis=1)
            self._least = 0.4 * float(np.quantile(ranges, 0.1))

    def add(self, score: float) -> bool:
        """Whether the last ten scores, this one included, are of one scene."""
        self._last.append(score)
        return len(self._last) == self.RUN and max(self._last) - min(self._last) < self._least
