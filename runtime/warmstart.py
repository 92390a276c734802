"""When what a loop carries from frame to frame starts afresh (METHODS.md 5.4)."""

from __future__ import annotations

import logging
from collections import deque

import numpy as np

from .manifest import Loop
from .program import Program
from .wiring import programs

log = logging.getLogger(__name__)


class WarmStart:
    """Brings a program's persistent carries back to the bundle's values every `frames` frames, or when the objective
    that the loop reports as telemetry `loss` exceeds `factor` times its running median.

    Carries of a class-bound state are kept per product by the program itself, so a product change needs nothing here.
    For a program without persistent carries it does nothing.
    """

    def __init__(self, program: Program, frames: int = 1000, factor: float = 1.5, window: int = 100) -> None:
        manifest = program.bundle.manifest
        steps = programs(manifest)[program.name]
        self.active = any(isinstance(step, Loop) and step.persist for step in steps)
        self._loss = manifest.outputs.telemetry.get("loss")
        self._frames, self._factor = frames, factor
        self._seen = 0
        self._losses: dict[int, deque[float]] = {}
        self._window = window

    def after_frame(self, program: Program, class_index: int) -> bool:
        """After each scored frame; whether the carries were reset."""
        if not self.active:
            return False
        self._seen += 1
        reason = f"{self._seen} frames" if self._seen >= self._frames else self._risen(program, class_index)
        if reason is None:
            return False
        program.reset()
        self._seen = 0
        self._losses.clear()
        log.info("loop state starts afresh: %s", reason)
        return True

    def _risen(self, program: Program, class_index: int) -> str | None:
        if self._loss is None or self._loss not in program.outputs:
            return None
        loss = float(program.read(self._loss)[0])
        seen = self._losses.setdefault(class_index, deque(maxlen=self._window))
        median = float(np.median(seen)) if len(seen) >= 10 else float("inf")
        seen.append(loss)
        return None if loss <= self._factor * median else f"loss {loss:.3g} against a median of {median:.3g}"
