"""Thresholds that an evaluation tries in place of the bundle's. They promise nothing, and nothing of them is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .detector import Detector
from .errors import ConfigError, ProductError
from .manifest import Threshold
from .tradeoff import BUNDLES


def values_by_product(given: Sequence[tuple[str, float]], products: Sequence[str]) -> dict[str, float]:
    """What --threshold says of each of these products; of some perhaps nothing.

    given: a product and its value, or no product and that of all which have none of their own.

    Raises:
        ProductError: it names another product.
        ConfigError: it says two things of one.
    """
    named = [product for product, _ in given]
    if unknown := [product for product in named if product and product not in products]:
        raise ProductError(
            f"--threshold of a product that is not evaluated, {unknown[0]!r}",
            found=", ".join(unknown),
            expected=", ".join(products),
            next_step="name one of these, as --threshold PRODUCT=VALUE, or none: for all",
        )
    if len({*named}) < len(named):
        raise ConfigError(
            "--threshold says twice what to hold scores against",
            found=", ".join(f"{product or 'every product'}: {value:g}" for product, value in given),
            expected="one value for each product, or one for all",
            next_step="give --threshold once, or once for each product as --threshold PRODUCT=VALUE",
        )
    values = dict(given)
    return {p: values[p if p in values else ""] for p in products if p in values or "" in values}


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
