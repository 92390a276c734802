"""The composition root of a line: sources → slots → judging thread → alarms → outbox → publisher.

Start: configuration, sources and bundle are checked (a wrong one ends the run with a reason, before anything is
started), the outbox opens, cameras start and fill their slots while the judging thread opens the engines, then delivery
connects. Stop, on SIGTERM: cameras stop, waiting frames are judged, the outbox is committed and delivered as far as the
broker takes it, `stopped` is published.
"""

from __future__ import annotations

import json
import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from .alarm import AlarmBoard, Kind
from .alarm import payload as alarm_payload
from .bundle import Bundle
from .calibrated import other_engines, unknown_cameras
from .classifier import log_classifier
from .deliverywatch import DeliveryWatch
from .detector import Detector
from .engine.select import open_backend
from .errors import AndonError
from .evidence import EvidenceStore
from .handlers import Handlers
from .judge import Judge
from .judgement import Judgement, OnlineMemory
from .lineconfig import CameraConfig
from .linecrop import log_crops
from .linestate import LineState
from .linethresholds import describe, log_thresholds, standing
from .memory import open_memory
from .mqtt.commands import Commands
from .mqtt.delivery import Delivery, published_version
from .operation import Operation
from .outbox import Outbox
from .overrides import Overrides
from .reload import reload
from .sections import delivery_section, metrics_fields
from .slot import LanePolicy, Missed, Slots
from .source import Source, make_source
from .source.camera import Camera, CameraState
from .startup import (
    Options,
    Signals,
    alarm_rule,
    effective,
    open_bundle,
    pick_variant,
    sole_user,
)
from .summary import closing_summary
from .types import Frame
from .unjudged import Unjudged
from .verdict import Ids
from .whereabouts import state_folder
from .worker import LineWorker

log = logging.getLogger("andon.line")
#: Seconds that a source may take to let go of its camera; at the stop, all of them together.
JOIN = 5.0


