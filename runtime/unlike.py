"""Good images that are unlike those a threshold was set on: another light, lens or batch.

A threshold's promise is about parts like the calibration's. How many of those lie above it by chance is known exactly
(calib/threshold.py), so more than that says that the images differ, and that every figure of such an evaluation says as
much about the difference as about defects.

The promise is about one picture of a new part. Where it is known which images show the same part, each part weighs one
(byparts.py); then the chance is that of parts whose images are all decided alike, which spread most. What was judged
with another threshold is not held against the promise, and what is not counted as it was neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..calib.threshold import chance_of_as_many, rank
from .byparts import part_shares
from .detector import Detector
from .evaluation import Judged
from .fingerprint import unpack
from .manifest import Loop, Manifest, Threshold
from .quality import percent
from .wiring import programs

_UNLIKE = 1e-3  # probability below which bad luck is no explanation
_NAMED = 3


@dataclass(frozen=True)
class Held:
    """The false alarms on a product's good images, held against its threshold's promise.

    alarms: how many of `images` good images are NG. parts: how many parts they show, where that is known. rate: the
    share of NG; with parts the mean of each one's share. promise: the largest that was promised, by `samples` good
    images (or parts).
    chance: probability that parts like the calibration's do that or worse, or more than that where parts have several
    images; None where it is not known.
    """

    alarms: int
    images: int
    parts: int | None
    rate: float
    promise: float
    samples: int
    chance: float | None

    @property
    def unlike(self) -> bool:
        """Whether chance is no explanation."""
        return self.chance is not None and self.chance < _UNLIKE

    @property
    def over(self) -> bool:
        """Whether the rate is above the promise."""
        return self.rate > self.promise * (1 + 1e-9)

    @property
    def grouped(self) -> bool:
        """Whether some part has several images."""
        return self.parts is not None and self.parts < self.images

    def __str__(self) -> str:
        """How many are NG, in words."""
        of = f"{self.images} good images" + (f" of {self.parts} parts" if self.grouped else "")
        return f"{self.alarms} of {of} are called NG"


#: The part of each image by its key, where it is known; `andon eval` finds it out (groups.tested_parts).
Parts = Mapping[str, str] | None


def held(detector: Detector, judged: Sequence[Judged], parts: Parts = None) -> dict[str, Held]:
    """Each product's false alarms beside the promise, where it has some and good images that were judged by it.

    A promise that counts parts is held against them alone: without `parts` such a product is not there.
    """
    found = {}
    for product, (threshold, good) in _promised(detector, judged).items():
        own = [j for j in good if _by(threshold, j)]
        if not own or (parts is None and _counts_parts(threshold)):
            continue
        alarms = sum(j.label == "NG" for j in own)
        shares = None if parts is None else part_shares(own, parts, "NG")
        count, weight = (len(own), float(alarms)) if shares is None else (len(shares), float(shares.sum()))
        chance = None
        if _chance_is_known(detector, threshold, own):
            promise = (threshold.samples, threshold.false_alarm_rate, threshold.confidence)
            chance = chance_of_as_many(math.floor(weight + 1e-9), count, *promise)
        shown = None if parts is None else count
        rate, promised = weight / count, threshold.false_alarm_rate
        found[product] = Held(alarms, len(own), shown, rate, promised, threshold.samples, chance)
    return found


def unlike_calibration(promises: Mapping[str, Held]) -> dict[str, str]:
    """What to say of each product whose good images raise more alarms than parts like the calibration's would.

    Images that were judged as another product or could not be judged do not count: they are no matter of the light.
    Nothing is said where the chance is not known: thresholds set by hand or by enrolling, and programs or memories that
    keep something from frame to frame, whose scores depend on what came before.
    """
    return {
        product: f"{h}{_each_once(h)} where {percent(h.promise)} were promised; good parts like the {h.samples} of the "
        f"calibration would do that with probability {_shown(h)}. These are unlike them (light, lens, batch?), and the "
        "figures say as much about that as about defects. Or the calibration's are pictures of parts that were trained "
        "on (andon train --group-by)"
        for product, h in promises.items()
        if h.unlike
    }


def over_promise(promises: Mapping[str, Held]) -> dict[str, str]:
    """Rate beside promise, of each product whose good images raise more alarms than promised, but are not `unlike`."""
    return {product: beside(h) for product, h in promises.items() if h.over and not h.unlike}


def beside(found: Held) -> str:
    """The rate beside the promise in words, and where it is above it how likely that is."""
    rate = _each_once(found) or f", {percent(found.rate)},"
    text = f"{found}{rate} where at most {percent(found.promise)} were promised"
    if found.over and found.chance is not None and found.chance < 1:
        text += f"; good parts like the {found.samples} of the calibration do that with probability {_shown(found)}"
    return text


def not_compared(detector: Detector, judged: Sequence[Judged], parts: Parts = None) -> dict[str, str]:
    """What to say of each product some of whose good images cannot be held against the promise."""
    said = {}
    for product, (threshold, good) in _promised(detector, judged).items():
        others = [j.threshold for j in good if not _by(threshold, j) and j.threshold is not None]
        promised = f"at most {percent(threshold.false_alarm_rate)}"
        if others:
            said[product] = (
                f"{len(others)} of {len(good)} good images were judged with the threshold {_values(others)}, not with "
                f"{threshold.value!r}, which calibration set and promised {promised} false alarms "
                "for: the promise is not held against them. Next: record verdicts of a line that has the "
                "bundle's thresholds, or leave --verdicts out to judge the images with them"
            )
        elif parts is None and _counts_parts(threshold):
            said[product] = (
                f"{promised} false alarms were promised of parts (the calibration's "
                f"{len(unpack(threshold.images))} images show {threshold.samples}), and it is not known which part "
                f"each of the {len(good)} good images here shows: the promise is not held against their rate. Next: "
                "say it with --group-by"
            )
    return said


def _promised(detector: Detector, judged: Sequence[Judged]) -> dict[str, tuple[Threshold, list[Judged]]]:
    """Of each product with some promise: its threshold, and what was decided of its good images."""
    found = {}
    for product in sorted({j.sample.product for j in judged}):
        threshold = detector.threshold(product)
        good = [j for j in judged if j.sample.product == product == j.product and j.sample.good]
        good = [j for j in good if j.label != "UNKNOWN"]
        if threshold is not None and good and threshold.promises:
            found[product] = (threshold, good)
    return found


def _counts_parts(threshold: Threshold) -> bool:
    """Whether it was set on several pictures of some parts: on more images than count."""
    return threshold.samples < len(unpack(threshold.images))


def _by(threshold: Threshold, judged: Judged) -> bool:
    """Whether it was judged with that threshold, which verdicts carry as it is, digit for digit."""
    return judged.threshold is None or judged.threshold == threshold.value


def _chance_is_known(detector: Detector, threshold: Threshold, judged: Sequence[Judged]) -> bool:
    past = has_past(detector.bundle.manifest, detector.program_name) or any(j.learnt for j in judged)
    provisional = threshold.source.startswith("provisional")
    possible = rank(threshold.samples, threshold.false_alarm_rate, threshold.confidence) is not None
    return not past and not provisional and possible


def has_past(manifest: Manifest, program: str) -> bool:
    """Whether a program keeps something from frame to frame, so that a score depends on what came before it."""
    return any(isinstance(step, Loop) and step.persist for step in programs(manifest)[program])


def _values(thresholds: Iterable[float]) -> str:
    """Thresholds in words, all digits: they may differ from the bundle's in the last one."""
    values = sorted({*thresholds})
    return " or ".join([*(repr(v) for v in values[:_NAMED]), *(["others"] if len(values) > _NAMED else [])])


def _each_once(found: Held) -> str:
    return f", {percent(found.rate)} with each part counted once," if found.grouped else ""


def _shown(found: Held) -> str:
    if found.chance is None or found.chance < 1e-9:
        return "below 1e-09"
    return f"{'at most ' if found.grouped else ''}{found.chance:.1g}"
