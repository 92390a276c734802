"""The kept figures of docs/results.json: one record per measured number, merged by key and written atomically.

A record is ``{method, set, product, shots, seed, metric, value, command}`` plus optional further fields (setting, sd,
n, date). Two records with the same key are the same measurement; the newer one replaces the older.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError

Record = Mapping[str, Any]

#: Fields every record has; `shots`, `seed` and `product` may be None (a full set, a mean over draws, all products).
REQUIRED = ("method", "set", "product", "shots", "seed", "metric", "value", "command")
#: Fields that tell one measurement from another; `setting` is optional (e.g. "online q=0.8 farthest, 10 % anomalies").
KEY = ("method", "set", "product", "shots", "seed", "metric", "setting")


def _key(record: Record) -> tuple[str, ...]:
    return tuple(json.dumps(record.get(field), sort_keys=True) for field in KEY)


def _sort_key(record: Record) -> tuple[str, ...]:
    """Readable order: method, set, product, setting, then the rest."""
    order = ("method", "set", "product", "setting", "shots", "seed", "metric")
    return tuple(str(record.get(field, "")) for field in order)


def _check(record: Record) -> None:
    missing = [field for field in REQUIRED if field not in record]
    if missing:
        raise ConfigError(
            "incomplete result record",
            found=dict(record),
            expected=f"fields {', '.join(REQUIRED)}",
            next_step=f"add {', '.join(missing)}",
        )
    value = record["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(
            "result record without a finite value",
            found=value,
            expected="a finite number",
            next_step=f"measure again: {record['command']}",
        )


def load_results(path: Path) -> list[dict[str, Any]]:
    """Records of a results file; an absent file has none.

    Raises:
        ConfigError: the file is not a JSON list of complete records.
    """
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not JSON", found=str(error), expected="a list of records", next_step="restore it from git"
        ) from error
    if not isinstance(records, list):
        raise ConfigError(f"{path} is not a list", found=type(records).__name__, expected="a list of records")
    for record in records:
        _check(record)
    return records


def merge_results(path: Path, new: Iterable[Record]) -> list[dict[str, Any]]:
    """Merge `new` records into the file by key and write it atomically; returns all records.

    Processes that merge at the same time wait for each other (a lock on the folder).

    Raises:
        ConfigError: a record is incomplete or its value is not a finite number; the file is left as it was.
    """
    new = list(new)  # a generator may train for minutes: not under the lock
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        merged = {_key(record): dict(record) for record in load_results(path)}
        for record in new:
            _check(record)
            merged[_key(record)] = dict(record)
        records = sorted(merged.values(), key=_sort_key)
        text = "[\n" + ",\n".join(json.dumps(record, allow_nan=False) for record in records) + "\n]\n"
        _replace(path, text)
        return records
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
