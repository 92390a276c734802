"""Commands that arrive on ``<camera>/cmd/<name>`` and their results on ``<camera>/cmd/<name>/result``.

Whoever may publish there is decided by the broker's ACL. Here every command is bounded in size, validated against
configs/schema/command.json, rate limited, executed once per id by one worker thread, and answered. A trigger is
executed when it arrives: behind a command that waits for the judging thread it would get a later picture.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from ..errors import AndonError, NotNowError
from ..verdict import dumps, readable, timestamp
from .session import MAX_COMMAND

log = logging.getLogger("andon.commands")

SCHEMA = "andon.command-result/1"
COMMANDS = ("acknowledge", "product", "threshold", "trigger", "memory", "rebuild")
#: Commands per second and burst of one camera; triggers come at the pace of the line.
RATES: Mapping[str, tuple[float, int]] = {"trigger": (200.0, 400)}
RATE: tuple[float, int] = (5.0, 20)
#: Executed in the connection's thread, ahead of those that wait; their handlers must not block.
AT_ONCE = ("trigger",)
_REFUSALS: tuple[float, int] = (1.0, 5)
#: Ids that are remembered, of triggers and of all others: triggers would push the others out within seconds.
_REMEMBERED = 256
_WAITING = 64
#: Characters of an id, as in configs/schema/command.json.
_ID = 64

#: (camera, the command's fields without schema and id) -> fields of the result. Called in the commands' own thread,
#: those of AT_ONCE in the connection's, with `late` (seconds that it may have lain unread) where it is not 0.
Handler = Callable[[str, dict[str, Any]], Mapping[str, Any] | None]
Reply = Callable[[str, bytes], None]
_Key = tuple[str, str, str]  # camera, command, id


class TokenBucket:
    """At most ``rate`` per second in the long run and ``burst`` at once."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = float(burst), clock()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(frozen=True)
class _Job:
    camera: str
    name: str
    id: str | None
    arguments: dict[str, Any]
    reply: Reply


