"""What an evaluation decided of each image, as a file for a person or a script to go through."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .evaluation import Judged
from .verdict import number

KINDS = (".jsonl", ".csv")


def require_kind(path: Path) -> None:
    """Refuse a file whose name does not say how it is to be written.

    Raises:
        ConfigError: naming what does.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(
            f"--out {path}: in what form?",
            found=path.suffix or "a name without an ending",
            expected="FILE.jsonl, a JSON object for each image, or FILE.csv, a table",
            next_step=f"--out {path.with_suffix('.jsonl')} or --out {path.with_suffix('.csv')}",
        )


def write_images(
    path: Path,
    judged: Sequence[Judged],
    bundle: str | None,
    program: str | None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Write a line for each image, in the order they were judged.

    bundle, program: None where it is not known. parts: which part each shows, where that is known.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [row(j, bundle, program, None if parts is None else parts.get(j.sample.key)) for j in judged]
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in rows)
            return
        table = csv.writer(file)
        table.writerow(rows[0] if rows else ())
        for each in rows:
            table.writerow([json.dumps(v) if isinstance(v, list) else v for v in each.values()])


def row(judged: Judged, bundle: str | None, program: str | None, part: str | None = None) -> dict[str, Any]:
    """What is written of an image; null (in a table: empty) is what it does not have.

    key: its path in the set. defect: `good` or what the set says, null without labels. label, reason (of UNKNOWN),
    score, threshold, regions (of NG; bbox as x, y, width, height and area in pixels of the picture, peak): as in a
    verdict. judged_as: the product whose threshold it was held against. predicted: the one that the classifier sees.
    """
    sample = judged.sample
    return {
        "key": sample.key,
        "product": sample.product,
        "defect": sample.label or None,
        "label": judged.label,
        "reason": judged.reason or None,
        "score": number(judged.score),
        "threshold": number(judged.threshold),
        "regions": [{"bbox": [*r.bbox], "area": r.area, "peak": number(r.peak)} for r in judged.regions],
        "judged_as": judged.product,
        "predicted": judged.predicted,
        "part": part,
        "bundle": bundle,
        "program": program,
    }
