"""Recording: the cameras of a line into folders of pictures, without bundle, engines or verdicts (`andon record`).

    source(s) → latest-frame slot per camera → this thread → PNG files

Camera threads never wait for the disk unless `drop: block` says so: what comes while a picture is written is dropped by
the slots' policy, and counted.
"""

from __future__ import annotations

import logging
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import AndonError, SourceError
from .handlers import trigger_of
from .lineconfig import CameraConfig
from .pictures import NoRoomError, PictureFolder
from .slot import LanePolicy, Missed, Slots, missed
from .source import Source
from .source.camera import Camera, CameraState
from .startup import Signals
from .types import Frame

log = logging.getLogger("andon.record")
End = Literal["count", "seconds", "max_bytes", "disk", "sources", "asked"]
#: One look at the slots; also how soon a signal is seen.
_SLICE = 0.2
#: Pictures that may wait for the disk, if the camera's `queue` says no more.
_WAITING = 4
#: Share of the pause between two pictures that must have passed: a camera's own rate jitters around it.
_DUE = 0.95
#: Pictures in a row like one before from which on the camera is said to stand still.
_STILL = 10
#: Seconds that all cameras together may take to let go.
_JOIN = 5.0


class PacedSlots(Slots):
    """Slots that take a frame of a camera only so many seconds after the one before, and each that a trigger awaits."""

    def __init__(self, policies: Mapping[str, LanePolicy], pauses: Mapping[str, float]):
        """pauses: camera -> seconds between two pictures; 0: every frame."""
        super().__init__(policies)
        self._pauses = pauses
        self._last: dict[str, float] = {}  # a camera's entry is its own thread's

    def wanted(self, camera: str, monotonic: float) -> bool:
        """See :meth:`Slots.wanted`; asked once for each frame, before it is copied."""
        if self.awaited(camera, monotonic):
            return True
        if not super().wanted(camera, monotonic):
            return False
        if monotonic - self._last.get(camera, float("-inf")) < _DUE * self._pauses[camera]:
            return False
        self._last[camera] = monotonic
        return True


@dataclass(frozen=True)
class Lane:
    """What is recorded of one camera. config: without what only a line needs. pause: seconds between two pictures.

    folder: product of the frame -> where its picture goes, or None where that would take a product and there is none.
    """

    config: CameraConfig
    source: Source
    pause: float
    folder: Callable[[str | None], Path | None]


@dataclass
class Recorded:
    """What became of one camera's frames. missed: reason -> parts (and pictures) that there is none of.

    trouble: what is wrong with its source now, or was at the end.
    """

    pictures: int = 0
    duplicates: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    parts: set[str] = field(default_factory=set)
    still: int = 0  # duplicates in a row
    trouble: str = ""


def recording_config(camera: CameraConfig, *, free: bool) -> CameraConfig:
    """A camera's configuration for a recording. free: wait for no trigger."""
    changes: dict[str, Any] = {"deadline_ms": None, "queue": max(camera.queue, _WAITING)}
    return camera.model_copy(update={**changes, **({"trigger": None} if free else {})})


