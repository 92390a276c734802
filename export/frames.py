"""The real images that an export is judged by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..runtime.crop import read_image
from ..runtime.dataset import Dataset, Sample
from ..runtime.errors import ConfigError
from ..runtime.manifest import Preprocess
from ..runtime.preprocess import resize
from ..train.holdout import HOLD_OUT
from .walk import Array

_T = TypeVar("_T")
#: Memory for all frames of an export, bytes: limits how many large frames are used (where products are many, a few each
#: are used all the same).
BUDGET = 256 << 20


@dataclass(frozen=True)
class Frames:
    """Frames at network size.

    images: uint8 [n, H, W, 3] RGB; class_ids: int32 [n]; labels: int32 [n], 1 defective and 0 good.
    source: for the record.
    """

    images: Array
    class_ids: Array
    labels: Array
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | Array) -> Frames:
        """Some of the frames."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Frames(self.images[chosen], self.class_ids[chosen], self.labels[chosen], self.source)

    def joined(self, other: Frames) -> Frames:
        """These frames and then the others."""
        return Frames(
            np.concatenate((self.images, other.images)),
            np.concatenate((self.class_ids, other.class_ids)),
            np.concatenate((self.labels, other.labels)),
            f"{self.source}; {other.source}",
        )


@dataclass(frozen=True)
class Evidence:
    """good: held-out good images (thresholds, calibration, ranges). labelled: good and defective ones for the gate."""

    good: Frames
    labelled: Frames


def load(samples: Sequence[Sample], classes: Sequence[str], preprocess: Preprocess, source: str) -> Frames:
    """Read and resize images as the line does."""
    images = np.empty((len(samples), preprocess.height, preprocess.width, 3), np.uint8)
    for image, sample in zip(images, samples, strict=True):
        resize(read_image(sample), preprocess, out=image)
    ids = np.array([list(classes).index(s.product) for s in samples], np.int32)
    labels = np.array([0 if s.good else 1 for s in samples], np.int32)
    return Frames(images, ids, labels, source)


def thin(groups: Mapping[Any, Sequence[_T]], limit: int) -> list[_T]:
    """At most `limit` members, evenly from every group and evenly spaced within it: the same ones every time.

    Where there are more groups than that, the first ones have one each.
    """
    sizes = {key: len(members) for key, members in groups.items()}
    share = dict.fromkeys(groups, 0)
    for _ in range(min(limit, sum(sizes.values()))):
        key = min((k for k in groups if share[k] < sizes[k]), key=lambda k: share[k])
        share[key] += 1
    chosen: list[_T] = []
    for key, members in groups.items():
        picks = np.linspace(0, sizes[key] - 1, share[key]).round().astype(int)
        chosen += [members[i] for i in picks]
    return chosen


def gather(
    dataset: Dataset,
    holdout: Sequence[str],
    classes: Sequence[str],
    preprocess: Preprocess,
    *,
    seen: Collection[str] = (),
    good: int = 128,
    labelled: int = 400,
) -> Evidence:
    """The evidence of a checkpoint: its held-out good images, and the test split.

    A product without good and defective test images is judged by its held-out good ones with synthetic defects: no
    product's decisions go unlooked at.

    holdout: keys of the good images that training left out. seen: keys of test images that are copies of what training
    saw, left out: their patches may be rows of a bank, and of a distance near 0 rounding is all there is to compare.

    Raises:
        ConfigError: there is no held-out good image, or a product has none.
        SourceError: an image cannot be read, or a key is not in the data set.
    """
    frame_bytes = preprocess.height * preprocess.width * 3
    fit = max(16, BUDGET // frame_bytes)
    # Each product has a threshold and a gate of its own: one good frame and one of each label, whatever the memory.
    good, labelled = max(min(good, fit // 3), len(classes)), min(labelled, fit - fit // 3)
    held = dataset.select(keys=holdout, products=classes)
    if missing := [c for c in classes if not any(s.product == c for s in held.samples)]:
        there = dataset.select(split="train", products=missing, good=True).samples
        raise ConfigError(
            f"{dataset.spec} has no held-out good image of {', '.join(missing)}",
            found=", ".join(f"{c}: {sum(s.product == c for s in there)} good training images" for c in missing)
            + f"; {len(held)} held-out images of others",
            expected="good images that training left out",
            next_step=HOLD_OUT,
        )
    kept = load(thin(_by_class(held.samples), good), classes, preprocess, f"{dataset.spec}, held-out good")
    test = [s for s in dataset.select(split="test", products=classes).samples if s.key not in seen]
    judged = [c for c in classes if len({s.good for s in test if s.product == c}) == 2]
    if not judged:
        return Evidence(kept, with_synthetic_defects(kept))
    others = with_synthetic_defects(kept.select([i for i, c in enumerate(kept.class_ids) if classes[c] not in judged]))
    chosen = thin(_by_class([s for s in test if s.product in judged]), max(2 * len(judged), labelled - len(others)))
    tested = load(chosen, classes, preprocess, f"{dataset.spec}, test split")
    return Evidence(kept, tested.joined(others) if len(others) else tested)


def _by_class(samples: Sequence[Sample]) -> dict[object, list[Sample]]:
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.product, sample.good), []).append(sample)
    return groups


def with_synthetic_defects(good: Frames, seed: int = 0) -> Frames:
    """Good frames and as many with a defect made on them, for sets that come without defects.

    A patch of the frame is pasted elsewhere in it (CutPaste, Li et al. 2021), brightened or darkened.
    """
    rng = np.random.default_rng(seed)
    spoilt = good.images.copy()
    for image in spoilt:
        height, width = image.shape[:2]
        h, w = (int(rng.uniform(0.06, 0.2) * size) + 1 for size in (height, width))
        y0, x0, y1, x1 = (int(rng.integers(0, size)) for size in (height - h, width - w, height - h, width - w))
        patch = image[y0 : y0 + h, x0 : x0 + w].astype(np.float32)
        shift = rng.uniform(30, 90) * rng.choice((-1, 1))
        image[y1 : y1 + h, x1 : x1 + w] = np.clip(patch + shift, 0, 255).astype(np.uint8)
    return Frames(
        np.concatenate((good.images, spoilt)),
        np.concatenate((good.class_ids, good.class_ids)),
        np.concatenate((np.zeros(len(good), np.int32), np.ones(len(good), np.int32))),
        f"{good.source}, with synthetic defects",
    )
