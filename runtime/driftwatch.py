"""Which cameras' scores have moved up: a drift monitor per camera and product, with or without a memory that learns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..calib.drift import DriftMonitor
from ..calib.snapshots import Snapshot
from .memoryconfig import DriftConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """What a score has done.

    changed: the warning began or ended with it; warning: the state now; learning: it went into the reference;
    completed: it was the last that the reference lacked.
    """

    changed: bool
    warning: bool
    learning: bool
    completed: bool


class DriftWatch:
    """Monitors by "camera/product", made with their first score, and what they warn of now."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self.monitors: dict[str, DriftMonitor] = {}
        self._warnings: dict[str, str] = {}

    def warnings(self, camera: str) -> dict[str, str]:
        """Products that have drifted at this camera, and how."""
        found = {}
        for name, detail in self._warnings.items():
            where, product = name.split("/", 1)
            if where == camera:
                found[product] = detail
        return found

    def observe(self, camera: str, product: str, score: float, apart: bool) -> Watched:
        """Hold a score against the reference of its camera and product, or take it into that; log what changes.

        apart: it is known to be of another part than the one before.
        """
        name = f"{camera}/{product}"
        if name not in self.monitors:
            self.monitors[name] = DriftMonitor(self._config.policy())
        monitor = self.monitors[name]
        learning = not monitor.complete
        drift = monitor.observe(score, apart)
        completed = monitor.complete and (learning or drift.renewed)
        if drift.renewed:
            log.warning("camera %s: the drift reference of %s was of too few parts: replaced", camera, product)
        if completed and not apart:
            every = monitor.spacing.stride
            often = "every score" if every == 1 else f"one score in {every} to {2 * every}"
            log.info("camera %s: drift reference of %s taken; %s counts", camera, product, often)
        if drift.changed:
            detail = f"{product}: scores moved up, KS {drift.statistic:.2f} against {drift.critical:.2f}"
            log.warning("camera %s: drift %s (%s)", camera, "warning" if drift.warning else "cleared", detail)
            if drift.warning:
                self._warnings[name] = detail
            else:
                self._warnings.pop(name, None)
        return Watched(drift.changed, drift.warning, learning, completed)

    def reset(self, camera: str | None = None) -> None:
        """Every monitor, or those of a camera, takes a new reference; what they warned of is over."""
        for name, monitor in self.monitors.items():
            if camera in (None, name.split("/", 1)[0]):
                monitor.reset()
                self._warnings.pop(name, None)

    def describe(self) -> dict[str, Any]:
        """For status, web page and command results."""
        return {
            "drift": sorted(self._warnings),
            "drift_score": {name: round(monitor.statistic(), 4) for name, monitor in self.monitors.items()},
        }

    def arrays(self) -> dict[str, Any]:
        """What a snapshot keeps of all monitors."""
        return {
            f"drift.{name}.{key}": value
            for name, monitor in self.monitors.items()
            for key, value in monitor.state().items()
        }

    def take(self, snapshot: Snapshot) -> None:
        """The snapshot's monitors instead of those of the same names.

        Raises:
            CalibrationError: they do not fit the configuration.
        """
        for name in snapshot.meta.get("drift", []):
            monitor = DriftMonitor(self._config.policy())
            monitor.restore(snapshot.part(f"drift.{name}."))
            self.monitors[name] = monitor
            # What was said of the monitor that this one replaces holds no more.
            self._warnings.pop(name, None)
            if monitor.warning:
                self._warnings[name] = f"{name.split('/', 1)[1]}: scores had moved up when this state was saved"
