"""Which threshold a product is judged against at a camera, and what to do where it has none."""

from __future__ import annotations

from .bundle import Bundle
from .errors import BundleError, quoted
from .lineconfig import JudgeConfig
from .linethresholds import in_model
from .overrides import Stored


def threshold_in_force(
    product: str, bundle: Bundle, program: str, settings: JudgeConfig, commanded: Stored, camera: str | None = None
) -> float | None:
    """A command's threshold, else the configuration's, each if it is for this model and program, else the bundle's.

    camera: where; what was set for it alone stands before what was set for all. None: what holds for all.
    """
    override = commanded.in_force(product, bundle, program, camera)
    if override is not None:
        return override
    if (own := in_model(settings.thresholds.get(product), bundle, program)) is not None:
        return own
    entry = bundle.threshold(product, program, camera)
    return None if entry is None else entry.value


def calibration_step(bundle: Bundle) -> str:
    """What to do where a bundle has no threshold: a .tar has to be unpacked for it."""
    own = "or with --set PRODUCT=VALUE in place of --data, for a threshold of your own"
    try:
        bundle.require_folder("andon calibrate --data GOOD-IMAGES")
    except BundleError as packed:
        return f"{packed.next_step}, {own}"
    return f"andon calibrate --bundle {quoted(bundle.path)} --data GOOD-IMAGES, {own}"
