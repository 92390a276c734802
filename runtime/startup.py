"""Before a line runs: the command line's values in the configuration, which bundle, which folder, which precision."""

from __future__ import annotations

import fcntl
import logging
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .alarm import AlarmRule
from .bundle import Bundle
from .engine.probe import require_tensorrt, tensorrt_missing
from .errors import BundleError, ConfigError
from .lineconfig import AlarmConfig, LineConfig, load_line
from .manifest import Variant
from .memorybanks import require_memory
from .newest import may_be_bundle, newest_first
from .overrides import unusable_state
from .products import require_products
from .whereabouts import broker_at
from .wiring import wire

log = logging.getLogger("andon.line")


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
        changes["broker"] = broker_at(options.broker, config.broker)
    if options.until_end and (endless := [name for name, camera in config.cameras.items() if camera.endless]):
        raise ConfigError(
            "--until-end needs sources that end",
            found=f"endless: {', '.join(endless)}",
            next_step="use --max-frames, or stop it with SIGTERM",
        )
    return config.model_copy(update=changes)


def bundle_path(config: LineConfig) -> Path:
    """The bundle that is meant; with a * in its name the newest export that matches.

    Links are followed here, at every look: what is loaded and opened then is one bundle, wherever they point next.

    Raises:
        ConfigError: none is named, or none matches.
    """
    return _matching(config)[0].resolve()


def _matching(config: LineConfig) -> list[Path]:
    """The bundle that is named, or those that a * in its name may mean, the newest first; at least one."""
    if config.bundle is None:
        raise ConfigError("no bundle is named", next_step="set 'bundle' in the configuration, or give --bundle")
    if "*" not in config.bundle.name:
        return [config.bundle]
    matches = list(config.bundle.parent.glob(config.bundle.name))
    bundles = [path for path in matches if may_be_bundle(path)]
    if not bundles:
        raise ConfigError(
            f"no bundle matches {config.bundle}",
            found=", ".join(sorted(path.name for path in matches)[:5]) or None,
            expected="a folder with a manifest.json, or a .tar of one" if matches else None,
            next_step="andon export --method METHOD",
        )
    return newest_first(bundles)


def _load_whole(config: LineConfig) -> Bundle:
    """The newest bundle that is whole: a line that ran must not stay down because a newer one was half copied.

    Raises:
        BundleError: none is; about the newest.
    """
    refused: list[tuple[Path, BundleError | PermissionError]] = []
    for path in _matching(config):
        try:
            bundle = Bundle.load(path.resolve())
        except (BundleError, PermissionError) as error:
            refused.append((path, error))
            continue
        for newer, why in refused:
            log.error(
                "%s is newer and cannot be used, the line runs with %s; mend it, then send the command rebuild: %s",
                newer, path, str(why).replace("\n", "; "),
            )  # fmt: skip
        return bundle
    raise refused[0][1]


def open_bundle(
    config: LineConfig, *, starting: bool = False, further: Callable[[Bundle], None] | None = None
) -> Bundle:
    """The bundle that is meant, loaded and held against the configuration; only its engines are not opened yet.

    starting: the line has none yet. Then, with a * in the name, an older bundle is taken if the newest is damaged or
    not wholly copied; a line that runs keeps what it has.
    further: what else may refuse it.

    Raises:
        AndonError: it cannot be found, is damaged, or does not fit the configuration or this machine.
    """
    bundle = _load_whole(config) if starting else Bundle.load(bundle_path(config))
    try:
        require_engine(config, bundle)
        require_products(config, bundle)
        require_memory(config, bundle)
        if further is not None:
            further(bundle)
    except BaseException:
        bundle.close()
        raise
    return bundle


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold the state folder, made if missing, for this run alone: overrides, memory and alarms have one writer.

    Raises:
        ConfigError: the folder cannot be used, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("w")
    except OSError as error:
        raise unusable_state(folder, error) from error
    with lock:
        _hold(lock, folder, "stop the other process, or give this line its own 'state' folder")
        yield


@contextmanager
def line_at_rest(folder: Path, next_step: str) -> Iterator[None]:
    """Keep a line of this state folder from running meanwhile. Nothing is made: where no line has run none is kept.

    next_step: what to do while one runs.

    Raises:
        ConfigError: a run holds the folder.
    """
    try:
        lock = _opened(folder / "run.lock")
    except OSError:  # another user's: then the camera itself says that it is in use
        yield
        return
    with lock:
        _hold(lock, folder, next_step)
        yield


def _opened(lock: Path) -> IO[str]:
    """Open a lock file that is there; a new one could be of a user whose file the line's cannot open."""
    try:
        return lock.open("r+")
    except PermissionError:
        return lock.open()  # enough for a lock, but on NFS


def _hold(lock: IO[str], folder: Path, next_step: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"the state folder {folder} is in use",
            found=f"another process holds it ({error.strerror})",
            expected="one `andon run` or `andon record` per state folder",
            next_step=next_step,
        ) from error


def alarm_rule(config: AlarmConfig) -> AlarmRule:
    """The rule of a configuration."""
    return AlarmRule(**config.model_dump())


def pick_variant(config: LineConfig, bundle: Bundle, backend: str) -> Variant:
    """The precision to run on a backend; auto is fp16 on TensorRT where the bundle has it, else fp32."""
    if config.variant != "auto":
        return config.variant
    return "fp16" if backend == "tensorrt" and "fp16" in bundle.manifest.variants else "fp32"


def require_engine(config: LineConfig, bundle: Bundle) -> tuple[str, Variant]:
    """The backend and the precision that a line will run the bundle with.

    Raises:
        ConfigError: the bundle has no such program or precision.
        EngineError: the backend cannot be used on this machine.
    """
    wire(bundle.manifest, config.program)
    if config.backend == "tensorrt":
        require_tensorrt("set backend: onnxruntime, or andon run with --backend onnxruntime")
    backend = config.backend if config.backend != "auto" else "onnxruntime" if tensorrt_missing() else "tensorrt"
    variant = pick_variant(config, bundle, backend)
    for stage in bundle.manifest.stages:
        bundle.stage_path(stage, variant)
    return backend, variant


class Signals:
    """SIGTERM and SIGINT end the run, SIGHUP reloads; the handlers of before come back. Only in the main thread."""

    def __init__(self, events: queue.SimpleQueue[str]):
        self._events = events
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        texts = {signal.SIGTERM: "stop SIGTERM", signal.SIGINT: "stop SIGINT", signal.SIGHUP: "reload"}
        for number, text in texts.items():
            self._before[number] = signal.signal(number, lambda *_, text=text: self._events.put(text))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
