"""Views of good training images, so that a product with a few dozen images is trained like one with many.

A view is its image mirrored, turned, scaled and shifted a little. Views go through the frozen backbone like images and
into the same cache, so each is made once and not anew at every step.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..runtime.dataset import Sample
from .holdout import Split
from .method import Augmentation

Array = NDArray[Any]
_FLIP_AXIS = {"vertical": 0, "horizontal": 1}


@dataclass(frozen=True)
class View(Sample):
    """A sample seen otherwise; its key is the sample's with the view's number.

    flips: axes of the image that run backwards, 0 from top to bottom, 1 from left to right. rotation: degrees;
    scale: 1 for none; shift: in widths and heights of the image.
    """

    flips: tuple[int, ...] = ()
    rotation: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def recipe(self) -> str:
        """All that its pixels depend on beside the image's; the number ahead goes up when `of` makes them otherwise."""
        return f"1 {self.flips} {self.rotation} {self.scale} {self.shift}"

    def of(self, image: Array) -> Array:
        """The view of an image uint8 [H, W, 3], of the same size; what it shows of the outside is mirrored inside."""
        image = np.ascontiguousarray(np.flip(image, self.flips))
        if (self.rotation, self.scale, self.shift) == (0.0, 1.0, (0.0, 0.0)):
            return image
        height, width = image.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), self.rotation, self.scale)
        matrix[:, 2] += np.multiply(self.shift, (width, height))
        return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def augmented(split: Split, settings: Augmentation) -> tuple[list[Sample], list[Sample]]:
    """Images and views to train on, and images and views for the constants.

    A product with fewer than `settings.images` images to train on gets views of them up to that number, and views of
    its images for constants in the same proportion: the constants are to be of the score that training gives. The
    images kept for thresholds get none, so a threshold's promise is about parts as the camera sees them.
    """
    fitting, constants = list(split.fitting), list(split.constants)
    for product in sorted({s.product for s in split.fitting}):
        mine = [s for s in split.fitting if s.product == product]
        views = _views(mine, settings.images - len(mine), settings)
        fitting += views
        own = [s for s in split.constants if s.product == product]
        constants += _views(own, len(own) * len(views) // len(mine), settings)
    return fitting, constants


def described(settings: Augmentation) -> str:
    """What the views are, and what to do where that is wrong: only the user knows which way round a part may lie."""
    parts = [f"mirrored {' and '.join(settings.flips)}"] if settings.flips else []
    if settings.moves:
        moved = f"scaled by {settings.scale:.0%}, shifted by {settings.shift:.0%}"
        parts.append(f"turned up to {settings.rotation:g} degrees, {moved}")
    return "; ".join(
        [*parts, "if such a part is a defect: --set augment.flips=[] --set augment.rotation=5, or images=0"]
    )


def _views(samples: Sequence[Sample], count: int, settings: Augmentation) -> list[Sample]:
    """`count` views or as many as there are different ones, of every sample equally many (or one more)."""
    axes = list(dict.fromkeys(_FLIP_AXIS[flip] for flip in settings.flips))  # named twice is named once
    flips = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    numbers = itertools.count(1) if settings.moves else range(1, len(flips))
    # the order depends on the keys alone, like the hold-out: the same images in any order give the same views
    order = random.Random(0).sample(sorted(samples, key=lambda s: s.key), len(samples))
    pairs = itertools.islice(((s, number) for number in numbers for s in order), max(0, count))
    return [_view(sample, number, flips[number % len(flips)], settings) for sample, number in pairs]


def _view(sample: Sample, number: int, flips: tuple[int, ...], settings: Augmentation) -> View:
    rng = random.Random(f"{sample.key} {number}")
    rotation, scale, right, down = (
        most * rng.uniform(-1, 1) for most in (settings.rotation, settings.scale, settings.shift, settings.shift)
    )
    fields = {f.name: getattr(sample, f.name) for f in dataclasses.fields(Sample)}
    fields["key"] = f"{sample.key}#{number}"
    return View(**fields, flips=flips, rotation=rotation, scale=1 + scale, shift=(right, down))
