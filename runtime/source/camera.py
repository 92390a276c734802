"""One thread per camera: reads its source into the slots, and rebuilds the source for ever when it stalls or breaks."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ..errors import AndonError, SourceError
from ..lineconfig import CameraConfig
from ..slot import Missed, Slots
from ..types import Frame
from .base import EndOfSource, Shot, Source, utc_now

State = Literal["starting", "live", "down", "ended", "failed", "stopped"]
log = logging.getLogger(__name__)

#: One look at the source; also how soon a stop is seen.
SLICE = 0.2
#: Shortest pause before the source is rebuilt; it doubles up to CameraConfig.retry_max.
RETRY_MIN = 0.25
#: Frames for so many seconds make a good start of it: the next outage begins with short pauses again.
STEADY = 5.0
#: Without a stale_after of its own, a source that broke is reported stale after this.
STALE_DEFAULT = 5.0
#: And so long one call of it may take: a look at a large folder on a slow share is no trouble.
CALL_DEFAULT = 30.0


@dataclass(frozen=True)
class CameraState:
    """What a camera is doing. restarts: how often the source was rebuilt; skipped: frames above max_fps."""

    camera: str
    state: State = "starting"
    detail: str = ""
    restarts: int = 0
    skipped: int = 0
    last_frame: float | None = None


class Camera:
    """Owns the thread that owns the source.

    A live camera that is down is rebuilt with exponential backoff and jitter, and says so by `on_state` and, at a low
    rate, by UNKNOWN verdicts with reason camera_stale. A source with an end is `ended` after it, or `failed` when it
    breaks: it is not played again.
    """

    def __init__(
        self,
        name: str,
        config: CameraConfig,
        source: Source,
        slots: Slots,
        on_state: Callable[[CameraState], None],
    ):
        self.name = name
        self._config = config
        self._source = source
        self._slots = slots
        self._on_state = on_state
        self._state = CameraState(name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera-{name}", daemon=True)
        self._last_seen = 0.0
        self._live_since = 0.0
        self._said_stale: float | None = None  # in this outage
        self._next_wanted = 0.0
        self._retry = RETRY_MIN
        self._lock = threading.Lock()  # of the end of a call of the source, and of what others say about one
        self._call: tuple[str, float] | None = None  # what the source was asked to do, and when

    @property
    def state(self) -> CameraState:
        """The present state; safe to read from any thread."""
        return self._state

    @property
    def finished(self) -> bool:
        """True once no frame will come any more."""
        return self._state.state in ("ended", "failed", "stopped")

    def configure(self, config: CameraConfig) -> None:
        """Take over settings from the next frame on; the source stays the one given."""
        self._config = config

    def start(self) -> None:
        """Start the thread."""
        self._last_seen = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; it does within the time of one look at the source."""
        self._stop.set()

    def look(self) -> None:
        """Say what the camera's own thread cannot while a call of its source does not return: a connection that gets
        no answer, a share that hangs. For another thread, every second or so; never waits."""
        with self._lock:
            if self._call is None or self.finished or self._stop.is_set():
                return
            (call, since), now = self._call, time.monotonic()
            limit = self._config.silence or CALL_DEFAULT
            if not self._config.endless:  # a share with many files may take its time to list, and nothing waits for it
                limit = max(limit, CALL_DEFAULT)
            if now - since < limit:
                return
            if self._state.state != "down":
                self._move("down", f"its source has not come back from '{call}' for {limit:g} s")
            again = self._config.stale_verdict_every
            if self._config.endless and (self._said_stale is None or now - self._said_stale >= again):
                self._said_stale = now
                self._miss("camera_stale", self._state.detail, wait=False)

    def join(self, timeout: float) -> bool:
        """Wait for the thread. False if a source did not let go of it in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @contextmanager
    def _calling(self, call: str) -> Iterator[None]:
        """Around every call of the source, which may not return: see `look`."""
        self._call = call, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._call = None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._calling("open"):
                    self._source.open()
                self._pump()
            except EndOfSource:
                if not self._config.endless:
                    self._move("ended")
                    break
                self._down("the stream ended")
            except Exception as error:
                if not isinstance(error, AndonError):  # a plug-in's bug must not end the camera
                    log.exception("camera %s: unexpected error", self.name)
                if not self._config.endless:
                    self._move("failed", str(error))
                    self._miss("bad_frame", str(error))
                    break
                self._down(str(error))
            finally:
                with self._calling("close"):
                    self._source.close()
            self._pause()
        if self._stop.is_set() and not self.finished:
            self._move("stopped")

    def _pump(self) -> None:
        self._last_seen = max(self._last_seen, time.monotonic())
        while not self._stop.is_set():
            with self._calling("read"):
                shot = self._source.read(SLICE)
            now = time.monotonic()
            if shot is None:
                limit = self._config.silence
                if limit is not None and now - self._last_seen > limit:
                    raise SourceError(f"no frame for {limit:g} s")
                if limit is None and self._config.watched:  # it can be read and nothing new lies there: all is well
                    self._live()
                continue
            self._live()
            self._deliver(shot)
            # Time spent waiting for room (drop: block) is not silence of the camera.
            self._last_seen = time.monotonic()

    def _live(self) -> None:
        now = time.monotonic()
        if self._state.state != "live":
            self._live_since = now
            # The next outage says so for itself. The pause stays, or one frame at each attempt would keep it short:
            # a camera that gives no more than that would be rebuilt, and an alarm come and go, four times a second.
            self._said_stale = None
            self._move("live")
        elif now - self._live_since >= STEADY:
            self._retry = RETRY_MIN

    def _deliver(self, shot: Shot) -> None:
        config = self._config
        # A frame that a trigger waits for is its part's: a later one would show what has come after it.
        announced = shot.part_id is not None or self._slots.awaited(self.name, shot.monotonic)
        if config.max_fps is not None and not announced:
            if shot.monotonic < self._next_wanted:
                self._update(skipped=self._state.skipped + 1)
                return
            self._next_wanted = max(self._next_wanted + 1 / config.max_fps, shot.monotonic)
        if not self._slots.wanted(self.name, shot.monotonic):
            return
        try:
            with self._calling("load"):
                image = shot.load()
        except SourceError as error:
            self._miss("bad_frame", str(error), shot)
            return
        frame = Frame(
            camera=self.name,
            seq=0,
            captured=shot.captured,
            monotonic=shot.monotonic,
            image=image,
            part_id=shot.part_id,
            product=shot.product,
            deadline=None if config.deadline_ms is None else shot.monotonic + config.deadline_ms / 1000,
            path=shot.path,
        )
        self._update(last_frame=shot.monotonic)
        self._slots.put(frame)

    def _miss(self, reason: str, detail: str, shot: Shot | None = None, *, wait: bool = True) -> None:
        item = Missed(
            camera=self.name,
            seq=0,
            reason=reason,
            captured=shot.captured if shot else utc_now(),
            monotonic=shot.monotonic if shot else time.monotonic(),
            part_id=shot.part_id if shot else None,
            product=shot.product if shot else None,
            path=shot.path if shot else None,
            detail=detail,
        )
        self._slots.put(item, wait=wait)

    def _down(self, detail: str) -> None:
        if not self._stop.is_set():
            self._move("down", detail, restarts=self._state.restarts + 1)

    def _pause(self) -> None:
        """Wait before the source is rebuilt, saying camera_stale when it is due."""
        until = time.monotonic() + self._retry * random.uniform(0.8, 1.2)
        self._retry = min(2 * self._retry, self._config.retry_max)
        while not self._stop.is_set():
            now = time.monotonic()
            due = self._last_seen + (self._config.stale_after or STALE_DEFAULT)
            if self._said_stale is not None:
                due = max(due, self._said_stale + self._config.stale_verdict_every)
            if now >= due:
                self._said_stale = now
                self._miss("camera_stale", self._state.detail)
            if now >= until:
                return
            self._stop.wait(min(until, max(due, now + 0.01)) - now)

    def _move(self, state: State, detail: str = "", *, restarts: int | None = None) -> None:
        """A state change: logged once, published once. Repeated failures with one cause are one change."""
        before = self._state
        cause = detail.partition("\n")[0]  # the lines below it carry addresses and counters that differ each time
        self._update(state=state, detail=detail, restarts=before.restarts if restarts is None else restarts)
        if (before.state, before.detail.partition("\n")[0]) != (state, cause):
            level = logging.WARNING if state in ("down", "failed") else logging.INFO
            log.log(level, "camera %s: %s%s", self.name, state, f" ({cause})" if cause else "")
            self._on_state(self._state)

    def _update(self, **changes: object) -> None:
        self._state = CameraState(**{**vars(self._state), **changes})  # type: ignore[arg-type]
