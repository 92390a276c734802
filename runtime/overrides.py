"""What commands have set: thresholds of a product at one camera or at all, and the product of a camera. Kept over
restarts, every change audited."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..calib.atomic import write_atomic
from ..calib.audit import AuditLog
from .bundle import Bundle
from .errors import ConfigError
from .verdict import timestamp

log = logging.getLogger(__name__)

#: The file in the state folder.
FILE = "overrides.json"
#: Its key for thresholds of one camera, which earlier versions do not know and pass over; left out where there is none.
CAMERAS = "camera_thresholds"


@dataclass(frozen=True)
class ThresholdOverride:
    """A threshold and whose scores it is about.

    model: :attr:`Bundle.model_id`, which a new calibration keeps; of earlier versions one of its former ids. program:
    its name. Both None in files of still earlier versions, which say neither: such a number fits no model.
    """

    value: float
    model: str | None = None
    program: str | None = None

    def fits(self, bundle: Bundle, program: str) -> bool:
        """Whether it is about the scores of this bundle's model under this program."""
        return self.model in (bundle.model_id, *bundle.former_ids) and self.program == program


@dataclass(frozen=True)
class Stored:
    """What a state folder holds: product -> threshold at every camera, camera -> product, and camera -> product ->
    threshold at this one, which stands first."""

    thresholds: Mapping[str, ThresholdOverride] = field(default_factory=dict)
    products: Mapping[str, str] = field(default_factory=dict)
    camera_thresholds: Mapping[str, Mapping[str, ThresholdOverride]] = field(default_factory=dict)

    def of(self, product: str, camera: str | None = None) -> list[ThresholdOverride]:
        """What was set of a product's threshold that may be about a camera, its own first."""
        own = self.camera_thresholds.get(camera, {}) if camera is not None else {}
        return [each[product] for each in (own, self.thresholds) if product in each]

    def each(self) -> Iterator[tuple[str | None, str, ThresholdOverride]]:
        """Camera (None: all), product and threshold of all that was set."""
        for camera, thresholds in [(None, self.thresholds), *self.camera_thresholds.items()]:
            for product, override in thresholds.items():
                yield camera, product, override

    def in_force(self, product: str, bundle: Bundle, program: str, camera: str | None = None) -> float | None:
        """The threshold by command of a product at a camera, None: of all; None if there is none for this model."""
        return next((each.value for each in self.of(product, camera) if each.fits(bundle, program)), None)


class DamagedOverrides(ConfigError):
    """The file is not what was written."""


def read_overrides(folder: Path) -> Stored:
    """What commands have set on the line with this state folder; writes nothing and needs no line.

    Raises:
        DamagedOverrides: the file can be read, but not understood.
        ConfigError: it cannot be read, perhaps only this time.
    """
    path, expected = folder / FILE, "products and thresholds, as commands have set them"
    try:
        content = json.loads(path.read_bytes())
        products = {str(camera): str(product) for camera, product in content["products"].items()}
        own = {str(camera): _thresholds(entries) for camera, entries in content.get(CAMERAS, {}).items()}
        return Stored(_thresholds(content["thresholds"]), products, own)
    except (FileNotFoundError, NotADirectoryError):
        return Stored()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedOverrides(
            f"{path} is damaged",
            found=error,
            expected=expected,
            next_step="it is set aside at the next start, and the commands have to be sent again",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read",
            found=error,
            expected=expected,
            next_step="see that this user may read it; only if it never can be read again, delete it and send the "
            "commands again",
        ) from error


def unusable_state(folder: Path, error: OSError) -> ConfigError:
    """The refusal of a state folder that cannot be made or written."""
    return ConfigError(
        f"the state folder {folder} cannot be used",
        found=error,
        expected="a folder that this user may write",
        next_step="set 'state' in the line configuration, or $STATE_DIRECTORY",
    )


