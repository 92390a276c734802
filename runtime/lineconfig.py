"""The line configuration: cameras, judging, alarms, delivery. One YAML file, refused as a whole when a key is wrong.

Relative paths are relative to the configuration file. Secrets never stand in it: they are named by an environment
variable or a file. The published JSON Schema (configs/schema/line.json) is generated from these models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from .configfile import load
from .manifest import Roi, Variant
from .memoryconfig import MemoryConfig
from .settings import LocalPath, Seconds, Settings
from .sourceconfig import (
    DatasetSource,
    FileSource,
    FolderSource,
    GstreamerSource,
    PatternSource,
    PlaybackSource,
    SourceConfig,
)

#: Levels of a topic that a camera must not be called, because the station uses them itself.
RESERVED = ("cmd", "status", "metrics", "alarm", "verdict", "evidence")
TopicLevel = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Milliseconds = Annotated[float, Field(gt=0)]


class TriggerConfig(Settings):
    """Triggered operation: a trigger (command) names a part, the next frame captured after it is that part's."""

    timeout_ms: Milliseconds = Field(
        default=1000,
        description="Without a frame by then the part is UNKNOWN, no_frame. A trigger that comes late has so much less "
        "time: one with a ts by its age, any by what the station itself was held up",
    )
    delay_ms: float = Field(default=0, ge=0, description="Time from the trigger until the part is in view")
    only: bool = Field(default=True, description="True: frames without a trigger are not judged")


class CameraConfig(Settings):
    """One camera."""

    source: SourceConfig = Field(description="Where the frames come from")
    product: str = Field(
        default="auto", description="Product (class of the bundle) or auto: by the bundle's classifier"
    )
    roi: Roi | None = Field(
        default=None,
        description="Region of interest [x, y, width, height] in camera pixels; null: what the bundle was trained with "
        "(andon train --roi), the whole picture if that is not said. A picture that it leaves by more than 2 pixels is "
        "of another size than meant, as is without it one that has neither the size of those that were trained on nor "
        "that of what was cut out of them: UNKNOWN, bad_frame",
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
        default=None,
        gt=0,
        lt=1,
        description="Weight of the newest score in an exponential mean over a camera's frames of a product; null: off. "
        "On the line alone: calibrate and eval score single pictures. Smoothed scores spread less than those a "
        "threshold was set on: fewer false alarms than promised, and more misses",
    )

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


def _model_id(value: object) -> object:
    """Refuse what is no model's id; one of digits alone is a number to YAML, and may be another number than it says.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float):
        raise ValueError('a model\'s id stands in quotes, as in model: "012345678901"')
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{12}", value):
        raise ValueError("a model's id is 12 hexadecimal digits; andon check says which model runs")
    return value


class ModelThreshold(Settings):
    """A threshold and whose scores it is about: under another model or program it is not in force."""

    value: float = Field(description="The threshold")
    model: Annotated[str, BeforeValidator(_model_id)] = Field(
        pattern="^[0-9a-f]{12}$",
        description="Id of the model, in quotes, as andon check says it; a new calibration of the model keeps it, "
        "another training or export has another",
    )
    program: str = Field(default="default", description="Program of the bundle whose scores it is about")


def _tag(value: object) -> str:
    return "bound" if isinstance(value, dict | ModelThreshold) else "plain"


#: A number for whatever model runs, or one that names its model. The tags must not be keys that stand there.
OwnThreshold = Annotated[
    Annotated[float, Tag("plain")] | Annotated[ModelThreshold, Tag("bound")],
    Discriminator(_tag),
]


class JudgeConfig(Settings):
    """From scores to verdicts."""

    check_product: bool = Field(
        default=False,
        description="UNKNOWN, wrong_product, where the bundle's classifier sees another product than given; "
        "refused where it has none",
    )
    thresholds: dict[str, OwnThreshold] = Field(
        default={},
        description="Product -> threshold that replaces the bundle's: {value, model} is in force under that model "
        "alone, a plain number under whatever model runs, which is warned of (docs/operations.md)",
    )
    pixel_threshold: OwnThreshold | None = Field(
        default=None,
        description="Map value above which a pixel is part of a region, {value, model} or a plain number as in "
        "thresholds; null: the bundle's",
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

    path: LocalPath | None = Field(
        default=None,
        description="Folder, with pictures as <camera>/<day>/<id of the verdict>.jpg, which may have other files, and "
        "pictures of other lines whose cameras have other names; null: evidence in the state directory",
    )
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
        description="Bundle folder or .tar; with a * the newest export that matches, by its manifest (of copies of one "
        "the one that was calibrated last), at a start the newest that is whole; null: given by --bundle",
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