class Recording:
    """One recording. :meth:`run` returns when it has ended.

    Attributes:
        lanes, sources: as given, and the cameras' threads. cameras: camera -> what became of its frames.
        folders: folder -> cameras and products of its pictures. ended: why it did. failure: what ended it before its
        time, or None.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        pictures: PictureFolder,
        *,
        count: int | None = None,
        seconds: float | None = None,
        progress: Callable[[], None] = lambda: None,
    ):
        """count: pictures of each camera after which it ends; seconds: time after which it does; progress: called after
        each picture."""
        self.lanes = lanes
        self._pictures = pictures
        self._count = count
        self._seconds = seconds
        self._progress = progress
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._outlives = False
        policies = {
            name: LanePolicy(lane.config.drop_policy, lane.config.queue, _triggered(lane.config))
            for name, lane in lanes.items()
        }
        self.slots = PacedSlots(policies, {name: lane.pause for name, lane in lanes.items()})
        self.sources = {
            name: Camera(name, lane.config, lane.source, self.slots, self._state) for name, lane in lanes.items()
        }
        self.cameras = {name: Recorded() for name in lanes}
        self.folders: dict[Path, set[tuple[str, str]]] = {}
        self.ended: End = "asked"
        self.failure: AndonError | None = None

    def stop(self) -> None:
        """End it in good order; from any thread."""
        self._events.put("stop asked to")

    def trigger(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The command `trigger`: see :meth:`andon.runtime.handlers.Handlers.trigger`."""
        config = self.lanes[camera].config
        self.slots.trigger(camera, trigger_of(config.trigger, arguments, config.product))
        return {"part_id": arguments["part_id"]}

    def run(self) -> None:
        """Record until the count, the time, the room or every source is at its end, or a signal comes."""
        self._outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup: the terminal may go
        with ExitStack() as stack:
            stack.enter_context(Signals(self._events))
            for camera in self.sources.values():
                camera.start()
            try:
                self.ended = self._record(time.monotonic())
            finally:
                self._stop_cameras()
            if self.ended in ("asked", "seconds", "sources"):  # what waits was taken in time
                while (item := self.slots.take(0)) is not None and self.failure is None:
                    self._take(item)

    def _record(self, started: float) -> End:
        looked = started
        while True:
            end = self._take(self.slots.take(_SLICE))
            if end is not None:
                return end
            if self._asked():
                return "asked"
            now = time.monotonic()
            if self._seconds is not None and now - started >= self._seconds:
                return "seconds"
            if now - looked >= 1:
                looked = now
                for camera in self.sources.values():
                    camera.look()
            # In this order: a camera puts its last frame before it has finished.
            if all(camera.finished for camera in self.sources.values()) and not any(
                map(self.slots.waiting, self.lanes)
            ):
                return "count" if self._all_counted() else "sources"

    def _asked(self) -> bool:
        try:
            event = self._events.get_nowait()
        except queue.Empty:
            return False
        if event == "reload" and self._outlives:
            return False
        log.info("ending: %s", "SIGHUP" if event == "reload" else event.removeprefix("stop "))
        return True

    def _take(self, item: Frame | Missed | None) -> End | None:
        """Deal with what the slots gave; why the recording is at its end, or None."""
        if item is None or self._full(item.camera):
            return None
        if isinstance(item, Missed):
            self._missed(item)
            return None
        try:
            self._write(item)
        except NoRoomError as error:
            if not error.limit:
                step = "make room, or record to another disk; what is recorded is whole"
                self.failure = AndonError(f"recording ended: {error.strerror}", next_step=step)
            return "max_bytes" if error.limit else "disk"
        except (OSError, SourceError) as error:
            step = "look at that disk or share; what is recorded is whole"
            self.failure = AndonError("recording ended: a picture cannot be written", found=error, next_step=step)
            return "disk"
        if self._full(item.camera):
            self.sources[item.camera].stop()
        return "count" if self._all_counted() else None

    def _write(self, frame: Frame) -> None:
        recorded = self.cameras[frame.camera]
        folder = self.lanes[frame.camera].folder(frame.product)
        if folder is None:
            self._missed(missed(frame, "no_product", "neither the trigger nor the configuration names its product"))
            return
        if self._pictures.add(folder, frame) is None:
            recorded.duplicates += 1
            recorded.still += 1
            if recorded.still == _STILL:
                log.warning(
                    "camera %s: %d pictures in a row are pixel by pixel like one before and are left out: does it "
                    "stand still, or is it a test picture?", frame.camera, _STILL,
                )  # fmt: skip
            return
        recorded.still = 0
        recorded.pictures += 1
        recorded.sizes[frame.image.shape[1], frame.image.shape[0]] += 1
        if frame.part_id is not None:
            recorded.parts.add(frame.part_id)
        product = frame.product or self.lanes[frame.camera].config.product
        self.folders.setdefault(folder, set()).add((frame.camera, product))
        self._progress()

    def _missed(self, item: Missed) -> None:
        if item.reason == "camera_stale":  # the camera says it itself, and it is no part
            return
        self.cameras[item.camera].missed[item.reason] += 1
        what = f"part {item.part_id}" if item.part_id else "a picture"
        log.warning("camera %s: %s is not recorded: %s (%s)", item.camera, what, item.reason, item.detail)

    def _full(self, camera: str) -> bool:
        return self._count is not None and self.cameras[camera].pictures >= self._count

    def _all_counted(self) -> bool:
        return all(map(self._full, self.lanes))

    def _stop_cameras(self) -> None:
        for camera in self.sources.values():
            camera.stop()
        self.slots.close()
        until = time.monotonic() + _JOIN
        for name, camera in self.sources.items():
            if not camera.join(max(0.0, until - time.monotonic())):
                log.error("camera %s: its source does not let go after %g s", name, _JOIN)

    def _state(self, state: CameraState) -> None:
        """Called by camera threads, which have logged it; a stop is no news of the source."""
        if state.state != "stopped":
            self.cameras[state.camera].trouble = state.detail.partition("\n")[0]


def _triggered(config: CameraConfig) -> bool:
    return config.trigger is not None and config.trigger.only
