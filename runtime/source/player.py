"""Plays image files through a GStreamer pipeline, as a camera would, and still knows whose picture each frame is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SourceError
from ..sourceconfig import DatasetSource, FolderSource
from .base import Array, EndOfSource, Shot
from .gstreamer import Pipeline, gst, to_array
from .playlist import Part, parts, playing

PLAYER = "andon_player"
#: Pictures in the pipeline at a time: one is shown while the next is converted. When nothing comes out, elements hold
#: some back (an encoder's look-ahead) or have lost them, and more are sent, up to the second number.
AHEAD, MOST_AHEAD = 2, 32
#: Seconds without a picture until one more is sent.
HELD_BACK = 0.05


@dataclass(frozen=True)
class _Flying:
    """A picture on its way through the pipeline, or (with an error) one that could not be sent."""

    part: Part
    pts: int
    error: SourceError | None = None


class PipelinePlayer:
    """Source: decodes each file, pushes it into an appsrc and takes it from the pipeline's end.

    Parts and frames are matched by presentation time stamp, which elements that pass one buffer for one buffer keep.
    A picture that the pipeline loses, and a file that cannot be decoded, come out as a shot that fails to load.
    """

    def __init__(self, config: FolderSource | DatasetSource):
        self._config = config
        text = f"appsrc name={PLAYER} format=time is-live=false block=false ! {config.through}"
        self._pipeline = Pipeline(text, live=False, sync=config.fps is not None, keep_all=True)
        self._playing: Iterator[Part] = iter(())
        self._flying: deque[_Flying] = deque()
        self._sent, self._ahead = 0, AHEAD
        self._ended = self._drained = False
        self._last_out = 0.0
        self._modules: Any = None
        self._pending: Any = None

    def check(self) -> str:
        """See :class:`Source`."""
        return f"{len(parts(self._config))} images through {self._pipeline.check()}"

    def open(self) -> None:
        """See :class:`Source`."""
        parts(self._config)
        self._modules = gst()
        self._playing = playing(self._config)
        self._flying.clear()
        self._sent, self._ahead, self._pending = 0, AHEAD, None
        self._ended = self._drained = False
        self._last_out = time.monotonic()
        self._pipeline.open()

    def read(self, timeout: float) -> Shot | None:
        """See :class:`Source`."""
        self._fill()
        if not self._flying:
            raise EndOfSource
        head = self._flying[0]
        if head.error is not None:
            return self._fail(head.error)
        sample = self._pending or self._pull(timeout)
        pts = None if sample is None else sample.get_buffer().pts
        if sample is None and not self._drained:
            return None
        if sample is not None and all(flying.pts != pts for flying in self._flying):
            raise SourceError(
                "the elements in source.through changed the time stamps, so frames cannot be told apart",
                found=f"{pts} ns",
                expected=f"{head.pts} ns",
                next_step="use elements that pass one buffer for one buffer (no videorate)",
            )
        if head.pts != pts:
            self._pending = sample
            return self._fail(SourceError(f"{head.part.path} was lost in the pipeline", found=self._config.through))
        self._pending = None
        return self._shot(self._flying.popleft().part, sample)

    def close(self) -> None:
        """See :class:`Source`."""
        self._pipeline.close()
        self._playing, self._pending = iter(()), None
        self._flying.clear()

    def _fill(self) -> None:
        """Send pictures until enough are on their way; after the last one tell the pipeline that it was the last."""
        while len(self._flying) < self._ahead and not self._ended:
            part = next(self._playing, None)
            if part is not None:
                self._flying.append(self._send(part))
            else:
                self._ended = True
                self._pipeline.element(PLAYER).end_of_stream()

    def _pull(self, timeout: float) -> Any | None:
        """The next sample, or None: nothing yet, or (`_drained`) nothing any more."""
        patience = HELD_BACK + (2 / self._config.fps if self._config.fps else 0.0)
        more = not self._ended and self._ahead < MOST_AHEAD
        try:
            sample = self._pipeline.pull(min(timeout, patience) if more else timeout)
        except EndOfSource:
            self._drained = True
            return None
        now = time.monotonic()
        if sample is not None:
            self._last_out = now
        elif more and now - self._last_out >= patience:
            self._ahead += 1
        return sample

    def _send(self, part: Part) -> _Flying:
        pts = self._pts(self._sent)
        self._sent += 1
        try:
            image = part.load()
        except SourceError as error:
            return _Flying(part, pts, error)
        self._pipeline.element(PLAYER).push_sample(self._sample(image, pts))
        return _Flying(part, pts)

    def _pts(self, index: int) -> int:
        second = int(self._modules.Gst.SECOND)
        return int(index * second / self._config.fps) if self._config.fps else index * (second // 1000)

    def _sample(self, image: Array, pts: int) -> Any:
        """A sample of uint8 [h, w, 3] RGB; GStreamer wants rows of a multiple of four bytes."""
        height, width, _ = image.shape
        row = 3 * width
        padded = image.reshape(height, row)
        if row % 4:
            padded = np.pad(padded, ((0, 0), (0, -row % 4)))
        Gst = self._modules.Gst
        buffer = Gst.Buffer.new_wrapped(padded.tobytes())
        buffer.pts = pts
        buffer.duration = self._pts(1)
        rate = f"{round((self._config.fps or 0) * 1000)}/1000"
        caps = Gst.Caps.from_string(f"video/x-raw,format=RGB,width={width},height={height},framerate={rate}")
        return Gst.Sample.new(buffer, caps, None, None)

    def _shot(self, part: Part, sample: Any) -> Shot:
        modules = self._modules
        return Shot(
            load=lambda: to_array(modules, sample), part_id=part.part_id, product=part.product, path=str(part.path)
        )

    def _fail(self, error: SourceError) -> Shot:
        part = self._flying.popleft().part

        def load() -> Array:
            raise error

        return Shot(load=load, part_id=part.part_id, product=part.product, path=str(part.path))
