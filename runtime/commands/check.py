"""`andon check`: does this configuration, its bundle, its cameras and its broker work on this machine?

Nothing is published and no engine is built; a few golden frames go through engines that are there.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from ..errors import AndonError, BundleError, ConfigError, quoted

if TYPE_CHECKING:
    from ..overrides import Stored

#: Golden frames that are replayed; `andon verify` replays all of them, and the decisions.
FEW = 3


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, whether it is good, and what was found."""

    what: str
    ok: bool
    found: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="line configuration (YAML)")
    parser.add_argument("--bundle", type=Path, help="bundle folder or .tar, instead of the configuration's")
    parser.add_argument("--broker", metavar="HOST:PORT", help="instead of the configuration's")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Check and print a table; "ok" False if anything would keep the line from working.

    Raises:
        ConfigError: the configuration itself is refused.
    """
    from ..overrides import Stored, read_overrides
    from ..startup import Options, effective
    from ..whereabouts import state_elsewhere, state_folder

    config = effective(Options(config=args.config, bundle=args.bundle, broker=args.broker))
    findings = [Finding("configuration", True, f"{config.topic}, {len(config.cameras)} cameras")]
    try:
        commanded = read_overrides(state_folder(config, args.config))
    except ConfigError as error:
        commanded = Stored()
        findings.append(Finding("overrides", False, str(error)))
    findings += _bundle(config, commanded)
    findings += [_guard(f"camera {name}", _camera(name, camera)) for name, camera in config.cameras.items()]
    findings.append(_guard("broker", lambda: _broker(config)))
    if config.web is not None:
        findings.append(_guard("live page", lambda: _page(config.web)))
    state = state_folder(config, args.config)
    elsewhere = state_elsewhere(config, args.config, "check")
    remark = f"\n{elsewhere}" if elsewhere else ""
    findings.append(_guard("state folder", lambda: _state(config, state) + remark))
    if (waiting := config.outbox.path) is not None:
        findings.append(_guard("outbox", lambda: _outbox(waiting)))
    if config.evidence is not None:
        pictures = config.evidence.path or state / "evidence"
        findings.append(_guard("evidence folder", lambda: _writable("evidence.path", pictures)))
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        first, *more = finding.found.splitlines()
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<{width}}  {first}")
        for line in more:
            print(f"      {'':<{width}}  {line}")
    return {"ok": all(finding.ok for finding in findings), "findings": [asdict(finding) for finding in findings]}


def _guard(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except AndonError as error:
        return Finding(what, False, str(error))


def _camera(name: str, camera: Any) -> Callable[[], str]:
    from ..source import make_source

    def look() -> str:
        checked = make_source(name, camera)
        said = checked.check()
        source = camera.source
        if source.kind == "usb" and not Path(source.device).exists():
            raise ConfigError(f"{source.device} is not there now", next_step="plug it in; the line waits for it")
        if source.kind == "rtsp":
            _reach(urlsplit(source.url))
            from ..source.decoders import require_stream
            from ..source.pipelines import rtsp_element, rtsp_login

            said += f"\nit sends {require_stream(rtsp_element(source), rtsp_login(name, source))}"
        if source.kind == "file":
            from ..source.decoders import require_frame

            require_frame(checked)
        return "\n".join([said, *(f"warning: {text}" for text in _remarks(source))])

    return look


def _remarks(source: Any) -> list[str]:
    """What the files of a source are like, as train, calibrate and eval say it; and that a pipeline is no camera."""
    from ..dataset import open_dataset
    from ..remarks import remarks, too_dark
    from ..source.playlist import parts

    if source.kind == "gstreamer" and re.search(r"\bvideotestsrc\b", source.pipeline):
        return ["videotestsrc is GStreamer's test picture, not a camera: what it shows is judged like a part"]
    if source.kind == "dataset":
        return remarks(open_dataset(source.data))
    return [text] if source.kind == "folder" and (text := too_dark([p.path for p in parts(source)])) else []


def _reach(address: SplitResult) -> None:
    try:
        socket.create_connection((address.hostname or "", address.port or 554), timeout=3).close()
    except OSError as error:
        raise ConfigError(
            f"{address.hostname}:{address.port or 554} cannot be reached now: {error}",
            next_step="check the camera and the network; the line waits for it",
        ) from error


def _bundle(config: Any, commanded: Stored) -> list[Finding]:
    """The bundle, then what of the configuration rests on it, from the backend to the memory; products and thresholds
    also by command."""
    from ..bundle import Bundle
    from ..startup import bundle_path

    try:
        path = bundle_path(config)
        bundle = Bundle.load(path)
    except AndonError as error:
        return [Finding("bundle", False, str(error))]
    with bundle:
        manifest = bundle.manifest
        engine = _guard("engine", lambda: _engine(config, bundle))
        return [
            Finding("bundle", True, f"{path}: {manifest.method} {bundle.id}, {_model(bundle)}"),
            engine,
            *([_guard("golden set", lambda: _golden(config, bundle))] if engine.ok else []),
            _guard("products", lambda: _products(config, commanded, bundle)),
            _guard("thresholds", lambda: _thresholds(config, commanded, bundle, engine.ok)),
            *_crops(config, commanded, bundle),
            *([_guard("memory", lambda: _memory(config, bundle))] if config.memory.enabled else []),
        ]


def _model(bundle: Any) -> str:
    return f"model {bundle.model_id}, products {', '.join(bundle.manifest.classes)}"


def _engine(config: Any, bundle: Any) -> str:
    from ..startup import require_engine

    backend, variant = require_engine(config, bundle)
    return f"{backend}, {variant}, program {config.program}"


def _golden(config: Any, bundle: Any) -> str:
    """Some golden frames through the engines of this machine, unless those have to be built first."""
    from ..engine.select import open_backend
    from ..program import Program
    from ..replay import golden_size, replay_finite, replay_golden
    from ..startup import require_engine

    shown = quoted(bundle.path)
    verify = f"andon verify --bundle {shown}"
    name, variant = require_engine(config, bundle)
    count = golden_size(bundle)
    comparable = count > 0 and config.program == "default"
    with open_backend(name) as backend:
        plans = getattr(backend, "plans", None)  # TensorRT's
        paths = {stage: bundle.stage_path(stage, variant) for stage in bundle.manifest.stages}
        if plans is not None and not all(plans.has(stage, path, variant) for stage, path in paths.items()):
            return f"NOT CHECKED, as engines must be built first: andon build --bundle {shown}, then {verify}"
        with Program(bundle, backend, variant, config.program) as program:
            checks = replay_golden(program, most=FEW) if comparable else replay_finite(program, FEW)
    if failed := [f"{each.subject}: {each.what} {each.value:.3g}" for each in checks if not each.ok]:
        raise BundleError(
            "the engines of this machine do not give what they should: do not run this bundle",
            found="; ".join(failed),
            expected="what the export recorded, within its limits" if comparable else "numbers",
            next_step=f"{verify} shows the whole table; export the bundle again if it fails elsewhere, too",
        )
    if comparable:
        return f"{min(FEW, count)} of {count} frames give what the export recorded; the rest, and decisions: {verify}"
    why = "the golden set is of the default program" if count else "the bundle has no golden set"
    return f"scores are numbers; NOT CHECKED whether they are the export's ({why})"


def _products(config: Any, commanded: Stored, bundle: Any) -> str:
    """What a line would judge its cameras as: a product by command stands before the configuration's."""
    from ..classifier import classifier_remarks
    from ..products import require_product, require_products

    require_products(config, bundle)
    said = []
    for name, camera in config.cameras.items():
        product = commanded.products.get(name)
        if product is None:
            said.append(f"{name}: {camera.product}")
            continue
        try:
            require_product(name, camera, product, bundle, config.program)
        except AndonError as error:
            raise ConfigError(
                f"camera {name} is judged as product {product} by an earlier command: every verdict would be UNKNOWN",
                found=f"{product} in the state folder, which stands before {camera.product} in the configuration",
                expected=error.expected,
                next_step=f"send the command product to {name} with one of these (docs/mqtt.md)",
            ) from error
        said.append(f"{name}: {product} (by command; configuration: {camera.product})")
    unsure = classifier_remarks(config, bundle, commanded.products)
    return "\n".join([", ".join(said), *(f"warning: {text}" for text in unsure)])


