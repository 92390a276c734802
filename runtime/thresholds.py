"""Which threshold a product is judged against, and what to do where it has none."""

from __future__ import annotations

from .bundle import Bundle
from .errors import BundleError, quoted
from .lineconfig import JudgeConfig
from .overrides import Stored


def threshold_in_force(
    product: str, bundle: Bundle, program: str, settings: JudgeConfig, commanded: Stored
) -> float | None:
    """A command's threshold, if it is about this model and program, else the configuration's, else the bundle's."""
    override = commanded.thresholds.get(product)
    if override is not None and override.fits(bundle, program):
        return override.value
    if product in settings.thresholds:
        return settings.thresholds[product]
    entry = bundle.threshold(product, program)
    return None if entry is None else entry.value


def calibration_step(bundle: Bundle) -> str:
    """What to do where a bundle has no threshold: a .tar has to be unpacked for it."""
    try:
        bundle.require_folder("andon calibrate --data GOOD-IMAGES")
    except BundleError as packed:
        return f"{packed.next_step}, or set judge.thresholds"
    return f"andon calibrate --bundle {quoted(bundle.path)} --data GOOD-IMAGES, or set judge.thresholds"
