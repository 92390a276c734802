"""The rows of the memory of normal, as the calibrators have them and as the program's engines do.

Nothing here knows a method: what to read and where to write is the manifest's `memory` section.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..calib.calibrator import Observation, OnlineCalibrator, Outcome
from ..calib.snapshots import Snapshot
from .bundle import Bundle
from .errors import CalibrationError, EngineError
from .lineconfig import LineConfig
from .manifest import Memory
from .memoryconfig import MemoryConfig
from .program import Program

log = logging.getLogger(__name__)


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
    return open_calibrators(bundle, memory, config.memory)[0].memory.policy.capacity


def open_calibrators(bundle: Bundle, memory: Memory, config: MemoryConfig) -> tuple[OnlineCalibrator, ...]:
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


def learnt_rows(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the memory of normal consists of, without what every frame changes (guard, drift) and without counters."""
    return {name: array for name, array in arrays.items() if name.endswith((".memory.rows", ".memory.foreground"))}


class MemoryBanks:
    """One calibrator per product, or one for all; none for a bundle without memory, or with calibration switched off.

    Raises:
        CalibrationError: the policy does not fit the bundle.
    """

    def __init__(self, program: Program, config: MemoryConfig) -> None:
        manifest = program.bundle.manifest
        self._program = program
        self._classes = manifest.classes
        self._memory = manifest.memory if config.enabled else None
        self.calibrators = open_calibrators(program.bundle, self._memory, config) if self._memory else ()
        self._broken: dict[int, str] = {}
        self._states: dict[int, dict[str, Any]] = {}  # copies for saving, of calibrators that have not changed since
        self._kept: dict[str, Any] = {}  # what was learnt, where that is not in use now

    def unusable(self, product: str) -> str | None:
        """Why frames of this product cannot be judged with the memory as it is; None: they can."""
        return self._broken.get(self._index(product)) if self.calibrators else None

    def name(self, class_index: int) -> str:
        """Whose bank a frame of this class is held against: the product's, or "*", that of all."""
        return self._classes[class_index] if self._memory and self._memory.per_class else "*"

    def _index(self, product: str) -> int:
        return self._classes.index(product) if self._memory and self._memory.per_class else 0

    def learn(self, program: Program, class_index: int, score: float, *, trusted: bool) -> Outcome | None:
        """Let the frame that the program has just scored teach; None: it may not, and nothing was read of it.

        What it changed reaches the engine with :meth:`upload`.
        """
        memory = self._memory
        if memory is None:
            return None
        index = class_index if memory.per_class else 0
        if index in self._broken:
            return None
        calibrator = self.calibrators[index]
        if calibrator.turns_away(trusted=trusted):
            return None  # before its patches are fetched from the engine
        self._states.pop(index, None)
        seen = Observation(
            score,
            program.read(memory.candidates),
            program.read(memory.patch_score),
            None if memory.transport is None else program.read(memory.transport),
            None if memory.nearest is None else program.read(memory.nearest),
            None if memory.anchor is None else program.read(memory.anchor),
        )
        return calibrator.observe(seen, trusted=trusted)

    def upload(self, class_index: int, rows: slice | None = None) -> None:
        """Write episodic rows (all of them by default) into the program; a failure makes the product unjudgeable."""
        spec = self._memory
        if spec is None:
            return
        index = class_index if spec.per_class else 0
        memory = self.calibrators[index].memory
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
            log.exception("memory of %s cannot be used", self.name(index))
            return
        self._broken.pop(index, None)

    def freeze(self, frozen: bool) -> None:
        """Whether frames teach nothing from now on."""
        self._states.clear()
        for calibrator in self.calibrators:
            calibrator.frozen = frozen

    def reset(self) -> None:
        """As it was enrolled."""
        self._states.clear()
        for index, calibrator in enumerate(self.calibrators):
            calibrator.reset()
            self.upload(index)

    def describe(self) -> dict[str, Any]:
        """For status, web page and command results."""
        return {
            "frozen": any(calibrator.frozen for calibrator in self.calibrators),
            "rows": {self.name(index): each.memory.length for index, each in enumerate(self.calibrators)},
            "frames": dict(sum((calibrator.counts for calibrator in self.calibrators), Counter[str]())),
        }

    def arrays(self) -> dict[str, Any]:
        """What a snapshot keeps; nobody changes these arrays."""
        arrays = dict(self._kept)
        for index, calibrator in enumerate(self.calibrators):
            if index not in self._states:
                self._states[index] = {f"{index}.{name}": value for name, value in calibrator.state().items()}
            arrays |= self._states[index]
        return arrays

    def take(self, snapshot: Snapshot, *, keep_frozen: bool = False) -> None:
        """The snapshot's rows instead of the present ones, in the engine too.

        keep_frozen: whether frames teach stays as it is now, not as it was when the snapshot was saved.

        Raises:
            CalibrationError: they do not fit.
        """
        frozen = [calibrator.frozen for calibrator in self.calibrators]
        self._states.clear()
        for index, calibrator in enumerate(self.calibrators):
            own = snapshot.part(f"{index}.")
            # A snapshot of a line that has not learnt yet has none: the memory is as it was enrolled.
            calibrator.restore(own) if own else calibrator.reset()
            self.upload(index)
        if keep_frozen:
            for calibrator, was in zip(self.calibrators, frozen, strict=True):
                calibrator.frozen = was
        if not self.calibrators:
            self._kept = {name: array for name, array in snapshot.arrays.items() if not name.startswith("drift.")}
