"""Every tensor of an opened program, allocated once: frame, state, tables, stage outputs and ping-pong partners."""

from __future__ import annotations

from collections.abc import Sequence

from .bundle import Bundle
from .engine.base import Array, Backend, Buffer
from .wiring import Source, WiredStep


class Counter:
    """A persistent step counter, the tables it slides over, and the rows it has staged on the device.

    Which rows a loop reads changes from frame to frame, so they are staged in `count` fixed buffers (a few bytes a row)
    and the launches stay the same (METHODS.md 7.2). Counts are kept per class where what the loop persists is.
    """

    def __init__(self, count: int, rows: int, by_class: bool):
        self._count = count
        self._last = rows - count
        self._by_class = by_class
        self._tables: list[tuple[Array, Sequence[Buffer]]] = []
        self._values: dict[int, int] = {}
        self._staged = -1

    def add(self, table: Array, buffers: Sequence[Buffer]) -> None:
        """Slide over this table too; row offset + k is staged in buffers[k]."""
        self._tables.append((table, buffers))

    def stage(self, backend: Backend, class_index: int) -> None:
        """Upload the rows that the next frame of this class reads, unless they are there."""
        offset = self._values.get(class_index if self._by_class else 0, 0)
        if offset != self._staged:
            for table, buffers in self._tables:
                for k, buffer in enumerate(buffers):
                    backend.upload(buffer, table[offset + k])
            self._staged = offset

    def advance(self, class_index: int) -> None:
        """A frame of this class is done."""
        key = class_index if self._by_class else 0
        self._values[key] = min(self._values.get(key, 0) + self._count, self._last)

    def reset(self) -> None:
        """Start again at row 0."""
        self._values.clear()


class Tensors:
    """The buffers of one program on one backend.

    Attributes:
        frame: the buffer stages read the frame from, uint8 [1, height, width, 3].
        staging: host array of the same shape; the frame buffer itself where the host can address it.
    """

    def __init__(self, bundle: Bundle, backend: Backend, steps: Sequence[WiredStep]):
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._backend = backend
        self._steps = steps
        size = self._manifest.preprocess
        self.frame = backend.allocate((1, size.height, size.width, 3), "uint8")
        self.staging = backend.allocate_host(self.frame.shape, "uint8") if self.frame.host is None else self.frame.host
        self.persistent = tuple(name for step in steps for name in step.persist.values())
        self.states: dict[str, Sequence[Buffer]] = {}
        for name in self._used_states():
            state = self._manifest.state[name]
            if state.class_bound:
                self.states[name] = backend.allocate_rows(state.shape[0], state.shape[1:], state.dtype)
            else:
                self.states[name] = (backend.allocate(state.shape, state.dtype),)
        # From here on the bundle's folder may be replaced or removed, which must reach no running program: what a reset
        # brings back is kept (a few kB a product: what loops carry), the rest is on the device. What is kept is never
        # changed, nor are the tables of counters: an upload of it waits for nothing.
        self._initial: dict[str, Array] = {}
        for name in self.states:
            values = bundle.array(self._manifest.state[name])
            if name in self.persistent:
                self._initial[name] = values
            self._upload(name, values)
            backend.synchronize()  # the values are let go of
        self.counters: dict[str, Counter] = {}
        self._tables: dict[tuple[str, str | None], Sequence[Buffer]] = {}
        for step in steps:
            for name in step.tables.values():
                self._load_table(step, name)
        self._in_place = {n for step in steps for n in step.persist.values() if self._may_write_in_place(step, n)}
        self._own: dict[tuple[str, str, str], Buffer] = {}

    def source(self, source: Source, class_index: int) -> Buffer:
        """The buffer of a frame or state source."""
        return self.frame if source.kind == "frame" else self.state(source.name, class_index)

    def state(self, name: str, class_index: int) -> Buffer:
        """A state, or its row of a class."""
        return self.states[name][class_index if self._manifest.state[name].class_bound else 0]

    def table(self, step: WiredStep, name: str) -> Sequence[Buffer]:
        """Rows of a table as the loop reads them: buffer k at step k."""
        return self._tables[name, step.counter]

    def output(self, stage: str, output: str, role: str = "final") -> Buffer:
        """The program's own buffer for a stage output; the same for every class. Other roles: ping-pong partners."""
        key = (stage, output, role)
        if key not in self._own:
            tensor = self._manifest.stages[stage].outputs[output]
            self._own[key] = self._backend.allocate(tensor.shape, tensor.dtype)
        return self._own[key]

    def targets(self, step: WiredStep, output: str, class_index: int) -> list[Buffer]:
        """The buffer a carried output is written to at each step of a loop.

        Two buffers in turn. The last one is the persistent state itself where that is safe: then nothing is copied at
        the end of the frame. Step 0 reads the init source, possibly that state, so it never writes it.
        """
        count = step.count or 0
        state = next((s for name, s in step.persist.items() if step.carry[output] == name), None)
        in_place = state is not None and state in self._in_place
        if not count:
            return []
        final = self.state(state, class_index) if state and in_place else self.output(step.stage, output)
        partner = self.output(step.stage, output, "partner") if count > 1 else final
        targets = [partner if (count - 1 - k) % 2 else final for k in range(count)]
        if in_place and targets[0] is final:
            targets[0] = self.output(step.stage, output, "first")
        return targets

    def restore(self) -> None:
        """Bring what persists back to the values that the bundle had when it was opened, all classes."""
        for name, values in self._initial.items():
            self._upload(name, values)

    def _upload(self, name: str, values: Array) -> None:
        rows = values if self._manifest.state[name].class_bound else (values,)
        for buffer, row in zip(self.states[name], rows, strict=True):
            self._backend.upload(buffer, row)

    def _used_states(self) -> list[str]:
        sources = [s for step in self._steps for s in (*step.inputs.values(), *step.init.values())]
        names = {s.name for s in sources if s.kind in ("state", "class")} | set(self.persistent)
        return [name for name in self._manifest.state if name in names]

    def _load_table(self, step: WiredStep, name: str) -> None:
        """All rows once; for a counting loop, `count` buffers that are staged per frame."""
        if (name, step.counter) in self._tables:
            return
        entry = self._manifest.tables[name]
        values = self._bundle.array(entry)
        rows = entry.shape[0] if step.counter is None else step.count or 0
        buffers = self._backend.allocate_rows(rows, entry.shape[1:], entry.dtype)
        self._tables[name, step.counter] = buffers
        if step.counter is None:
            for buffer, row in zip(buffers, values, strict=True):
                self._backend.upload(buffer, row)
            self._backend.synchronize()
            return
        if step.counter not in self.counters:
            shortest = min(self._manifest.tables[t].shape[0] for t in step.tables.values())
            by_class = any(self._manifest.state[s].class_bound for s in step.persist.values())
            self.counters[step.counter] = Counter(rows, shortest, by_class)
        self.counters[step.counter].add(values, buffers)

    def _may_write_in_place(self, step: WiredStep, state: str) -> bool:
        """True if a loop's last step may write the state: nothing reads the old value at that step or after it."""
        index = self._steps.index(step)
        readers = [s for later in self._steps[index:] for s in later.inputs.values()]
        # A loop of 0 steps passes its init on by reference, so whoever reads it reads the state.
        readers += [s for i, x in enumerate(self._steps) if i > index or x.count == 0 for s in x.init.values()]
        return (step.count or 0) >= 2 and all(s.kind not in ("state", "class") or s.name != state for s in readers)
