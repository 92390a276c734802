"""Good images that are unlike those a threshold was set on: another light, lens or batch.

A threshold's promise is about parts like the calibration's. How many of those lie above it by chance is known exactly
(calib/threshold.py), so more than that says that the images differ, and that every figure of such an evaluation says as
much about the difference as about defects.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..calib.threshold import chance_of_as_many, rank
from .detector import Detector
from .evaluation import Judged
from .manifest import Loop
from .wiring import programs

_UNLIKE = 1e-3  # probability below which bad luck is no explanation


def unlike_calibration(detector: Detector, judged: Sequence[Judged]) -> dict[str, str]:
    """What to say of each product whose good images raise more alarms than parts like the calibration's would.

    Images that were judged as another product or could not be judged do not count: they are no matter of the light.
    Nothing is said where the chance is not known: thresholds set by hand or by enrolling, and programs that keep
    something from frame to frame, whose scores depend on what came before.
    """
    steps = programs(detector.bundle.manifest)[detector.program_name]
    if any(isinstance(step, Loop) and step.persist for step in steps):
        return {}
    found = {}
    for product in sorted({j.sample.product for j in judged}):
        threshold = detector.threshold(product)
        good = [j for j in judged if j.sample.product == product == j.product and j.sample.good]
        labels = [j.label for j in good if j.label != "UNKNOWN"]
        if threshold is None or threshold.source.startswith("provisional"):
            continue
        promise, samples, confidence = threshold.false_alarm_rate, threshold.samples, threshold.confidence
        if not labels or not samples or promise >= 1 or rank(samples, promise, confidence) is None:
            continue
        number = labels.count("NG")
        chance = chance_of_as_many(number, len(labels), samples, promise, confidence)
        if chance < _UNLIKE:
            shown = f"{chance:.1g}" if chance >= 1e-9 else "below 1e-09"
            found[product] = (
                f"{number} of {len(labels)} good images are called NG where {promise:.1%} were promised; good parts "
                f"like the {samples} of the calibration would do that with probability {shown}. These are unlike them "
                "(light, lens, batch?), and the figures say as much about that as about defects"
            )
    return found
