"""What commands have set: thresholds per product, product per camera. Kept over restarts, every change audited."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..calib.snapshots import AuditLog, write_atomic
from .errors import ConfigError
from .verdict import timestamp

log = logging.getLogger(__name__)


class Overrides:
    """Small, written whole and atomically at each change; the audit trail is ``audit.jsonl`` beside it.

    Read on the judging thread, changed there too (commands run between frames).
    """

    def __init__(self, folder: Path):
        """folder: the state directory, made if missing. A damaged file is set aside; then nothing is overridden.

        Raises:
            ConfigError: the folder cannot be used.
        """
        self._path = folder / "overrides.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._audit = AuditLog(folder / "audit.jsonl")
        except OSError as error:
            raise ConfigError(
                f"the state folder {folder} cannot be used",
                found=error,
                expected="a folder that this user may write",
                next_step="set 'state' in the line configuration, or $STATE_DIRECTORY",
            ) from error
        self._thresholds: dict[str, float] = {}
        self._products: dict[str, str] = {}
        if self._path.exists():
            self._load()

    @property
    def thresholds(self) -> MappingProxyType[str, float]:
        """Product -> threshold."""
        return MappingProxyType(self._thresholds)

    @property
    def products(self) -> MappingProxyType[str, str]:
        """Camera -> product."""
        return MappingProxyType(self._products)

    def set_threshold(self, product: str, value: float | None, before: float | None, by: str | None) -> None:
        """Override a product's threshold; None takes the override back. `before` is the one in force until now."""
        self._change("threshold", self._thresholds, product, value, before, by)

    def set_product(self, camera: str, product: str | None, before: str, by: str | None) -> None:
        """Change the product a camera expects; None goes back to the configuration's."""
        self._change("product", self._products, camera, product, before, by)

    def close(self) -> None:
        """Close the audit trail."""
        self._audit.sync()
        self._audit.close()

    def _change(self, what: str, table: dict[str, Any], key: str, value: Any, before: Any, by: str | None) -> None:
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
        content = {"thresholds": self._thresholds, "products": self._products}
        write_atomic(self._path, json.dumps(content, indent=1, sort_keys=True).encode())
        self._audit.write({"ts": timestamp(), "what": what, "of": key, "before": before, "now": value, "by": by})
        self._audit.sync()
        log.warning("%s of %s: %s -> %s (by %s)", what, key, before, value, by or "unknown")

    def _load(self) -> None:
        try:
            content = json.loads(self._path.read_bytes())
            self._thresholds = {str(k): float(v) for k, v in content["thresholds"].items()}
            self._products = {str(k): str(v) for k, v in content["products"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            aside = self._path.with_suffix(".damaged")
            self._path.replace(aside)
            self._thresholds, self._products = {}, {}
            log.error("%s is damaged (%s) and set aside as %s: nothing is overridden", self._path, error, aside.name)
        for kind, table in (("threshold", self._thresholds), ("product", self._products)):
            for key, value in table.items():
                log.warning("%s of %s is overridden by an earlier command: %s", kind, key, value)
