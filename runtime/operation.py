"""Operation of a running line: live page, metrics, health and systemd's watchdog, kept by one thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .errors import AndonError
from .health import Check, Progress, readiness
from .metrics import Metrics
from .notify import Notifier
from .web.server import Backend, WebServer, page_token

if TYPE_CHECKING:
    from .app import LineApp

log = logging.getLogger("andon.operation")

#: Seconds between looks at the line.
_PERIOD = 1.0
#: Seconds that systemd is asked to wait for engines, again and again while they open.
_PATIENCE = 30.0


class Operation:
    """Entered once the line is put together, left when it has stopped.

    The web server is up from the start, so that a line that is still building engines says so.

    Raises:
        ConfigError: see :func:`page_token`. SourceError-free: the line itself is not touched.
        DeliveryError: the port is taken.
    """

    def __init__(self, app: LineApp, notifier: Notifier | None = None):
        self._app = app
        self._notifier = notifier or Notifier()
        self._progress = Progress(self._judged_and_waiting)
        self._memory: dict[str, Any] | None = None
        self._asked: Future[dict[str, Any]] | None = None
        self._said_ready = False
        self._failures: dict[str, str] = {}
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._attend, name="operation", daemon=True)
        self.web: WebServer | None = None
        self.metrics = Metrics(app.state.snapshot)

    def __enter__(self) -> Operation:
        app = self._app
        app.state.section("memory", lambda: self._memory)
        config = app.config.web
        if config is not None:
            app.state.on_verdict.append(self.metrics.observe)
            self.web = WebServer(config.host, config.port, self._backend(), page_token(config))
            self._stack.enter_context(self.web)
            log.info("live page on %s", self.web.url)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._notifier.stopping()
        self._stop.set()
        self._thread.join()
        self._stack.close()

    def alive(self) -> list[Check]:
        """For /healthz and the watchdog."""
        return [self._progress.check() if self._engines_open() else self._progress.opening()]

    def ready(self) -> list[Check]:
        """For /readyz."""
        return [*self.alive(), *readiness(self._app.state.snapshot())]

    def _backend(self) -> Backend:
        config = self._app.config
        return Backend(
            state=self._document,
            picture=lambda camera, width, heat: self._app.state.picture(camera, width=width, heat=heat),
            cameras=tuple(config.cameras),
            acknowledge=lambda camera, kind, by: self._app.handlers.acknowledge(camera, {"kind": kind, "by": by}),
            metrics=self.metrics.page,
            alive=self.alive,
            ready=self.ready,
        )

    def _document(self) -> dict[str, Any]:
        config = self._app.config
        return {
            **self._app.state.snapshot(),
            "line": {"site": config.site, "line": config.line, "station": config.station},
            "health": [asdict(check) for check in self.ready()],
        }

    def _judged_and_waiting(self) -> tuple[int, int]:
        slots = self._app.slots
        return slots.served, sum(slots.waiting(camera) for camera in slots.counts())

    # -- the thread ------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        period = min(_PERIOD, self._notifier.watchdog_interval or _PERIOD)
        while not self._stop.wait(period):
            with self._surviving("the line"):
                self._tell_systemd()
                self._ask_memory()
            with self._surviving("its cameras"):
                for camera in list(self._app.cameras.values()):
                    camera.look()

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Whatever fails here is said once; without this thread systemd would kill a line that judges."""
        try:
            yield
        except Exception as error:
            if self._failures.get(what) != repr(error):
                log.exception("%s cannot be looked at", what)
            self._failures[what] = repr(error)
        else:
            self._failures.pop(what, None)

    def _tell_systemd(self) -> None:
        (check,) = self.alive()
        if not self._engines_open():
            self._notifier.starting(check.detail, _PATIENCE)
            self._notifier.feed(check.detail)
            return
        status = "its state cannot be looked at"
        with self._surviving("its state"):
            status = self._status()
        if not self._said_ready:
            self._notifier.ready(status)
            self._said_ready = True
        if check.ok:
            self._notifier.feed(status)
        else:
            log.error("the watchdog is not fed: %s", check.detail)
            self._notifier.status(check.detail)

    def _engines_open(self) -> bool:
        """Not at the start, and not while `rebuild` opens them anew."""
        return self._app.worker.judge is not None

    def _status(self) -> str:
        problems = [f"{check.name}: {check.detail}" for check in readiness(self._app.state.snapshot()) if not check.ok]
        return "; ".join(problems) or "judging"

    def _ask_memory(self) -> None:
        """Ask the judging thread, which owns the memory, without waiting for it."""
        memory = self._app.worker.memory
        if memory is None:
            return
        if self._asked is not None and not self._asked.done():
            return
        answer, self._asked = self._asked, self._app.worker.post(memory.describe)
        if answer is None:
            return
        with self._surviving("its memory"):
            try:
                self._memory = answer.result()
            except AndonError as error:  # as it is while the line stops
                log.debug("memory: %s", error)
