"""The thresholds of a line's configuration against its bundle: which are in force, and what is said of them.

A threshold is a number on the scale of one model's scores. One that names its model is in force under that model alone,
as a threshold by command is (overrides.py). A plain number is in force under whatever model runs, where it could call
every part OK: that is said at every start, reload and rebuild and by `andon check`, with the line to write instead, and
the command `rebuild` carries it over to no other model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from .bundle import Bundle
from .errors import AndonError, BundleError, ConfigError
from .lineconfig import JudgeConfig, LineConfig, ModelThreshold
from .overrides import Stored, ThresholdOverride
from .promise import promise

log = logging.getLogger("andon.line")
Own = float | ModelThreshold
KEY, PIXEL = "judge.thresholds", "judge.pixel_threshold"


def in_model(own: Own | None, bundle: Bundle, program: str) -> float | None:
    """The configuration's number, as far as it is for this model and program; None: the bundle's is in force."""
    if isinstance(own, ModelThreshold):
        return own.value if ThresholdOverride(own.value, own.model, own.program).fits(bundle, program) else None
    return own


def require_model(settings: JudgeConfig, present: Bundle, found: Bundle, program: str) -> None:
    """Refuse another model in place of the present one while plain numbers would be carried over to it.

    Raises:
        BundleError: naming them, and how to say which model they are for.
    """
    plain = {f"{KEY}.{product}": own for product, own in settings.thresholds.items() if isinstance(own, float)}
    if isinstance(settings.pixel_threshold, float):
        plain[PIXEL] = settings.pixel_threshold
    if not plain or found.model_id == present.model_id:
        return
    named = "; ".join(_line(key, own, present, program) for key, own in plain.items())
    raise BundleError(
        f"{found.path} is another model, and {', '.join(plain)} of the configuration would be in force under it, too",
        found=f"model {found.model_id}, whose scores may have another scale, and plain numbers: "
        + ", ".join(f"{key} {own:g}" for key, own in plain.items()),
        expected=f"thresholds that name their model, as {present.model_id}, which runs",
        next_step=f"write {named}, or remove what is not needed; reload the line (SIGHUP), then send rebuild again: "
        "the new model is judged by its own thresholds",
    )


def describe(config: LineConfig, bundle: Bundle, commanded: Stored) -> dict[str, Any]:
    """What the configuration sets, as plain JSON values. model: null for whatever model runs; in_force: false also
    where thresholds by command stand before it at every camera."""

    def entry(own: Own, stands: bool) -> dict[str, Any]:
        named = own.model_dump() if isinstance(own, ModelThreshold) else {"value": own, "model": None, "program": None}
        return {**named, "in_force": stands and in_model(own, bundle, config.program) is not None}

    pixel = config.judge.pixel_threshold
    return {
        "thresholds": {
            product: entry(own, _uncommanded(product, config, bundle, commanded))
            for product, own in config.judge.thresholds.items()
        },
        "pixel_threshold": None if pixel is None else entry(pixel, True),
    }


def standing(config: LineConfig, bundle: Bundle, commanded: Stored, camera: str) -> dict[str, float]:
    """Those of them that are in force at a camera: product -> threshold."""
    own = {product: in_model(each, bundle, config.program) for product, each in config.judge.thresholds.items()}
    return {
        product: value
        for product, value in own.items()
        if value is not None and commanded.in_force(product, bundle, config.program, camera) is None
    }


def threshold_remarks(config: LineConfig, bundle: Bundle, commanded: Stored) -> Iterator[tuple[int, AndonError]]:
    """What is to be said of the configuration's thresholds, each with its level of logging: an error of one that is
    ignored, as it was set for another model or program; a warning of a plain number that stands before one of the
    bundle's, or whose bundle may be another tomorrow."""
    judge, program = config.judge, config.program
    for product, own in judge.thresholds.items():
        if _uncommanded(product, config, bundle, commanded):
            entries = {
                f" at {camera}" if camera else "": entry
                for camera, of, under, entry in bundle.manifest.calibrated()
                if (of, under) == (product, program) and (camera is None or camera in config.cameras)
            }
            kept = "; ".join(f"{entry.value:.6g}{at}, {promise(entry)}" for at, entry in entries.items()) or None
            unkept = any(entry.promises and entry.value != own for entry in entries.values())
            broken = "its promise does not hold, and " * unkept
            yield from _remarks(f"{KEY}.{product}", own, kept, broken, config, bundle)
    if judge.pixel_threshold is not None:
        pixels = [
            f"{entry.pixel:.6g} of {product}{'' if camera is None else f' at {camera}'}"
            for camera, product, under, entry in bundle.manifest.calibrated()
            if entry.pixel is not None and under == program and (camera is None or camera in config.cameras)
        ]
        yield from _remarks(PIXEL, judge.pixel_threshold, ", ".join(pixels) or None, "", config, bundle)


