"""A data set through the engines: scores, maps, decisions and latencies, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .crop import read_placed
from .dataset import Sample, named_by_folder
from .detector import AUTO, Detector, Judgement
from .errors import ProductError, quoted
from .quality import Metrics, map_at, mask_at, mean_metrics, summarize
from .regions import Box, find_regions
from .types import Region

Array = NDArray[Any]
Step = Callable[[int], object]


@dataclass(frozen=True)
class Judged:
    """One sample as the engines judged it.

    score: NaN where there is none. product: what it was judged as. predicted: the classifier's choice. threshold: what
    the score was held against; None where it was not. learnt: a line's memory scored it that had learnt by then.
    reason: why UNKNOWN. regions: where an NG one is anomalous, in pixels of the picture, largest peak first.
    """

    sample: Sample
    label: str
    score: float
    product: str | None
    predicted: str | None
    threshold: float | None = None
    learnt: bool = False
    reason: str = ""
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """Everything `andon eval` prints.

    products: metrics of each product, `mean` over them. right_product: share of the *good* images whose product the
    classifier finds, per product; right_product_defective: the same of defective ones, which METHODS.md 1.3 asks for: a
    defect may look like another product. Empty without a classifier. latency_ms: [n] per stage, plus preprocess, total.
    uncalibrated: products without a threshold; their error rates are those that the best F1 would have.
    """

    judged: tuple[Judged, ...]
    products: dict[str, Metrics]
    mean: Metrics
    right_product: dict[str, float]
    latency_ms: dict[str, Array]
    seconds: float
    uncalibrated: frozenset[str] = frozenset()
    right_product_defective: dict[str, float] = field(default_factory=dict)

    def unknown(self) -> dict[str, str]:
        """What to say of each product some of whose images were judged UNKNOWN, since its figures leave them out."""
        said = {}
        for product, metrics in self.products.items():
            labels = [j.label for j in self.judged if j.sample.product == product]
            if not (count := labels.count("UNKNOWN")):
                continue
            shares = [
                f"{share:.1%} of the {kind}"
                for kind in ("good", "defective")
                if (share := metrics.get(f"unknown_rate_{kind}")) is not None
            ]
            without = (
                "it has no threshold, so the error rates are those that the best F1 would have"
                if product in self.uncalibrated
                else "error rates leave them out, AUROC and F1_max those without a score"
            )
            said[product] = f"{count} of {len(labels)} images are UNKNOWN ({' and '.join(shares)}): {without}"
        return said


def evaluate(
    detector: Detector, samples: Sequence[Sample], *, auto: bool = False, step: Step | None = None
) -> Evaluated:
    """Judge every sample, product by product; what a program keeps between frames starts afresh at each product.

    Args:
        auto: let the classifier choose the product instead of giving the sample's.
        step: called with 1 after each image.

    Pixel figures are there for a product whose defective images all have masks; they are computed at network size.

    Raises:
        ProductError: a sample's product is not one of the bundle's.
        SourceError: an image or mask cannot be read.
    """
    products = sorted({s.product for s in samples})
    _require_known(detector.bundle.manifest.classes, products)
    if not samples:
        raise ProductError("there is no image to judge", found="no sample", next_step="name another --data or --split")
    judged: list[Judged] = []
    timings: list[dict[str, float]] = []
    results: dict[str, Metrics] = {}
    start = perf_counter()
    for product in products:
        mine = [s for s in samples if s.product == product]
        detector.program.reset()
        results[product] = _product(detector, mine, auto, judged, timings, step)
    seconds = perf_counter() - start
    names = timings[0]
    latency = {name: np.array([t[name] for t in timings]) for name in names}
    without = frozenset(product for product in results if detector.threshold(product) is None)
    right, right_defective = (_right_product(judged, good) for good in (True, False))
    return Evaluated(tuple(judged), results, mean_metrics(results), right, latency, seconds, without, right_defective)


def _require_known(classes: Sequence[str], products: Sequence[str]) -> None:
    """Raises ProductError where the set has a product that the bundle does not know."""
    if unknown := [p for p in products if p not in classes]:
        known = " ".join(quoted(p) for p in products if p in classes)
        raise ProductError(
            f"unknown product {unknown[0]!r}",
            found=", ".join(unknown),
            expected=", ".join(classes),
            next_step=(f"evaluate the others with --products {known}; " if known else "") + named_by_folder(classes),
        )


def _product(
    detector: Detector,
    samples: Sequence[Sample],
    auto: bool,
    judged: list[Judged],
    timings: list[dict[str, float]],
    step: Step | None,
) -> Metrics:
    size = (detector.bundle.manifest.preprocess.height, detector.bundle.manifest.preprocess.width)
    pixels = all(s.good or s.mask_path is not None for s in samples) and any(not s.good for s in samples)
    maps = np.zeros((len(samples) if pixels else 0, *size), np.float32)
    masks = np.zeros(maps.shape, bool)
    mine: list[Judged] = []
    for i, (each, result, mask) in enumerate(judge_each(detector, samples, auto=auto, masks=pixels, step=step)):
        mine.append(each)
        timings.append(result.latency_ms)
        if pixels and result.map is not None:
            maps[i] = map_at(result.map, size)
            if mask is not None:
                masks[i] = mask_at(mask, size)
    judged += mine
    threshold = detector.threshold(samples[0].product)
    return summarize(
        [j.score for j in mine],
        [not s.good for s in samples],
        threshold=threshold.value if threshold else None,
        labels=[j.label for j in mine],  # with `auto`, held against the threshold of the product each was judged as
        maps=maps if pixels else None,
        masks=masks if pixels else None,
    )


def judge_each(
    detector: Detector, samples: Sequence[Sample], *, auto: bool = False, masks: bool = False, step: Step | None = None
) -> Iterator[tuple[Judged, Judgement, Array | None]]:
    """Judge samples one after the other: each with what the detector gave, valid until the next, and its mask.

    masks: whether they are read at all; None where a sample has none.

    Raises:
        SourceError: an image or mask cannot be read.
    """
    for sample in samples:
        image, mask, box = read_placed(sample, masks)
        result = detector.judge_image(image, AUTO if auto else sample.product)
        score = float("nan") if result.score is None else result.score
        found = (result.label, score, result.product, result.predicted, result.threshold)
        yield Judged(sample, *found, reason=result.reason, regions=_regions(result, box)), result, mask
        if step is not None:
            step(1)


def _regions(result: Judgement, box: Box) -> tuple[Region, ...]:
    """As a line with the settings that it has without a word publishes them."""
    if result.label != "NG" or result.map is None or result.pixel_threshold is None:
        return ()
    return find_regions(result.map, result.pixel_threshold, box)


def _right_product(judged: Sequence[Judged], good: bool) -> dict[str, float]:
    seen = [j for j in judged if j.sample.good == good and j.predicted is not None]
    return {
        product: float(np.mean([j.predicted == product for j in seen if j.sample.product == product]))
        for product in sorted({j.sample.product for j in seen})
    }


def confusion_table(evaluated: Evaluated) -> str:
    """Decisions by ground truth and product, as text."""
    lines = [f"{'decided':<10}  {'good OK':>8} {'good NG':>8} {'bad OK':>8} {'bad NG':>8} {'UNKNOWN':>8}"]
    for product in evaluated.products:
        mine = [j for j in evaluated.judged if j.sample.product == product]
        counts = [
            sum(j.sample.good == good and j.label == label for j in mine)
            for good in (True, False)
            for label in ("OK", "NG")
        ]
        unknown = sum(j.label == "UNKNOWN" for j in mine)
        lines.append(f"{product:<10}  " + " ".join(f"{n:>8}" for n in [*counts, unknown]))
    return "\n".join(lines)


def percentiles(latency_ms: dict[str, Array]) -> dict[str, dict[str, float]]:
    """p50, p95 and p99 of each timing, in milliseconds."""
    return {
        name: {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
        for name, values in latency_ms.items()
    }


def latency_table(latency_ms: dict[str, Array]) -> str:
    """The percentiles as text; recorded verdicts that are all UNKNOWN have none."""
    rows = percentiles(latency_ms)
    if not rows:
        return "no latency: nothing was judged"
    width = max(len(name) for name in rows)
    lines = [f"{'ms':<{width}}  {'p50':>9}  {'p95':>9}  {'p99':>9}"]
    for name, row in rows.items():
        lines.append("  ".join([f"{name:<{width}}", *(f"{row[key]:9.3f}" for key in ("p50", "p95", "p99"))]))
    return "\n".join(lines)
