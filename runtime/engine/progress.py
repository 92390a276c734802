"""How far a TensorRT build has come, as a progress bar with ETA."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .trt import Trt

log = logging.getLogger(__name__)
_UNITS = 1000


class BuildProgress:
    """A bar that TensorRT's progress monitor moves; without a monitor it only shows the time.

    IProgressMonitor came with 9.0/10.0:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ProgressMonitor.html
    """

    def __init__(self, trt: Trt, title: str):
        self._trt = trt
        self._bar = tqdm(total=_UNITS, desc=f"build {title}", unit="‰", mininterval=0.2 if sys.stderr.isatty() else 30)
        self._lock = threading.Lock()
        self._phases: dict[str, Phase] = {}
        self._monitor: Any = None
        #: True after Ctrl-C: the build is asked to end and gives no plan
        self.interrupted = False

    def attach(self, config: Any) -> None:
        """Let a builder configuration report here."""
        if hasattr(self._trt, "IProgressMonitor"):
            self._monitor = _make_monitor(self._trt, self)
            config.progress_monitor = self._monitor

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins, inside a step of its parent. Called from any thread."""
        with self._lock:
            above = self._phases.get(parent or "")
            phase = Phase(max(steps, 1), above.share / above.steps if above else 1.0)
            self._phases[name] = phase

    def step(self, name: str) -> None:
        """A step of a phase is done. Called from any thread."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None and phase.done < phase.steps:
                phase.done += 1
                self._show()

    def finish(self, name: str) -> None:
        """A phase is over, perhaps early. Called from any thread."""
        with self._lock:
            self._phases.pop(name, None)

    def _show(self) -> None:
        reached = min(1.0, sum(phase.share * phase.done / phase.steps for phase in self._phases.values()))
        self._bar.update(max(0, int(reached * _UNITS) - self._bar.n))

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.update(_UNITS - self._bar.n)
        self._bar.close()


class Phase:
    """A phase under way. share: part of the whole build that it is."""

    def __init__(self, steps: int, share: float):
        self.steps = steps
        self.share = share
        self.done = 0


def _make_monitor(trt: Trt, progress: BuildProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Thread-safe, as TensorRT asks; step_complete returning False ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._guarded(lambda: progress.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._guarded(lambda: progress.step(phase_name))
            return not progress.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._guarded(lambda: progress.finish(phase_name))

        def _guarded(self, action: Callable[[], None]) -> None:
            """TensorRT calls back from C++, where Ctrl-C must not surface; it is raised once the build has ended."""
            try:
                action()
            except KeyboardInterrupt:
                progress.interrupted = True

    return Monitor()
