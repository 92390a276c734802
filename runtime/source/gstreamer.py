"""GStreamer pipelines that end in an appsink. `gi` is imported here, late: the rest of the runtime needs none of it."""

from __future__ import annotations

import re
import shlex
import time
from datetime import timedelta
from typing import Any

import cv2
import numpy as np

from ..errors import SourceError
from .ages import Ages
from .base import Array, EndOfSource, Shot, utc_now

SINK = "andon_sink"
#: What the sink takes. BGRx, as a Jetson's hardware gives it, is turned round while it is copied, and only in frames
#: that are loaded; videoconvert would do it to every frame of the camera. Two structures, RGB first: of one with both
#: formats videoconvert chooses BGRx for everything that it has to convert.
CAPS = "video/x-raw,format=RGB;video/x-raw,format=BGRx"
APT = (
    "apt-get install gstreamer1.0-plugins-base gstreamer1.0-plugins-good gir1.2-gst-plugins-base-1.0 "
    "gir1.2-gstreamer-1.0 python3-gi python3-gst-1.0, and make gi visible in the environment (see README)"
)
#: Where decoders come from.
DECODERS = "apt-get install gstreamer1.0-libav (on a Jetson nvidia-l4t-gstreamer)"
#: Elements that pipelines of industrial cameras need, and what brings them (Debian's names).
PACKAGES = {
    "aravissrc": "apt-get install libaravis-0.8-0",
    "bayer2rgb": "apt-get install gstreamer1.0-plugins-bad",
}
_NO_ELEMENT = re.compile(r'no element "(\w+)"')
#: A line of decodebin's: Missing decoder: H.264 (High Profile) (video/x-h264, stream-format=...
MISSING = re.compile(r"^(Missing decoder: .*?)(?: \([a-z]+/[^\n]*)?$", re.MULTILINE)


def gst() -> Any:
    """The modules Gst, GstApp and GstVideo, as attributes of one object; initialised.

    Raises:
        SourceError: GStreamer or its Python bindings are not installed.
    """
    try:
        import gi

        for name in ("Gst", "GstApp", "GstVideo"):
            gi.require_version(name, "1.0")
        from gi.repository import GLib, Gst, GstApp, GstVideo
    except (ImportError, ValueError) as error:
        raise SourceError("GStreamer cannot be used from Python", found=error, next_step=APT) from error
    Gst.init(None)
    return _Modules(GLib, Gst, GstApp, GstVideo)


class _Modules:
    def __init__(self, glib: Any, gst_: Any, app: Any, video: Any):
        self.GLib, self.Gst, self.GstApp, self.GstVideo = glib, gst_, app, video


def has_element(name: str) -> bool:
    """Whether an element of this name is installed."""
    return gst().Gst.ElementFactory.find(name) is not None


def parse(text: str) -> Any:
    """Make a pipeline of gst-launch text.

    Raises:
        SourceError: GStreamer refuses it; carries GStreamer's message.
    """
    modules = gst()
    try:
        return modules.Gst.parse_launch(text)
    except modules.GLib.Error as error:
        missing = _NO_ELEMENT.search(error.message)
        by_hand = f"try it by hand: gst-launch-1.0 {_in_a_shell(text.replace(SINK, 's'))}"
        raise SourceError(
            f"GStreamer refuses the pipeline: {error.message}",
            found=text,
            expected="elements that exist and link, ending in raw video",
            next_step=PACKAGES.get(missing[1], by_hand) if missing else by_hand,
        ) from error


def _in_a_shell(text: str) -> str:
    """Pipeline text as arguments of gst-launch-1.0, whose parentheses, quotes and semicolons the shell leaves alone."""
    return " ".join(word if word == "!" else shlex.quote(word) for word in text.split())


def to_array(modules: Any, sample: Any) -> Array:
    """The RGB picture of a sample of `CAPS` as uint8 [h, w, 3], copied row by row as its stride says.

    Raises:
        SourceError: the buffer cannot be read or is smaller than its caps say.
    """
    buffer = sample.get_buffer()
    info = modules.GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    meta = modules.GstVideo.buffer_get_video_meta(buffer)
    stride, offset = (meta.stride[0], meta.offset[0]) if meta is not None else (info.stride[0], info.offset[0])
    readable, mapped = buffer.map(modules.Gst.MapFlags.READ)
    if not readable:
        raise SourceError("a frame's memory cannot be read", next_step="end the pipeline in system memory (nvvidconv)")
    try:
        return unpack(mapped.data, info.width, info.height, stride, offset, bgrx=info.finfo.name == "BGRx")
    finally:
        buffer.unmap(mapped)


def unpack(data: Any, width: int, height: int, stride: int, offset: int = 0, *, bgrx: bool = False) -> Array:
    """Packed rows of `stride` bytes each, RGB or BGRx, as a contiguous uint8 [height, width, 3] RGB copy.

    Raises:
        SourceError: fewer bytes than width, height and stride ask for (the last row may lack its padding).
    """
    channels = 4 if bgrx else 3
    needed = offset + stride * (height - 1) + channels * width
    if stride < channels * width or len(data) < needed:
        raise SourceError(
            "a frame does not fit its caps", found=f"{len(data)} bytes, stride {stride}", expected=f"{needed} bytes"
        )
    rows: Array = np.ndarray((height, width, channels), np.uint8, data, offset, (stride, channels, 1))
    return cv2.cvtColor(rows, cv2.COLOR_BGRA2RGB) if bgrx else rows.copy()


