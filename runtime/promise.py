"""What the thresholds of a bundle promise, in words; one that somebody has chosen (`andon calibrate --set`) nothing."""

from __future__ import annotations

from .bundle import Bundle
from .manifest import Threshold
from .quality import percent


def promise(entry: Threshold) -> str:
    """What a threshold of a bundle promises."""
    if not entry.promises:
        return "set by hand in the bundle: it promises no false-alarm rate"
    return f"calibrated: at most {percent(entry.false_alarm_rate)} false alarms"


def by_hand(bundle: Bundle, program: str, camera: str | None = None) -> dict[str, Threshold]:
    """The bundle's thresholds of a program that promise nothing, by product; at a camera, None: at all."""
    found = {product: bundle.threshold(product, program, camera) for product in bundle.manifest.classes}
    return {product: entry for product, entry in found.items() if entry is not None and not entry.promises}
