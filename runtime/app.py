"""The composition root of a line: sources → slots → judging thread → alarms → outbox → publisher.

Start: configuration and sources are checked (a wrong one ends the run with a reason), the outbox opens, cameras start
and fill their slots while the judging thread opens the engines, then delivery connects. Stop, on SIGTERM: cameras stop,
waiting frames are judged, the outbox is committed and delivered as far as the broker takes it, `stopped` is published.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .alarm import AlarmBoard, AlarmRule, Kind
from .alarm import payload as alarm_payload
from .bundle import Bundle
from .detector import Detector
from .errors import AndonError, ConfigError
from .evidence import EvidenceStore
from .handlers import Handlers
from .judge import Judge, OnlineMemory
from .lineconfig import AlarmConfig, LineConfig, load_line
from .linestate import LineState
from .manifest import Variant
from .memory import open_memory
from .mqtt.commands import Commands
from .mqtt.delivery import Delivery
from .outbox import Outbox
from .overrides import Overrides
from .slot import LanePolicy, Slots
from .source import make_source
from .source.camera import Camera, CameraState
from .verdict import Ids
from .worker import LineWorker

log = logging.getLogger("andon.line")
#: Seconds that a source may take to let go of its camera.
JOIN = 5.0


@dataclass(frozen=True)
class Options:
    """What the command line adds to a configuration; None keeps the configuration's value."""

    config: Path
    bundle: Path | None = None
    backend: str | None = None
    variant: str | None = None
    broker: str | None = None
    threads: int | None = None
    max_frames: int | None = None
    until_end: bool = False


def effective(options: Options) -> LineConfig:
    """The configuration with the command line's values in it.

    Raises:
        ConfigError: the file or a value is refused.
    """
    config = load_line(options.config)
    changes: dict[str, Any] = {}
    if options.backend is not None:
        changes["backend"] = options.backend
    if options.variant is not None:
        changes["variant"] = options.variant
    if options.bundle is not None:
        changes["bundle"] = options.bundle.absolute()
    if options.broker is not None:
        changes["broker"] = _broker(config, options.broker)
    if options.until_end and (endless := [name for name, camera in config.cameras.items() if camera.endless]):
        raise ConfigError(
            "--until-end needs sources that end",
            found=f"endless: {', '.join(endless)}",
            next_step="use --max-frames, or stop it with SIGTERM",
        )
    return config.model_copy(update=changes)


def _broker(config: LineConfig, address: str) -> Any:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"--broker {address}", found=address, expected="HOST:PORT")
    from .lineconfig import BrokerConfig

    base = config.broker or BrokerConfig()
    return base.model_copy(update={"host": host, "port": int(port), "embedded": False})


def bundle_path(config: LineConfig) -> Path:
    """The bundle that is meant; with a * in its name the newest match.

    Raises:
        ConfigError: none is named, or none matches.
    """
    if config.bundle is None:
        raise ConfigError("no bundle is named", next_step="set 'bundle' in the configuration, or give --bundle")
    if "*" not in config.bundle.name:
        return config.bundle
    matches = [path for path in config.bundle.parent.glob(config.bundle.name) if not path.name.startswith(".")]
    if not matches:
        raise ConfigError(f"no bundle matches {config.bundle}", next_step="andon export --method <method>")
    return max(matches, key=lambda path: path.stat().st_mtime)


def state_folder(config: LineConfig, file: Path) -> Path:
    """Where outbox, overrides and memory live."""
    named = config.state or os.environ.get("STATE_DIRECTORY")
    return Path(named) if named else file.absolute().parent / "state"


def alarm_rule(config: AlarmConfig) -> AlarmRule:
    """The rule of a configuration."""
    return AlarmRule(**config.model_dump())


