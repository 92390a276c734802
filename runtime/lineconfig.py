"""The line configuration: cameras, judging, alarms, delivery. One YAML file, refused as a whole when a key is wrong.

Relative paths are relative to the configuration file. Secrets never stand in it: they are named by an environment
variable or a file. The published JSON Schema (configs/schema/line.json) is generated from these models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from .configfile import load
from .manifest import Variant
from .memoryconfig import MemoryConfig
from .settings import Seconds, Settings

#: Levels of a topic that a camera must not be called, because the station uses them itself.
RESERVED = ("cmd", "status", "metrics", "alarm", "verdict", "evidence")
TopicLevel = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Milliseconds = Annotated[float, Field(gt=0)]


def _absolute(path: Path, info: ValidationInfo) -> Path:
    """Make a path of the file absolute, once, here: nobody else needs to know where the file lies.

    Links stay as they are named: a certificate that is renewed or a bundle that is replaced by pointing its link
    elsewhere is found at the next look. Only what stands before a .. is followed, which alone says what that means.
    """
    whole = Path((info.context or {}).get("base", "."), path.expanduser()).absolute()
    ups = [index for index, part in enumerate(whole.parts) if part == ".."]
    if not ups:
        return whole
    return Path(*whole.parts[: ups[-1] + 1]).resolve().joinpath(*whole.parts[ups[-1] + 1 :])


LocalPath = Annotated[Path, AfterValidator(_absolute)]


def _absolute_set(data: str, info: ValidationInfo) -> str:
    """A data set's folder made absolute like every other path; the name of an installed one stays."""
    from .dataset import ELPV  # which brings OpenCV, that no other source's configuration needs

    return data if data == ELPV else str(_absolute(Path(data), info))


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


class TriggerConfig(Settings):
    """Triggered operation: a trigger (command) names a part, the next frame captured after it is that part's."""

    timeout_ms: Milliseconds = Field(default=1000, description="Without a frame by then the part is UNKNOWN, no_frame")
    delay_ms: float = Field(default=0, ge=0, description="Time from the trigger until the part is in view")
    only: bool = Field(default=True, description="True: frames without a trigger are not judged")


