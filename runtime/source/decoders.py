"""Whether what a camera or file sends can be decoded here, found out before a line needs it (check, doctor)."""

from __future__ import annotations

import time
from typing import Any

from ..errors import SourceError
from .base import EndOfSource, Source
from .gstreamer import DECODERS, element_name, gst, parse

#: What cameras send, as RTP says it: name and GStreamer's media type.
ENCODINGS = {
    "H264": ("H.264", "video/x-h264"),
    "H265": ("H.265", "video/x-h265"),
    "JPEG": ("MJPEG", "image/jpeg"),
    "MP4V-ES": ("MPEG-4", "video/mpeg, mpegversion=4"),
}
#: Payload types that are one encoding's for all time (RFC 3551), which a camera then need not name.
_STATIC = {26: "JPEG"}
#: Seconds for the first frame of a file, and for a camera's answer.
PATIENCE = 10.0


def decoders(media: str) -> list[str]:
    """Installed decoders of a media type that decodebin chooses among, as it does: the highest rank first."""
    modules = gst().Gst
    caps = modules.Caps.from_string(media)
    factories = modules.ElementFactory.list_get_elements(modules.ELEMENT_FACTORY_TYPE_DECODER, modules.Rank.MARGINAL)
    fitting = [each for each in factories if each.can_sink_any_caps(caps)]
    return [each.get_name() for each in sorted(fitting, key=lambda each: (-each.get_rank(), each.get_name()))]


def require_frame(source: Source) -> None:
    """Open a source until it has given its first frame.

    Raises:
        SourceError: it cannot be opened or decoded, or gives no frame in PATIENCE seconds.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        source.open()
        while time.monotonic() < deadline:
            if source.read(0.2) is not None:
                return
    except EndOfSource as error:
        raise SourceError("it ends without a frame", next_step="name a file with a video track") from error
    finally:
        source.close()
    raise SourceError(f"it gives no frame within {PATIENCE:g} s", next_step="try it by hand: gst-play-1.0 FILE")


def require_stream(pipeline: str, properties: dict[str, dict[str, Any]]) -> str:
    """What an RTSP camera says that it sends. It is asked (DESCRIBE) and sets up no stream: it may have only one.

    pipeline: text of an rtspsrc alone. properties: as of :meth:`Pipeline.open`; its only key is the rtspsrc's name.

    Raises:
        SourceError: it refuses, has no video, or none that can be decoded here.
    """
    modules = gst()
    element = parse(pipeline)
    sent: list[str] = []

    def select(_element: Any, _number: int, caps: Any) -> bool:
        stream = caps.get_structure(0)
        if stream.get_string("media") == "video":
            kind = stream.get_int("payload")[1]
            sent.append(stream.get_string("encoding-name") or _STATIC.get(kind, f"RTP payload type {kind}"))
        return False  # so no stream is set up, and it ends with an error

    for values in properties.values():
        for name, value in values.items():
            element.set_property(name, value)
    element.connect("select-stream", select)
    bus = modules.Gst.Bus.new()
    element.set_bus(bus)
    try:
        element.set_state(modules.Gst.State.PAUSED)
        message = bus.timed_pop_filtered(int(PATIENCE * modules.Gst.SECOND), modules.Gst.MessageType.ERROR)
    finally:
        element.set_state(modules.Gst.State.NULL)
    if not sent:
        error, debug = (None, "") if message is None else message.parse_error()
        raise SourceError(
            f"{element_name(element)}: {error.message if error else f'no answer within {PATIENCE:g} s'}",
            found=(debug or "").strip() or None,
            expected="a stream with video",
            next_step="check the path of the url, user and password; if it takes one client alone, stop the line first",
        )
    names = [ENCODINGS.get(each, (each, "")) for each in sent]
    unusable = [name for name, media in names if media and not decoders(media)]
    if len(unusable) == len(sent):
        raise SourceError(f"missing decoder: {', '.join(unusable)}, which the camera sends: {DECODERS}")
    return ", ".join(name for name, _ in names)
