"""Few-shot evaluation: many support draws on cached features, scored as the engines score (METHODS.md 9, F.3).

Features come from the bundle's own feature stage, once per image. Everything after it runs in numpy with the formulas
of the stages (transport.py, held against them by tests), because a draw is then seconds instead of minutes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..crop import read_image
from ..dataset import Dataset
from ..diskcache import Entry, Lease, code_of, limit, prune, used
from ..engine.base import Backend
from ..errors import ConfigError
from ..fingerprint import image_hash
from ..images import read_rgb
from ..manifest import Manifest
from ..preprocess import resize
from ..quality import auroc
from ..regions import cut_out
from ..wiring import parse_source
from .enroll import enroll_product
from .features import FeatureExtractor, memory_of
from .foreground import Foreground, to_grid
from .navigator import subsample
from .support import read_part
from .transport import Moments, Navigator, costs, score, step

Array = NDArray[Any]
Progress = Callable[[int], object]
#: Programs with more CT steps than this start every frame at phi_0.
WARM_STEPS = 10


@dataclass(frozen=True)
class Memory:
    """A product enrolled from one support draw. center [c]; rows [n, c] centred; foreground [n]; navigator."""

    center: Array
    rows: Array
    foreground: Array
    navigator: Navigator


class FeatureCache:
    """Patch features of a data set's images, float16 on disk: [N, m, c].

    Kept under $ANDON_CACHE (else .cache) by a hash of the feature stage's file, the preprocessing, the code that reads
    and resizes, and the images, and to $ANDON_CACHE_LIMIT (diskcache.py).

    Raises:
        ConfigError: that is not a size.
    """

    def __init__(self, bundle: Bundle, backend: Backend, dataset: Dataset, progress: Progress = lambda n: None) -> None:
        most = limit()
        self.dataset = dataset
        self.manifest = bundle.manifest
        with FeatureExtractor(bundle, backend) as extract:
            shape = (len(dataset), extract.patches, extract.dim)
            path = _cache_path(bundle, dataset)
            found = _kept(path, shape)
            if found is None:
                _prune(path.parent, most)  # a limit that was lowered for want of room makes room first
                self._fill(path, shape, extract, progress)
                found = np.load(path, mmap_mode="r")
        self.features: Array = found
        with suppress(FileNotFoundError):  # removed by another process since: what is mapped stays readable
            self._lease = Lease(path, create=False)
        used(path)
        _prune(path.parent, most)

    def _fill(self, path: Path, shape: tuple[int, ...], extract: FeatureExtractor, progress: Progress) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        try:
            out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            lease = Lease(partial, create=False)
            for index, sample in enumerate(self.dataset.samples):
                out[index] = extract(resize(read_image(sample), self.manifest.preprocess))
                progress(1)
            out.flush()
            partial.replace(path)
            lease.release()
        finally:
            partial.unlink(missing_ok=True)

    def __getitem__(self, index: int) -> Array:
        """[m, c] float32 of one image."""
        return np.asarray(self.features[index], np.float32)

    def select(self, product: str, *, split: str | None = None, good: bool | None = None) -> Array:
        """Indices of the images that satisfy every given condition."""
        return np.array(
            [
                index
                for index, s in enumerate(self.dataset.samples)
                if s.product == product and split in (None, s.split) and good in (None, s.good)
            ],
            np.int64,
        )


def _prune(folder: Path, most: int | None) -> None:
    entries = []
    for path in folder.glob("*.npy"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            entries.append(Entry(stat.st_mtime, stat.st_size, path, (path,)))
    prune(entries, most, f"few-shot cache {folder}")


def _kept(path: Path, shape: tuple[int, ...]) -> Array | None:
    """The array of an earlier run; None if there is none, or a damaged one."""
    try:
        found: Array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float16 else None


def _cache_path(bundle: Bundle, dataset: Dataset) -> Path:
    """Named by all that the features depend on: the stage that makes them, code that reads images, those in order."""
    stage = bundle.manifest.stages[parse_source(memory_of(bundle).candidates).name]
    digest = hashlib.sha256()
    crops = [str(s.crop) for s in dataset.samples] if any(s.crop is not None for s in dataset.samples) else []
    for part in (
        bundle.manifest.files[stage.files["fp32"]].sha256,
        bundle.manifest.preprocess.model_dump_json(),
        code_of(read_rgb, resize),
        *(image_hash(s.path) for s in dataset.samples),
        *((code_of(read_image, cut_out), *crops) if crops else ()),
    ):
        digest.update(part.encode() + b"\0")
    return Path(os.environ.get("ANDON_CACHE", ".cache")) / "fewshot" / f"{digest.hexdigest()[:16]}.npy"


def rank(anomalous: Array, scores: Array) -> float:
    """Image AUROC; not a number where one kind is missing."""
    value = auroc(scores, anomalous)
    return float("nan") if value is None else value


def draw_support(cache: FeatureCache, product: str, shots: int, seed: int) -> Array:
    """Indices of the support: good training images; draws of a seed are nested (1 in 2 in 4 shots).

    Raises:
        ConfigError: the product has fewer.
    """
    candidates = cache.select(product, split="train", good=True)
    if len(candidates) < shots:
        raise ConfigError(
            f"{product} has too few good training images",
            found=len(candidates),
            expected=f"at least {shots}",
            next_step="lower --few-shot",
        )
    return np.random.default_rng((seed, 4711)).permutation(candidates)[:shots]


def enroll_draw(cache: FeatureCache, support: Array, foreground: Foreground, seed: int) -> Memory:
    """Memory and navigator of a support draw, as `andon enroll` makes them."""
    grid = round(cache.features.shape[1] ** 0.5)
    samples = [cache.dataset.samples[i] for i in support]
    masks = [to_grid(read_part(s.path, s.crop, foreground)[1], grid) for s in samples]
    product = enroll_product(_plain(cache.manifest), [cache[int(i)] for i in support], masks, seed)
    s, bank = product.state, product.bank
    navigator = Navigator(s["projection"], s["w1"], s["b1"], s["w2"], float(s["inv_tau"][0]))
    return Memory(s["center"], bank.rows, bank.foreground, navigator)


def _plain(manifest: Manifest) -> Manifest:
    """Refuse what this evaluation does not model.

    Raises:
        ConfigError: not foct with the siamese navigator, or with a PCA.
    """
    if "inv_tau" not in manifest.state or manifest.constants.get("pair") or "basis" in manifest.state:
        raise ConfigError(
            "the few-shot evaluation needs foct with the siamese navigator and no PCA",
            found=manifest.method,
            expected="a foct bundle of the edge preset",
            next_step="andon enroll --method foct --support DIR",
        )
    return manifest


@dataclass(frozen=True)
class Steps:
    """CT steps to measure: their counts, the learning rate, and in how many random orders the test split streams by."""

    counts: tuple[int, ...]
    lr: float
    orders: int


def frozen(
    cache: FeatureCache, memory: Memory, product: str, steps: Steps, progress: Progress
) -> Iterator[tuple[str, int, int, float]]:
    """Image AUROC on the product's test split with the memory as enrolled: (method, CT steps, order, value).

    knn: plain distance to the same rows. foct with 0 steps: soft distance. Up to 10 steps: phi goes on from frame to
    frame, as in the bundle's programs; more: from phi_0 every frame, as in its ct100, and one order is enough.
    """
    test = cache.select(product, split="test")
    labels = np.array([not cache.dataset.samples[i].good for i in test])
    rho, stride = cache.manifest.constants["rho"], int(cache.manifest.constants["stride"])
    plain, soft = np.empty(len(test)), np.empty(len(test))
    runs = [(n, order) for n in steps.counts if n for order in range(steps.orders if n <= WARM_STEPS else 1)]
    for position, index in enumerate(test):
        found = score(memory.navigator, cache[int(index)] - memory.center, memory.rows)
        plain[position], soft[position] = found.nearest.max(), found.score.max()
        progress(1)
    yield "knn", 0, 0, rank(labels, plain)
    if 0 in steps.counts:
        yield "foct", 0, 0, rank(labels, soft)
    for count, order in runs:
        scores, navigator, moments = np.empty(len(test)), memory.navigator, Moments.zeros(memory.navigator)
        for position in np.random.default_rng((order, 17)).permutation(len(test)):
            if count > WARM_STEPS:
                navigator, moments = memory.navigator, Moments.zeros(memory.navigator)
            patches = cache[int(test[position])] - memory.center
            some = subsample(patches, stride)
            cost = costs(some, memory.rows)
            for _ in range(count):
                navigator, moments, _ = step(navigator, moments, some, memory.rows, cost, steps.lr, rho)
            scores[position] = score(navigator, patches, memory.rows).score.max()
            progress(1)
        yield "foct", count, order, rank(labels, scores)
