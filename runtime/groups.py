"""Which pictures show the same part: several exposures, a burst, the frames of a video.

Such pictures are nearly one. Were some of them trained on and the others held out, a threshold set on those would
promise fewer false alarms than new parts raise; and ten pictures of one part say no more about others than one does.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .dataset import Sample
from .errors import ConfigError, quoted

TABLE = ".csv"
_COLUMNS = ("image", "part")
HELP = (
    "which pictures show one part: a regular expression that finds the part in an image's path in the set, as in "
    "'serial_([0-9]+)', or a table FILE.csv with the columns image,part"
)


def absolute(how: str) -> str:
    """The same from any directory: a table's path is made absolute."""
    return str(Path(how).absolute()) if how.endswith(TABLE) else how


def parts_of(samples: Sequence[Sample], how: str) -> dict[str, str]:
    """The part of each sample, by its key; parts of different products are different ones whatever they are called.

    how: a regular expression that is searched for in the key (what its parentheses hold is the part, without any all
    that it found), or the path of a table with a line for each image: its key or file name, and its part.

    Raises:
        ConfigError: the expression or the table cannot be used, or says nothing of an image.
    """
    found = known_parts(samples, how)
    if missing := [s.key for s in samples if s.key not in found]:
        raise ConfigError(
            f"{how} does not say which part {missing[0]} shows",
            found=f"no part for {len(missing)} of {len(samples)} good images",
            expected="a part for every image; one that is alone has a name of its own",
            next_step="add it to the table" if how.endswith(TABLE) else "mend --group-by, or give a table FILE.csv",
        )
    return found


def known_parts(samples: Sequence[Sample], how: str) -> dict[str, str]:
    """The same, without the samples of which `how` says nothing.

    Raises:
        ConfigError: the expression or the table cannot be used.
    """
    return _from_table(samples, Path(how)) if how.endswith(TABLE) else _from_names(samples, how)


def tested_parts(
    samples: Sequence[Sample], group_by: str | None, training: str = ""
) -> tuple[dict[str, str] | None, str]:
    """The part of each test image by its key, None where it is not known; and what to say of it, if anything.

    group_by: of the command; without it training's is used, as far as it says the part of every good image here. A
    defective image of which it says nothing is of a part of its own.

    Raises:
        ConfigError: `group_by` cannot be used, or says nothing of a good image.
    """
    how = group_by if group_by is not None else training
    if not how:
        return None, ""
    good = [s for s in samples if s.good]
    try:
        parts = {**{s.key: s.key for s in samples}, **known_parts(samples, how), **parts_of(good, how)}
    except ConfigError as error:
        if group_by is not None:
            raise
        return None, (
            f"training told parts by {how}, which does not say what these images show ({error.what}: {error.found}): "
            "every figure is by image; --group-by says which images show one part"
        )
    return parts, "" if several(samples, parts) else f"no two images show the same part by {how}"


def several(samples: Iterable[Sample], parts: Mapping[str, str]) -> list[list[Sample]]:
    """The samples by product and part, parts with one picture left out; in the samples' order."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        if sample.key in parts:
            groups.setdefault((sample.product, parts[sample.key]), []).append(sample)
    return [group for group in groups.values() if len(group) > 1]


def _from_names(samples: Sequence[Sample], how: str) -> dict[str, str]:
    try:
        search = re.compile(how).search
    except re.error as error:
        raise ConfigError(
            f"--group-by {quoted(how)} is not a regular expression",
            found=error,
            expected="a regular expression such as 'serial_([0-9]+)', or a table FILE.csv",
            next_step="repeat the command with --group-by 'serial_([0-9]+)', as the names of your images are",
        ) from error
    found = {s.key: search(s.key) for s in samples}
    return {
        key: "\0".join(text or "" for text in (match.groups() or (match.group(),)))
        for key, match in found.items()
        if match is not None
    }


def _from_table(samples: Sequence[Sample], path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = [name.strip() for name in rows.fieldnames or ()]
            rows.fieldnames = columns
            if not {*_COLUMNS} <= {*columns}:
                raise ConfigError(
                    f"{path} is no table of parts",
                    found=f"the columns {', '.join(columns) or '(none)'}",
                    expected="a first line that names the columns image and part",
                    next_step="write them into its first line",
                )
            table = {(row["image"] or "").strip(): (row["part"] or "").strip() for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"cannot read {path}",
            found=error,
            expected="a table in UTF-8 with the columns image,part",
            next_step="name the table that there is, with --group-by FILE.csv",
        ) from error
    named = {s.key: table.get(s.key) or table.get(s.path.name) for s in samples}
    return {key: part for key, part in named.items() if part}