def log_thresholds(config: LineConfig, bundle: Bundle, commanded: Stored) -> None:
    """Say that in the log, and which thresholds in force promise nothing, as somebody has chosen them."""
    for level, said in threshold_remarks(config, bundle, commanded):
        log.log(level, "%s", "; ".join(line.strip() for line in str(said).splitlines()))
    own = describe(config, bundle, commanded)["thresholds"]
    for product, each in own.items():
        if each["in_force"] and each["model"] is not None:
            told = "the configuration's for this model: it promises no false-alarm rate"
            log.info("threshold of %s: %g, %s", product, each["value"], told)
    for camera, product, program, entry in bundle.manifest.calibrated():
        if entry.promises or program != config.program or not (camera is None or camera in config.cameras):
            continue
        by_command = commanded.in_force(product, bundle, program, camera) is not None
        if not by_command and in_model(config.judge.thresholds.get(product), bundle, program) is None:
            at = "" if camera is None else f" at {camera}"
            log.info("threshold of %s%s: %g, %s", product, at, entry.value, promise(entry))


def whose(product: str, config: LineConfig, bundle: Bundle, camera: str) -> str:
    """Who set a product's threshold at a camera, as `andon check` shows it, commands aside; empty: calibration."""
    own = config.judge.thresholds.get(product)
    entry = bundle.threshold(product, config.program, camera)
    if in_model(own, bundle, config.program) is not None:
        return " (by the configuration" + (")" if entry is None else f"; without it: {entry.value:.4g})")
    alone = entry is not None and entry is bundle.own_threshold(product, config.program, camera)
    hand = " (its own)" if alone else ""
    hand += " (set by hand in the bundle: it promises nothing)" if entry is not None and not entry.promises else ""
    if isinstance(own, ModelThreshold):
        hand += f" ({own.value:.4g} of the configuration is ignored: set for another model or program)"
    return hand


def _uncommanded(product: str, config: LineConfig, bundle: Bundle, commanded: Stored) -> bool:
    """Whether there is a camera at which no command's threshold of this product is in force."""
    return any(commanded.in_force(product, bundle, config.program, name) is None for name in config.cameras)


def _remarks(
    key: str, own: Own, kept: str | None, broken: str, config: LineConfig, bundle: Bundle
) -> Iterator[tuple[int, AndonError]]:
    """kept: what the bundle has in place of it. broken: the promise that does not hold with it, empty without one."""
    value = own.value if isinstance(own, ModelThreshold) else own
    step = f"write {_line(key, value, bundle, config.program)}, if it is meant for this model's scores, or remove it"
    if isinstance(own, ModelThreshold):
        if in_model(own, bundle, config.program) is not None:
            return
        what = f"{key} is ignored: it was set for another model or program"
        found = f"{value:g} for model {own.model}, program {own.program}"
        expected = f"model {bundle.model_id}, program {config.program}, which run; in force: {kept or 'none'}"
        yield logging.ERROR, ConfigError(what, found=found, expected=expected, next_step=step)
        return
    name = "" if config.bundle is None else config.bundle.name
    if kept is None and "*" not in name:
        return
    before = "" if kept is None else ", before the bundle's own"
    what = f"{key} is a plain number, in force under whatever model runs{before}: {broken}on another model's scale "
    what += "every part could be OK"
    found = f"{value:g}" + (f", and bundle {name} means another model after the next export" if "*" in name else "")
    expected = kept or "a threshold that names its model"
    yield logging.WARNING, ConfigError(what, found=found, expected=expected, next_step=step)


def _line(key: str, value: float, bundle: Bundle, program: str) -> str:
    """The line of the configuration, in YAML, that says the number is for this model."""
    parent, name = key.split(".", 2)[:2] if key == PIXEL else (KEY, key.removeprefix(f"{KEY}."))
    shown = name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name)
    more = "" if program == "default" else f", program: {program}"
    return f'{shown}: {{value: {value!r}, model: "{bundle.model_id}"{more}}} (in {parent})'
