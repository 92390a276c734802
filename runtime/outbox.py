"""The store between the judge and the broker: a message is committed here before it is offered to MQTT.

One writer thread owns the write connection and commits everything that waits in one transaction (group commit), so a
lone message is not delayed and a burst costs one fsync. A message leaves the file only after the broker's PUBACK.
When the disk refuses, messages stay in a bounded memory tail, are offered from there, and the commit is retried.

Order is the order of `put`, kept by an integer key. Ages count the time that the outbox was open; no clock that is set,
or wrong at a start, makes a message old.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from .errors import DeliveryError
from .outbox_file import OutboxFile, refused
from .outbox_floors import Floors
from .outbox_news import Event, News
from .stored import MEMORY_VERSION, OutboxStats, Stored

log = logging.getLogger("andon.outbox")

#: Messages and bytes of one transaction; the bytes keep the log smaller than the reserve of the file.
_BATCH, _BATCH_BYTES = 512, 2**17
#: A nearly full disk takes small transactions, each followed by folding the log into the file.
_SMALL_BATCH = 16
_ACK_BATCH = 256
_ACK_DELAY = 0.2
_RETRY = 1.0
_HOUSEKEEPING = 5.0
#: State of the file: the greatest identifier as of the last :meth:`Outbox.used`.
_USED = "used_id"


class Outbox:
    """See the module. Thread-safe; a context manager that starts and joins its one thread.

    Args:
        path: SQLite file; its folder is made.
        max_bytes, max_age: caps on payload bytes and seconds of running; beyond them the oldest go, counted.
        memory_bytes: cap on what is not yet committed, for a disk that refuses.
        event: called as (what, text) on `set_aside`, `degraded`, `recovered`, `dropped`; by the writer thread or open.

    Raises:
        DeliveryError: on open, when the disk refuses, another process holds the file, or it is of a newer version.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 256 * 2**20,
        max_age: float = 7 * 86400,
        memory_bytes: int = 64 * 2**20,
        event: Event | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.path = Path(path)
        self._caps = (max_bytes, max_age)
        self._memory_bytes = memory_bytes
        self._news = News(event)
        self._file = OutboxFile(self.path, wall, monotonic)
        self._lock = threading.Condition()
        self._tail: dict[int, Stored] = {}
        self._tail_bytes = 0
        self._states: dict[str, bytes] = {}
        self._acked: dict[int, int] = {}  # key -> payload bytes, until it is deleted
        self._held = (0, 0, 0)  # the file's count, bytes and last key as of the last transaction, see _take_stock
        self._listeners: list[tuple[frozenset[str] | None, Callable[[], None]]] = []
        self._next = 1
        self._committed = 0
        self._last_id = ""
        self._version = 0  # the greatest of the memory's that a message carried
        self._degraded: str | None = None
        self._tail_dropped = self._given_up = self._damaged = 0
        self._stopping = False
        self._due_at = 0.0
        self._thread: threading.Thread | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    def open(self) -> Outbox:
        """Open the file, set a corrupt one aside, start the writer."""
        self._file.lock()
        try:
            self._file.open()
        except (sqlite3.OperationalError, OSError) as error:
            self._file.close()
            raise DeliveryError(
                f"the outbox {self.path} cannot be opened",
                found=str(error),
                expected="a disk with room that this user may write",
                next_step=f"make room (df -h {self.path.parent}), or set 'outbox.path' in the line configuration",
            ) from error
        except BaseException:
            self._file.close()
            raise
        self._next = self._file.last_key + 1
        self._committed = self._file.last_key
        self._last_id = max(self._file.last_id, (self._file.load_state(_USED) or b"").decode())
        stored, floor = int(self._file.load_state(MEMORY_VERSION) or 0), self._file.before.version
        self._version = max(stored, floor)
        if floor > stored:  # a full disk did not take it
            self._states[MEMORY_VERSION] = b"%d" % floor
        self._take_stock()
        self._news.dropped = self._file.dropped - self._file.damaged
        self._say_losses()
        self._stopping = False
        self._keep_floors(sync=False)  # makes their file, while there may be room
        self._thread = threading.Thread(target=self._write, name="andon-outbox", daemon=True)
        self._thread.start()
        return self

    def finish(self) -> None:
        """Commit what waits and stop the writer; from then on nothing is taken, but :meth:`stats` still answers.

        On a full disk the reserve goes to what is in memory. What even so is not stored is lost: said, and counted.
        """
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        opened = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._say_losses(now=True)
        if lost := len(self._tail):
            self._news.say("dropped", f"{lost} messages were never stored: {self._degraded}")
            self._file.count_lost(lost)
            with self._lock:
                for key in list(self._tail):
                    self._forget(key)
        if opened:
            self._keep_floors(sync=True)

    def close(self) -> None:
        """:meth:`finish`, and close the file."""
        self.finish()
        self._file.close()

    def __enter__(self) -> Outbox:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the judge's side ------------------------------------------------------------------------------------------

    def put(
        self, camera: str, kind: str, identifier: str, payload: bytes, state: tuple[str, bytes] | None = None
    ) -> int:
        """Hand over a message; returns its key at once. ``state`` (name, value) is committed with it or before it.

        Raises:
            DeliveryError: the outbox is closed.
        """
        with self._lock:
            if self._stopping or self._thread is None:
                raise DeliveryError("the outbox is closed", found=f"{kind} of {camera}", expected="an open outbox")
            key = self._next
            self._next += 1
            self._tail[key] = Stored(key, camera, kind, identifier, payload)
            self._tail_bytes += len(payload)
            if state is not None:
                self._states[state[0]] = state[1]
                if state[0] == MEMORY_VERSION:
                    self._version = max(self._version, int(state[1]))
            self._last_id = max(self._last_id, identifier)
            while self._tail_bytes > self._memory_bytes and len(self._tail) > 1:
                self._forget(next(iter(self._tail)))
                self._tail_dropped += 1
            self._lock.notify_all()
        return key

    def wait(self, key: int, timeout: float) -> bool:
        """Whether the message of this key is safe on disk, waiting up to ``timeout`` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: self._committed >= key, timeout)

    def save_state(self, name: str, value: bytes) -> None:
        """Keep a small value over restarts, committed with the next transaction."""
        with self._lock:
            self._states[name] = value
            self._lock.notify_all()

    def used(self, identifier: str) -> None:
        """An identifier was given that no message here carries: new ones come after it all the same, see `last_id`."""
        with self._lock:
            self._last_id = max(self._last_id, identifier)
            self._states[_USED] = self._last_id.encode()
            self._lock.notify_all()

    def load_state(self, name: str) -> bytes | None:
        """What :meth:`save_state` or :meth:`put` kept, or None."""
        with self._lock:
            if name in self._states:
                return self._states[name]
        return self._file.load_state(name)

    # -- the publisher's side --------------------------------------------------------------------------------------

    def listen(self, callback: Callable[[], None], cameras: Iterable[str] | None = None) -> None:
        """Call back after each commit of messages of these cameras (None: of any), and again and again while the disk
        refuses; from the writer thread, so the callback must not block."""
        self._listeners.append((None if cameras is None else frozenset(cameras), callback))

    @property
    def next_key(self) -> int:
        """The key that the next message will get: everything below was there before."""
        with self._lock:
            return self._next

    @property
    def last_id(self) -> str | None:
        """The greatest identifier ever put or told of: the floor for new ones."""
        with self._lock:
            return self._last_id or None

    def cameras(self) -> list[str]:
        """Cameras that have messages in the file, configured or not."""
        return self._file.cameras()

    def fetch(self, cameras: Sequence[str], kind: str, after: int, limit: int) -> list[Stored]:
        """Committed, unacknowledged messages with a key above ``after``, oldest first.

        While the disk refuses, uncommitted ones too: better sent from memory than kept from the line. Before that their
        identifiers and versions are made floors, or a start after a kill would use them again.
        The tail is read before the file, so a message that is committed in between is seen in the file.
        """
        with self._lock:
            tail = []
            if self._degraded:
                tail = [m for m in self._tail.values() if m.key > after and m.kind == kind and m.camera in cameras][
                    :limit
                ]
            acked = set(self._acked)
        if tail:
            self._keep_floors(sync=True)
        found: dict[int, Stored] = {}
        cursor = after
        while len(found) < limit:
            rows = self._file.fetch(cameras, kind, cursor, limit)
            found.update((row[0], Stored(*row)) for row in rows if row[0] not in acked)
            if len(rows) < limit:
                found.update((message.key, message) for message in tail)
                break
            cursor = rows[-1][0]
        return [found[key] for key in sorted(found)[:limit]]

    def done(self, messages: Iterable[Stored]) -> None:
        """The broker acknowledged these; they are deleted with the next transactions."""
        with self._lock:
            for message in messages:
                if message.key in self._tail:
                    self._forget(message.key)
                else:
                    self._acked[message.key] = len(message.payload)
            self._lock.notify_all()

    def give_up(self, message: Stored, damaged: bool = False) -> None:
        """It can never be delivered: it is deleted as after :meth:`done`, and counted as dropped.

        The broker takes none so large; or, damaged, the disk has changed it.
        """
        with self._lock:
            self._given_up += 1
            self._damaged += damaged
        if damaged:
            log.error("outbox: %s %s of %s is damaged and dropped", message.kind, message.id, message.camera)
        self.done([message])

    def stats(self) -> OutboxStats:
        """Depth, losses and state at this moment."""
        with self._lock:
            count, size, last_key = self._held
            fresh = [len(m.payload) for m in self._tail.values() if m.key > last_key]
            messages = max(0, count + len(fresh) - len(self._acked))
            return OutboxStats(
                messages=messages,
                bytes=max(0, size + sum(fresh) - sum(self._acked.values())) if messages else 0,
                dropped=self._file.dropped + self._tail_dropped + self._given_up,
                oldest_age_s=self._file.oldest_age() if messages else 0.0,
                degraded=self._degraded,
                set_aside=self._file.set_aside,
                in_memory=len(self._tail) if self._degraded else 0,
                too_large=self._given_up - self._damaged,
                damaged=self._damaged + self._file.damaged,
            )

    def _keep_floors(self, sync: bool) -> None:
        with self._lock:
            dropped = self._file.dropped + self._tail_dropped + self._damaged
            waiting = max(0, self._file.count - len(self._acked))
            floors = Floors(self._last_id, self._version, dropped, waiting)
        self._file.floors.write(floors, sync)

    # -- the writer thread -----------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._due_at = time.monotonic() + _HOUSEKEEPING
        while True:
            try:
                if self._turn():
                    return
            except Exception as error:
                log.exception("the outbox's writer")
                self._set_degraded(f"{type(error).__name__}: {error}")
                if self._stopping:
                    return
                self._pause()

    def _turn(self) -> bool:
        """One transaction, if there is anything to write. True when it was the last."""
        with self._lock:
            self._await_work(self._due_at)
            batch = self._next_batch()
            states, acked = dict(self._states), set(self._acked)
            stopping = self._stopping
        due = time.monotonic() >= self._due_at
        if batch or states or acked or due:
            if self._commit(batch, states, acked, due):
                self._settle(batch, states, acked)
            elif stopping:
                return not self._file.give_up_reserve()
            else:
                self._pause()
        if due:
            if not self._degraded:
                self._file.reserve()
            self._keep_floors(sync=False)
            self._due_at = time.monotonic() + _HOUSEKEEPING
        return stopping and not (self._tail or self._acked or self._states)

    def _next_batch(self) -> list[Stored]:
        batch: list[Stored] = []
        size = 0
        for message in islice(self._tail.values(), _SMALL_BATCH if self._degraded else _BATCH):
            size += len(message.payload)
            if batch and size > _BATCH_BYTES:
                break
            batch.append(message)
        return batch

    def _await_work(self, housekeeping: float) -> None:
        """Sleep until there is something to commit; acknowledgements alone may wait a little to be many."""
        acks_since: float | None = None
        while not (self._tail or self._states or self._stopping or len(self._acked) >= _ACK_BATCH):
            moment = time.monotonic()
            if self._acked and acks_since is None:
                acks_since = moment
            until = housekeeping if acks_since is None else min(housekeeping, acks_since + _ACK_DELAY)
            if moment >= until:
                return
            self._lock.wait(until - moment)

    def _commit(self, batch: list[Stored], states: dict[str, bytes], acked: set[int], due: bool) -> bool:
        last_id = max((message.id for message in batch), default=None)
        rows = [(m.key, m.camera, m.kind, m.id, m.payload) for m in batch if m.key > self._file.last_key]
        try:
            if self._degraded and acked:
                self._file.delete_with_reserve(acked)
            self._file.commit(rows, states, acked, last_id, self._caps if due or rows else None)
        except sqlite3.DatabaseError as error:
            if refused(error):
                self._set_degraded(str(error))
            else:
                self._replace(error, acked)
            return False
        if self._degraded:
            self._file.fold()
            if len(batch) == len(self._tail):
                self._degraded = None
                self._news.say("recovered", "the outbox stores again; nothing waits in memory")
        return True

    def _replace(self, damage: sqlite3.DatabaseError, acked: set[int]) -> None:
        log.error("the outbox file is damaged: %s", damage)
        try:
            self._file.replace_damaged(acked, self.next_key)
        except (sqlite3.DatabaseError, OSError) as error:
            self._set_degraded(f"damaged ({damage}), and not replaced: {error}")
        else:
            with self._lock:
                self._take_stock()
                if self._version:  # what the file may have lost is known here
                    self._states.setdefault(MEMORY_VERSION, b"%d" % self._version)
                self._states[_USED] = self._last_id.encode()
            self._say_losses()

    def _take_stock(self) -> None:
        """What the file holds, together with what waits beside it: counted at one moment, or sums would not agree."""
        self._held = (self._file.count, self._file.bytes, self._file.last_key)

    def _settle(self, batch: list[Stored], states: dict[str, bytes], acked: set[int]) -> None:
        with self._lock:
            for message in batch:
                if message.key in self._tail:
                    self._forget(message.key)
                else:  # acknowledged, from memory, while it was being stored
                    self._acked[message.key] = len(message.payload)
                self._committed = max(self._committed, message.key)
            for name, value in states.items():
                if self._states.get(name) is value:
                    del self._states[name]
            for key in acked:
                del self._acked[key]
            self._take_stock()
            self._lock.notify_all()
        self._say_losses()
        if batch:
            self._tell({message.camera for message in batch})

    def _say_losses(self, now: bool = False) -> None:
        # A commit may have set a file aside, too: it opens the file anew where there is none.
        dropped = self._file.dropped - self._file.damaged + self._tail_dropped
        self._news.losses(self._file.set_aside, dropped, now)

    def _pause(self) -> None:
        self._tell()
        with self._lock:
            self._lock.wait_for(lambda: self._stopping, _RETRY)

    def _tell(self, cameras: set[str] | None = None) -> None:
        """Whoever waits for messages of these cameras; None: everybody."""
        for waits_for, listener in self._listeners:
            if cameras is None or waits_for is None or waits_for & cameras:
                listener()

    def _forget(self, key: int) -> None:
        self._tail_bytes -= len(self._tail.pop(key).payload)

    def _set_degraded(self, reason: str) -> None:
        if self._degraded != reason:
            self._news.say("degraded", f"{self.path}: {reason}; messages wait in memory")
        self._degraded = reason
