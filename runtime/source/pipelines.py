"""Pipeline text for each kind of camera. The Jetson's hardware elements are chosen where they are installed.

nvarguscamerasrc, nvv4l2decoder, nvjpegdec and nvvidconv come with JetPack
(https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/SD/Multimedia/AcceleratedGstreamer.html); everywhere else
decodebin chooses among what is installed and videoconvert converts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..configfile import secret
from ..errors import SourceError
from ..lineconfig import CameraConfig
from ..sourceconfig import CsiSource, FileSource, GstreamerSource, PatternSource, RtspSource, UsbSource
from .gstreamer import GstreamerCamera, has_element

Has = Callable[[str], bool]
#: From NVMM memory to system memory, in a format that the sink takes as it is.
FROM_NVMM = "nvvidconv ! video/x-raw,format=BGRx"
RTSP = "andon_rtsp"
FILE = "andon_file"


def csi(config: CsiSource, has: Has) -> str:
    """A CSI camera; only the Jetson has the element."""
    if not has("nvarguscamerasrc"):
        raise SourceError(
            "a CSI camera needs the element nvarguscamerasrc",
            found="it is not installed",
            expected="a Jetson with JetPack's GStreamer plug-ins",
            next_step="apt-get install nvidia-l4t-gstreamer, or use kind: usb or gstreamer",
        )
    return (
        f"nvarguscamerasrc sensor-id={config.sensor} ! video/x-raw(memory:NVMM),width={config.width},"
        f"height={config.height},framerate={config.fps}/1 ! nvvidconv flip-method={config.flip} ! "
        "video/x-raw,format=BGRx"
    )


def usb(config: UsbSource, has: Has) -> str:
    """A USB camera, raw or MJPEG."""
    wanted = [f"{name}={value}" for name, value in (("width", config.width), ("height", config.height)) if value]
    if config.fps:
        wanted.append(f"framerate={config.fps}/1")
    media = "image/jpeg" if config.format == "mjpeg" else "video/x-raw"
    text = f"v4l2src device={_quoted(config.device)} ! {','.join([media, *wanted])}"
    if config.format == "mjpeg":
        hardware = has("nvv4l2decoder") and has("nvvidconv")
        text += f" ! nvv4l2decoder mjpeg=1 ! {FROM_NVMM}" if hardware else " ! jpegdec"
    return text


def rtsp(config: RtspSource, has: Has) -> str:
    """A network camera. decodebin prefers nvv4l2decoder by rank; what it gives lies in NVMM memory there."""
    text = f"{rtsp_element(config)} ! decodebin"
    return f"{text} ! {FROM_NVMM}" if has("nvv4l2decoder") and has("nvvidconv") else text


def rtsp_element(config: RtspSource) -> str:
    """What connects to a network camera."""
    protocols = "tcp" if config.protocol == "tcp" else "udp"
    return f"rtspsrc name={RTSP} location={_quoted(config.url)} protocols={protocols} latency={config.latency_ms}"


def video_file(config: FileSource, has: Has) -> str:
    """A video file. The path is set as a property, so that no character of it is read as pipeline text."""
    text = f"filesrc name={FILE} ! decodebin"
    return f"{text} ! {FROM_NVMM}" if has("nvv4l2decoder") and has("nvvidconv") else text


def pattern(config: PatternSource) -> str:
    """GStreamer's test picture."""
    count = -1 if config.frames is None else config.frames
    return (
        f"videotestsrc is-live=true pattern={config.pattern} num-buffers={count} ! "
        f"video/x-raw,width={config.width},height={config.height},framerate={config.fps}/1"
    )


def camera_source(name: str, camera: CameraConfig, has: Has = has_element) -> GstreamerCamera:
    """The pipeline source of a camera whose kind is not one of image files.

    Raises:
        SourceError: an element that the kind needs is missing, or the file is.
        ConfigError: the password's variable or file is missing.
    """
    source = camera.source
    keep_all = camera.drop_policy == "block"
    if isinstance(source, GstreamerSource):
        return GstreamerCamera(source.pipeline, live=source.live, keep_all=keep_all or not source.live)
    if isinstance(source, PatternSource):
        return GstreamerCamera(pattern(source), keep_all=keep_all)
    if isinstance(source, CsiSource):
        return GstreamerCamera(csi(source, has), keep_all=keep_all)
    if isinstance(source, UsbSource):
        return GstreamerCamera(usb(source, has), keep_all=keep_all)
    if isinstance(source, RtspSource):
        return GstreamerCamera(rtsp(source, has), keep_all=keep_all, properties=rtsp_login(name, source))
    if isinstance(source, FileSource):
        if not source.path.is_file():
            raise SourceError(f"camera {name}: no file {source.path}", next_step="name an existing video file")
        properties = {FILE: {"location": str(source.path)}}
        return GstreamerCamera(
            video_file(source, has),
            live=False,
            sync=source.realtime,
            keep_all=True,
            loop=source.loop,
            properties=properties,
        )
    raise SourceError(f"camera {name}: '{source.kind}' is no pipeline source")


def rtsp_login(name: str, source: RtspSource) -> dict[str, dict[str, Any]]:
    """The login of a network camera, as properties of its element.

    Raises:
        ConfigError: the password's variable or file is missing.
    """
    password = secret(f"cameras.{name}.source.password", source.password_env, source.password_file)
    login = {"user-id": source.user, "user-pw": password}
    return {RTSP: {key: value for key, value in login.items() if value is not None}}


def _quoted(value: str) -> str:
    """A property value in gst-launch text."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
