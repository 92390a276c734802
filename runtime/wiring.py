"""A program's wiring: every step's inputs resolved to sources and checked before anything is opened.

The executor (program.py) trusts what comes out of here: sources exist and are produced earlier, shapes and dtypes match
across every link, carries pair up, tables have enough rows, and the outputs the runtime reads are produced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from .errors import BundleError
from .manifest import Loop, Manifest, Run, Stage, Step, Tensor
from .regions import clip_roi

Kind = Literal["frame", "state", "class", "output", "carry", "table"]
EXPORT_AGAIN = "export the bundle again: andon export --method METHOD"


@dataclass(frozen=True)
class Source:
    """Where a stage input's data come from. name: state, table or stage; output: the stage's output."""

    kind: Kind
    name: str = ""
    output: str = ""


@dataclass(frozen=True)
class WiredStep:
    """One resolved step. `count` is None for a `run`; the other fields are those of manifest.Loop."""

    stage: str
    count: int | None
    inputs: Mapping[str, Source]
    carry: Mapping[str, str]
    init: Mapping[str, Source]
    tables: Mapping[str, str]
    persist: Mapping[str, str]
    counter: str | None

    @property
    def class_bound(self) -> bool:
        """True if the step reads a per-class state."""
        return any(s.kind == "class" for s in (*self.inputs.values(), *self.init.values()))


def parse_source(text: str) -> Source:
    """Parse ``frame | state:<name> | class:<name> | <stage>.<output> | carry | table``.

    Raises:
        BundleError: the text is none of these.
    """
    if text in ("frame", "carry", "table"):
        return Source(text)  # type: ignore[arg-type]
    for kind in ("state", "class"):
        if text.startswith(f"{kind}:"):
            return Source(kind, text[len(kind) + 1 :])  # type: ignore[arg-type]
    stage, dot, output = text.partition(".")
    if dot and stage and output:
        return Source("output", stage, output)
    raise BundleError(
        "a source in the manifest cannot be read",
        found=text,
        expected="frame, state:<name>, class:<name>, <stage>.<output>, carry or table",
        next_step=EXPORT_AGAIN,
    )


def programs(manifest: Manifest) -> dict[str, tuple[Step, ...]]:
    """The default program and the alternatives, by name."""
    return {"default": manifest.program, **manifest.alternatives}


def wire(manifest: Manifest, program: str = "default") -> tuple[WiredStep, ...]:
    """Resolve and check one program of a manifest.

    Raises:
        BundleError: there is no such program, or it does not hold together; the message names step and tensor.
    """
    known = programs(manifest)
    if program not in known:
        raise BundleError(
            f"the bundle has no program {program!r}",
            found=program,
            expected=", ".join(sorted(known)),
            next_step="choose one of these with --program",
        )
    return _Wiring(manifest, program).wire(known[program])


def check(manifest: Manifest) -> None:
    """Check everything in a manifest that the schema cannot say.

    Raises:
        BundleError: naming program, step and tensor.
    """
    for stage_name, stage in manifest.stages.items():
        missing = [v for v in ("fp32", *manifest.variants) if v not in stage.files]
        if missing:
            _refuse(f"stage {stage_name} has no {missing[0]} file", sorted(stage.files), list(manifest.variants))
    for name, state in manifest.state.items():
        if state.class_bound and (not state.shape or state.shape[0] != len(manifest.classes)):
            expected = f"{len(manifest.classes)} rows, one per product"
            _refuse(f"class-bound state {name} has the wrong leading axis", state.shape, expected)
    for name in programs(manifest):
        wire(manifest, name)
    _check_memory(manifest)
    _check_crops(manifest)
    for _, product, name, _ in manifest.calibrated():
        if product not in manifest.classes:
            _refuse("a threshold names an unknown product", product, ", ".join(manifest.classes))
        if name not in programs(manifest):
            _refuse(f"a threshold of {product} names an unknown program", name, ", ".join(programs(manifest)))


def _check_memory(manifest: Manifest) -> None:
    memory = manifest.memory
    if memory is None:
        return
    capacity = memory.semantic_rows + memory.episodic_rows
    for role, name, rank in (
        ("bank", memory.bank, 2),
        ("valid", memory.valid, 1),
        ("foreground", memory.foreground, 1),
    ):
        if name is None:
            continue
        if name not in manifest.state:
            _refuse(f"the memory's {role} is not a state", name, ", ".join(manifest.state))
        state = manifest.state[name]
        shape = state.shape[1:] if state.class_bound else state.shape
        if state.class_bound != memory.per_class or len(shape) != rank or shape[0] != capacity:
            _refuse(
                f"the memory's {role} state {name} has the wrong shape", state.shape, f"{capacity} rows, rank {rank}"
            )


def _check_crops(manifest: Manifest) -> None:
    crops = [*manifest.crops.items()]
    crops += [(product, t.crop) for _, product, _, t in manifest.calibrated() if t.crop is not None]
    for product, crop in crops:
        if product not in manifest.classes:
            _refuse("a crop names an unknown product", product, ", ".join(manifest.classes))
        if clip_roi(crop.roi, *crop.picture) is None:
            _refuse(f"the crop of {product} does not lie in its pictures", crop.roi, f"within {crop.picture}")


def _refuse(what: str, found: object, expected: object) -> NoReturn:
    raise BundleError(what, found=found, expected=expected, next_step=EXPORT_AGAIN)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


class _Wiring:
    """State of one walk over a program: which stage outputs exist so far."""

    def __init__(self, manifest: Manifest, program: str):
        self._manifest = manifest
        self._program = program
        self._produced: dict[tuple[str, str], Tensor] = {}
        self._undefined: set[tuple[str, str]] = set()

    def wire(self, steps: tuple[Step, ...]) -> tuple[WiredStep, ...]:
        seen: set[str] = set()
        wired = []
        for step in steps:
            name = step.run if isinstance(step, Run) else step.loop
            if name not in self._manifest.stages:
                self._fail(f"unknown stage {name}", name, ", ".join(self._manifest.stages))
            if name in seen:
                self._fail(f"stage {name} occurs twice", name, "each stage at most once in a program")
            seen.add(name)
            stage = self._manifest.stages[name]
            wired.append(self._run(name, stage, step) if isinstance(step, Run) else self._loop(name, stage, step))
            self._produced.update({(name, output): tensor for output, tensor in stage.outputs.items()})
        self._persisted(wired)
        self._outputs()
        return tuple(wired)

    def _run(self, name: str, stage: Stage, run: Run) -> WiredStep:
        if unknown := sorted(set(run.inputs) - set(stage.inputs)):
            self._fail(f"{name} has no input {unknown[0]} to bind", unknown[0], ", ".join(stage.inputs))
        inputs = {}
        for input_name, tensor in stage.inputs.items():
            source = parse_source(run.inputs.get(input_name, tensor.source))
            if source.kind in ("carry", "table"):
                self._fail(f"{name}.{input_name} is a {source.kind} but {name} is run once", "run", "loop")
            self._link(f"{name}.{input_name}", tensor, source)
            inputs[input_name] = source
        return WiredStep(name, None, inputs, {}, {}, {}, {}, None)

    def _loop(self, name: str, stage: Stage, loop: Loop) -> WiredStep:
        inputs: dict[str, Source] = {}
        init: dict[str, Source] = {}
        carried = list(loop.carry.values())
        declared: dict[str, set[str]] = {"carry": set(), "table": set()}
        for input_name, tensor in stage.inputs.items():
            source = parse_source(tensor.source)
            where = f"{name}.{input_name}"
            if source.kind not in ("carry", "table"):
                self._link(where, tensor, source)
                inputs[input_name] = source
                continue
            declared[source.kind].add(input_name)
            if source.kind == "carry" and input_name in loop.init:
                init[input_name] = parse_source(loop.init[input_name])
                self._link(where + " at step 0", tensor, init[input_name])
            elif source.kind == "table" and input_name in loop.tables:
                self._table(where, tensor, loop.tables[input_name], loop.count)
        for what, found, expected in (
            ("carries", set(carried), declared["carry"]),
            ("init", set(loop.init), declared["carry"]),
            ("tables", set(loop.tables), declared["table"]),
        ):
            if found != expected:
                self._fail(f"the loop over {name} does not bind its {what}", sorted(found), sorted(expected))
        if len(set(carried)) != len(carried):
            self._fail(f"the loop over {name} carries two outputs into one input", carried, "one output per input")
        self._carry(name, stage, loop)
        return WiredStep(name, loop.count, inputs, loop.carry, init, loop.tables, loop.persist, loop.counter)

    def _carry(self, name: str, stage: Stage, loop: Loop) -> None:
        for output, input_name in loop.carry.items():
            if output not in stage.outputs:
                self._fail(f"the loop over {name} carries an unknown output", output, ", ".join(stage.outputs))
            self._match(f"carry {name}.{output} -> {input_name}", stage.outputs[output], stage.inputs[input_name])
        for input_name, state_name in loop.persist.items():
            if input_name not in loop.carry.values():
                self._fail(f"{name}.{input_name} persists but is not carried", input_name, list(loop.carry.values()))
            state = self._manifest.state.get(state_name)
            if state is None:
                self._fail(f"{name}.{input_name} persists in an unknown state", state_name, list(self._manifest.state))
            kind: Kind = "class" if state.class_bound else "state"
            self._link(f"persist {name}.{input_name}", stage.inputs[input_name], Source(kind, state_name))
        if loop.counter is not None and not loop.tables:
            self._fail(f"the loop over {name} counts steps but has no table", loop.counter, "tables, or no counter")
        if loop.count == 0:
            foreign = [i for i, state in loop.persist.items() if parse_source(loop.init[i]).name != state]
            if foreign:
                self._fail(f"a loop of 0 steps over {name} persists another state's value", foreign, "its own init")
            self._undefined.update((name, output) for output in stage.outputs if output not in loop.carry)

    def _table(self, where: str, tensor: Tensor, table_name: str, count: int) -> None:
        table = self._manifest.tables.get(table_name)
        if table is None:
            self._fail(f"{where} reads an unknown table", table_name, ", ".join(self._manifest.tables) or "no tables")
        if table.shape[0] < count:
            self._fail(f"table {table_name} has too few rows for {where}", table.shape[0], f"at least {count}")
        self._match(f"{where} from table {table_name}", Tensor(shape=table.shape[1:], dtype=table.dtype), tensor)

    def _link(self, where: str, tensor: Tensor, source: Source) -> None:
        """Check that `source` exists here and has the input's shape and dtype."""
        if source.kind == "frame":
            size = self._manifest.preprocess
            self._match(f"{where} from the frame", Tensor(shape=(1, size.height, size.width, 3), dtype="uint8"), tensor)
        elif source.kind in ("state", "class"):
            state = self._manifest.state.get(source.name)
            if state is None:
                self._fail(
                    f"{where} reads an unknown state", source.name, ", ".join(self._manifest.state) or "no state"
                )
            if state.class_bound != (source.kind == "class"):
                right = "class" if state.class_bound else "state"
                self._fail(f"{where} reads {source.name} the wrong way", f"{source.kind}:", f"{right}:{source.name}")
            shape = state.shape[1:] if state.class_bound else state.shape
            self._match(f"{where} from {source.kind}:{source.name}", Tensor(shape=shape, dtype=state.dtype), tensor)
        elif source.kind == "output":
            self._match(f"{where} from {source.name}.{source.output}", self._output(where, source), tensor)
        else:
            self._fail(f"{where} cannot start from a {source.kind}", source.kind, "state:, class:, frame or an output")

    def _output(self, where: str, source: Source) -> Tensor:
        key = (source.name, source.output)
        if key not in self._produced:
            earlier = ", ".join(f"{s}.{o}" for s, o in self._produced) or "nothing yet"
            self._fail(f"{where} reads an output that no earlier step produces", ".".join(key), earlier)
        if key in self._undefined:
            self._fail(f"{where} reads an output that a loop of 0 steps never writes", ".".join(key), "count >= 1")
        return self._produced[key]

    def _match(self, where: str, found: Tensor, expected: Tensor) -> None:
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            self._fail(f"{where}: shapes or types differ", _describe(found), _describe(expected))

    def _persisted(self, wired: list[WiredStep]) -> None:
        names = [name for step in wired for name in step.persist.values()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            self._fail("two loops persist in one state", sorted(twice), "one writer per state")
        counters = [step.counter for step in wired if step.counter]
        if len(set(counters)) != len(counters):
            self._fail("two loops share a counter", counters, "one loop per counter")

    def _outputs(self) -> None:
        """Score and map in every program; what else the runtime reads at least in the default one."""
        outputs = self._manifest.outputs
        wanted = {"score": outputs.score, "map": outputs.map}
        if self._program == "default":
            memory = self._manifest.memory
            fields = ("candidates", "patch_score", "transport", "nearest", "anchor")
            optional = {f: getattr(memory, f) for f in fields} if memory else {}
            telemetry = {f"telemetry {name}": text for name, text in outputs.telemetry.items()}
            wanted |= {k: v for k, v in {"logits": outputs.logits, **optional, **telemetry}.items() if v}
        found: dict[str, Tensor] = {}
        for what, text in wanted.items():
            source = parse_source(text)
            if source.kind != "output":
                self._fail(f"output {what} must be a stage's output", text, "<stage>.<output>")
            tensor = found[what] = self._output(f"output {what}", source)
            if what == "score":
                self._match("output score", tensor, Tensor(shape=(1,), dtype="float32"))
            if what == "anchor":  # the guard decides by it: one distance for each patch, or none
                self._match("output anchor", tensor, found["patch_score"])
            if what == "map" and (len(tensor.shape) != 4 or tensor.shape[:2] != (1, 1) or tensor.dtype != "float32"):
                self._fail("output map has the wrong shape", _describe(tensor), "float32[1, 1, h, w]")
            if what == "logits" and tensor.shape != (1, len(self._manifest.classes)):
                self._fail(
                    "output logits has the wrong shape", _describe(tensor), f"[1, {len(self._manifest.classes)}]"
                )

    def _fail(self, what: str, found: object, expected: object) -> NoReturn:
        _refuse(f"program {self._program}: {what}", found, expected)
