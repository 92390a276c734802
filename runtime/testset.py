"""Which images of a set an evaluation is of: chosen by split, product and number, and new to the model."""

from __future__ import annotations

from collections.abc import Sequence

from .bundle import Bundle
from .dataset import Dataset, Sample
from .errors import ConfigError
from .fingerprint import Seen, counted, tally


def choose(dataset: Dataset, split: str, products: Sequence[str] | None, limit: int | None) -> list[Sample]:
    """The images to judge; with a limit, evenly spaced over good and defective ones of each product.

    Raises:
        ConfigError: none is left.
    """
    chosen = dataset.select(split=None if split == "all" else split, products=products).samples  # type: ignore[arg-type]
    if not chosen:
        raise ConfigError(
            f"{dataset.spec} has no images in its {split} split",
            found=dataset.describe(),
            expected="at least one image",
            next_step="choose another --split",
        )
    if limit is None:
        return list(chosen)
    kept: list[Sample] = []
    for product in sorted({s.product for s in chosen}):
        groups = [[s for s in chosen if s.product == product and s.good == good] for good in (True, False)]
        share = [min(len(groups[0]), max(limit - len(groups[1]), (limit + 1) // 2))]
        share.append(min(len(groups[1]), limit - share[0]))
        for group, count in zip(groups, share, strict=True):
            kept += [group[i * len(group) // count] for i in range(count)]
    return kept


def unseen_tests(bundle: Bundle, samples: Sequence[Sample], spec: str) -> tuple[list[Sample], dict[str, int] | None]:
    """Samples without the test images that the making of the bundle saw (or skipped), and how many those are by use.

    A good/bad folder is split by position, so images that are added to it move others from train to test; and sets are
    copied together. Images of the train split stay: who asks for them knows. None for a bundle without a record.

    Raises:
        ConfigError: no image is left.
        SourceError: an image cannot be read.
    """
    known = Seen.of(bundle)
    if known is None:
        return list(samples), None
    tests = [s for s in samples if s.split == "test"]
    use = {k.sample.key: k.use for k in known.sort(tests)}
    seen = tally(use.values())
    kept = [s for s in samples if use.get(s.key) is None]
    if not kept:
        raise ConfigError(
            f"no test image of {spec} is new to the model",
            found=counted(seen) or "no image",
            expected="images that neither training nor thresholds have seen",
            next_step="give other images with --data",
        )
    return kept, seen
