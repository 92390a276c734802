"""What of an image set is passed over, and what is nearly black: said by train, calibrate, eval and check alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .dataset import ELPV, MASK_FOLDER, Dataset
from .images import IMAGE_SUFFIXES, sixteen_bit_peak
from .verdict import readable

#: Pictures that people keep beside the others and that no reader here takes.
_FOREIGN = (".avif", ".dib", ".dng", ".exr", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jxl", ".pbm", ".pnm", ".raw")
_DEEP = (".png", ".tif", ".tiff", ".pgm", ".ppm")  # what 16 bits are saved in
_LOOKS = 8
_NAMED = 8
#: Values below this in 16 bits are a camera's 12, or 10, at the lower end.
_TWELVE_BITS = 1 << 12


def remarks(dataset: Dataset) -> list[str]:
    """What whoever gave the set should know of it, if anything. dataset: all of it, not a selection."""
    products = {p: [s.path for s in dataset.samples if s.product == p] for p in dataset.products}
    dim = [f"{product}: {text}" for product, paths in products.items() if (text := too_dark(paths))]
    return [*_passed_over(dataset), *dim]


def too_dark(paths: Sequence[Path]) -> str:
    """What to say of images with a camera's 12 bits in 16, which are read as 16; empty for others.

    A few, evenly spaced, are decoded, of most sets one; those that cannot be are the reader's to refuse.
    """
    deep = [path for path in paths if path.suffix.lower() in _DEEP]
    count, peak = min(_LOOKS, len(deep)), 0
    for i in range(count):
        found = sixteen_bit_peak(deep[i * len(deep) // count])
        if found is None or found >= _TWELVE_BITS:
            return ""
        peak = max(peak, found)
    if not count:
        return ""
    bits = 12 if peak >= 1 << 10 else 10
    return (
        f"nearly black: 16-bit images of which none of {count} looked at has a value above {peak}, as where a camera's "
        f"{bits} bits lie at the lower end; 16 bits are read as they are, so save them shifted up by {16 - bits} bits "
        f"(times {1 << (16 - bits)}), or as 8 bits, here and on the line"
    )


def _passed_over(dataset: Dataset) -> Iterator[str]:
    """Of a folder: images that lie where the layout has none, and pictures of kinds that are not read."""
    if dataset.spec == ELPV:
        return
    used = {s.path for s in dataset.samples}
    places: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for path in visible_files(dataset.root):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES and path not in used:
            places[readable(path.parent.relative_to(dataset.root).as_posix())] += 1
        elif suffix in _FOREIGN:
            kinds[suffix] += 1
    if places:
        yield (
            f"{places.total()} images of {dataset.spec} are not used ({_named(places)}): only those count that lie in "
            "a folder of good parts or of a defect itself (train/good, test/<defect>, or good beside <defect>), not "
            "beside it or deeper"
        )
    if kinds:
        yield (
            f"{kinds.total()} pictures of {dataset.spec} are not used ({_named(kinds)}): images are read from "
            + ", ".join(IMAGE_SUFFIXES)
        )


def _named(found: Counter[str]) -> str:
    named = [f"{name}: {count}" for name, count in sorted(found.items())]
    return ", ".join([*named[:_NAMED], *(["..."] if len(named) > _NAMED else [])])


def visible_files(root: Path) -> Iterator[Path]:
    """Visible files of a set but those of masks; a product folder may be a link."""
    for top in sorted(root.iterdir()):
        if top.name.startswith(".") or top.name == MASK_FOLDER:
            continue
        if not top.is_dir():
            yield top
            continue
        for folder, folders, names in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != MASK_FOLDER)
            yield from (Path(folder, name) for name in names if not name.startswith("."))