def _thresholds(config: Any, commanded: Stored, bundle: Any, runs: bool) -> str:
    """The thresholds in force and who set them, those that rest, as they are of another model or program, and, where
    it `runs` at all, a warning of those that were calibrated with engines that may decide otherwise."""
    from ..calibrated import unknown_cameras
    from ..linethresholds import threshold_remarks
    from ..thresholds import calibration_step

    products = {name: commanded.products.get(name, camera.product) for name, camera in config.cameras.items()}
    wanted = bundle.manifest.classes if "auto" in products.values() else sorted({*products.values()})
    said, in_force, missing = [], {}, []
    for product in wanted:
        cameras = [name for name, expected in products.items() if expected in (product, "auto")]
        found = {name: _threshold(product, name, config, commanded, bundle) for name in cameras}
        in_force[product] = {value for value, _ in found.values()}
        for value, remark in dict.fromkeys(found.values()):
            of = [name for name, each in found.items() if each == (value, remark)]
            where = "" if len(of) == len(cameras) else f" at {', '.join(of)}"
            if value is None:
                missing.append(product + where)
            else:
                said.append(f"{product} {value:.4g}{where}{remark}")
    own = [error for _, error in threshold_remarks(config, bundle, commanded)]
    if missing:
        raise BundleError(
            f"no threshold for {', '.join(missing)} under program {config.program}: every verdict would be UNKNOWN",
            found="; ".join(f"{each.what} ({each.found})" for each in own) or None,
            next_step=calibration_step(bundle),
        )
    for camera, product, override in commanded.each():  # of what is judged when a command or an image names it
        if product not in in_force if camera is None else products.get(camera) not in (product, "auto"):
            fits = override.fits(bundle, config.program)
            why = "once it is judged" if fits else "is ignored: set for another model or program"
            where = "" if camera is None else f" at {camera}"
            if camera is not None and camera not in products:
                why = "is not used"
                where += ", which this line does not have,"
            said.append(f"{product} ({override.value:.4g} by command{where} {why})")
    other = _other_engines(config, bundle, in_force) if runs else []
    other += unknown_cameras(bundle, config.cameras)
    return "\n".join([", ".join(said), *(f"warning: {text}" for text in (*own, *other))])


