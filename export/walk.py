"""The program's meaning in plain Python: what the executor on the device is held against.

The walk runs a cut's program over numpy arrays and leaves the stages to a call: torch modules for the reference,
onnxruntime sessions for range analysis and quantiser calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.errors import ConfigError
from ..runtime.manifest import Loop, Step
from ..runtime.wiring import parse_source
from .stage import StageDef, StagedModel

Array = NDArray[Any]
#: (stage name, inputs in graph order) -> outputs by name
StageCall = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
#: (stage name, loop step, inputs, outputs), once per stage call
Trace = Callable[[str, int, Mapping[str, Array], Mapping[str, Array]], None]


def programs(staged: StagedModel) -> dict[str, tuple[Step, ...]]:
    """The default program and the alternatives, by name."""
    return {"default": staged.program, **staged.alternatives}


def torch_call(staged: StagedModel) -> StageCall:
    """Run the stages as torch modules, without gradients."""
    stages = {stage.name: stage for stage in staged.stages}

    def call(name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        stage = stages[name]
        with torch.no_grad():
            result = stage.module(*(torch.from_numpy(np.array(array)) for array in inputs.values()))
        values = result if isinstance(result, tuple) else (result,)
        if len(values) != len(stage.outputs):
            raise ConfigError(
                f"stage {name} returns another number of tensors than it declares",
                found=len(values),
                expected=f"{len(stage.outputs)}: {', '.join(stage.outputs)}",
                next_step=f"mend the cut of {staged.method} (export/methods/{staged.method}.py)",
            )
        return {
            output: np.ascontiguousarray(value.numpy()) for output, value in zip(stage.outputs, values, strict=True)
        }

    return call


class Walk:
    """Runs a program frame by frame; persistent states and counters live between frames until `reset`."""

    def __init__(self, staged: StagedModel, call: StageCall, program: str = "default", trace: Trace | None = None):
        self._staged = staged
        self._stages = {stage.name: stage for stage in staged.stages}
        self._steps = programs(staged)[program]
        self._call = call
        self._trace = trace
        self.reset()

    def reset(self) -> None:
        """Back to the state the bundle ships with."""
        self._state = {name: np.array(array) for name, array in self._staged.state.items()}
        self._counters: dict[tuple[str, int], int] = {}

    @property
    def state(self) -> Mapping[str, Array]:
        """What is carried from frame to frame, and all other state, by name."""
        return self._state

    def frame(self, frame: Array, class_id: int = 0) -> dict[str, Array]:
        """Run one frame. frame: uint8 [1, height, width, 3]. Returns ``<stage>.<output>`` -> array.

        Outputs that a loop of 0 steps never writes are missing.

        Raises:
            ConfigError: the program names something that does not exist or is not produced yet.
        """
        values: dict[str, Array] = {}
        for step in self._steps:
            if isinstance(step, Loop):
                self._loop(step, frame, class_id, values)
            else:
                stage = self._stage(step.run)
                inputs = {
                    name: self._read(f"{stage.name}.{name}", source, frame, class_id, values)
                    for name, source in {**stage.inputs, **step.inputs}.items()
                }
                self._store(stage.name, self._run(stage.name, 0, inputs), values)
        return values

    def _stage(self, name: str) -> StageDef:
        if name not in self._stages:
            self._fail(f"the program runs an unknown stage {name}", name, ", ".join(self._stages))
        return self._stages[name]

    def _run(self, name: str, step: int, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._call(name, inputs)
        if self._trace is not None:
            self._trace(name, step, inputs, outputs)
        return outputs

    def _loop(self, loop: Loop, frame: Array, class_id: int, values: dict[str, Array]) -> None:
        stage = self._stage(loop.loop)
        carried = {
            name: self._read(f"{stage.name}.{name}", source, frame, class_id, values)
            for name, source in loop.init.items()
        }
        fixed = {
            name: self._read(f"{stage.name}.{name}", source, frame, class_id, values)
            for name, source in stage.inputs.items()
            if source not in ("carry", "table")
        }
        outputs: Mapping[str, Array] = {output: carried[name] for output, name in loop.carry.items()}
        for k in range(loop.count):
            rows = {name: self._row(table, loop, k, class_id) for name, table in loop.tables.items()}
            bound = {**fixed, **carried, **rows}
            outputs = self._run(stage.name, k, {name: bound[name] for name in stage.inputs})
            carried = {name: outputs[output] for output, name in loop.carry.items()}
        self._store(stage.name, outputs, values)
        for name, state in loop.persist.items():
            if state in self._staged.class_bound:
                self._state[state][class_id] = carried[name]
            else:
                self._state[state] = np.array(carried[name])
        if loop.counter is not None:
            key = self._counter(loop, class_id)
            self._counters[key] = self._counters.get(key, 0) + loop.count

    def _counter(self, loop: Loop, class_id: int) -> tuple[str, int]:
        """Steps are counted per class where what the loop persists is per class."""
        by_class = any(state in self._staged.class_bound for state in loop.persist.values())
        return (loop.counter or "", class_id if by_class else 0)

    def _row(self, table: str, loop: Loop, k: int, class_id: int) -> Array:
        if table not in self._staged.tables:
            self._fail(f"the loop over {loop.loop} reads an unknown table", table, ", ".join(self._staged.tables))
        rows = self._staged.tables[table]
        counted = self._counters.get(self._counter(loop, class_id), 0) if loop.counter is not None else 0
        offset = min(counted, len(rows) - loop.count)
        if offset + k >= len(rows):
            self._fail(f"table {table} has too few rows for the loop over {loop.loop}", len(rows), loop.count)
        return np.ascontiguousarray(rows[offset + k]).reshape(rows.shape[1:])

    def _read(self, where: str, source: str, frame: Array, class_id: int, values: Mapping[str, Array]) -> Array:
        parsed = parse_source(source)
        if parsed.kind == "frame":
            return frame
        if parsed.kind in ("state", "class"):
            if parsed.name not in self._state:
                self._fail(f"{where} reads an unknown state", parsed.name, ", ".join(self._state) or "no state")
            state = self._state[parsed.name]
            # A copy: what persists is written in place at the end of the frame.
            return state if parsed.kind == "state" else np.array(state[class_id])
        if source not in values:
            self._fail(f"{where} reads what no earlier step gives", source, ", ".join(values) or "nothing yet")
        return values[source]

    def _store(self, stage: str, outputs: Mapping[str, Array], values: dict[str, Array]) -> None:
        values.update({f"{stage}.{name}": array for name, array in outputs.items()})

    def _fail(self, what: str, found: object, expected: object) -> NoReturn:
        raise ConfigError(
            f"{self._staged.method}: {what}",
            found=found,
            expected=expected,
            next_step=f"mend the cut of {self._staged.method} (export/methods/{self._staged.method}.py)",
        )


def examples(staged: StagedModel, frame: Array) -> dict[str, tuple[dict[str, Array], dict[str, Array]]]:
    """One call's inputs and outputs of every stage, found by walking all programs in torch.

    A loop that the programs run 0 times is called once here, because its stage still needs shapes.

    Raises:
        ConfigError: a stage is in no program.
    """
    seen: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}

    def trace(stage: str, step: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        seen.setdefault(stage, (dict(inputs), dict(outputs)))

    for steps in programs(staged).values():
        at_least_once = tuple(
            s.model_copy(update={"count": max(1, s.count)}) if isinstance(s, Loop) else s for s in steps
        )
        Walk(replace(staged, program=at_least_once), torch_call(staged), trace=trace).frame(frame)
    unused = [stage.name for stage in staged.stages if stage.name not in seen]
    if unused:
        raise ConfigError(
            f"{staged.method}: a stage is in no program",
            found=", ".join(unused),
            expected="every stage run by the program or an alternative",
            next_step=f"mend the cut of {staged.method} (export/methods/{staged.method}.py)",
        )
    return seen