class Overrides:
    """Small, written whole and atomically at each change; the audit trail is ``audit.jsonl`` beside it.

    A threshold is a number on the scale of one model's scores. It is in force for the model and program it was set for
    (:meth:`use` says which runs) and rests under any other, where it could call every part OK.

    Read on the judging thread, changed there too (commands run between frames); :meth:`describe` on any thread.
    """

    def __init__(self, folder: Path):
        """folder: the state directory, made if missing. A damaged file is set aside; then nothing is overridden.

        Raises:
            ConfigError: the folder cannot be used, or the file in it not be read: what commands have set would not be
                in force, and the next one would write over it.
        """
        self._path = folder / FILE
        # Replaced, never changed: other threads read them, and a change that cannot be written must not be in force.
        self._stored = Stored()
        self._used: tuple[Bundle, str] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._load()
            self._audit = AuditLog(folder / "audit.jsonl")
            self._audit.open()
        except OSError as error:
            raise unusable_state(folder, error) from error

    def thresholds(self, camera: str | None = None) -> dict[str, float]:
        """Product -> threshold, of those in force at a camera; None: of those of all cameras."""
        stored, found = self._stored, {}
        own = stored.camera_thresholds.get(camera, {}) if camera is not None else {}
        for product in {**stored.thresholds, **own}:
            value = None if self._used is None else stored.in_force(product, *self._used, camera)
            if value is not None:
                found[product] = value
        return found

    @property
    def stored(self) -> Stored:
        """All of it, thresholds that rest too."""
        return self._stored

    @property
    def products(self) -> Mapping[str, str]:
        """Camera -> product. Read for every frame."""
        return self._stored.products

    def use(self, bundle: Bundle, program: str) -> None:
        """Say whose scores are judged from now on: at the start and after a rebuild.

        Thresholds that were set for another model or program rest until those run again, or until the command
        `threshold` replaces them or takes them back. Each is logged as an error and audited.
        """
        self._used = bundle, program
        for camera, product, override in self._stored.each():
            where = "" if camera is None else f" at {camera}"
            if self._fits(override):
                entry = bundle.threshold(product, program, camera)
                calibrated = "none" if entry is None else f"{entry.value:g}"
                log.warning(
                    "threshold of %s%s is overridden by an earlier command: %g (calibrated: %s); a new calibration of "
                    "this model does not change that, the command threshold with null does",
                    product, where, override.value, calibrated,
                )  # fmt: skip
            else:
                was = f"model {override.model}, program {override.program}" if override.model else "no named model"
                why = f"set for {was}; this is model {bundle.model_id}, program {program}"
                log.error(
                    "threshold %g of %s%s by command is ignored: %s; send the command again if it is meant for this "
                    "model, or with null to forget it",
                    override.value, product, where, why,
                )  # fmt: skip
                self._note("threshold ignored", product, override.value, None, None, cameras=_named(camera), why=why)

    def describe(self) -> dict[str, Any]:
        """What is overridden, as plain JSON values; thresholds with `in_force`."""

        def shown(thresholds: Mapping[str, ThresholdOverride]) -> dict[str, Any]:
            return {name: {**asdict(each), "in_force": self._fits(each)} for name, each in thresholds.items()}

        stored = self._stored
        return {
            "thresholds": shown(stored.thresholds),
            "products": dict(stored.products),
            CAMERAS: {camera: shown(each) for camera, each in stored.camera_thresholds.items()},
        }

    def set_threshold(
        self,
        product: str,
        value: float | None,
        before: float | None,
        by: str | None,
        camera: str | None = None,
        others: Sequence[str] = (),
    ) -> None:
        """Override a product's threshold for the model in use, at a camera or (None) at all, in place of what any of
        them has of its own. A value of None takes the override back, whatever model it is of.

        before: the threshold in force until now. others: the line's other cameras. An override of all cameras that
        one of them takes back becomes the others' own, so that it stays in force there.

        Raises:
            ConfigError: it cannot be written; then nothing has changed.
        """
        stored = self._stored
        model, program = (None, None) if self._used is None else (self._used[0].model_id, self._used[1])
        override = None if value is None else ThresholdOverride(value, model, program)
        everywhere = dict(stored.thresholds)
        own = {name: dict(each) for name, each in stored.camera_thresholds.items()}
        replaced = {name: each[product].value for name, each in own.items() if product in each and camera is None}
        for name in [*own] if camera is None else [camera]:
            own.get(name, {}).pop(product, None)
        if camera is None:
            everywhere.pop(product, None)
            everywhere |= {} if override is None else {product: override}
        elif override is not None:
            own.setdefault(camera, {})[product] = override
        elif (shared := everywhere.pop(product, None)) is not None:
            for name in others:
                present = own.setdefault(name, {}).get(product)
                if present is None or (self._fits(shared) and not self._fits(present)):
                    own[name][product] = shared
        own = {name: each for name, each in own.items() if each}
        self._save(f"threshold of {product}", replace(stored, thresholds=everywhere, camera_thresholds=own))
        where = "all cameras" if camera is None else camera
        log.warning("threshold of %s at %s: %s -> %s (by %s)", product, where, before, value, by or "unknown")
        more = {"replaced": replaced} if replaced else {}
        self._note(
            "threshold", product, before, value, by, cameras=_named(camera), model=model, program=program, **more
        )

    def set_product(self, camera: str, product: str | None, before: str, by: str | None) -> None:
        """Change the product a camera expects; None goes back to the configuration's.

        Raises:
            ConfigError: it cannot be written; then nothing has changed.
        """
        products = {name: each for name, each in self._stored.products.items() if name != camera}
        if product is not None:
            products[camera] = product
        self._save(f"product of {camera}", replace(self._stored, products=products))
        log.warning("product of %s: %s -> %s (by %s)", camera, before, product, by or "unknown")
        self._note("product", camera, before, product, by)

    def close(self) -> None:
        """Close the audit trail."""
        try:
            self._audit.sync()
            self._audit.close()
        except OSError as error:
            log.error("the audit trail %s is not complete: %s", self._audit.path, error)

    def _fits(self, override: ThresholdOverride) -> bool:
        return self._used is not None and override.fits(*self._used)

    def _save(self, what: str, stored: Stored) -> None:
        content = asdict(stored)
        if not stored.camera_thresholds:
            del content[CAMERAS]
        try:
            write_atomic(self._path, json.dumps(content, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise ConfigError(
                f"the {what} stays as it was: {self._path} cannot be written",
                found=error,
                expected="space and permission in the state folder",
                next_step=f"make room in {self._path.parent}, then send the command again",
            ) from error
        self._stored = stored

    def _note(self, what: str, key: str, before: Any, now: Any, by: str | None, **more: Any) -> None:
        """Audit what has happened already: the answer must not say otherwise because the trail cannot be written."""
        entry = {"ts": timestamp(), "what": what, "of": key, "before": before, "now": now, "by": by, **more}
        try:
            self._audit.write(entry)
            self._audit.sync()
        except OSError as error:
            log.error("the audit trail %s cannot be written: %s", self._audit.path, error)

    def _load(self) -> None:
        try:
            self._stored = read_overrides(self._path.parent)
        except DamagedOverrides as error:
            aside = self._path.with_suffix(".damaged")
            self._path.replace(aside)
            found = error.found
            log.error("%s is damaged (%s) and set aside as %s: nothing is overridden", self._path, found, aside.name)
        for camera, product in self._stored.products.items():
            log.warning("product of %s is overridden by an earlier command: %s", camera, product)


def _named(camera: str | None) -> list[str] | str:
    """Cameras in the audit trail."""
    return "all" if camera is None else [camera]


def _thresholds(entries: Any) -> dict[str, ThresholdOverride]:
    """Product -> threshold, of the file."""
    return {str(product): _threshold(entry) for product, entry in entries.items()}


def _threshold(entry: Any) -> ThresholdOverride:
    """One entry of the file; in earlier versions it was the number alone.

    Raises:
        ValueError: not a finite number: it would judge nothing, and no status message could say it.
    """
    if isinstance(entry, int | float):
        entry = {"value": entry, "model": None, "program": None}
    model, program = (None if entry[name] is None else str(entry[name]) for name in ("model", "program"))
    if not math.isfinite(value := float(entry["value"])):
        raise ValueError(f"threshold {value}")
    return ThresholdOverride(value, model, program)
