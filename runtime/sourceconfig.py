"""Where frames come from: the `source` of a camera in the line configuration, one model for each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from .settings import LocalPath, Settings, absolute

ELPV = "elpv"  # the one set that is named and not a folder


def _absolute_set(data: str, info: ValidationInfo) -> str:
    """A data set's folder made absolute like every other path; the name of an installed one stays."""
    return data if data == ELPV else str(absolute(Path(data), info))


class PlaybackSource(Settings):
    """What folders and data sets have in common: image files played one after the other."""

    fps: float | None = Field(default=None, gt=0, description="Playback rate; null: as fast as frames are consumed")
    player: Literal["direct", "gstreamer"] = Field(
        default="direct", description="gstreamer plays the images through a pipeline, as a camera would"
    )
    through: str = Field(
        default="videoconvert",
        description="Elements between player and sink, for player: gstreamer; one buffer out for each buffer in",
    )
    loop: bool = Field(default=False, description="Start again at the end")


class FolderSource(PlaybackSource):
    """Image files of a folder in the order of their names; the part id is the file name without its suffix."""

    kind: Literal["folder"] = Field(description="Images of a folder")
    path: LocalPath = Field(description="Folder")
    pattern: str = Field(default="**/*", description="Glob under the folder; files that are no images are left out")
    watch: bool = Field(
        default=False,
        description="Hot folder: wait for new files instead of ending; a restart judges again what lies there. "
        "Move files in whole: one that is written there is taken once it rests between two looks, 0.2 s apart. A name "
        "that is written again is judged again, but only what lies there at a look: better give each part its own. "
        "A file that is moved within the folder is a new part: archive elsewhere, or with a pattern without **",
    )

    @model_validator(mode="after")
    def _one_way(self) -> FolderSource:
        if self.watch and (self.loop or self.player == "gstreamer"):
            raise ValueError("watch goes with neither loop nor player: gstreamer")
        return self


class DatasetSource(PlaybackSource):
    """A data set as `andon train --data` takes it; each image brings its product and its key as part id."""

    kind: Literal["dataset"] = Field(description="Images of a data set")
    data: Annotated[str, AfterValidator(_absolute_set)] = Field(
        description="Name of an installed data set (elpv) or its folder, as `andon train --data` takes it"
    )
    split: Literal["train", "test"] = Field(default="test", description="Which part of it")
    limit: int | None = Field(default=None, ge=1, description="So many images, spread evenly; null: all")


class GstreamerSource(Settings):
    """Any pipeline; the runtime appends conversion to RGB and the sink."""

    kind: Literal["gstreamer"] = Field(description="A GStreamer pipeline")
    pipeline: str = Field(min_length=1, description="gst-launch text that ends in raw video, without a sink")
    live: bool = Field(default=True, description="False: it has an end (a file); it is then not rebuilt at the end")


class FileSource(Settings):
    """A video file."""

    kind: Literal["file"] = Field(description="A video file")
    path: LocalPath = Field(description="The file")
    realtime: bool = Field(default=True, description="Play at the recorded rate; false: as fast as consumed")
    loop: bool = Field(default=False, description="Start again at the end")


class PatternSource(Settings):
    """GStreamer's moving test picture."""

    kind: Literal["test"] = Field(description="Test picture")
    width: int = Field(default=640, ge=16, le=8192, description="Pixels")
    height: int = Field(default=480, ge=16, le=8192, description="Pixels")
    fps: int = Field(default=10, ge=1, le=240, description="Frames per second")
    pattern: str = Field(default="ball", pattern=r"^[a-z0-9-]+$", description="Pattern of videotestsrc")
    frames: int | None = Field(default=None, ge=1, description="End after so many frames; null: never")


class RtspSource(Settings):
    """A network camera."""

    kind: Literal["rtsp"] = Field(description="RTSP camera")
    url: str = Field(pattern=r"^rtspst?://|^rtsps?://", description="Address, without user name and password")
    protocol: Literal["tcp", "udp"] = Field(default="tcp", description="Transport of the video")
    latency_ms: int = Field(default=100, ge=0, description="Jitter buffer")
    user: str | None = Field(default=None, description="User name")
    password_env: str | None = Field(default=None, description="Environment variable that holds the password")
    password_file: LocalPath | None = Field(default=None, description="File that holds the password")

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        if "@" in url.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError("no user name or password in the URL; use user with password_env or password_file")
        return url


class CsiSource(Settings):
    """A CSI camera of the Jetson, through nvarguscamerasrc."""

    kind: Literal["csi"] = Field(description="Jetson CSI camera")
    sensor: int = Field(default=0, ge=0, description="sensor-id")
    width: int = Field(default=1920, ge=16, description="Pixels")
    height: int = Field(default=1080, ge=16, description="Pixels")
    fps: int = Field(default=30, ge=1, description="Frames per second")
    flip: int = Field(default=0, ge=0, le=7, description="flip-method of nvvidconv")


class UsbSource(Settings):
    """A USB camera, through v4l2src."""

    kind: Literal["usb"] = Field(description="USB camera")
    device: str = Field(default="/dev/video0", description="Video device; prefer /dev/v4l/by-id/... names")
    width: int | None = Field(default=None, ge=16, description="Pixels; null: the camera's choice")
    height: int | None = Field(default=None, ge=16, description="Pixels; null: the camera's choice")
    fps: int | None = Field(default=None, ge=1, description="Frames per second; null: the camera's choice")
    format: Literal["raw", "mjpeg"] = Field(default="raw", description="What the camera is asked to send")


SourceConfig = Annotated[
    FolderSource | DatasetSource | GstreamerSource | FileSource | PatternSource | RtspSource | CsiSource | UsbSource,
    Field(discriminator="kind"),
]
