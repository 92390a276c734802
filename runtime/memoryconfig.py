"""The `memory` section of a line configuration: what may enter the memory of normal, and when to warn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..calib.errors import CalibrationError
from ..calib.policies import DriftPolicy, GuardPolicy, MemoryPolicy
from .settings import Seconds, Settings


class GuardConfig(Settings):
    """Which frames may teach the memory (calib/guard.py says why)."""

    gate: bool = Field(default=True, description="false: the paper's rule, every frame teaches; learns defects")
    quantile: float = Field(default=0.5, gt=0, le=1, description="A frame teaches if its score is in this lower share")
    window: int = Field(default=50, ge=5, description="Frames the share is taken over, and of the anchors' baseline")
    warmup: int = Field(default=10, ge=1, description="Frames seen before the first may teach")
    local_bound: float = Field(
        default=1.5, gt=0, description="How far a patch may stand out of its frame, in multiples of the first frames'"
    )
    global_bound: float = Field(
        default=3.0,
        gt=0,
        description="How far a whole frame may lie from the support, in multiples of the first frames'",
    )
    share: float = Field(default=0.25, gt=0, le=1, description="Share of the capacity one frame may fill")

    @model_validator(mode="after")
    def _warmup_within_window(self) -> GuardConfig:
        if self.warmup > self.window:
            raise ValueError("warmup cannot be longer than window")
        return self

    def policy(self) -> GuardPolicy:
        """As calib takes it."""
        return GuardPolicy(**self.model_dump())


class DriftConfig(Settings):
    """Warning when scores have moved up (calib/drift.py). Scores count that are of different parts: those of frames
    with a part id, and of a camera that runs freely one now and then, as far apart as its first scores show to do."""

    enabled: bool = Field(default=True, description="Watch the scores of every camera and product")
    reference: int = Field(default=100, ge=5, description="First scores that count, the reference")
    window: int = Field(default=100, ge=5, description="Recent scores that count, held against them")
    alpha: float = Field(
        default=1e-6, gt=0, lt=1, description="Chance of a false warning per score that counts, while nothing moves"
    )

    @model_validator(mode="after")
    def _can_warn(self) -> DriftConfig:
        if self.enabled:
            try:
                self.policy()
            except CalibrationError as error:
                raise ValueError(f"{error.what}; {error.next_step}") from error
        return self

    def policy(self) -> DriftPolicy:
        """As calib takes it."""
        return DriftPolicy(**self.model_dump(exclude={"enabled"}))


class MemoryConfig(Settings):
    """Online calibration of the memory of normal (DESIGN.md 5), for bundles that have one."""

    enabled: bool = Field(default=False, description="Let the episodic memory grow from frames judged OK")
    capacity: int | None = Field(default=None, ge=1, description="Episodic rows; null: as many as the bundle has")
    keep: float = Field(default=0.5, gt=0, lt=1, description="Share of the capacity that a compression keeps")
    per_frame: int = Field(default=50, ge=1, description="Patches an accepted frame adds at most")
    selection: Literal["farthest", "transport"] = Field(
        default="farthest", description="Which patches of an accepted frame; transport: FOCT eq. 6"
    )
    foreground: int = Field(default=10, ge=0, description="Foreground patches that transport takes")
    background: int = Field(default=40, ge=0, description="Background patches that transport takes")
    order: Literal["score_first", "update_first"] = Field(
        default="score_first",
        description="score_first: a frame is judged with the memory as it was, then it may teach; update_first: the "
        "paper's order, it teaches and is then scored again, against its own patches too",
    )
    guard: GuardConfig = Field(default=GuardConfig(), description="Admission guard")
    drift: DriftConfig = Field(default=DriftConfig(), description="Drift warning")
    save_every: Seconds = Field(default=60.0, description="Seconds between saves; a restart goes on from the last")
    snapshot_every: Seconds = Field(
        default=900.0, description="Seconds between saves that rollback can return to, over restarts, too"
    )
    snapshots: int = Field(default=8, ge=1, description="How many of these are kept, and of those made by command")

    def policy(self, rows: int) -> MemoryPolicy:
        """As calib takes it; rows: episodic rows of the bundle."""
        fields = ("keep", "per_frame", "selection", "foreground", "background")
        return MemoryPolicy(capacity=self.capacity or rows, **{name: getattr(self, name) for name in fields})
