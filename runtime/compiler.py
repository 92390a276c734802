"""A program and a class as a flat tuple of launches, grouped by stage: what the executor (program.py) calls per frame.

A stage's input is bound straight to the buffer its producer writes; carried tensors ping-pong between buffers, step 0
reads the init source itself; table rows and rows of per-class state are addressed by binding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .engine.base import Backend, Buffer, Engine, Launch
from .errors import ConfigError
from .manifest import Manifest
from .tensors import Tensors
from .wiring import Source, WiredStep, parse_source

Group = tuple[str, Sequence[Launch]]


@dataclass(frozen=True)
class Compiled:
    """Launches of one class: all of them, or those up to the logits and the rest, and where the outputs are."""

    all: tuple[Group, ...]
    head: tuple[Group, ...]
    tail: tuple[Group, ...]
    outputs: Mapping[tuple[str, str], Buffer]
    score: Buffer
    map: Buffer
    logits: Buffer | None


class Compiler:
    """Compiles a program for each class. Steps and classes that bind the same buffers share a launch.

    per_stage: a group of launches for every stage, else one for the frame.

    Attributes:
        head: number of leading steps that yield the classifier's logits without knowing the class; 0 if there are none.
    """

    def __init__(
        self,
        manifest: Manifest,
        steps: Sequence[WiredStep],
        tensors: Tensors,
        engines: Mapping[str, Engine],
        backend: Backend,
        per_stage: bool,
    ):
        self._manifest = manifest
        self._steps = steps
        self._tensors = tensors
        self._engines = engines
        self._backend = backend
        self._per_stage = per_stage
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._compiled: dict[int, Compiled] = {}
        self.head = self._head_length()

    def _head_length(self) -> int:
        logits = self._manifest.outputs.logits
        stages = [step.stage for step in self._steps]
        if logits is None or parse_source(logits).name not in stages:
            return 0
        length = stages.index(parse_source(logits).name) + 1
        states = [s for step in self._steps[:length] for s in step.persist.values()]
        by_class = any(step.class_bound for step in self._steps[:length])
        return 0 if by_class or any(self._manifest.state[s].class_bound for s in states) else length

    def for_class(self, class_index: int) -> Compiled:
        """The program of one product, compiled when it is asked for first.

        Raises:
            ConfigError: there is no such product.
            EngineError: a launch cannot be prepared.
        """
        if class_index not in self._compiled:
            if not 0 <= class_index < len(self._manifest.classes):
                raise ConfigError(
                    "there is no such product index",
                    found=class_index,
                    expected=f"0 to {len(self._manifest.classes) - 1}",
                    next_step=f"choose one of {', '.join(self._manifest.classes)}",
                )
            self._compiled[class_index] = self._compile(class_index)
        return self._compiled[class_index]

    def _compile(self, class_index: int) -> Compiled:
        groups: list[tuple[str, list[Launch]]] = []
        late: list[Launch] = []
        outputs: dict[tuple[str, str], Buffer] = {}
        for step in self._steps:
            if step.count is None:
                groups.append((step.stage, [self._run(step, class_index, outputs)]))
            else:
                launches, copies = self._loop(step, class_index, outputs)
                groups.append((step.stage, launches))
                late += copies
        # States that could not be written in place: at the end, when every stage has seen the old value.
        groups[-1][1].extend(late)
        names = self._manifest.outputs
        return Compiled(
            self._fuse(groups),
            self._fuse(groups[: self.head]),
            self._fuse(groups[self.head :]),
            outputs,
            outputs[output_key(names.score)],
            outputs[output_key(names.map)],
            outputs[output_key(names.logits)] if names.logits and self.head else None,
        )

    def _fuse(self, groups: Sequence[tuple[str, list[Launch]]]) -> tuple[Group, ...]:
        if self._per_stage:
            return tuple((name, tuple(launches)) for name, launches in groups)
        launches = [launch for _, group in groups for launch in group]
        return (("frame", (self._backend.sequence(launches),)),) if launches else ()

    def _run(self, step: WiredStep, class_index: int, outputs: dict[tuple[str, str], Buffer]) -> Launch:
        bindings = {name: self._source(source, class_index, outputs) for name, source in step.inputs.items()}
        for output in self._manifest.stages[step.stage].outputs:
            bindings[output] = outputs[step.stage, output] = self._tensors.output(step.stage, output)
        return self._launch(step.stage, bindings)

    def _loop(
        self, step: WiredStep, class_index: int, outputs: dict[tuple[str, str], Buffer]
    ) -> tuple[list[Launch], list[Launch]]:
        stage, count = step.stage, step.count or 0
        fixed = {name: self._source(source, class_index, outputs) for name, source in step.inputs.items()}
        init = {name: self._source(source, class_index, outputs) for name, source in step.init.items()}
        written = {output: self._tensors.targets(step, output, class_index) for output in step.carry}
        for output in self._manifest.stages[stage].outputs:
            if output not in step.carry:
                fixed[output] = outputs[stage, output] = self._tensors.output(stage, output)
        launches = []
        for k in range(count):
            bindings = dict(fixed)
            for output, name in step.carry.items():
                bindings[name] = written[output][k - 1] if k else init[name]
                bindings[output] = written[output][k]
            for name, table in step.tables.items():
                bindings[name] = self._tensors.table(step, table)[k]
            launches.append(self._launch(stage, bindings))
        copies = []
        for output, name in step.carry.items():
            final = outputs[stage, output] = written[output][-1] if count else init[name]
            if name in step.persist:
                state = self._tensors.state(step.persist[name], class_index)
                if state is not final:
                    copies.append(self._backend.copy(state, final))
        return launches, copies

    def _source(self, source: Source, class_index: int, outputs: Mapping[tuple[str, str], Buffer]) -> Buffer:
        if source.kind == "output":
            return outputs[source.name, source.output]
        return self._tensors.source(source, class_index)

    def _launch(self, stage: str, bindings: Mapping[str, Buffer]) -> Launch:
        """Prepare a launch; steps and classes that bind the same buffers share one."""
        key = (stage, *sorted((name, id(buffer)) for name, buffer in bindings.items()))
        if key not in self._launches:
            self._launches[key] = self._engines[stage].prepare(bindings)
        return self._launches[key]

    def clear(self) -> None:
        """Forget the launches; their engines are to be closed."""
        self._compiled.clear()
        self._launches.clear()


def output_key(output: str) -> tuple[str, str]:
    """Stage and output of ``<stage>.<output>``."""
    source = parse_source(output)
    return source.name, source.output