class Commands:
    """The registry of handlers and the thread that runs them.

    Args:
        takes: (camera, product) -> whether the command `product` would be taken now; called in the connections'
            threads, must not block. By default every product is.

    Attributes:
        counts: how many commands were done, failed, refused (malformed, unknown,
            retained, too large), limited, repeated.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler] | None = None,
        takes: Callable[[str, str], bool] = lambda camera, product: True,
    ):
        self._takes = takes
        self._handlers: dict[str, Handler] = {}
        for name, handler in (handlers or {}).items():
            self.register(name, handler)
        self._validators = _validators()
        self._buckets: dict[tuple[str, str], TokenBucket] = {}
        self._triggers: OrderedDict[_Key, bytes | None] = OrderedDict()
        self._others: OrderedDict[_Key, bytes | None] = OrderedDict()
        self._asked: list[_Job] = []  # the commands `product` that are waited for, the latest last
        self._lock = threading.Lock()
        self._queue: queue.Queue[_Job | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.counts = {"done": 0, "failed": 0, "refused": 0, "limited": 0, "repeated": 0}

    def register(self, name: str, handler: Handler) -> None:
        """Say who executes a command.

        Raises:
            ValueError: it is not one of COMMANDS.
        """
        if name not in COMMANDS:
            raise ValueError(f"{name} is not a command of the contract: {', '.join(COMMANDS)}")
        self._handlers[name] = handler

    def start(self) -> None:
        """Start the worker."""
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="andon-commands", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the command at hand, refuse those that wait and all that come, join."""
        if self._thread is None:
            return
        with self._lock:
            self._stopping = True
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                self._refuse(job)
        self._queue.put(None)
        self._thread.join()
        self._thread = None

    def receive(self, camera: str, name: str, payload: bytes, retained: bool, reply: Reply, late: float = 0.0) -> None:
        """Take one message; never blocks, never raises. ``reply`` gets (name, result), here or in the worker.

        late: seconds for which the message may have lain here unread.
        """
        if retained and not payload:
            return  # somebody clears the topic: no command
        rate = RATES.get(name, RATE) if name in COMMANDS else _REFUSALS
        key = name if name in COMMANDS else "?"
        if not self._bucket(camera, key, rate).take():
            self._count("limited")
            if self._bucket(camera, "limited", _REFUSALS).take():
                reply(name[:64], _too_many(camera, name, payload, rate[0]))
            return
        try:
            identifier, arguments = self._parse(name, payload, retained)
        except AndonError as error:
            self._count("refused")
            if self._bucket(camera, "refused", _REFUSALS).take():
                reply(name[:64], _refusal(camera, name, _claimed_id(payload), error))
            return
        if identifier is not None and self._repeated(camera, name, identifier, reply):
            return
        job = _Job(camera, name, identifier, arguments, reply)
        if name in AT_ONCE:
            job = self._as_asked(job)
            self._run(replace(job, arguments={**job.arguments, "late": late}) if late else job)
            return
        try:
            with self._lock:  # or the worker could have finished it before it is noted
                stopping = self._stopping
                if not stopping:
                    self._queue.put_nowait(job)
                if name == "product" and not stopping:
                    self._asked.append(job)
            if stopping:
                self._refuse(job)
        except queue.Full:
            busy = _failure(camera, name, identifier, "busy", f"{_WAITING} commands wait")
            self._finish(job, "failed", busy, again=True)

    def _as_asked(self, trigger: _Job) -> _Job:
        """A trigger that overtakes a `product` sent before it is a part of that, unless that will be refused."""
        with self._lock:
            asked = [job.arguments["product"] for job in reversed(self._asked) if job.camera == trigger.camera]
        product = next((each for each in asked if self._takes(trigger.camera, each)), None)
        if product is None:
            return trigger
        return replace(trigger, arguments={**trigger.arguments, "product": product})

    def _parse(self, name: str, payload: bytes, retained: bool) -> tuple[str | None, dict[str, Any]]:
        if name not in COMMANDS:
            raise AndonError("unknown command", found=name[:64], expected="one of " + ", ".join(COMMANDS))
        if retained:
            raise AndonError("a retained command is not executed", next_step="publish commands without retain")
        if len(payload) > MAX_COMMAND:
            raise AndonError("the command is too large", found=f"{len(payload)} bytes, at most {MAX_COMMAND}")
        try:
            document = json.loads(payload or b"{}", parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise AndonError("the command is not JSON", found=str(error)[:200]) from error
        problem = best_match(self._validators[name].iter_errors(document))
        if problem is not None:
            where = "/".join(str(part) for part in problem.absolute_path)
            raise AndonError(
                "the command does not fit its schema",
                found=f"{where}: {problem.message}"[:300],
                next_step=f"see configs/schema/command.json, $defs/{name}",
            )
        for field, value in document.items():
            if isinstance(value, str) and readable(value) != value:
                raise AndonError(
                    "the command's text cannot be sent on",
                    found=f"{field}: {readable(value)}, half of a surrogate pair",
                    next_step="send UTF-8, or both \\u escapes of the character",
                )
        arguments = {field: value for field, value in document.items() if field not in ("schema", "id")}
        return document.get("id"), arguments

    def _repeated(self, camera: str, name: str, identifier: str, reply: Reply) -> bool:
        with self._lock:
            key, seen = (camera, name, identifier), self._seen(name)
            if key not in seen:
                seen[key] = None
                while len(seen) > _REMEMBERED:
                    seen.popitem(last=False)
                return False
            answer = seen[key]
        self._count("repeated")
        if answer is not None:  # None: the first one still runs, its answer is the answer
            reply(name, answer)
        return True

    def _seen(self, name: str) -> OrderedDict[_Key, bytes | None]:
        """Ids with their answers; None: it is still waited for."""
        return self._triggers if name in AT_ONCE else self._others

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._run(job)

    def _run(self, job: _Job) -> None:
        try:
            outcome, answer, again = self._execute(job)
            self._finish(job, outcome, answer, again=again)
        except Exception:  # nothing that a command brings may end the line's only command thread, or a connection
            log.exception("command %s of %s cannot be answered", job.name, job.camera)

    def _execute(self, job: _Job) -> tuple[str, bytes, bool]:
        """Outcome, answer and whether it was not executed and may come again."""
        where = (job.camera, job.name, job.id)
        handler = self._handlers.get(job.name)
        if handler is None:
            return "failed", _failure(*where, "this line does not take that command", job.name), False
        try:
            result = handler(job.camera, job.arguments)
            answer = _answer(*where, ok=True, result=dict(result or {}))
        except AndonError as error:
            return "failed", _refusal(*where, error), isinstance(error, NotNowError)
        except Exception as error:
            log.exception("command %s of %s failed", job.name, job.camera)
            return "failed", _failure(*where, "internal error", f"{type(error).__name__}: {error}"), False
        log.info("command %s of %s done: %s", job.name, job.camera, job.arguments)
        return "done", answer, False

    def _refuse(self, job: _Job) -> None:
        error = NotNowError("the line is stopping", next_step="repeat it after the restart")
        self._finish(job, "failed", _refusal(job.camera, job.name, job.id, error), again=True)

    def _finish(self, job: _Job, outcome: str, answer: bytes, *, again: bool = False) -> None:
        """Answer. again: it was not executed and may come again under its id."""
        with self._lock:
            if again and job.id is not None:
                self._seen(job.name).pop((job.camera, job.name, job.id), None)
            elif job.id is not None:
                self._seen(job.name)[job.camera, job.name, job.id] = answer
            self._asked = [each for each in self._asked if each is not job]
        self._count(outcome)
        job.reply(job.name, answer)

    def _bucket(self, camera: str, name: str, rate: tuple[float, int]) -> TokenBucket:
        with self._lock:
            return self._buckets.setdefault((camera, name), TokenBucket(*rate))

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.counts[outcome] += 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _claimed_id(payload: bytes) -> str | None:
    """The id of a command that is not taken, so that its sender can tell which one the answer is about."""
    try:
        document = json.loads(payload) if len(payload) <= MAX_COMMAND else None
    except (ValueError, RecursionError):
        return None
    claimed = document.get("id") if isinstance(document, dict) else None
    fits = isinstance(claimed, str) and 1 <= len(claimed) <= _ID and readable(claimed) == claimed
    return claimed if fits else None


def _answer(camera: str, name: str, identifier: str | None, **fields: Any) -> bytes:
    head = {"schema": SCHEMA, "id": identifier, "ts": timestamp(), "camera": camera, "command": name[:64]}
    return dumps({**head, "error": None, "found": None, "expected": None, "next": None, "result": None, **fields})


def _failure(camera: str, name: str, identifier: str | None, error: str, found: str) -> bytes:
    return _answer(camera, name, identifier, ok=False, error=error, found=found)


def _refusal(camera: str, name: str, identifier: str | None, error: AndonError) -> bytes:
    found, expected = (None if each is None else str(each) for each in (error.found, error.expected))
    fields = {"error": error.what, "found": found, "expected": expected, "next": error.next_step}
    return _answer(camera, name, identifier, ok=False, **fields)


def _too_many(camera: str, name: str, payload: bytes, rate: float) -> bytes:
    return _failure(camera, name, _claimed_id(payload), "too many commands", f"at most {rate:g} per second")


def _validators() -> dict[str, Draft202012Validator]:
    text = files("andon.configs").joinpath("schema/command.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    return {name: Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}) for name in COMMANDS}