class CameraConfig(Settings):
    """One camera."""

    source: SourceConfig = Field(description="Where the frames come from")
    product: str = Field(
        default="auto", description="Product (class of the bundle) or auto: by the bundle's classifier"
    )
    roi: tuple[int, int, int, int] | None = Field(
        default=None,
        description="Region of interest [x, y, width, height] in camera pixels; null: the whole picture. A picture "
        "that it leaves by more than 2 pixels is of another size than meant: UNKNOWN, bad_frame",
    )
    max_fps: float | None = Field(
        default=None, gt=0, description="Frames above this rate are skipped, but for those of triggers"
    )
    drop: Literal["latest", "block"] | None = Field(
        default=None,
        description="latest: newer frames replace waiting ones (counted); block: the source waits; "
        "null: block where pictures come as fast as they are taken (a folder or data set without fps, a file with "
        "realtime: false, a pipeline with live: false), else latest",
    )
    queue: int = Field(default=1, ge=1, le=64, description="Frames that may wait for judgement")
    stale_after: Seconds | None = Field(
        default=5,
        description="Seconds without a frame, beyond the pause that a playback rate makes, until the source is "
        "rebuilt, or said to be down where it does not come back (a connection without an answer); null: it may be "
        "silent, as a watched folder may unless this is set",
    )
    stale_verdict_every: Seconds = Field(default=30, description="Seconds between camera_stale verdicts while down")
    retry_max: Seconds = Field(
        default=5, description="Longest pause between attempts to rebuild the source, in seconds"
    )
    deadline_ms: Milliseconds | None = Field(
        default=None, description="Capture to verdict; a later one is UNKNOWN, deadline_missed. null: none"
    )
    trigger: TriggerConfig | None = Field(default=None, description="Triggered operation; null: free running")
    smoothing: float | None = Field(
        default=None, gt=0, lt=1, description="Weight of the newest score in an exponential mean; null: off"
    )

    @field_validator("roi")
    @classmethod
    def _positive(cls, roi: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if roi is not None and (min(roi[:2]) < 0 or min(roi[2:]) < 1):
            raise ValueError("x and y are 0 or more, width and height 1 or more")
        return roi

    @model_validator(mode="after")
    def _watched_may_be_silent(self) -> CameraConfig:
        if self.watched and "stale_after" not in self.model_fields_set:
            object.__setattr__(self, "stale_after", None)  # frozen, and this is still its making
        return self

    @property
    def watched(self) -> bool:
        """Whether the source is a hot folder: pictures come when somebody puts them there, in no rhythm."""
        return isinstance(self.source, FolderSource) and self.source.watch

    @property
    def silence(self) -> float | None:
        """Seconds without a frame from which on the source counts as silent; None: it may be."""
        if self.stale_after is None:
            return None
        pause = 1 / self.source.fps if isinstance(self.source, PlaybackSource) and self.source.fps else 0.0
        return self.stale_after + pause

    @property
    def drop_policy(self) -> Literal["latest", "block"]:
        """What happens to a frame that finds the queue full."""
        if self.drop is not None:
            return self.drop
        source = self.source
        unhurried = (
            (isinstance(source, PlaybackSource) and source.fps is None)
            or (isinstance(source, FileSource) and not source.realtime)
            or (isinstance(source, GstreamerSource) and not source.live)
        )
        return "block" if unhurried else "latest"

    @property
    def endless(self) -> bool:
        """Whether the source has no end of its own."""
        source = self.source
        if isinstance(source, FolderSource | DatasetSource | FileSource):
            return source.loop or self.watched
        if isinstance(source, PatternSource):
            return source.frames is None
        return not (isinstance(source, GstreamerSource) and not source.live)


class JudgeConfig(Settings):
    """From scores to verdicts."""

    check_product: bool = Field(
        default=False,
        description="UNKNOWN, wrong_product, where the bundle's classifier sees another product than given; "
        "refused where it has none",
    )
    thresholds: dict[str, float] = Field(default={}, description="Product -> threshold that replaces the bundle's")
    pixel_threshold: float | None = Field(
        default=None, description="Map value above which a pixel is part of a region; null: the bundle's"
    )
    min_area: int = Field(default=1, ge=1, description="Smallest region, in camera pixels")
    max_regions: int = Field(default=16, ge=1, le=256, description="Regions per verdict, largest peak first")


class AlarmConfig(Settings):
    """Alarm of a camera: raised at k NG of the last n verdicts, cleared at `clear` or fewer."""

    k: int = Field(default=3, ge=1, description="NG verdicts among the last n that raise the alarm")
    n: int = Field(default=5, ge=1, description="Length of the window, in verdicts")
    clear: int = Field(default=0, ge=0, description="NG verdicts among the last n at which it clears (hysteresis)")
    latch: bool = Field(default=True, description="Once raised it stays until acknowledged")
    unknown: Literal["ignore", "count"] = Field(
        default="ignore", description="count: UNKNOWN counts as NG; ignore: it leaves the window as it is"
    )
    cannot_judge_after: int | None = Field(
        default=3, ge=1, description="UNKNOWN verdicts in a row that raise the alarm cannot_judge; null: never"
    )

    @model_validator(mode="after")
    def _ordered(self) -> AlarmConfig:
        if not self.clear < self.k <= self.n:
            raise ValueError(f"needs clear < k <= n, found clear {self.clear}, k {self.k}, n {self.n}")
        return self


class TlsConfig(Settings):
    """TLS towards the broker; with cert and key also the client's own identity."""

    ca: LocalPath | None = Field(default=None, description="CA certificates (PEM); null: the system's")
    cert: LocalPath | None = Field(default=None, description="Client certificate (PEM)")
    key: LocalPath | None = Field(default=None, description="Client key (PEM)")
    key_password_env: str | None = Field(default=None, description="Environment variable with the key's password")

    @model_validator(mode="after")
    def _pair(self) -> TlsConfig:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together")
        return self


class BrokerConfig(Settings):
    """The MQTT broker."""

    host: str = Field(default="127.0.0.1", description="Host name or address")
    port: int = Field(default=1883, ge=0, le=65535, description="TCP port; 0 with embedded: a free one")
    embedded: bool = Field(default=False, description="Start a mosquitto of our own on loopback for this run")
    protocol: Literal["5", "3.1.1"] = Field(default="5", description="MQTT version")
    client_id: str | None = Field(
        default=None, description="Start of each camera's client id; null: andon-<site>-<line>-<station>"
    )
    username: str | None = Field(default=None, description="User name")
    password_env: str | None = Field(default=None, description="Environment variable that holds the password")
    password_file: LocalPath | None = Field(default=None, description="File that holds the password")
    tls: TlsConfig | None = Field(default=None, description="TLS; null: plain TCP")
    keepalive: int = Field(default=30, ge=5, le=3600, description="Seconds")
    retry_max: Seconds = Field(default=30, description="Longest pause between connection attempts, in seconds")
    max_packet: int | None = Field(
        default=None,
        ge=2048,
        le=268435460,
        description="Largest packet the broker takes, in bytes, where it has a limit that it does not announce "
        "(no broker does with MQTT 3.1.1); null: what it announces",
    )
    metrics_every: Seconds = Field(default=10, description="Seconds between metrics messages")
    home_assistant: TopicLevel | None = Field(
        default=None, description="Discovery prefix of Home Assistant, usually homeassistant; null: no discovery"
    )


class OutboxConfig(Settings):
    """The store between the judge and the broker."""

    path: LocalPath | None = Field(default=None, description="SQLite file; null: outbox.db in the state directory")
    max_bytes: int = Field(
        default=256 * 2**20, ge=2**16, description="Payload bytes kept; the oldest go first, counted"
    )
    max_age: Seconds = Field(default=7 * 86400, description="Seconds of running a message is kept undelivered")
    inflight: int = Field(default=64, ge=1, le=65535, description="Messages offered and not yet acknowledged")


class EvidenceConfig(Settings):
    """Pictures kept as evidence."""

    path: LocalPath | None = Field(default=None, description="Folder; null: evidence in the state directory")
    labels: tuple[Literal["OK", "NG", "UNKNOWN"], ...] = Field(
        default=("NG",), description="Verdicts that keep a picture"
    )
    max_bytes: int = Field(
        default=512 * 2**20, ge=2**16, description="Quota; the oldest go first, sooner on full disks"
    )
    quality: int = Field(default=85, ge=1, le=100, description="JPEG quality")
    overlay: bool = Field(default=True, description="Draw the heat map over the picture")
    publish: bool = Field(
        default=False, description="Also publish each picture, on <camera>/evidence/<id of the verdict>, QoS 0"
    )


class WebConfig(Settings):
    """Live page, health and Prometheus metrics."""

    host: str = Field(default="127.0.0.1", description="Address to bind")
    port: int = Field(default=8090, ge=0, le=65535, description="TCP port; 0: a free one")
    token_env: str | None = Field(default=None, description="Environment variable with the token")
    token_file: LocalPath | None = Field(default=None, description="File with the token")

    @model_validator(mode="after")
    def _guarded(self) -> WebConfig:
        if self.host not in ("127.0.0.1", "::1", "localhost") and not (self.token_env or self.token_file):
            raise ValueError("bound elsewhere than loopback the page needs token_env or token_file")
        return self


class LineConfig(Settings):
    """Root of a line configuration."""

    site: TopicLevel = Field(description="First level of the topics")
    line: TopicLevel = Field(description="Second level")
    station: TopicLevel = Field(description="Third level")
    bundle: LocalPath | None = Field(
        default=None,
        description="Bundle folder or .tar; with a * the newest export that matches, by its "
        "manifest; null: given by --bundle",
    )
    backend: Literal["auto", "onnxruntime", "tensorrt"] = Field(default="auto", description="Engine backend")
    variant: Variant | Literal["auto"] = Field(
        default="auto", description="Precision; auto: fp32 on onnxruntime, fp16 on tensorrt where the bundle has it"
    )
    program: str = Field(default="default", description="Program of the bundle: default or one of its alternatives")
    state: LocalPath | None = Field(
        default=None,
        description="Folder for outbox, overrides, memory; null: $STATE_DIRECTORY (only a service is told it: name the "
        "folder for andon check and watch), else 'state' beside this file",
    )
    cameras: dict[TopicLevel, CameraConfig] = Field(min_length=1, description="Cameras by name")
    judge: JudgeConfig = Field(default=JudgeConfig(), description="From scores to verdicts")
    alarm: AlarmConfig = Field(default=AlarmConfig(), description="Alarm of each camera")
    broker: BrokerConfig | None = Field(
        default=BrokerConfig(), description="MQTT broker; null: verdicts wait in the outbox"
    )
    outbox: OutboxConfig = Field(default=OutboxConfig(), description="Store between judge and broker")
    evidence: EvidenceConfig | None = Field(default=None, description="Pictures kept as evidence; null: none")
    web: WebConfig | None = Field(default=None, description="Live page and metrics; null: none")
    memory: MemoryConfig = Field(default=MemoryConfig(), description="Online calibration")

    @field_validator("cameras")
    @classmethod
    def _not_reserved(cls, cameras: dict[str, CameraConfig]) -> dict[str, CameraConfig]:
        for name in cameras:
            if name in RESERVED:
                raise ValueError(f"a camera cannot be called '{name}': the station's own topics use it")
        return cameras

    @property
    def topic(self) -> str:
        """The station's topic, without a slash at its end."""
        return f"andon/v1/{self.site}/{self.line}/{self.station}"


def load_line(path: Path) -> LineConfig:
    """Read a line configuration.

    Raises:
        ConfigError: see :func:`andon.runtime.configfile.load`.
    """
    return load(path, LineConfig)


def schema() -> dict[str, Any]:
    """The JSON Schema of a line configuration, published as configs/schema/line.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **LineConfig.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
