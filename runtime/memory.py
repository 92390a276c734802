"""Online calibration on the line: the memory of normal of any bundle that has one, kept current while it judges.

Nothing here knows a method: what to read and where to write is the manifest's `memory` section. Everything runs on the
judging thread but the writing of snapshots, for which this module owns one thread.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..calib.calibrator import Observation, OnlineCalibrator, Outcome
from ..calib.drift import DriftMonitor
from ..calib.snapshots import AuditLog, Refusal, Snapshot, SnapshotStore
from .autosave import Autosave
from .bundle import Bundle
from .detector import Detector
from .detector import Judgement as Scored
from .errors import CalibrationError, ConfigError, EngineError
from .judge import Judgement
from .lineconfig import LineConfig
from .manifest import Memory
from .memoryconfig import MemoryConfig
from .program import Program
from .types import Frame
from .verdict import timestamp
from .warmstart import WarmStart

log = logging.getLogger(__name__)


def open_memory(config: LineConfig, detector: Detector, folder: Path) -> LineMemory | None:
    """Online calibration of a line, in `memory` under its state folder; None if there is nothing to watch or learn.

    Raises:
        CalibrationError: see :class:`LineMemory`.
    """
    learns = config.memory.enabled and detector.bundle.manifest.memory is not None
    if not learns and not config.memory.drift.enabled and not WarmStart(detector.program).active:
        return None
    return LineMemory(detector.program, config.memory, folder / "memory")


def require_memory(config: LineConfig, bundle: Bundle) -> int | None:
    """Hold the `memory` section against the bundle, before anything is opened.

    Returns:
        How many learnt rows each memory may hold; None where nothing learns.

    Raises:
        CalibrationError: more rows than the bundle has, or a rule for which it lacks an output.
    """
    memory = bundle.manifest.memory if config.memory.enabled else None
    if memory is None:
        return None
    return _calibrators(bundle, memory, config.memory)[0].memory.policy.capacity


class LineMemory:
    """The memory of one line: calibrators, drift monitors, snapshots and audit log. Implements judge.OnlineMemory.

    A bundle without memory, or with calibration switched off, has drift monitors all the same.

    Args:
        program: the opened program; saved state is written into it here.
        config: the `memory` section of the line configuration.
        folder: where snapshots and audit.jsonl live; made if missing.
        clock: seconds, monotonic.

    Raises:
        CalibrationError: the folder cannot be used, or the policy does not fit the bundle.
    """

    def __init__(
        self,
        program: Program,
        config: MemoryConfig,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self._config = config
        self._classes = program.bundle.manifest.classes
        self._memory = program.bundle.manifest.memory if config.enabled else None
        self._calibrators = _calibrators(program.bundle, self._memory, config) if self._memory else ()
        self._warm_start = WarmStart(program)
        self._drift: dict[str, DriftMonitor] = {}
        self._warnings: dict[str, str] = {}
        self._broken: dict[int, str] = {}
        self._number = 0
        self._content = 0  # the version that the memory's content was made in; a rollback brings an older one back
        self._left: list[tuple[int, int]] = []  # first and last of the versions that a rollback took out of use
        self._clock = clock
        self._save_due = clock() + config.save_every
        self._states: dict[int, dict[str, Any]] = {}  # copies for saving, of calibrators that have not changed since
        self._kept: dict[str, Any] = {}  # what was learnt, where that is not in use now
        self._store = SnapshotStore(folder, _identity(program.bundle), config.snapshots)
        self._audit = AuditLog(folder / "audit.jsonl")
        self._audit_failing = False
        self._restore_last()
        every = config.save_every, config.snapshot_every
        self._saver = Autosave(self._store, *every, clock, content=_rows, before=self._sync_audit)

    # -- what the judge asks -----------------------------------------------------------------------------------------

    def unusable(self, product: str) -> str | None:
        """Why frames of this product cannot be judged with the memory as it is; None: they can."""
        return self._broken.get(self._index(product)) if self._calibrators else None

    def version(self, product: str) -> int | None:
        """Number of the memory's present version, one for the whole bundle; None without memory."""
        return self._number if self._calibrators else None

    def drift(self, camera: str) -> str | None:
        """What has drifted at this camera; None: nothing has."""
        found = [detail for name, detail in self._warnings.items() if name.split("/", 1)[0] == camera]
        return "; ".join(found) or None

    @property
    def teaches_first(self) -> bool:
        """Whether a frame teaches before its verdict (`memory.order: update_first`)."""
        return self._config.order == "update_first" and bool(self._calibrators)

    def after_frame(self, program: Program, judgement: Judgement, frame: Frame) -> None:
        """A frame was judged; now the memory may learn from it, unless it has done so before the verdict."""
        scored = judgement.scored
        if scored is None or scored.score is None or not np.isfinite(scored.score):
            return
        self._watch(frame.camera, scored.product or "", scored.score)
        if scored.class_index is None:
            return
        self._warm_start.after_frame(program, scored.class_index)
        if not self.teaches_first:
            self.teach(program, scored, judgement.verdict.label, frame, judgement.verdict.id)

    def teach(self, program: Program, scored: Scored, label: str, frame: Frame, verdict: str) -> bool:
        """Let the frame that the program has just scored teach, if it may; True: the memory has changed.

        label: what it was judged by that score; verdict: identifier of its verdict, for the audit log.
        """
        memory = self._memory
        if memory is None or scored.class_index is None or scored.score is None or not np.isfinite(scored.score):
            return False
        index = scored.class_index if memory.per_class else 0
        if index in self._broken:
            return False
        calibrator, trusted = self._calibrators[index], label == "OK"
        if calibrator.turns_away(trusted=trusted):
            return False  # before its patches are fetched from the engine
        self._states.pop(index, None)
        seen = Observation(
            scored.score,
            program.read(memory.candidates),
            program.read(memory.patch_score),
            None if memory.transport is None else program.read(memory.transport),
            None if memory.nearest is None else program.read(memory.nearest),
        )
        outcome = calibrator.observe(seen, trusted=trusted)
        if outcome.change is None:
            return False
        self._changed()
        self._upload(index, slice(outcome.change.start, outcome.change.stop))
        self._record(outcome, verdict, frame, index)
        self._offer()
        return True

    def _watch(self, camera: str, product: str, score: float) -> None:
        if not self._config.drift.enabled:
            return
        name = f"{camera}/{product}"
        if name not in self._drift:
            self._drift[name] = DriftMonitor(self._config.drift.policy())
        monitor = self._drift[name]
        learning = not monitor.complete
        drift = monitor.observe(score)
        if drift.changed:
            detail = f"{product}: scores moved up, KS {drift.statistic:.2f} against {drift.critical:.2f}"
            log.warning("camera %s: drift %s (%s)", camera, "warning" if drift.warning else "cleared", detail)
            if drift.warning:
                self._warnings[name] = detail
            else:
                self._warnings.pop(name, None)
            self._note({"action": "drift", "camera": camera, "warning": drift.warning})
        # Whether or not anything is learnt: after a power cut a new reference would be taken from what has drifted.
        if drift.changed or (learning and (monitor.complete or self._clock() >= self._save_due)):
            self._offer()

    def _record(self, outcome: Outcome, verdict: str, frame: Frame, index: int) -> None:
        change, patches = outcome.change, outcome.patches
        if change is None or patches is None:
            return
        self._note(
            {
                "action": "admit",
                "version": self._number,
                "product": self._classes[index] if self._memory and self._memory.per_class else "*",
                "camera": frame.camera,
                "seq": frame.seq,
                "part_id": frame.part_id,
                "verdict": verdict,
                "score": outcome.decision.found,
                "limit": outcome.decision.limit if np.isfinite(outcome.decision.limit) else None,
                "why": f"score within the {self._config.guard.quantile} quantile and both anchors"
                if self._config.guard.gate
                else "gate off",
                "selection": self._config.selection,
                "patches": patches.tolist(),
                "compressed": change.compressed,
                "rows": change.length,
            }
        )

    def _note(self, entry: Mapping[str, Any], sync: bool = False) -> None:
        """Into the audit log, with the time."""
        with self._auditing():
            self._audit.write({"time": timestamp(), **entry})
            if sync:
                self._audit.sync()
            self._audit_failing = False

    def _sync_audit(self) -> None:
        """Before a snapshot is saved, on the thread that saves: what is in it is then explained, whatever comes."""
        with self._auditing():
            self._audit.sync()

    @contextmanager
    def _auditing(self) -> Iterator[None]:
        """A log that cannot be written is said once: what was learnt counts all the same, and has to be saved."""
        try:
            yield
        except OSError as error:
            if not self._audit_failing:
                log.error("the audit log of the memory, %s, may lack entries: %s", self._audit.path, error)
            self._audit_failing = True

    # -- commands ----------------------------------------------------------------------------------------------------

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Execute freeze, unfreeze, snapshot, rollback (`version`, else the newest older one) or reset.

        Where there is no memory but a drift watch, reset gives that a new reference, and is all there is.

        Raises:
            ConfigError: unknown action, or there is no memory to command.
            CalibrationError: no snapshot to roll back to, or it cannot be written.
        """
        actions: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "freeze": lambda _: self._freeze(True),
            "unfreeze": lambda _: self._freeze(False),
            "snapshot": lambda _: self._snapshot(),
            "rollback": lambda a: self._rollback(a.get("version")),
            "reset": lambda _: self._reset(),
        }
        if name not in actions:
            raise ConfigError(f"no memory action '{name}'", found=name, expected=", ".join(actions))
        if not self._calibrators and not (name == "reset" and self._config.drift.enabled):
            raise ConfigError(
                "this line has no memory to command",
                found="memory.enabled: false" if not self._config.enabled else "a bundle without memory",
                expected="memory.enabled: true and a bundle with memory (knn, foct)",
                next_step="change the line configuration",
            )
        before = self._number
        actions[name](arguments)
        entry = {"action": name, "before": before, "version": self._number, "by": arguments.get("by")}
        self._note(entry, sync=True)
        if name != "snapshot":
            self._offer()
            self._saver.flush()  # what a person was told is done must not come undone by a power cut within the minute
        return {"version": self._number, "before": before, **self.describe()}

    def _freeze(self, frozen: bool) -> None:
        self._states.clear()
        for calibrator in self._calibrators:
            calibrator.frozen = frozen

    def _snapshot(self) -> None:
        self._saver.write(self._arrays(), self._meta(), "pinned")

    def _reset(self) -> None:
        self._states.clear()
        for index, calibrator in enumerate(self._calibrators):
            calibrator.reset()
            self._upload(index)
        for monitor in self._drift.values():
            monitor.reset()
        self._warnings.clear()
        self._changed()

    def _changed(self) -> None:
        """The memory is another than any before."""
        self._number += 1
        self._content = self._number

    def _rollback(self, version: int | None) -> None:
        """Back to a saved version; it becomes a new one, and stays frozen or not as the memory is now.

        Without a version: to the newest that the present content came from. What an earlier rollback took out of use
        is not among these, or the second of two would bring back what the first was for.
        """
        frozen = [calibrator.frozen for calibrator in self._calibrators]
        with self._saver.lock:
            item = self._saved(version)
        self._take(item)
        for calibrator, was in zip(self._calibrators, frozen, strict=True):
            calibrator.frozen = was
        self._left.append((self._content + 1, self._number))
        self._number += 1

    def _saved(self, version: int | None) -> Snapshot:
        """What :meth:`_rollback` returns to: of snapshots of the same content the newest that is whole."""
        saved = sorted(self._store.metas(), key=lambda item: (_content(item[1]), item[0]), reverse=True)
        for number, meta in list(saved):
            if int(meta["version"]) == version or (version is None and self._came_from(_content(meta))):
                try:
                    return self._store.load(number)
                except CalibrationError as error:
                    log.warning("rollback: snapshot %d is passed over: %s", number, error)
                    saved.remove((number, meta))
        versions = sorted({int(meta["version"]) for _, meta in saved})
        raise CalibrationError(
            "there is no such version to roll back to" if version is not None else "there is no older version",
            found=version if version is not None else f"version {self._number}",
            expected=f"one of {versions}" if versions else "a saved snapshot",
            next_step="choose one of these, or reset the memory",
        )

    def _came_from(self, content: int) -> bool:
        return content < self._content and not any(first <= content <= last for first, last in self._left)

    def _offer(self) -> None:
        """Hand the present state to the thread that saves."""
        self._saver.offer(self._arrays(), self._meta())
        self._save_due = self._clock() + self._config.save_every

    # -- state -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Present state for status, web page and command results."""
        counts = sum((calibrator.counts for calibrator in self._calibrators), Counter[str]())
        return {
            "order": self._config.order if self._calibrators else None,
            "frozen": any(calibrator.frozen for calibrator in self._calibrators),
            "rows": {self._name(i): c.memory.length for i, c in enumerate(self._calibrators)},
            "frames": dict(counts),
            # By the numbers that rollback takes; the same version may be saved more than once.
            "snapshots": sorted({int(meta["version"]) for _, meta in self._store.metas()}, reverse=True),
            "drift": sorted(self._warnings),
            "drift_score": {name: round(monitor.statistic(), 4) for name, monitor in self._drift.items()},
            "version": self._number if self._calibrators else None,
        }

    def _name(self, index: int) -> str:
        return self._classes[index] if self._memory and self._memory.per_class else "*"

    def _index(self, product: str) -> int:
        return self._classes.index(product) if self._memory and self._memory.per_class else 0

    def _arrays(self) -> dict[str, Any]:
        arrays = dict(self._kept)
        for index, calibrator in enumerate(self._calibrators):
            if index not in self._states:
                self._states[index] = {f"{index}.{name}": value for name, value in calibrator.state().items()}
            arrays |= self._states[index]
        for name, monitor in self._drift.items():
            arrays |= {f"drift.{name}.{key}": value for key, value in monitor.state().items()}
        return arrays

    def _meta(self) -> dict[str, Any]:
        return {
            "version": self._number,
            "content": self._content,
            "left": list(self._left),
            "saved": timestamp(),
            "program": self._program.name,
            "drift": sorted(self._drift),
        }

    def _restore_last(self) -> None:
        """Take the newest snapshot that fits; what cannot be used is logged and passed over."""
        last = max((int(e["version"]) for e in self._audit.entries() if "version" in e), default=0)
        for item in self._store.usable():
            if isinstance(item, Refusal):
                log.warning("snapshot %s is not used: %s", item.path.name, item.reason)
                continue
            try:
                self._take(item)
            except CalibrationError as error:
                log.warning("snapshot %d is not used: %s", item.number, error)
                continue
            saved = int(item.meta["version"])
            # Killed after the last save, the line may have published later versions: their numbers are not used again.
            self._number = saved if last <= saved else last + 1
            entry = {"action": "restore", "version": self._number, "of": saved, "snapshot": item.number}
            self._note(entry)
            log.info("memory version %d restored from snapshot %d as version %d", saved, item.number, self._number)
            return
        # Nothing was saved yet, or nothing is left of it.
        self._number = self._content = last + 1 if last else 0

    def _take(self, snapshot: Snapshot) -> None:
        arrays = snapshot.arrays
        self._states.clear()
        for index, calibrator in enumerate(self._calibrators):
            own = _part(arrays, f"{index}.")
            # A snapshot of a line that has not learnt yet has none: the memory is as it was enrolled.
            calibrator.restore(own) if own else calibrator.reset()
            self._upload(index)
        if not self._calibrators:
            self._kept = {name: array for name, array in arrays.items() if not name.startswith("drift.")}
        self._content = _content(snapshot.meta)
        self._left = [(int(first), int(last)) for first, last in snapshot.meta.get("left", ())]
        # Programs of a bundle score on scales of their own: what one has seen is no reference for another.
        same = snapshot.meta.get("program", self._program.name) == self._program.name
        for name in snapshot.meta.get("drift", []) if self._config.drift.enabled and same else []:
            monitor = DriftMonitor(self._config.drift.policy())
            monitor.restore(_part(arrays, f"drift.{name}."))
            self._drift[name] = monitor
            # What was said of the monitor that this one replaces holds no more.
            self._warnings.pop(name, None)
            if monitor.warning:
                self._warnings[name] = f"{name.split('/', 1)[1]}: scores had moved up when this state was saved"

    def _upload(self, index: int, rows: slice | None = None) -> None:
        """Write episodic rows (all of them by default) into the program; a failure makes the product unjudgeable."""
        memory, spec = self._calibrators[index].memory, self._memory
        if spec is None:
            return
        rows = rows or slice(memory.semantic_rows, len(memory.bank))
        values = {spec.bank: memory.bank, spec.valid: memory.valid}
        # Labels that no stage reads (foct's) are the host's alone: there is nothing to write them to.
        if spec.foreground is not None and memory.foreground is not None and self._program.has_state(spec.foreground):
            values[spec.foreground] = memory.foreground
        try:
            for name, array in values.items():
                self._program.write_state(name, array[rows], rows, class_index=index)
        except EngineError as error:
            self._broken[index] = f"the memory could not be written to the engine: {error.what}"
            log.exception("memory of %s cannot be used", self._name(index))
            return
        self._broken.pop(index, None)

    def close(self) -> None:
        """Write what has to survive and stop the writer."""
        if self._calibrators or self._drift:
            self._offer()
        self._saver.close()
        with self._auditing():
            try:
                self._audit.sync()
            finally:
                self._audit.close()