class LineApp:
    """One run of a line. :meth:`run` returns when it has stopped; :meth:`stop` may be called from any thread."""

    delivery: Delivery
    worker: LineWorker
    _unjudged: Unjudged

    def __init__(
        self,
        options: Options,
        *,
        on_ready: Callable[[LineApp], None] = lambda app: None,
    ):
        """on_ready: called once, when frames are judged and delivery runs.

        Raises:
            ConfigError: see :func:`effective`.
            SourceError: a source can never be opened as configured.
        """
        self.options = options
        self.config = effective(options)
        self.folder = state_folder(self.config, options.config)
        self._on_ready = on_ready
        self._stop_by: float | None = None
        self._reopening: Future[None] | None = None
        self._delivery_watch = DeliveryWatch(self._delivery_alarm)
        self._keep_broker: Callable[[], None] = lambda: None
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._detector_stack = ExitStack()
        cameras = self.config.cameras
        self.state = LineState({name: camera.product for name, camera in cameras.items()})
        self.slots = Slots({name: _lane_policy(camera) for name, camera in cameras.items()})
        self.cameras = {
            name: Camera(name, camera, self._checked_source(name), self.slots, self._camera_state)
            for name, camera in cameras.items()
        }
        self.boards = {name: AlarmBoard(name, alarm_rule(self.config.alarm)) for name in cameras}

    def stop(self, why: str = "asked to") -> None:
        """End the run in good order."""
        self._events.put(f"stop {why}")

    def reload(self) -> None:
        """Read the configuration again and take over what can be taken over without a gap."""
        self._events.put("reload")

    def rebuild(self) -> Bundle:
        """Look for the bundle again (a `*` may mean a newer one now), load it and build its engines anew.

        The status topics say `ready` false meanwhile. Not on the judging thread, which goes on while files are hashed.

        Raises:
            AndonError: the bundle is refused, as at the start, or as it has no threshold for a product that is judged
                now; the line goes on with the one it has.
        """
        judge = self.worker.judge
        bundle = open_bundle(self.config, further=None if judge is None else judge.require_thresholds)

        def finish(done: Future[None]) -> None:
            if done.cancelled() or done.exception() is not None:  # the line stops: nobody took the bundle over
                bundle.close()
            self.delivery.announce()

        self.state.fact(ready=False)
        self.delivery.announce()
        self._unjudged = Unjudged(bundle.manifest.method, bundle.id)
        self._reopening = self.worker.post(lambda: self.worker.reopen(bundle))
        self._reopening.add_done_callback(finish)
        return bundle

    def replace_source(self, name: str, source: Source) -> None:
        """Let a camera of that name go and start another on the new source; the others are not touched."""
        old = self.cameras[name]
        old.stop()
        if not old.join(JOIN):
            log.error("camera %s: its source does not let go after %g s", name, JOIN)
        self.slots.configure(name, _lane_policy(self.config.cameras[name]))  # drop: null goes by the source
        self.cameras[name] = Camera(name, self.config.cameras[name], source, self.slots, self._camera_state)
        self.cameras[name].start()

    def run(self) -> dict[str, Any]:
        """Run until stopped; the closing summary.

        Raises:
            AndonError: it cannot start, or the judging thread failed.
        """
        with ExitStack() as stack:
            stack.enter_context(Signals(self._events))
            bundle = stack.enter_context(open_bundle(self.config, starting=True))
            self.bundle_path = bundle.path
            self._unjudged = Unjudged(bundle.manifest.method, bundle.id)
            stack.enter_context(sole_user(self.folder))
            self.overrides = Overrides(self.folder)
            stack.callback(self.overrides.close)
            self.state.section("overrides", self.overrides.describe)
            for name, product in self.overrides.products.items():  # said from the first status on
                if name in self.config.cameras:
                    self.state.expects(name, product)
            outbox = self.config.outbox
            self.outbox = stack.enter_context(
                Outbox(
                    outbox.path or self.folder / "outbox.db",
                    max_bytes=outbox.max_bytes,
                    max_age=outbox.max_age,
                )
            )
            self.ids = Ids(self.outbox.last_id)
            self._restore_boards()
            evidence = self._open_evidence(stack)
            self._make_delivery(stack)
            self.worker = LineWorker(
                lambda new: self._open_judge(new or bundle, rebuild=new is not None),
                self._detector_stack.close,
                self.slots,
                self.delivery,
                self.boards,
                self.ids,
                self.state,
                evidence,
                self.options.max_frames,
                lambda: self._events.put("finished"),
            )
            self.operation = stack.enter_context(Operation(self))
            return self._run()

    # -- start -------------------------------------------------------------------------------------------------------

    def _checked_source(self, name: str) -> Source:
        source = make_source(name, self.config.cameras[name])
        said = source.check()
        log.debug("camera %s: %s", name, said)
        return source

    def _restore_boards(self) -> None:
        for name, board in self.boards.items():
            dumped = self.outbox.load_state(f"alarm/{name}")
            if dumped is not None:
                try:
                    board.restore(json.loads(dumped))
                except (ValueError, TypeError, AttributeError) as error:  # it is JSON, but the disk has changed it
                    log.error("camera %s: what was kept of its alarms is damaged: %s; they begin anew", name, error)
                    self.boards[name] = board = AlarmBoard(name, alarm_rule(self.config.alarm))
                self.state.alarms(name, board.alarms)

    def _open_evidence(self, stack: ExitStack) -> EvidenceStore | None:
        config = self.config.evidence
        if config is None:
            return None
        folder = config.path or self.folder / "evidence"
        cameras = None if config.path is None else list(self.config.cameras)  # a named one may be other lines', too
        store = stack.enter_context(EvidenceStore(config, folder, self._publish_picture, cameras))
        self.state.section(
            "evidence", lambda: {name: getattr(store, name) for name in ("written", "skipped", "failed", "removed")}
        )
        return store

    def _publish_picture(self, camera: str, identifier: str, jpeg: bytes) -> None:
        self.delivery.picture(camera, identifier, jpeg)

    def _make_delivery(self, stack: ExitStack) -> None:
        broker = self.config.broker
        if broker is not None and broker.embedded:
            from .broker import EmbeddedBroker, announced

            embedded = stack.enter_context(EmbeddedBroker(broker.port))
            self._keep_broker = embedded.attend
            broker = broker.model_copy(update={"host": embedded.host, "port": embedded.port})
            stack.enter_context(announced(self.folder, f"{embedded.host}:{embedded.port}"))
            log.info("embedded broker on %s:%d", embedded.host, embedded.port)
        self.broker = broker
        self.handlers = Handlers(self)
        self.delivery = Delivery(
            self.config.topic,
            list(self.config.cameras),
            broker,
            self.outbox,
            inflight=self.config.outbox.inflight,
            status=self.state.status,
            alarms=self._alarm_message,
            commands=Commands(self.handlers.table(), self.handlers.takes),
        )
        self.state.section("delivery", lambda: delivery_section(self.broker, self.delivery.health()))
        self.state.section("slots", lambda: {name: vars(counts) for name, counts in self.slots.counts().items()})

    def _alarm_message(self, camera: str) -> bytes:
        # A tuple of frozen alarms: safe to read beside the judging thread, which replaces it.
        self.outbox.used(identifier := self.ids.next())
        return alarm_payload(identifier, camera, self.boards[camera].alarms)

    def _open_judge(self, bundle: Bundle, *, rebuild: bool) -> tuple[Judge, OnlineMemory | None]:
        """Open engines, memory and judge; on the judging thread.

        rebuild: the bundle is a new one, to be closed with its engines; build those that are there, too.
        """
        started = time.monotonic()
        stack = self._detector_stack
        if rebuild:
            stack.enter_context(bundle)
        self.bundle_path = bundle.path
        self.state.fact(ready=False)
        backend = stack.enter_context(open_backend(self.config.backend, threads=self.options.threads, rebuild=rebuild))
        variant = pick_variant(self.config, bundle, backend.name)
        detector = stack.enter_context(Detector(bundle, backend, variant, self.config.program))
        detector.warm_up(self.overrides.products.get(name, c.product) for name, c in self.config.cameras.items())
        memory = open_memory(self.config, detector, self.folder, published_version(self.outbox))
        if memory is not None:
            stack.callback(memory.close)
        judge = Judge(detector, self.config.cameras, self.config.judge, self.overrides, self.ids.next, memory)
        manifest = detector.bundle.manifest
        self.state.fact(
            ready=True,
            method=manifest.method,
            bundle=detector.bundle.id,
            backend=detector.backend.name,
            variant=variant,
            program=self.config.program,
            products=list(manifest.classes),
        )
        self.say_thresholds(judge)
        others = other_engines(
            bundle, [self.config.program], variant, backend.name, judge.in_force(), self.config.cameras
        )
        for other in [*others, *unknown_cameras(bundle, self.config.cameras)]:
            log.warning("%s", str(other).replace("\n", "; "))
        log_thresholds(self.config, bundle, self.overrides.stored)
        log_crops(self.config, bundle, self.overrides.products)
        log_classifier(self.config, bundle, self.overrides.products)
        for name in self.config.cameras:
            self.state.expects(name, judge.product_of(name))
        log.info(
            "bundle %s (%s %s) on %s, opened in %.2f s",
            bundle.path.name, manifest.method, detector.bundle.id, detector.backend.name, time.monotonic() - started,
        )  # fmt: skip
        return judge, memory

    def say_thresholds(self, judge: Judge) -> None:
        """State which thresholds are in force, and which of them commands and the configuration have set; on the
        judging thread."""
        bundle, commanded = judge.detector.bundle, self.overrides.stored
        classes = bundle.manifest.classes
        self.state.fact(
            thresholds={product: judge.threshold(product) for product in classes},
            configured=describe(self.config, bundle, commanded),
        )
        for name in self.config.cameras:
            in_force = {product: judge.threshold(product, name) for product in classes}
            own = standing(self.config, bundle, commanded, name)
            self.state.thresholds(name, in_force, self.overrides.thresholds(name), own)

    # -- run and stop ------------------------------------------------------------------------------------------------

    def _run(self) -> dict[str, Any]:
        for camera in self.cameras.values():
            camera.start()
        self.worker.start()
        try:
            self.delivery.start()
            try:
                if self._wait_ready():
                    log.info("line %s runs: %d cameras", self.config.topic, len(self.cameras))
                    self.delivery.announce()
                    self._on_ready(self)
                    self._attend()
            finally:
                self._stop_line()
                self.delivery.stop()
                self.outbox.finish()  # what it could not store is known and counted before anything is said of it
                if self.broker is not None and (waiting := self.outbox.stats().messages):
                    log.warning("%d messages wait in the outbox; they are delivered after the next start", waiting)
        finally:
            self._stop_line()
        if self.worker.failure is not None:
            raise self.worker.failure
        return closing_summary(self)

    def _wait_ready(self) -> bool:
        """Wait for the engines, which may take minutes to build; False when the run is to stop before they are there.

        Whatever else happens meanwhile is attended to when they are open.

        Raises:
            AndonError: they cannot be opened.
        """
        later: list[str] = []
        while not self.worker.wait_ready(0.1):
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                continue
            if event.startswith("stop"):
                log.info("stopping before the engines are open: %s", event.removeprefix("stop "))
                return False
            if event == "reload":
                log.info("the configuration is read again when the engines are open")
            if event not in later:
                later.append(event)
        for event in later:
            self._events.put(event)
        return True

    def _attend(self) -> None:
        """Wait for signals and the line's own end; meanwhile publish metrics and watch the broker."""
        every = self.config.broker.metrics_every if self.config.broker else 3600.0
        due = time.monotonic() + every
        reload_due = False
        while True:
            try:
                event = self._events.get(timeout=max(0.05, min(1.0, due - time.monotonic())))
            except queue.Empty:
                event = ""
            if event.startswith("stop"):
                log.info("stopping: %s", event.removeprefix("stop "))
                return
            if event == "finished":
                return
            if event == "reload":
                reload_due = True
                if self._opening:
                    log.info("the configuration is read again when the engines are open")
            if reload_due and not self._opening:
                reload_due = False
                self._reload()
            if self.options.until_end and all(camera.finished for camera in self.cameras.values()):
                log.info("stopping: every source has ended")
                return
            self._keep_broker()
            if self._delivery_watch.look(self.delivery.health()):
                self.delivery.announce()
            if time.monotonic() >= due:
                due = time.monotonic() + every
                self._publish_metrics()

    @property
    def _opening(self) -> bool:
        """Whether the command `rebuild` has the judging thread open its engines anew: it takes no other call then."""
        return not self.worker.opened or (self._reopening is not None and not self._reopening.done())

    def _stop_line(self) -> None:
        """Cameras first, so that the judging thread finds an end; then what waits is judged. Twice is harmless."""
        for camera in self.cameras.values():
            camera.stop()
        self.slots.close()
        if self._stop_by is None:
            self._stop_by = time.monotonic() + JOIN  # one for all: systemd waits for the stop, not for each camera
            for name, camera in self.cameras.items():
                if not camera.join(max(0.0, self._stop_by - time.monotonic())):
                    log.error("camera %s: its source does not let go after %g s", name, JOIN)
        # An engine build cannot be interrupted; its thread then dies with the process.
        patience = None if self.worker.opened else max(0.0, self._stop_by - time.monotonic())
        if not self.worker.join(patience) and not self.worker.give_up():
            self.worker.join()  # they have been opened just now
        if answered := self.worker.answer_waiting(self._never_judged):
            log.warning("%d parts are UNKNOWN: the line ends before its engines could judge them", answered)

    def _never_judged(self, item: Frame | Missed, why: str) -> Judgement:
        product = self.overrides.products.get(item.camera, self.config.cameras[item.camera].product)
        return self._unjudged.verdict(item, why, self.ids.next(), product)

    def _camera_state(self, state: CameraState) -> None:
        """Called by camera threads: publish, and let the alarm board know, on the thread that owns it."""
        if state is not self.cameras[state.camera].state:  # of one that was replaced and lets go late
            return
        self.state.camera(state)
        down = state.state in ("down", "failed")
        self._condition(state.camera, "camera", down, state.detail.partition("\n")[0])
        self.delivery.announce(state.camera)
        if state.state in ("ended", "failed") and self.options.until_end:
            self._events.put("")

    def _condition(self, camera: str, kind: Kind, present: bool, detail: str, further: bool = False) -> None:
        """Tell an alarm board, on the thread that owns it."""
        board = self.boards[camera]
        self.worker.post(lambda: self.worker.alarm(camera, board.condition(kind, present, detail, further)))

    def _delivery_alarm(self, trouble: bool, why: str, further: bool) -> None:
        for name in self.boards:
            self._condition(name, "delivery", trouble, why, further)

    def _publish_metrics(self) -> None:
        snapshot = self.state.snapshot()
        for name in self.cameras:
            self.delivery.metrics(name, metrics_fields(snapshot, name))

    def _reload(self) -> None:
        try:
            reload(self)
        except AndonError as error:
            log.error("the configuration is not reloaded: %s", error)


def _lane_policy(camera: CameraConfig) -> LanePolicy:
    return LanePolicy(camera.drop_policy, camera.queue, camera.trigger is not None and camera.trigger.only)
