"""Good images that are unlike those a threshold was set on: another light, lens or batch.

A threshold's promise is about parts like the calibration's. How many of those lie above it by chance is known exactly
(calib/threshold.py), so more than that says that the images differ, and that every figure of such an evaluation says as
much about the difference as about defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..calib.threshold import chance_of_as_many, rank
from .detector import Detector
from .evaluation import Judged
from .manifest import Loop
from .wiring import programs

_UNLIKE = 1e-3  # probability below which bad luck is no explanation


@dataclass(frozen=True)
class _Alarms:
    """number of `parts` good images of a product are NG; promise: of the `samples` behind its threshold.

    chance: probability that parts like the calibration's do that or worse; None where it is not known.
    """

    number: int
    parts: int
    promise: float
    samples: int
    chance: float | None


def unlike_calibration(detector: Detector, judged: Sequence[Judged]) -> dict[str, str]:
    """What to say of each product whose good images raise more alarms than parts like the calibration's would.

    Images that were judged as another product or could not be judged do not count: they are no matter of the light.
    Nothing is said where the chance is not known: thresholds set by hand or by enrolling, and programs that keep
    something from frame to frame, whose scores depend on what came before.
    """
    return {
        product: f"{a.number} of {a.parts} good images are called NG where {a.promise:.1%} were promised; good parts "
        f"like the {a.samples} of the calibration would do that with probability {_shown(a.chance)}. These are unlike "
        "them (light, lens, batch?), and the figures say as much about that as about defects. Or the calibration's are "
        "pictures of parts that were trained on (andon train --group-by)"
        for product, a in _alarms(detector, judged).items()
        if a.chance is not None and a.chance < _UNLIKE
    }


def over_promise(detector: Detector, judged: Sequence[Judged]) -> dict[str, str]:
    """Rate beside promise, of each product whose good images raise more alarms than promised, but are not `unlike`."""
    said = {}
    for product, a in _alarms(detector, judged).items():
        if a.number <= a.promise * a.parts or (a.chance is not None and a.chance < _UNLIKE):
            continue
        text = f"{a.number} of {a.parts} good images are called NG, {a.number / a.parts:.1%}, where at most "
        text += f"{a.promise:.1%} were promised"
        if a.chance is not None:
            text += f"; good parts like the {a.samples} of the calibration do that with probability {_shown(a.chance)}"
        said[product] = text
    return said


def _alarms(detector: Detector, judged: Sequence[Judged]) -> dict[str, _Alarms]:
    """The false alarms of each product that has some promise and good images to hold it against."""
    steps = programs(detector.bundle.manifest)[detector.program_name]
    has_past = any(isinstance(step, Loop) and step.persist for step in steps)
    found = {}
    for product in sorted({j.sample.product for j in judged}):
        threshold = detector.threshold(product)
        good = [j for j in judged if j.sample.product == product == j.product and j.sample.good]
        labels = [j.label for j in good if j.label != "UNKNOWN"]
        if threshold is None or not labels or not threshold.samples or threshold.false_alarm_rate >= 1:
            continue
        promise, samples, confidence = threshold.false_alarm_rate, threshold.samples, threshold.confidence
        number, chance = labels.count("NG"), None
        provisional = threshold.source.startswith("provisional")
        if not has_past and not provisional and rank(samples, promise, confidence) is not None:
            chance = chance_of_as_many(number, len(labels), samples, promise, confidence)
        found[product] = _Alarms(number, len(labels), promise, samples, chance)
    return found


def _shown(chance: float | None) -> str:
    return "below 1e-09" if chance is None or chance < 1e-9 else f"{chance:.1g}"