def _calibrators(bundle: Bundle, memory: Memory, config: MemoryConfig) -> tuple[OnlineCalibrator, ...]:
    """One calibrator per product where each has its own bank, else one.

    Raises:
        CalibrationError: the policy does not fit the bundle.
    """
    if config.selection == "transport" and memory.transport is None:
        raise CalibrationError(
            "memory.selection: transport: the bundle gives no transport probabilities to choose by",
            found=f"a {bundle.manifest.method} bundle",
            expected="a method with conditional transport (foct)",
            next_step="set memory.selection: farthest",
        )
    state = bundle.manifest.state
    bank, valid = bundle.array(state[memory.bank]), bundle.array(state[memory.valid])
    labels = None if memory.foreground is None else bundle.array(state[memory.foreground])
    if not memory.per_class:
        bank, valid, labels = bank[None], valid[None], None if labels is None else labels[None]
    policy, guard = config.policy(memory.episodic_rows), config.guard.policy()
    return tuple(
        OnlineCalibrator.create(
            bank[index], valid[index], memory.semantic_rows, policy, guard, None if labels is None else labels[index]
        )
        for index in range(len(bank))
    )


def _identity(bundle: Bundle) -> dict[str, Any]:
    """What a snapshot must have been made with: the model (thresholds aside), whether its memory was in use or not."""
    has_memory = bundle.manifest.memory is not None  # says nothing new, but snapshots of earlier versions have it
    return {"model": bundle.model_id, "classes": list(bundle.manifest.classes), "memory": has_memory}


def _rows(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the memory of normal consists of, without what every frame changes (guard, drift) and without counters."""
    return {name: array for name, array in arrays.items() if name.endswith((".memory.rows", ".memory.foreground"))}


def _content(meta: Mapping[str, Any]) -> int:
    """The version that a snapshot's content was made in: an older one than its own after a rollback."""
    return int(meta.get("content", meta["version"]))


def _part(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
