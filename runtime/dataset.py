"""Image sets of good and defective parts: which files there are, which product, label, mask and split each one has.

Shared by training and by the device (eval, calibrate, the folder source), so it needs numpy and cv2 only.
Layouts that :func:`open_dataset` takes:

* ``elpv``: the installed package elpv-dataset, products ``mono`` and ``poly``;
* MVTec: ``<product>/train/good``, ``<product>/test/{good,<defect>}`` and, if there are masks,
  ``<product>/ground_truth/<defect>/<image>_mask.png``;
* good/bad: ``<product>/good`` beside any number of defect folders (``bad``, ``scratch``, ...); not split by anyone, so
  80 % of the good images become train by a fixed shuffle and the rest, with all defects, test;
  masks, if there are any, in ``<product>/ground_truth/<defect>`` here too;
* a folder that holds several of these product folders, or links to them; each product has the name it has there.

Images count that lie in these folders themselves, none deeper or beside them: remarks.py says how many those are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from .errors import ConfigError, SourceError, quoted
from .images import IMAGE_SUFFIXES, on_disk, read_mask, read_rgb
from .manifest import Crop
from .sourceconfig import ELPV
from .verdict import readable

__all__ = ["ELPV", "GOOD", "Dataset", "Sample", "Split", "open_dataset", "read_mask", "read_rgb", "split_readable"]

Split = Literal["train", "test"]
GOOD = "good"
_GOOD_FOLDERS = ("good", "ok")
MASK_FOLDER = "ground_truth"
# Folders of masks by other names: as defects they would be found without fail, and flatter every figure.
_MASK_NAMES = ("annotation", "annotations", "groundtruth", "gt", "mask", "masks", "segmentation", "segmentations")
_TRAIN_SHARE = 0.8
_LAYOUTS = (
    "elpv | a product folder with train/good and test/ (MVTec; masks in ground_truth/<defect>/<image>_mask.png) | "
    "a product folder with good/ beside defect folders | a folder of such product folders"
)


@dataclass(frozen=True)
class Sample:
    """One image of a set.

    key: path relative to the set's root, with forward slashes: the same on every machine, unique in the set.
    label: ``good`` or the name of the defect; empty: nobody has said (unlabelled.py).
    mask_path: image whose pixels above zero are the defect.
    crop: what of the image is judged (crop.py reads it so); None: all of it.
    key, product and label go into records, so names that are not UTF-8 are escaped there (verdict.readable).
    """

    path: Path
    key: str
    product: str
    label: str
    split: Split
    mask_path: Path | None = None
    crop: Crop | None = None

    @property
    def good(self) -> bool:
        """True for a good part."""
        return self.label == GOOD


@dataclass(frozen=True)
class Dataset:
    """An indexed image set.

    spec: what was opened, for the record. license: of the images, if it is known.
    drawn: products of good/bad folders, which nobody has split: their split is drawn here, anew as they grow.
    """

    spec: str
    root: Path
    samples: tuple[Sample, ...]
    license: str = ""
    drawn: frozenset[str] = frozenset()

    @property
    def products(self) -> tuple[str, ...]:
        """Products in the set, sorted: the order of every class axis made from it."""
        return tuple(sorted({s.product for s in self.samples}))

    @property
    def has_masks(self) -> bool:
        """True if any sample has a mask."""
        return any(s.mask_path is not None for s in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def select(
        self,
        *,
        split: Split | None = None,
        products: Iterable[str] | None = None,
        good: bool | None = None,
        keys: Iterable[str] | None = None,
    ) -> Dataset:
        """The samples that satisfy every given condition, in the same order.

        Raises:
            ConfigError: a product is not in the set.
            SourceError: a key is not in the set.
        """
        wanted = None if products is None else {readable(product) for product in products}
        if wanted is not None and not wanted <= set(self.products):
            raise ConfigError(
                f"{self.spec} has no product {', '.join(sorted(wanted - set(self.products)))}",
                found=", ".join(sorted(wanted)),
                expected=", ".join(self.products),
                next_step=f"name products of this set, or {named_by_folder(sorted(wanted - set(self.products)))}",
            )
        only = None if keys is None else set(keys)
        if only is not None and (missing := only - {s.key for s in self.samples}):
            raise SourceError(
                f"{self.spec} lacks {len(missing)} of {len(only)} named images",
                found=f"no {min(missing)}",
                expected="the set that the list was made from, unchanged",
                next_step="give the same --data as in training",
            )
        kept = tuple(
            s
            for s in self.samples
            if (split is None or s.split == split)
            and (wanted is None or s.product in wanted)
            and (good is None or s.good == good)
            and (only is None or s.key in only)
        )
        return replace(self, samples=kept)

    def describe(self) -> str:
        """One line per product: how many images of which kind."""
        lines = []
        for product in self.products:
            mine = [s for s in self.samples if s.product == product]
            counts = Counter("train good" if s.split == "train" else f"test {s.label}" for s in mine)
            lines.append(f"{product}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
        return "\n".join(lines)


def open_dataset(spec: str | Path) -> Dataset:
    """Open `elpv` or a folder; the layout of a folder is detected (see the module's text).

    Raises:
        SourceError: there is no such folder or package, it holds no image, its layout is unclear, or a mask is missing.
    """
    if str(spec) == ELPV:
        return _elpv()
    root = Path(spec)
    if not root.is_dir():
        raise SourceError(
            f"no data set at {spec}",
            found="no such folder" if not root.exists() else "a file",
            expected=_LAYOUTS,
            next_step="name an existing folder, or elpv",
        )
    product = _product(root, root)
    if product is not None:
        return _checked(Dataset(readable(str(spec)), root, tuple(product), drawn=_drawn([root])))
    samples: list[Sample] = []
    strangers: list[str] = []
    for folder in _folders(root):
        inside = _product(folder, root)
        if inside is not None:
            samples.extend(inside)
        elif _any_image(folder):
            strangers.append(folder.name)
    if strangers:
        raise _unclear(root, f"{', '.join(strangers)}: images in an unknown arrangement")
    if not samples:
        top = [p.name + ("/" if p.is_dir() else "") for p in sorted(root.iterdir())]
        raise _unclear(root, ", ".join(top[:12]) + (", ..." if len(top) > 12 else "") if top else "an empty folder")
    return _checked(Dataset(readable(str(spec)), root, tuple(samples), drawn=_drawn(_folders(root))))


def named_by_folder(products: Sequence[str]) -> str:
    """What to do about a set whose folder is not called as the product that a person means: one of these."""
    which = products[0] if len(products) == 1 else "one of them"
    return (
        f"if it has images of {which}, call their folder so (its name is the product's): rename it, or give --data "
        f"FOLDER with a link FOLDER/{products[0]} to it"
    )


def _drawn(folders: Sequence[Path]) -> frozenset[str]:
    return frozenset(readable(folder_name(f)) for f in folders if not (f / "train").is_dir())


def split_readable(
    samples: Sequence[Sample], on_corrupt: Literal["error", "skip"]
) -> tuple[list[Sample], list[Sample]]:
    """Samples that can be used, and those skipped because their image cannot be decoded.

    With `error` nothing is decoded here: the first corrupt image raises SourceError where it is read.
    """
    if on_corrupt == "error":
        return list(samples), []
    kept, skipped = [], []
    for sample in samples:
        try:
            read_rgb(sample.path)
            kept.append(sample)
        except SourceError:
            skipped.append(sample)
    return kept, skipped


def _unclear(root: Path, found: str) -> SourceError:
    step = "arrange the images in one of these layouts"
    if _images(root):
        name = folder_name(root)
        parent = root.parent if root.name == name else root.resolve().parent  # of `.` it is not `.`
        above = f"give --data {quoted(parent)}" if name.lower() in _GOOD_FOLDERS else "put them into PRODUCT/good"
        step = f"{above}, if these are images of good parts; the folder around good is called as the product"
    if _any_image(root):
        step += (
            "; pictures that nobody has labelled are scored by andon eval --unlabelled --bundle BUNDLE --data "
            f"{quoted(root)}"
        )
    return SourceError(f"cannot tell the layout of {root}", found=found, expected=_LAYOUTS, next_step=step)


def _checked(dataset: Dataset) -> Dataset:
    for product in dataset.products:
        if not any(s.split == "train" and s.product == product for s in dataset.samples):
            raise SourceError(
                f"{dataset.root}: product {product} has no good image to train on",
                found="no image in the folder of good parts itself",
                expected=f"images ({', '.join(IMAGE_SUFFIXES)}) in train/good or good",
                next_step="put images of good parts there",
            )
    return dataset


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if on_disk(p))


def _any_image(folder: Path) -> bool:
    return any(on_disk(p) for p in folder.rglob("*"))


def _good_folder(folder: Path) -> Path | None:
    found = [p for p in _folders(folder) if p.name.lower() in _GOOD_FOLDERS]
    if len(found) > 1:  # one would be left out, or taken for a defect
        raise SourceError(
            f"{folder} has several folders of good parts",
            found=", ".join(p.name for p in found),
            expected="one, good or ok",
            next_step="put their images into one folder",
        )
    return found[0] if found else None


def folder_name(folder: Path) -> str:
    """A folder's own name, also of `.` and `..`; a link has its own, which is not that of what it leads to."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _product(folder: Path, root: Path) -> list[Sample] | None:
    """The samples of one product folder, or None if it is not one."""
    train = folder / "train"
    if train.is_dir():
        good = _good_folder(train)
        if good is None:
            return None
        samples = [_sample(p, root, folder, GOOD, "train") for p in _images(good)]
        tests = _defects(folder / "test") if (folder / "test").is_dir() else []
        for kind in tests:
            label = GOOD if kind.name.lower() in _GOOD_FOLDERS else kind.name
            samples += [_sample(p, root, folder, label, "test") for p in _images(kind)]
        return samples
    good = _good_folder(folder)
    if good is None:
        return None
    images = _images(good)
    chosen = _train_share(images)
    samples = [_sample(p, root, folder, GOOD, "train" if p in chosen else "test") for p in images]
    for kind in _defects(folder):
        if kind != good and kind.name != MASK_FOLDER:
            samples += [_sample(p, root, folder, kind.name, "test") for p in _images(kind)]
    return samples


def _defects(folder: Path) -> list[Path]:
    """The folders of a folder of defects (others too), refused where one is of masks and would pass for a defect.

    Masks that lie deeper, in a folder for each defect, are no samples, by whatever name: remarks.py says them.
    """
    found = _folders(folder)
    for kind in found:
        name = kind.name.lower().replace("-", "").replace("_", "").replace(" ", "")
        if kind.name != MASK_FOLDER and name in _MASK_NAMES and _images(kind):
            raise SourceError(
                f"{kind} is named like a folder of masks and would be taken for one of defective parts",
                found=kind.name,
                expected=f"masks in {MASK_FOLDER}/<defect>/<image>_mask.png of the product folder",
                next_step="move the masks there or out of the set; rename the folder if these are pictures of parts",
            )
    return found


def _train_share(images: Sequence[Path]) -> set[Path]:
    """Which good images of a product are for training: shuffled by ``random.Random(0)``, the first 80 %."""
    shuffled = list(images)
    random.Random(0).shuffle(shuffled)
    return set(shuffled[: max(1, int(_TRAIN_SHARE * len(shuffled)))])


def _sample(path: Path, root: Path, folder: Path, label: str, split: Split) -> Sample:
    mask = None if label == GOOD else _mask_of(path, folder / MASK_FOLDER / label)
    key, product = path.relative_to(root).as_posix(), folder_name(folder)
    return Sample(path, readable(key), readable(product), readable(label), split, mask)


def _mask_of(image: Path, folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    for stem in (f"{image.stem}_mask", image.stem):
        for suffix in IMAGE_SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise SourceError(
        f"no mask for {image}",
        found=f"no {image.stem}_mask.png in {folder}",
        expected="one mask per defective image, or no ground_truth folder for this defect",
        next_step="add the mask or remove the folder of masks",
    )


def _elpv() -> Dataset:
    """Solar cells of PyPI elpv-dataset (Buerhop et al. 2018, Deitsch et al. 2019/2021), read without importing it.

    good = probability 0, defective = probability 1; the graded ones between are left out. The product is the cell type.
    """
    found = find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise SourceError(
            "the data set elpv is not installed",
            found="no package elpv_dataset",
            expected="the Python package elpv-dataset (90 MB)",
            next_step="pip install elpv-dataset",
        )
    root = Path(next(iter(found.submodule_search_locations))) / "data"
    try:
        rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    except OSError as error:
        raise SourceError(
            f"cannot read {root / 'labels.csv'}: {error}", next_step="pip install --force-reinstall elpv-dataset"
        ) from error
    samples: list[Sample] = []
    for product in ("mono", "poly"):
        cells = [(root / name, float(p)) for name, p, kind in rows if kind == product]
        good = [path for path, p in cells if p == 0]
        train = _train_share(good)
        for path, p in cells:
            if p in (0.0, 1.0):
                key = path.relative_to(root).as_posix()
                label = GOOD if p == 0 else "defective"
                samples.append(Sample(path, key, product, label, "train" if path in train else "test"))
    return Dataset("elpv", root, tuple(samples), license="CC BY-NC-SA 4.0")
