"""Online calibration on the line: the memory of normal of any bundle that has one, kept current while it judges.

Here the parts meet: rows (memorybanks.py), versions (memoryversions.py), drift (driftwatch.py), snapshots, audit log.
Everything runs on the judging thread but the writing and listing of snapshots, for which this module owns one thread:
only a command does that where it is executed, for its answer says what is on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..calib.audit import AuditLog
from ..calib.calibrator import Outcome
from ..calib.snapshots import Refusal, Snapshot, SnapshotStore
from .autosave import Autosave
from .bundle import Bundle
from .detector import Detector
from .detector import Judgement as Scored
from .driftwatch import DriftWatch
from .errors import CalibrationError, ConfigError
from .judgement import Judgement
from .lineconfig import LineConfig
from .memorybanks import MemoryBanks, learnt_rows
from .memoryconfig import MemoryConfig
from .memoryversions import MemoryVersions, content_version, made_without_memory
from .program import Program
from .types import Frame
from .verdict import timestamp
from .warmstart import WarmStart

log = logging.getLogger(__name__)


def open_memory(config: LineConfig, detector: Detector, folder: Path, published: int = 0) -> LineMemory | None:
    """Online calibration of a line, in `memory` under its state folder; None if there is nothing to watch or learn.

    published: the newest version that a verdict was given with.

    Raises:
        CalibrationError: see :class:`LineMemory`.
    """
    learns = config.memory.enabled and detector.bundle.manifest.memory is not None
    if not learns and not config.memory.drift.enabled and not WarmStart(detector.program).active:
        return None
    return LineMemory(detector.program, config.memory, folder / "memory", published)


class LineMemory:
    """The memory of one line: calibrators, drift monitors, snapshots and audit log. Implements judge.OnlineMemory.

    A bundle without memory, or with calibration switched off, has drift monitors all the same.

    Args:
        program: the opened program; saved state is written into it here.
        config: the `memory` section of the line configuration.
        folder: where snapshots and audit.jsonl live; made if missing.
        published: a version that was in use already, whatever the folder knows of it.
        clock: seconds, monotonic.

    Raises:
        CalibrationError: the folder cannot be used, or the policy does not fit the bundle.
    """

    def __init__(
        self,
        program: Program,
        config: MemoryConfig,
        folder: Path,
        published: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self._config = config
        self._banks = MemoryBanks(program, config)
        self._versions = MemoryVersions()
        self._drift = DriftWatch(config.drift)
        self._warm_start = WarmStart(program)
        self._clock = clock
        self._save_due = clock() + config.save_every
        self._store = SnapshotStore(folder, *_identities(program.bundle), keep=config.snapshots)
        self._audit = AuditLog(folder / "audit.jsonl", rotates=False)
        self._audit_failing = False
        with self._auditing():
            self._audit.open()
        self._restore_last(published)
        every = config.save_every, config.snapshot_every
        self._saver = Autosave(self._store, *every, clock, content=learnt_rows, before=self._sync_audit)

    # -- what the judge asks -----------------------------------------------------------------------------------------

    def unusable(self, product: str) -> str | None:
        """Why frames of this product cannot be judged with the memory as it is; None: they can."""
        return self._banks.unusable(product)

    def version(self, product: str) -> int | None:
        """Number of the memory's present version, one for the whole bundle; None without memory."""
        return self._versions.number if self._banks.calibrators else None

    def drift(self, camera: str) -> dict[str, str]:
        """Products that have drifted at this camera, and how."""
        return self._drift.warnings(camera)

    @property
    def teaches_first(self) -> bool:
        """Whether a frame teaches before its verdict (`memory.order: update_first`)."""
        return self._config.order == "update_first" and bool(self._banks.calibrators)

    def after_frame(self, program: Program, judgement: Judgement, frame: Frame) -> None:
        """A frame was judged; now the memory may learn from it, unless it has done so before the verdict."""
        scored = judgement.scored
        if scored is None or scored.score is None or not np.isfinite(scored.score):
            return
        if not self.teaches_first:
            self._watch(frame, scored.product or "", scored.score)
        if scored.class_index is None:
            return
        self._warm_start.after_frame(program, scored.class_index)
        if not self.teaches_first:
            self.teach(program, scored, judgement.verdict.label, frame, judgement.verdict.id)

    def teach(self, program: Program, scored: Scored, label: str, frame: Frame, verdict: str) -> bool:
        """Let the frame that the program has just scored teach, if it may; True: the memory has changed.

        label: what it was judged by that score; verdict: identifier of its verdict, for the audit log.
        """
        if scored.score is None or not np.isfinite(scored.score):
            return False
        if self.teaches_first:  # the second score is against its own patches: a freeze would look like drift
            self._watch(frame, scored.product or "", scored.score)
        if scored.class_index is None:
            return False
        outcome = self._banks.learn(program, scored.class_index, scored.score, trusted=label == "OK")
        if outcome is None or outcome.change is None:
            return False
        self._versions.changed()
        self._banks.upload(scored.class_index, slice(outcome.change.start, outcome.change.stop))
        self._record(outcome, verdict, frame, self._banks.name(scored.class_index))
        self._offer()
        return True

    def _watch(self, frame: Frame, product: str, score: float) -> None:
        if not self._config.drift.enabled:
            return
        seen = self._drift.observe(frame.camera, product, score, apart=frame.part_id is not None)
        if seen.changed:
            self._note({"action": "drift", "camera": frame.camera, "warning": seen.warning})
        # Whether or not anything is learnt: after a power cut a new reference would be taken from what has drifted.
        if seen.changed or seen.completed or (seen.learning and self._clock() >= self._save_due):
            self._offer()

    def _record(self, outcome: Outcome, verdict: str, frame: Frame, bank: str) -> None:
        change, patches = outcome.change, outcome.patches
        if change is None or patches is None:
            return
        self._note(
            {
                "action": "admit",
                "version": self._versions.number,
                "product": bank,
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
            self._audit.rotate()
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
        """Execute freeze, unfreeze, snapshot, rollback (`version`, else the newest older one), reference or reset.

        reference: the drift watch of `camera` (else of all) takes a new reference; what was learnt stays. Where there
        is no memory but a drift watch, this and reset, which does the same for all cameras, are all there is.

        Raises:
            ConfigError: unknown action, or there is no memory to command.
            CalibrationError: no snapshot to roll back to; or it is in force and could not be written.
        """
        actions: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
            "freeze": lambda _: self._banks.freeze(True),
            "unfreeze": lambda _: self._banks.freeze(False),
            "snapshot": lambda _: self._snapshot(),
            "rollback": lambda a: self._rollback(a.get("version")),
            "reference": lambda a: self._drift.reset(a.get("camera")),
            "reset": lambda _: self._reset(),
        }
        if name not in actions:
            raise ConfigError(f"no memory action '{name}'", found=name, expected=", ".join(actions))
        if name == "reference" and not self._config.drift.enabled:
            raise ConfigError(
                "this line watches no drift",
                found="memory.drift.enabled: false",
                next_step="set memory.drift.enabled: true in the line configuration",
            )
        watch_only = name in ("reference", "reset") and self._config.drift.enabled
        if not self._banks.calibrators and not watch_only:
            raise ConfigError(
                "this line has no memory to command",
                found="memory.enabled: false" if not self._config.enabled else "a bundle without memory",
                expected="memory.enabled: true and a bundle with memory (knn, foct)",
                next_step="change the line configuration",
            )
        before = self._versions.number
        back_to = actions[name](arguments)
        done = {"version": self._versions.number, "before": before, **({} if back_to is None else {"of": back_to})}
        entry = {"action": name, **done, "by": arguments.get("by")}
        if name == "reference":
            entry["camera"] = arguments.get("camera")
        self._note(entry, sync=True)
        if name != "snapshot":
            self._offer()
            self._save_now(name)
        return {**done, **self.describe()}

    def _save_now(self, name: str) -> None:
        """What a person was told is done must not come undone by a power cut within the minute."""
        if (error := self._saver.flush()) is not None:
            raise CalibrationError(
                f"{name} is in force, but not saved: a restart may undo it",
                found=error,
                expected="a state folder that can be written",
                next_step="mend that; saving is tried again every minute (memory.save_every) and at the stop",
            )

    def _snapshot(self) -> None:
        self._saver.write(self._arrays(), self._meta(), "pinned")

    def _reset(self) -> None:
        self._banks.reset()
        self._drift.reset()
        self._versions.changed()

    def _rollback(self, version: int | None) -> int:
        """Back to a saved version, which is returned; it becomes a new one, frozen or not as the memory is now."""
        with self._saver.lock:
            snapshot = self._versions.find(self._store, version)
        self._take(snapshot, keep_frozen=True)
        self._versions.rolled_back()
        return int(snapshot.meta["version"])

    def _offer(self) -> None:
        """Hand the present state to the thread that saves."""
        self._saver.offer(self._arrays(), self._meta())
        self._save_due = self._clock() + self._config.save_every

    # -- state -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Present state for status, web page and command results. Waits for no disk: it is asked for every second."""
        return {
            "order": self._config.order if self._banks.calibrators else None,
            **self._banks.describe(),
            # By the numbers that rollback takes; the same version may be saved more than once.
            "snapshots": sorted({int(meta["version"]) for _, meta in self._saver.saved}, reverse=True),
            **self._drift.describe(),
            "version": self._versions.number if self._banks.calibrators else None,
        }

    def _arrays(self) -> dict[str, Any]:
        return self._banks.arrays() | self._drift.arrays()

    def _meta(self) -> dict[str, Any]:
        return {
            **self._versions.meta(),
            "saved": timestamp(),
            "program": self._program.name,
            "drift": sorted(self._drift.monitors),
            "watched": "first score",
        }

    def _restore_last(self, published: int) -> None:
        """Take the newest snapshot that fits; what cannot be used is logged and passed over."""
        last = 0
        with self._auditing():
            last = max((int(e["version"]) for e in self._audit.entries() if "version" in e), default=0)
        last = max(last, published)  # a power cut takes the last lines of that log, which waits for no disk
        for item in self._store.usable():
            if isinstance(item, Refusal):
                log.warning("snapshot %s is not used: %s", item.path.name, item.reason)
                continue
            try:
                self._take(self._with_rows(item))
            except CalibrationError as error:
                log.warning("snapshot %d is not used: %s", item.number, error)
                continue
            saved = int(item.meta["version"])
            self._versions.restored(saved, last)
            number = self._versions.number
            entry = {"action": "restore", "version": number, "of": saved, "snapshot": item.number}
            self._note(entry)
            log.info("memory version %d restored from snapshot %d as version %d", saved, item.number, number)
            return
        self._versions.begin(last)

    def _with_rows(self, snapshot: Snapshot) -> Snapshot:
        """With what was learnt before, where an earlier version left that out as the memory was switched off."""
        if not made_without_memory(snapshot):
            return snapshot
        for older in self._store.usable():
            if isinstance(older, Snapshot) and older.number < snapshot.number and learnt_rows(older.arrays):
                rows = {name: array for name, array in older.arrays.items() if not name.startswith("drift.")}
                made = {"content": content_version(older.meta), "left": older.meta.get("left", [])}
                return replace(snapshot, arrays={**rows, **snapshot.arrays}, meta={**snapshot.meta, **made})
        return snapshot

    def _take(self, snapshot: Snapshot, *, keep_frozen: bool = False) -> None:
        self._banks.take(snapshot, keep_frozen=keep_frozen)
        self._versions.take(snapshot.meta)
        # Programs of a bundle score on scales of their own: what one has seen is no reference for another.
        same = snapshot.meta.get("program", self._program.name) == self._program.name
        # Earlier versions watched the score of after the update: held against that, every first score has drifted.
        comparable = not self.teaches_first or "watched" in snapshot.meta
        if self._config.drift.enabled and same and comparable:
            self._drift.take(snapshot)

    def close(self) -> None:
        """Write what has to survive and stop the writer."""
        if self._banks.calibrators or self._drift.monitors:
            self._offer()
        self._saver.close()
        with self._auditing():
            try:
                self._audit.sync()
            finally:
                self._audit.close()


def _identities(bundle: Bundle) -> list[dict[str, Any]]:
    """What a snapshot must have been made with: the model (thresholds aside), whether its memory was in use or not.

    First as it is written now, then as earlier versions wrote it.
    """
    classes = list(bundle.manifest.classes)
    return [{"model": model, "classes": classes} for model in (bundle.model_id, *bundle.former_ids)]