def element_name(element: Any) -> str:
    """What an element is called in a message: by its kind, not v4l2src17 when it is rebuilt for the 17th time.

    A name that the pipeline's text gives (name=...) stays.
    """
    name = str(element.get_name())
    factory = element.get_factory() if hasattr(element, "get_factory") else None  # a pad has none
    if factory is None:
        return name
    kind = str(factory.get_name())
    return kind if name.removeprefix(kind).isdigit() else name


class Pipeline:
    """An opened pipeline and its sink. Used by one thread."""

    def __init__(self, text: str, *, live: bool, sync: bool, keep_all: bool):
        """text: gst-launch text that ends in raw video. sync: hand frames out when they are due, not as they come.
        keep_all: the sink never drops; else it keeps the newest two.
        """
        self._live = live
        self._text = (
            f"{text} ! videoconvert ! {CAPS} ! appsink name={SINK} max-buffers=2 "
            f"drop={'false' if keep_all else 'true'} sync={'true' if sync else 'false'} qos=false"
        )
        self._modules: Any = None
        self._pipeline: Any = None
        self._sink: Any = None
        self._broken: SourceError | None = None
        self._ages = Ages(0.0)

    def check(self) -> str:
        """Parse it, start nothing; SourceError when GStreamer refuses."""
        parse(self._text)
        return self._text

    def open(self, properties: dict[str, dict[str, Any]] | None = None) -> None:
        """Start playing. properties: element name -> property -> value, set before (secrets never enter the text)."""
        self._modules = gst()
        self._broken = None
        self._pipeline = parse(self._text)
        self._sink = self._pipeline.get_by_name(SINK)
        for element, values in (properties or {}).items():
            for name, value in values.items():
                self._pipeline.get_by_name(element).set_property(name, value)
        if self._pipeline.set_state(self._modules.Gst.State.PLAYING) == self._modules.Gst.StateChangeReturn.FAILURE:
            error = self._error() or SourceError("the pipeline does not start", found=self._text)
            self.close()
            raise error
        self._ages = Ages(time.monotonic())

    def element(self, name: str) -> Any:
        """An element of the opened pipeline."""
        return self._pipeline.get_by_name(name)

    def pull(self, timeout: float) -> Any | None:
        """The next sample, or None; EndOfSource and SourceError as in Source.read."""
        asked = time.monotonic()
        sample = self._sink.try_pull_sample(0)
        waited = sample is None
        if waited:
            sample = self._sink.try_pull_sample(int(timeout * self._modules.Gst.SECOND))
        self._ages.pulled(asked, time.monotonic(), waited=waited)
        # With every sample, or the bus would keep the elements' messages for as long as frames come without a pause.
        error = self._error()
        self._broken = self._broken or error
        if sample is None:
            if self._broken is not None:
                raise self._broken
            if self._sink.is_eos():
                raise EndOfSource
        return sample

    def shot(self, sample: Any) -> Shot:
        """The sample pulled last as a shot, dated by the pipeline's clock where the source is live."""
        modules, age = self._modules, self._age(sample)
        return Shot(
            load=lambda: to_array(modules, sample),
            captured=utc_now() - timedelta(seconds=age),
            monotonic=time.monotonic() - age,
        )

    def close(self) -> None:
        """Stop and free the pipeline. Waits for its threads."""
        if self._pipeline is not None:
            self._pipeline.set_state(self._modules.Gst.State.NULL)
        self._pipeline = self._sink = None

    def _age(self, sample: Any) -> float:
        if not self._live:  # a recording is as old as it is shown
            return 0.0
        clock, pts = self._pipeline.get_clock(), sample.get_buffer().pts
        if clock is None or pts == self._modules.Gst.CLOCK_TIME_NONE:
            return self._ages.age(None)
        running = sample.get_segment().to_running_time(self._modules.Gst.Format.TIME, pts)
        age = (clock.get_time() - self._pipeline.get_base_time() - running) / self._modules.Gst.SECOND
        return self._ages.age(float(age))

    def _error(self) -> SourceError | None:
        """The next error on the bus, which is emptied up to there."""
        message = self._pipeline.get_bus().pop_filtered(self._modules.Gst.MessageType.ERROR)
        if message is None:
            return None
        error, debug = message.parse_error()
        found = (debug or "").strip()
        # Of several lines only the first gets into alarms and logs, and GStreamer's own says no more than "a plug-in".
        missing = ", ".join(match[1] for match in MISSING.finditer(found))
        what = f"{missing}: {DECODERS}" if missing else error.message
        return SourceError(f"{element_name(message.src)}: {what}", found=found or None)


class GstreamerCamera:
    """A source that is one pipeline: camera, network stream, video file, test picture."""

    def __init__(
        self,
        text: str,
        *,
        live: bool = True,
        sync: bool = False,
        keep_all: bool = False,
        loop: bool = False,
        properties: dict[str, dict[str, Any]] | None = None,
    ):
        """loop: start again at the end of the stream."""
        self._pipeline = Pipeline(text, live=live, sync=sync, keep_all=keep_all)
        self._properties = properties
        self._loop = loop

    def check(self) -> str:
        """See :class:`Source`."""
        return self._pipeline.check()

    def open(self) -> None:
        """See :class:`Source`."""
        self._pipeline.open(self._properties)

    def read(self, timeout: float) -> Shot | None:
        """See :class:`Source`."""
        try:
            sample = self._pipeline.pull(timeout)
        except EndOfSource:
            if not self._loop:
                raise
            self.close()
            self.open()
            return None
        return None if sample is None else self._pipeline.shot(sample)

    def close(self) -> None:
        """See :class:`Source`."""
        self._pipeline.close()
