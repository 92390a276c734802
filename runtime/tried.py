"""Thresholds that an evaluation tries in place of the bundle's. They promise nothing, and nothing of them is stored."""

from __future__ import annotations

from collections.abc import Mapping

from .detector import Detector
from .manifest import Threshold
from .tradeoff import BUNDLES


def use_thresholds(detector: Detector, tried: Mapping[str, float]) -> dict[str, float | None]:
    """Let the detector hold scores against these; what it held them against before, None: against nothing.

    The pixel threshold stays. Of what a value by hand lets through nothing is promised, so there is no promise to hold.

    Raises:
        ProductError: the bundle does not know a product.
    """
    before: dict[str, float | None] = {}
    for product, value in tried.items():
        own = detector.threshold(product)
        before[product] = own.value if own else None
        by_hand = {"value": value, "false_alarm_rate": 1.0, "samples": 0, "source": "andon eval --threshold"}
        detector.set_threshold(product, Threshold(pixel=own.pixel if own else None, **by_hand))  # type: ignore[arg-type]
    return before


def said_of(before: Mapping[str, float | None], detector: Detector, whose: str = BUNDLES) -> dict[str, str]:
    """What to say of each product for which another threshold is tried. before: in place of what, and whose that is."""
    said = {}
    for product, own in before.items():
        now = detector.threshold(product)
        tried = f"threshold {now.value if now else float('nan'):.6g} is tried"
        place = "" if own is None else f" in place of the {whose} {own:.6g}"
        said[product] = f"{tried}{place}: it promises nothing, and is not stored"
    return said
