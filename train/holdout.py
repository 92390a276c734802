"""Which good training images a run trains on, which set its constants, and which are kept for thresholds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.dataset import Dataset, Sample
from ..runtime.groups import known_parts, several

_MIN_HOLDOUT = 40  # about 20 of each kind: conformal prediction needs 19 to promise 5 %
#: What `andon export` needs before it can hold a product's decisions against anything.
HOLD_OUT = (
    "train again with four different good training images of each product or more (a folder without train/ and test/ "
    "gives some of its images to the test) and holdout 0.1 or more"
)
_ROUND = 20  # 19, 39, ... promise 5 % exactly; with 20 to 38 the largest score is the threshold: stricter than asked


@dataclass(frozen=True)
class Split:
    """Good training images, each in one part; the order of the list they came from is kept.

    fitting: trained on.
    constants: for `finalize` alone (quantiles, score maps by position). They shape the score, so their own scores are
        no longer exchangeable with those of new parts. None where the method sets no constant.
    thresholds: neither the weights nor a constant has seen them, so a threshold set on them keeps its promise
        (split conformal prediction, Papadopoulos et al. 2002).
    """

    fitting: list[Sample]
    constants: list[Sample]
    thresholds: list[Sample]


def split_good(
    samples: Sequence[Sample],
    share: float,
    contents: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
    for_constants: bool = True,
) -> Split:
    """Split good images; `share` of each product is held out, about half for constants and half for thresholds.

    At least 40 images of a product are held out where that is no more than a quarter of it. Thresholds get the number
    nearest to half of them at which a promise of 5 % false alarms is kept without being stricter than asked.
    The choice depends on the images' keys alone, not on the run's seed: seeds are comparable, and features are
    computed once. Copies of an image within a product count as one and go where it goes: a copy of what was trained on
    is not held out.

    contents: hash of each image's file by its key; without it no two images are taken for equal.
    parts: the part that each image shows, by its key (runtime/groups.py); the pictures of a part then count as one,
        too, and stay together, and all numbers above are of parts.
    for_constants: False if nothing would look at those (`MethodConfig.uses_constants`): then all that is held out is
        for thresholds. None is left over to come to 19 or 39, as each lowers the rate that can be promised and steadies
        the threshold; `andon calibrate` says where that makes 5 % stricter than asked. What is trained on is the same.
    """
    constants: set[str] = set()
    thresholds: set[str] = set()
    for product in sorted({s.product for s in samples} if share else ()):
        mine = sorted(s.key for s in samples if s.product == product)
        together = {same[0]: same for same in _together(mine, [by for by in (contents, parts) if by])}
        keys = list(together)  # still sorted
        count = min(max(round(share * len(keys)), min(_MIN_HOLDOUT, len(keys) // 4)), len(keys) - 1)
        held = random.Random(0).sample(keys, count)
        kept = count
        if for_constants:
            kept = count // 2
            if kept >= _ROUND - 1:
                kept = _ROUND * round((kept + 1) / _ROUND) - 1
        thresholds.update(*(together[key] for key in held[:kept]))
        constants.update(*(together[key] for key in held[kept:]))
    return Split(
        [s for s in samples if s.key not in constants and s.key not in thresholds],
        [s for s in samples if s.key in constants],
        [s for s in samples if s.key in thresholds],
    )


def _together(keys: Sequence[str], labels: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Sorted keys, those together that have a label in common, directly or through others."""
    groups: dict[str, list[str]] = {key: [key] for key in keys}
    for by in labels:
        first: dict[str, str] = {}
        for key in keys:
            one, other = groups[first.setdefault(by[key], key)], groups[key]
            if one is not other:
                one += other
                groups.update(dict.fromkeys(other, one))
    return sorted({id(same): sorted(same) for same in groups.values()}.values())


def not_held_out(split: Split, products: Sequence[str]) -> list[str]:
    """The products of which no image is held out, each with the number of its good training images."""
    held = {s.product for s in (*split.constants, *split.thresholds)}
    bare = [product for product in products if product not in held]
    return [f"{product} ({sum(s.product == product for s in split.fitting)} good training images)" for product in bare]


def group_remarks(data: Dataset, split: Split, parts: Mapping[str, str], how: str) -> Iterator[str]:
    """What to say of the parts, of which several pictures are kept together; nothing where none are known.

    data: the whole set, whose test images may show the same parts. parts: of the good training images, by key.
    """
    good = [*split.fitting, *split.constants, *split.thresholds]
    if not parts:
        return
    counts = [
        len({(s.product, parts[s.key]) for s in part}) for part in (split.fitting, split.constants, split.thresholds)
    ]
    held = f"{counts[1]} for constants, " if split.constants else ""
    yield (
        f"they show {sum(counts)} parts, whose pictures stay together: {counts[0]} parts to train on, {held}"
        f"{counts[2]} for thresholds"
    )
    if not several(good, parts):
        yield f"warning: no two images show the same part by group_by {how}: it keeps nothing together"
    known = {(s.product, parts[s.key]) for s in good}
    for product in sorted(data.drawn):
        tests = [s for s in data.samples if s.good and s.split == "test" and s.product == product]
        if shown := sum((product, part) in known for part in known_parts(tests, how).values()):
            yield (
                f"warning: {product}: {shown} of {len(tests)} good test images show parts that are trained on or held "
                "out, which flatters every figure: in a folder of good images beside defects the test is drawn picture "
                "by picture; arrange it as train/good and test/good, part by part"
            )