class LineApp:
    """One run of a line. :meth:`run` returns when it has stopped; :meth:`stop` may be called from any thread."""

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
        self._delivery_trouble = False
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._detector_stack = ExitStack()
        cameras = self.config.cameras
        self.state = LineState({name: camera.product for name, camera in cameras.items()})
        self.slots = Slots(
            {
                name: LanePolicy(camera.drop, camera.queue, camera.trigger is not None and camera.trigger.only)
                for name, camera in cameras.items()
            }
        )
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

    def run(self) -> dict[str, Any]:
        """Run until stopped; the closing summary.

        Raises:
            AndonError: it cannot start, or the judging thread failed.
        """
        path = bundle_path(self.config)
        with ExitStack() as stack:
            stack.enter_context(_signals(self._events))
            self.overrides = Overrides(self.folder)
            stack.callback(self.overrides.close)
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
                lambda: self._open_judge(path),
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
            return self._run()

    # -- start -------------------------------------------------------------------------------------------------------

    def _checked_source(self, name: str) -> Any:
        source = make_source(name, self.config.cameras[name])
        said = source.check()
        log.debug("camera %s: %s", name, said)
        return source

    def _restore_boards(self) -> None:
        import json

        for name, board in self.boards.items():
            dumped = self.outbox.load_state(f"alarm/{name}")
            if dumped is not None:
                board.restore(json.loads(dumped))
                self.state.alarms(name, board.alarms)

    def _open_evidence(self, stack: ExitStack) -> EvidenceStore | None:
        config = self.config.evidence
        if config is None:
            return None
        store = stack.enter_context(EvidenceStore(config, config.path or self.folder / "evidence"))
        self.state.section(
            "evidence", lambda: {name: getattr(store, name) for name in ("written", "skipped", "failed", "removed")}
        )
        return store

    def _make_delivery(self, stack: ExitStack) -> None:
        broker = self.config.broker
        if broker is not None and broker.embedded:
            from .broker import EmbeddedBroker

            embedded = stack.enter_context(EmbeddedBroker(broker.port))
            broker = broker.model_copy(update={"host": embedded.host, "port": embedded.port})
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
            commands=Commands(self.handlers.table()),
        )
        self.state.section("delivery", self._delivery_section)
        self.state.section("slots", lambda: {name: vars(counts) for name, counts in self.slots.counts().items()})

    def _alarm_message(self, camera: str) -> bytes:
        # A tuple of frozen alarms: safe to read beside the judging thread, which replaces it.
        return alarm_payload(self.ids.next(), camera, self.boards[camera].alarms)

    def _open_judge(self, path: Path) -> tuple[Judge, OnlineMemory | None]:
        """Runs on the judging thread."""
        started = time.monotonic()
        stack = self._detector_stack
        variant = self._variant(path)
        detector = stack.enter_context(
            Detector.open(
                path,
                backend=self.config.backend,
                variant=variant,
                program=self.config.program,
                threads=self.options.threads,
            )
        )
        memory = open_memory(self.config, detector, self.folder)
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
            thresholds={product: judge.threshold(product) for product in manifest.classes},
        )
        for name in self.config.cameras:
            self.state.expects(name, judge.product_of(name))
        log.info(
            "bundle %s (%s %s) on %s, opened in %.2f s",
            path.name, manifest.method, detector.bundle.id, detector.backend.name, time.monotonic() - started,
        )  # fmt: skip
        return judge, memory

    def _variant(self, path: Path) -> Variant:
        wanted = self.config.variant
        if wanted != "auto":
            return wanted
        from .engine.probe import tensorrt_missing

        if self.config.backend == "onnxruntime" or tensorrt_missing():
            return "fp32"
        with Bundle.load(path) as bundle:
            return "fp16" if "fp16" in bundle.manifest.variants else "fp32"

    # -- run and stop ------------------------------------------------------------------------------------------------

    def _run(self) -> dict[str, Any]:
        for camera in self.cameras.values():
            camera.start()
        self.worker.start()
        try:
            self.delivery.start()
            try:
                self.worker.wait_ready()
                log.info("line %s runs: %d cameras", self.config.topic, len(self.cameras))
                self._on_ready(self)
                self._attend()
            finally:
                self._stop_line()
                self.delivery.stop()
        finally:
            self._stop_line()
        if self.worker.failure is not None:
            raise self.worker.failure
        return self._summary()

    def _attend(self) -> None:
        """Wait for signals and the line's own end; meanwhile publish metrics and watch the broker."""
        every = self.config.broker.metrics_every if self.config.broker else 3600.0
        due = time.monotonic() + every
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
                self._reload()
            if self.options.until_end and all(camera.finished for camera in self.cameras.values()):
                log.info("stopping: every source has ended")
                return
            self._watch_delivery()
            if time.monotonic() >= due:
                due = time.monotonic() + every
                self._publish_metrics()

    def _stop_line(self) -> None:
        """Cameras first, so that the judging thread finds an end; then what waits is judged. Twice is harmless."""
        for camera in self.cameras.values():
            camera.stop()
        self.slots.close()
        for name, camera in self.cameras.items():
            if not camera.join(JOIN):
                log.error("camera %s: its source does not let go after %g s", name, JOIN)
        self.worker.join()

    def _camera_state(self, state: CameraState) -> None:
        """Called by camera threads: publish, and let the alarm board know, on the thread that owns it."""
        self.state.camera(state)
        if not hasattr(self, "worker"):
            return
        down = state.state in ("down", "failed")
        self._condition(state.camera, "camera", down, state.detail.partition("\n")[0])
        self.delivery.announce(state.camera)
        if state.state in ("ended", "failed") and self.options.until_end:
            self._events.put("")

    def _condition(self, camera: str, kind: Kind, present: bool, detail: str) -> None:
        """Tell an alarm board, on the thread that owns it."""
        self.worker.post(lambda: self.worker.alarm(camera, self.boards[camera].condition(kind, present, detail)))

    def _watch_delivery(self) -> None:
        health = self.delivery.health()
        present = not health.connected or health.outbox.degraded is not None
        if present != self._delivery_trouble:
            self._delivery_trouble = present
            reason = health.outbox.degraded or health.reason
            for name in self.boards:
                self._condition(name, "delivery", present, reason)

    def _delivery_section(self) -> dict[str, Any]:
        health = self.delivery.health()
        return {
            "broker": None if self.broker is None else f"{self.broker.host}:{self.broker.port}",
            "connected": health.connected,
            "reason": health.reason,
            "acknowledged": health.acknowledged,
            "outbox": vars(health.outbox),
        }

    def _publish_metrics(self) -> None:
        snapshot = self.state.snapshot()
        for name in self.cameras:
            fields = {
                "frames": snapshot["frames"],
                "fps": snapshot["fps"],
                "labels": snapshot["cameras"][name]["labels"],
                "latency_ms": snapshot["latency_ms"],
                "slots": snapshot["slots"][name],
                "outbox": snapshot["delivery"]["outbox"]["messages"],
            }
            self.delivery.metrics(name, fields)

    def _reload(self) -> None:
        from .reload import reload

        try:
            reload(self)
        except AndonError as error:
            log.error("the configuration is not reloaded: %s", error)

    def _summary(self) -> dict[str, Any]:
        """The closing summary: what was judged, how fast, what was lost, what it took."""
        snapshot = self.state.snapshot()
        failed = [name for name, camera in self.cameras.items() if camera.state.state == "failed"]
        return {
            "ok": not failed,
            "frames": snapshot["frames"],
            "fps": snapshot["fps"],
            "verdicts": self.state.counts(),
            "unknown": self.state.reasons(),
            "latency_ms": snapshot["latency_ms"],
            "cameras": {
                name: {"state": camera.state.state, "restarts": camera.state.restarts, "skipped": camera.state.skipped}
                for name, camera in self.cameras.items()
            },
            "slots": snapshot["slots"],
            "delivery": snapshot["delivery"],
            "thresholds": snapshot.get("thresholds", {}),
            "bundle": snapshot.get("bundle"),
            "backend": snapshot.get("backend"),
            "variant": snapshot.get("variant"),
            "memory_mb": _peak_memory(),
            "uptime_s": snapshot["uptime_s"],
        }


class _signals:
    """SIGTERM and SIGINT end the run, SIGHUP reloads; the handlers of before come back. Only in the main thread."""

    def __init__(self, events: queue.SimpleQueue[str]):
        self._events = events
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        import threading

        if threading.current_thread() is not threading.main_thread():
            return
        texts = {signal.SIGTERM: "stop SIGTERM", signal.SIGINT: "stop SIGINT", signal.SIGHUP: "reload"}
        for number, text in texts.items():
            self._before[number] = signal.signal(number, lambda *_, text=text: self._events.put(text))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _peak_memory() -> dict[str, float]:
    """Resident memory now and at its peak, in MB."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": round(pages * resource.getpagesize() / 1e6, 1),
        "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
