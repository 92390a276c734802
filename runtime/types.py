"""The values that travel along the line: frames, judgements, verdicts. Frozen, small, on the hot path."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from numpy.typing import NDArray

Label = Literal["OK", "NG", "UNKNOWN"]

#: Reasons of an UNKNOWN verdict; the list is part of the message contract (configs/schema/verdict.json).
UNKNOWN_REASONS = (
    "engine_error",
    "not_a_number",
    "deadline_missed",
    "camera_stale",
    "wrong_product",
    "memory_unusable",
    "no_threshold",
    "no_frame",
    "bad_frame",
    "overload",
)


@dataclass(frozen=True)
class Frame:
    """One camera image.

    image: uint8 [height, width, 3] RGB as the camera gave it (before resizing), C-contiguous.
    """

    camera: str
    seq: int
    captured: datetime
    monotonic: float
    image: NDArray[Any]
    part_id: str | None = None
    product: str | None = None
    deadline: float | None = None
    path: str | None = None


@dataclass(frozen=True)
class Region:
    """A connected component of the map above the pixel threshold, in camera pixels."""

    bbox: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True)
class Verdict:
    """What was decided about one frame; `payload()` in runtime/verdict.py makes the MQTT message of it."""

    id: str
    camera: str
    seq: int
    ts_capture: datetime
    ts_judged: datetime
    label: Label
    reason: str
    product: str | None = None
    part_id: str | None = None
    score: float | None = None
    threshold: float | None = None
    regions: tuple[Region, ...] = ()
    method: str = ""
    bundle: str = ""
    memory_version: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    evidence: str | None = None
