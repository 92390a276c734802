"""When an engine that fails is beyond what this process can mend."""

from __future__ import annotations

import time
from collections.abc import Callable

from .errors import EngineError
from .judgement import Judgement

#: So many frames in a row, and nothing else for so many seconds. Not sooner: a frame that is UNKNOWN is better than one
#: that nobody judges, which is what a restart costs.
FRAMES, SECONDS = 5, 30.0


class EngineWatch:
    """Looks at every judgement of a line. After some faults (an illegal address, a GPU that fell off the bus) each CUDA
    call of the process fails until it ends: every frame would be UNKNOWN for ever, and a restart makes it whole.
    """

    def __init__(self, frames: int = FRAMES, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic):
        self._frames, self._seconds, self._clock = frames, seconds, clock
        self._failed = 0
        self._since = 0.0

    def look(self, judgement: Judgement) -> EngineError | None:
        """The failure that the line is to end with, once there is one; frames of all cameras count."""
        if judgement.verdict.reason == "engine_error":
            self._since = self._since if self._failed else self._clock()
            self._failed += 1
        elif judgement.scored is not None and judgement.scored.map is not None:  # else it did not get to the engine
            self._failed = 0
        lasted = self._clock() - self._since
        if self._failed < self._frames or lasted < self._seconds:
            return None
        return EngineError(
            f"the engine has failed on the last {self._failed} frames, for {lasted:.0f} s",
            found=judgement.detail,
            expected="an engine that recovers",
            next_step="start the line again (systemd does); if it fails as before: andon verify --bundle BUNDLE",
        )
