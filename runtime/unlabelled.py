"""Pictures of one product that nobody has labelled: they are judged, and there is nothing to hold that against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from .bundle import Bundle
from .dataset import Dataset, Sample
from .detector import Detector
from .errors import ProductError, SourceError
from .evaluation import Array, Judged, Step, judge_each
from .images import IMAGE_SUFFIXES, on_disk
from .remarks import visible_files
from .verdict import readable

#: Their label, which says neither good nor defective.
NO_LABEL = ""


@dataclass(frozen=True)
class Scored:
    """What the engines say of them. latency_ms: [n] per stage, plus preprocess, total."""

    judged: tuple[Judged, ...]
    latency_ms: dict[str, Array]
    seconds: float

    def count(self, label: str) -> int:
        """How many were judged so."""
        return sum(j.label == label for j in self.judged)

    def highest_first(self) -> list[Judged]:
        """Those that have a score, highest first, then the others."""
        return sorted(self.judged, key=lambda j: -j.score if np.isfinite(j.score) else np.inf)

    def spread(self) -> dict[str, float]:
        """Least, middle and largest score; empty where nothing has one."""
        scores = [j.score for j in self.judged if np.isfinite(j.score)]
        return {"min": min(scores), "median": float(np.median(scores)), "max": max(scores)} if scores else {}


def product_of(bundle: Bundle, given: Sequence[str] | None) -> str:
    """The one product that the pictures are of: as it is given, or the bundle's only one.

    Raises:
        ProductError: none or several are given, or the bundle does not know it.
    """
    products = list(dict.fromkeys(given or bundle.manifest.classes))
    if len(products) != 1:
        raise ProductError(
            "of which product are the pictures?",
            found=", ".join(products),
            expected="one, for whose threshold they are held against",
            next_step=f"--unlabelled --products {products[0]}, and the pictures of the others in folders of their own",
        )
    bundle.class_index(products[0])
    return products[0]


def open_unlabelled(spec: str | Path, product: str) -> Dataset:
    """Every picture in a folder, and in the folders in it, as a set of one product; those of masks (ground_truth) not.

    Raises:
        SourceError: there is no such folder, or no picture in it.
    """
    root = Path(spec)
    if not root.is_dir():
        raise SourceError(
            f"no folder of pictures at {spec}",
            found="a file" if root.exists() else "no such folder",
            expected="a folder, flat or of folders",
            next_step="name an existing folder with --data",
        )
    paths = sorted(path for path in visible_files(root) if on_disk(path))
    if not paths:
        raise SourceError(
            f"no picture in {spec}",
            found="no file that is read as one",
            expected=f"files {', '.join(IMAGE_SUFFIXES)}",
            next_step="name the folder that has them with --data",
        )
    keys = (readable(path.relative_to(root).as_posix()) for path in paths)
    samples = (Sample(path, key, product, NO_LABEL, "test") for path, key in zip(paths, keys, strict=True))
    return Dataset(readable(str(spec)), root, tuple(samples))


def score(detector: Detector, samples: Sequence[Sample], step: Step | None = None) -> Scored:
    """Judge them one after the other.

    Raises:
        SourceError: a picture cannot be read.
    """
    detector.program.reset()
    start = perf_counter()
    judged, timings = [], []
    for each, result, _ in judge_each(detector, samples, step=step):
        judged.append(each)
        timings.append(result.latency_ms)
    seconds = perf_counter() - start
    names = dict.fromkeys(name for t in timings for name in t)
    return Scored(tuple(judged), {n: np.array([t[n] for t in timings if n in t]) for n in names}, seconds)
