"""TensorRT plans: built on the device they run on, kept with a sidecar that says what they are for.

A plan fits one ONNX file, one set of build options, one way of building (network.RECIPE), one TensorRT version and one
kind of GPU; its name is the hash of those. A stage without a fitting plan is built and the reason logged. Files are
written atomically, each as soon as it is built, so an interrupted build goes on at the next stage. The folder is kept
to a limit (diskcache.py): the plans that were not used for longest go, never those of a process that has them open.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..diskcache import Entry, Lease, limit, prune, remove_unfinished, used
from ..errors import EngineError
from ..manifest import Variant
from .network import RECIPE, after_failure, make_config, parse_network
from .progress import BuildProgress
from .target import BuildOptions, Target
from .trt import Trt, start

log = logging.getLogger(__name__)
#: Bytes of plans that are kept if ANDON_CACHE_LIMIT is not set; a device's disk has less room than a workstation's.
PLANS_LIMIT = "4 GB"


@dataclass(frozen=True)
class Built:
    """What became of a stage's plan. seconds: of the build; 0 if it was there. reason: why it was built.

    kept: False where the disk refused it.
    """

    stage: str
    variant: str
    plan: Path
    bytes: int
    seconds: float = 0.0
    reason: str = ""
    trtexec: str = ""
    dla_fallback: tuple[str, ...] = ()
    kept: bool = True


class PlanStore:
    """Plans in a folder. Context: one TensorRT module, logger and target.

    options: None: for each stage those that :meth:`keep_options` kept last, else the default ones.

    Attributes:
        built: what `load` did, in order.

    Raises:
        ConfigError: $ANDON_CACHE_LIMIT is not a size.
        EngineError: TensorRT does not start.
    """

    def __init__(self, trt: Trt, logger: Any, folder: Path, target: Target, options: BuildOptions | None):
        self._trt = trt
        self._logger = logger
        self._folder = folder
        self._target = target
        self._options = options
        self._runtime = start(trt.Runtime, logger)
        self._most = limit(PLANS_LIMIT)
        self._leases: list[Lease] = []
        self._grown = False
        self.force = False
        self.built: list[Built] = []

    def load(self, stage: str, onnx: Path, variant: Variant) -> Any:
        """The deserialised plan of a stage, built if there is none that fits.

        Raises:
            EngineError: TensorRT refuses the stage, with its own message; or a fresh plan does not deserialise.
        """
        model = onnx.read_bytes()
        options = self._options_for(stage, variant, model)
        wanted = self._wanted(stage, variant, model, options)
        path = self._path(wanted)
        line = self.trtexec(stage, onnx, path, options)
        self._hold(path)
        plan, reason = self._existing(path, wanted)
        if plan is not None:
            used(path)
            self.built.append(Built(stage, variant, path, path.stat().st_size, trtexec=line))
            return plan
        log.info("stage %s %s: building its plan: %s", stage, variant, reason)
        remove_unfinished(self._folder.glob("*.tmp"))
        started = time.monotonic()
        serialized, fallback = self._build(stage, variant, model, onnx.name, options)
        seconds = time.monotonic() - started
        sidecar = {**wanted, "sha256": hashlib.sha256(serialized).hexdigest(), "seconds": seconds}
        # Plan first, sidecar last: a plan without a sidecar is never used.
        kept = _keep((path, serialized), (path.with_suffix(".json"), (json.dumps(sidecar, indent=1) + "\n").encode()))
        self._hold(path)
        self._grown = True
        plan = self._runtime.deserialize_cuda_engine(serialized)
        if plan is None:
            raise EngineError(
                f"stage {stage}: the plan that was just built does not deserialise",
                found=self._logger.take(),
                expected=f"a plan for {self._target.gpu}",
                next_step="andon doctor",
            )
        self.built.append(Built(stage, variant, path, len(serialized), seconds, reason, line, fallback, kept))
        return plan

    def has(self, stage: str, onnx: Path, variant: Variant) -> bool:
        """Whether there is a plan for this stage on this machine; `load` would build it otherwise."""
        model = onnx.read_bytes()
        wanted = self._wanted(stage, variant, model, self._options_for(stage, variant, model))
        return self._existing(self._path(wanted), wanted)[0] is not None

    def keep_options(self, stage: str, onnx: Path, variant: Variant) -> bool:
        """Let whoever opens this stage without options of its own have these; whether the disk took them."""
        model = onnx.read_bytes()
        options = self._options_for(stage, variant, model).of(stage)
        return _keep((self._options_path(stage, variant, model), (json.dumps(options) + "\n").encode()))

    def _options_for(self, stage: str, variant: str, model: bytes) -> BuildOptions:
        if self._options is not None:
            return self._options
        path = self._options_path(stage, variant, model)
        try:
            return BuildOptions.from_stage(stage, json.loads(path.read_text()))
        except FileNotFoundError:
            return BuildOptions()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be used, stage %s has the default build options: %s", path, stage, error)
            return BuildOptions()

    def _options_path(self, stage: str, variant: str, model: bytes) -> Path:
        """Of one ONNX file and kind of GPU; a plan for another TensorRT is built with the same options."""
        subject = {"onnx": hashlib.sha256(model).hexdigest(), "gpu": self._target.gpu, "sm": self._target.sm}
        return self._folder / f"{stage}.{variant}.{_digest(subject)[:16]}.options"

    def _path(self, wanted: dict[str, Any]) -> Path:
        return self._folder / f"{wanted['stage']}.{wanted['variant']}.{_digest(wanted)[:16]}.plan"

    def trtexec(self, stage: str, onnx: Path, plan: Path, options: BuildOptions) -> str:
        """The trtexec line that builds the same plan, as a shell takes it."""
        words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}", "--noTF32"]
        words += [f"--memPoolSize=workspace:{options.workspace_mb}", f"--timingCacheFile={self._timing_cache()}"]
        if (10, 0) <= _version(self._target.tensorrt) < (11, 0):
            words.append("--stronglyTyped")
        elif _version(self._target.tensorrt) < (10, 0):
            words += ["--fp16", "--int8", "--precisionConstraints=obey"]
        if options.optimization_level is not None:
            words.append(f"--builderOptimizationLevel={options.optimization_level}")
        if stage in options.dla:
            words += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
        return shlex.join(words)

    def prune(self) -> None:
        """Keep the folder to its limit if a plan was built since; to be called when no plan is still to be loaded,
        for what was loaded is held and what comes next may be the longest unused."""
        if self._grown:
            self._grown = False
            prune(self._entries(), self._most, f"plans in {self._folder}", log.warning)

    def _entries(self) -> Iterator[Entry]:
        for plan in self._folder.glob("*.plan"):
            sidecar = plan.with_suffix(".json")
            with suppress(OSError):
                stat = plan.stat()
                size = stat.st_size + (sidecar.stat().st_size if sidecar.exists() else 0)
                yield Entry(stat.st_mtime, size, plan, (sidecar, plan))

    def _hold(self, plan: Path) -> None:
        """Keep the plan from being removed as long as this store is open; nothing where there is none."""
        with suppress(OSError):
            self._leases.append(Lease(plan, create=False))

    def close(self) -> None:
        """Let go of the plans and the TensorRT runtime."""
        self.prune()
        self._leases.clear()
        self._runtime = None

    def _wanted(self, stage: str, variant: str, model: bytes, options: BuildOptions) -> dict[str, Any]:
        return {
            "stage": stage,
            "variant": variant,
            "onnx": hashlib.sha256(model).hexdigest(),
            "options": options.of(stage),
            "recipe": RECIPE,
            **asdict(self._target),
        }

    def _existing(self, path: Path, wanted: dict[str, Any]) -> tuple[Any, str]:
        """The plan at `path`, or None and why it cannot be used."""
        if self.force:
            return None, "asked for"
        if not path.is_file():
            return None, self._why_none(path, wanted)
        sidecar = _read_sidecar(path)
        try:
            serialized = path.read_bytes()
        except OSError as error:  # built by another user, as with sudo
            return None, f"it cannot be read: {error.strerror}"
        if sidecar is None or {k: sidecar.get(k) for k in wanted} != wanted:
            return None, "its sidecar is missing or says something else"
        if hashlib.sha256(serialized).hexdigest() != sidecar.get("sha256"):
            return None, "the plan was changed or cut short"
        plan = self._runtime.deserialize_cuda_engine(serialized)
        if plan is None:
            return None, f"it does not deserialise: {self._logger.take()}"
        return plan, ""

    def _why_none(self, path: Path, wanted: dict[str, Any]) -> str:
        """What differs from the newest plan of the same stage and variant."""
        pattern = f"{wanted['stage']}.{wanted['variant']}.*.plan"
        others = sorted(self._folder.glob(pattern), key=_modified, reverse=True)
        for other in others:
            sidecar = _read_sidecar(other)
            if sidecar is not None:
                differs = [f"{k} was {sidecar.get(k, 'not recorded')}" for k in wanted if sidecar.get(k) != wanted[k]]
                return "there is one for something else: " + "; ".join(differs)
        return "there is none yet"

    def _build(
        self, stage: str, variant: str, model: bytes, name: str, options: BuildOptions
    ) -> tuple[bytes, tuple[str, ...]]:
        trt, logger = self._trt, self._logger
        builder = start(trt.Builder, logger)
        network, parser = parse_network(trt, builder, logger, model, name)
        config, fallback = make_config(trt, builder, network, options, stage)
        cache = self._attach_timing_cache(config)
        with BuildProgress(trt, f"{stage} {variant}") as progress:
            progress.attach(config)
            serialized = builder.build_serialized_network(network, config)
        if progress.interrupted:
            raise KeyboardInterrupt
        if serialized is None:
            said = logger.take()
            raise EngineError(
                f"TensorRT cannot build stage {stage} ({name})",
                found=said,
                expected=f"a stage that TensorRT {self._target.tensorrt} builds on {self._target.gpu}",
                next_step=after_failure(said, variant, options.workspace_mb),
            )
        self._save_timing_cache(cache)
        del parser
        return bytes(serialized), fallback

    def _timing_cache(self) -> Path:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self._target.gpu).strip("-").lower()
        return self._folder / f"timing.{self._target.tensorrt}.{gpu}.cache"

    def _attach_timing_cache(self, config: Any) -> Any:
        path = self._timing_cache()
        try:
            known = path.read_bytes()
        except OSError:  # there is none, or it is another user's
            known = b""
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):
            log.info("the timing cache %s is of another device and is started afresh", path.name)
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def _save_timing_cache(self, cache: Any) -> None:
        _keep((self._timing_cache(), bytes(cache.serialize())))


def _version(text: str) -> tuple[int, int]:
    major, minor = (int(part) for part in text.split(".")[:2])
    return major, minor


def _modified(path: Path) -> float:
    """When a file was written; 0 if another process has removed it since it was listed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_sidecar(plan: Path) -> dict[str, Any] | None:
    try:
        sidecar = json.loads(plan.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return sidecar if isinstance(sidecar, dict) else None


def _keep(*files: tuple[Path, bytes]) -> bool:
    """Write them; what took minutes to build is used although the disk refuses it. Whether it took all."""
    try:
        for path, content in files:
            _replace(path, content)
    except OSError as error:
        log.warning("%s cannot be kept, and is built again when it is needed again: %s", path, error)
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_SH)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk half a plan would lie there for good