def _threshold(product: str, camera: str, config: Any, commanded: Stored, bundle: Any) -> tuple[float | None, str]:
    """The threshold in force of a product at a camera, and who set it."""
    from ..linethresholds import whose
    from ..overrides import Stored
    from ..thresholds import threshold_in_force

    without = threshold_in_force(product, bundle, config.program, config.judge, Stored(), camera)
    by_command = commanded.in_force(product, bundle, config.program, camera)
    remark = whose(product, config, bundle, camera)
    if by_command is not None:
        remark = f" (by command; without it: {'none' if without is None else f'{without:.4g}'})"
    if resting := [each for each in commanded.of(product, camera) if not each.fits(bundle, config.program)]:
        remark += f" ({resting[0].value:.4g} by command is ignored: set for another model or program)"
    return without if by_command is None else by_command, remark


def _other_engines(config: Any, bundle: Any, in_force: dict[str, set[float | None]]) -> list[Any]:
    from ..calibrated import other_engines
    from ..startup import require_engine

    backend, variant = require_engine(config, bundle)
    return other_engines(bundle, [config.program], variant, backend, in_force, config.cameras)


def _crops(config: Any, commanded: Stored, bundle: Any) -> list[Finding]:
    """What is cut out of the pictures, where a camera or the bundle says so, and what the two do not agree on."""
    from ..linecrop import crop_remarks

    said, ok = [], True
    for name, remarks in crop_remarks(config, bundle, commanded.products).items():
        roi = config.cameras[name].roi
        if roi is not None:
            said.append(f"{name}: {list(roi)}")
        for remark in remarks:
            word = {logging.WARNING: "warning", logging.ERROR: "error"}.get(remark.level, name)
            said.append(f"{word}: {remark.text}")
            ok = ok and remark.level < logging.ERROR
    return [Finding("region of interest", ok, "\n".join(said))] if said else []


def _memory(config: Any, bundle: Any) -> str:
    from ..memorybanks import require_memory

    rows = require_memory(config, bundle)
    return "the bundle has none: nothing is learnt" if rows is None else f"learns up to {rows} patches"


def _broker(config: Any) -> str:
    """Reach the broker and be let in, with the configuration's own credentials; publishes nothing."""
    broker = config.broker
    if broker is None:
        return "none: verdicts wait in the outbox"
    if broker.embedded:
        import shutil

        if shutil.which("mosquitto") is None and shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin") is None:
            raise ConfigError("broker.embedded needs mosquitto", next_step="apt-get install -y mosquitto")
        _free("broker.port", "127.0.0.1", broker.port)
        return "embedded mosquitto on loopback"
    from ..mqtt.probe import probe

    probe(broker, f"{config.topic.replace('/', '-')}-check-{socket.gethostname()}")
    return f"{broker.host}:{broker.port} lets us in"


def _page(web: Any) -> str:
    from ..web.server import page_token

    page_token(web)
    _free("web.port", web.host, web.port)
    return f"{web.host}:{web.port}"


def _free(key: str, host: str, port: int) -> None:
    """Refuse a port that is taken, as it is by a line that runs already. 0 is always free."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(
            f"{key}: {host}:{port} cannot be used now",
            found=error.strerror or error,
            expected="an address of this machine with a free port",
            next_step=f"set {key}: 0 for a free port, unless it is this line that runs there",
        ) from error


def _outbox(path: Path) -> str:
    """Refuse a place where the outbox's file cannot be; it is not opened, as a line may have it open."""
    _writable("outbox.path", path.parent)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        what = f"{path} cannot be written by this user" if path.is_file() else f"{path} is not a file"
        raise ConfigError(what, next_step="set 'outbox.path' to a file that can be written, or is not there yet")
    return str(path)


def _writable(key: str, folder: Path) -> str:
    """Refuse a folder that is none or is not this user's; one that is not there yet is made by a run."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        what = f"{folder} cannot be written by this user" if nearest.is_dir() else f"{nearest} is not a folder"
        raise ConfigError(what, next_step=f"set '{key}' to a folder that can be written")
    return str(folder)


def _state(config: Any, folder: Path) -> str:
    """The state folder, and of what an earlier run has left there what this one opens to write."""
    used = [folder, folder / "memory"] if config.memory.enabled or config.memory.drift.enabled else [folder]
    for part in used:
        _writable("state", part)
        audit = part / "audit.jsonl"
        if audit.exists() and not (audit.is_file() and os.access(audit, os.R_OK | os.W_OK)):
            raise ConfigError(
                f"{audit} cannot be read and written by this user",
                next_step=f"give it to the user that runs the line, or set 'state' to another folder than {folder}",
            )
    return str(folder)
