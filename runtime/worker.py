"""The one thread that owns engines, judge, alarms and memory: takes items from the slots and hands verdicts over.

Everything else that touches those runs here too, between two frames: see :meth:`LineWorker.call`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from .alarm import AlarmBoard, AlarmEvent
from .bundle import Bundle
from .enginewatch import EngineWatch
from .errors import AndonError, EngineError, NotNowError
from .evidence import EvidenceStore
from .judge import Judge
from .judgement import Judgement, OnlineMemory, with_evidence
from .linestate import LineState
from .mqtt.delivery import Delivery
from .slot import Missed, Slots
from .types import Frame
from .verdict import Ids

T = TypeVar("T")
log = logging.getLogger(__name__)
#: How long a command waits for the frame that is being judged.
CALL_TIMEOUT = 30.0
#: Seconds after which a board's window is stored with the next verdict.
KEEP_EVERY = 5.0


class LineWorker:
    """See the module.

    Args:
        open_judge: opens bundle, backend and program and makes the judge; runs on this thread, which owns the context.
            Its argument is the bundle of a rebuild, whose engines are to be built although they are there; else None.
        close_judge: the reverse.
        boards: camera -> its alarms.
        max_frames: stop after so many verdicts; None: never.
    """

    def __init__(
        self,
        open_judge: Callable[[Bundle | None], tuple[Judge, OnlineMemory | None]],
        close_judge: Callable[[], None],
        slots: Slots,
        delivery: Delivery,
        boards: Mapping[str, AlarmBoard],
        ids: Ids,
        state: LineState,
        evidence: EvidenceStore | None = None,
        max_frames: int | None = None,
        on_finished: Callable[[], None] = lambda: None,
    ):
        self._open, self._close = open_judge, close_judge
        self._slots, self._delivery, self._boards, self._ids = slots, delivery, boards, ids
        self._state, self._evidence = state, evidence
        self._left = max_frames
        self._on_finished = on_finished
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = threading.Lock()
        self._closed = False
        self._handover = threading.Lock()  # of what this thread owns, to the one that stops the line
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)
        self._ready = threading.Event()
        self.judge: Judge | None = None
        self.memory: OnlineMemory | None = None
        self.failure: AndonError | None = None
        self._memory_trouble = ""
        self._kept_at: dict[str, float] = {}
        self._engine_watch = EngineWatch()
        self._drift_told: dict[str, frozenset[str]] = {}

    def start(self) -> None:
        """Start the thread; it opens the engines first."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the engines are open; False if they are not within `timeout` seconds.

        Raises:
            AndonError: they cannot be opened.
        """
        ready = self._ready.wait(timeout)
        if self.failure is not None:
            raise self.failure
        return ready

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, which comes when the slots are closed and empty. False if it did not come in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def call(self, function: Callable[[], T]) -> T:
        """Run something on this thread between two frames and return what it returns, from any other thread.

        Raises:
            NotNowError: the line is stopping or did not get to it in time.
            EngineError: it was begun, and was not done in time.
        """
        future = self.post(function)
        try:
            return future.result(CALL_TIMEOUT)
        except FutureTimeout as error:
            if not future.cancel():  # what was refused must not happen later
                raise EngineError(
                    f"the line was not done with it after {CALL_TIMEOUT:g} s",
                    found="a command that has begun and will be finished",
                    next_step="see in the line's status whether it had its effect before repeating it",
                ) from error
            raise NotNowError(
                f"the line did not get to it within {CALL_TIMEOUT:g} s",
                found="a busy engine",
                next_step="repeat it when its status says ready",
            ) from error

    def post(self, function: Callable[[], T]) -> Future[T]:
        """The same without waiting."""
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                future.set_exception(_stopping())
            else:
                self._calls.append((function, future))
        self._slots.poke()
        return future

    def reopen(self, bundle: Bundle) -> None:
        """Close bundle and engines, build the engines of this bundle and open everything; on this thread only.

        Nothing is judged meanwhile, on TensorRT for minutes. If it fails the line ends with that failure.

        Raises:
            NotNowError: the line is stopping.
        """
        with self._handover:
            if self._slots.closed:
                raise _stopping()
            self.judge = self.memory = None
        self._shut()
        self._engine_watch = EngineWatch()  # the failures were of the engines before
        self._open_engines(bundle)

    @property
    def opened(self) -> bool:
        """Whether the engines are open, so that what waits will be judged."""
        with self._handover:
            return self.judge is not None

    def give_up(self) -> bool:
        """Let this thread judge nothing any more if its engines are not open; from the thread that stops the line.

        A build cannot be interrupted: its thread then ends after it, or with the process, and touches alarms and
        delivery no more. False: they are open, and what waits will be judged.
        """
        with self._handover:
            if self.judge is not None:
                return False
            self._given_up = True
        self._refuse_calls()
        return True

    def answer_waiting(self, unjudged: Callable[[Frame | Missed, str], Judgement]) -> int:
        """Hand over a verdict for every part that still waits, when nobody judges it any more; how many there were.

        On the thread that stops the line, once this one has ended or was given up.

        Args:
            unjudged: makes the verdict; (item, why).
        """
        if self._left is not None and self._left <= 0:
            return 0  # as many as were asked for are judged
        why = self.failure.what if self.failure else "the line was stopped before its engines were open"
        answered = 0
        while (item := self._slots.take(0)) is not None:
            if item.part_id is not None:
                self._hand_over(unjudged(item, why), None)
                answered += 1
        if answered:
            for board in self._boards.values():
                self._delivery.keep(board)
        return answered

    def alarm(self, camera: str, events: Iterable[AlarmEvent]) -> None:
        """Publish transitions of a board; on this thread only."""
        events = list(events)
        if events:
            for event in events:
                log.warning(
                    "camera %s: alarm %s %s -> %s (%s)",
                    camera, event.kind, event.before, event.alarm.state, event.alarm.detail,
                )  # fmt: skip
            self._delivery.alarm(self._boards[camera], events, self._ids)
            self._state.alarms(camera, self._boards[camera].alarms)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._open_engines(None)
        self._ready.set()
        try:
            self._serve()
        except Exception as error:
            log.exception("the line's thread failed")
            self.failure = EngineError(f"the line's thread failed: {type(error).__name__}", found=error)
        finally:
            if not self._given_up:
                for board in self._boards.values():
                    self._delivery.keep(board)
            self._refuse_calls()
            self._shut()
            self._on_finished()

    def _open_engines(self, bundle: Bundle | None) -> None:
        try:
            judge, memory = self._open(bundle)
            with self._handover:
                if self._given_up:
                    return
                self.judge, self.memory = judge, memory
            for camera in self._boards:  # one may have been restored with a warning that nobody watches any more
                self._tell_drift(camera)
        except AndonError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the engines cannot be opened")
            self._fail(EngineError(f"the engines cannot be opened: {type(error).__name__}", found=error))

    def _shut(self) -> None:
        """Close memory and engines. What cannot be written then is the run's failure, and the line still ends."""
        try:
            self._close()
        except AndonError as error:
            self._fail(error)
        except Exception as error:
            log.exception("memory or engines cannot be closed")
            self._fail(EngineError(f"they cannot be closed: {type(error).__name__}", found=error))

    def _fail(self, error: AndonError) -> None:
        """The first failure is the run's, which is over where this thread was given up."""
        if not self._given_up:
            self.failure = self.failure or error

    def _serve(self) -> None:
        while True:
            self._answer_calls()
            if (judge := self.judge) is None:
                return
            item = self._slots.take()
            if item is None:
                if self._slots.drained:
                    return
                continue
            if isinstance(item, Frame):
                judgement = judge.judge(item)
                self._hand_over(judgement, item)
                self._look_at_engine(judgement)
            else:
                self._hand_over(judge.unknown(item), None)
            if self._left is not None:
                self._left -= 1
                if self._left <= 0:
                    return

    def _hand_over(self, judgement: Judgement, frame: Frame | None) -> None:
        started = time.monotonic()
        verdict = judgement.verdict
        if self._evidence is not None and frame is not None:
            scored = judgement.scored
            picture = self._evidence.keep(
                verdict,
                frame.image,
                scored.map if scored else None,
                judgement.box,
                scored.pixel_threshold if scored else None,
            )
            judgement = with_evidence(judgement, picture)
            verdict = judgement.verdict
        self._delivery.verdict(verdict)
        self.alarm(verdict.camera, self._boards[verdict.camera].verdict(verdict.label, verdict.reason, verdict.part_id))
        if started >= self._kept_at.get(verdict.camera, 0.0) + KEEP_EVERY:
            self._kept_at[verdict.camera] = started
            self._delivery.keep(self._boards[verdict.camera])
        self._state.record(judgement, frame, (time.monotonic() - started) * 1e3)
        if self.memory is not None and self.judge is not None and frame is not None and judgement.scored is not None:
            self._learn(self.memory, self.judge, judgement, frame)

    def _look_at_engine(self, judgement: Judgement) -> None:
        """Have the line stopped in good order where only a restart helps; until then, what comes is UNKNOWN."""
        if self.failure is None and (failure := self._engine_watch.look(judgement)) is not None:
            log.error("the line ends: %s", failure)
            self.failure = failure
            self._on_finished()

    def _learn(self, memory: OnlineMemory, judge: Judge, judgement: Judgement, frame: Frame) -> None:
        """The memory's trouble must not become the line's: it is said once, and `unusable` decides about verdicts."""
        try:
            memory.after_frame(judge.detector.program, judgement, frame)
            self._tell_drift(frame.camera)
        except Exception as error:  # whatever it is, the next part must be judged
            if str(error) != self._memory_trouble:
                log.error("memory: %s", error, exc_info=not isinstance(error, AndonError))
            self._memory_trouble = str(error)

    def _tell_drift(self, camera: str) -> None:
        """Let a camera's board know what the memory says of drift; without a memory there is none."""
        drift = self.memory.drift(camera) if self.memory is not None else {}
        now, board, detail = frozenset(drift), self._boards[camera], "; ".join(drift.values())
        # At first it is not known which products a board that was restored names.
        told = self._drift_told.get(camera, now)
        self._drift_told[camera] = now
        events = board.condition("drift", bool(now), detail, further=bool(told) and not now <= told)
        if now and now < told:
            events += board.renew("drift", detail)
        self.alarm(camera, events)

    def _answer_calls(self) -> None:
        while (call := self._next_call()) is not None:
            function, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - whoever called gets it
                future.set_exception(error)

    def _refuse_calls(self) -> None:
        with self._closing:
            self._closed = True
        while (call := self._next_call()) is not None:
            future = call[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopping())

    def _next_call(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._closing:  # two threads take them when one gives the other up
            return self._calls.popleft() if self._calls else None


def _stopping() -> NotNowError:
    return NotNowError("the line is stopping", next_step="repeat it after the restart")
