"""`andon calibrate --set`: thresholds that somebody has chosen, in the bundle, so that they belong to its model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from ..bundle import Bundle
from ..byproduct import by_product
from ..errors import ConfigError, quoted
from ..manifest import Threshold
from ..newest import calibration_time
from ..promise import promise
from . import numbers, options

#: Options of `andon calibrate` that are about images, of which there are none here; each with its default.
ABOUT_IMAGES = {"false_alarm_rate": 0.01, "confidence": None, "group_by": None, "roi": None}


def configure(parser: argparse.ArgumentParser, instead: Any) -> None:
    """--set, in the group of what excludes each other, and --pixel."""
    instead.add_argument(
        "--set",
        type=numbers.product_value,
        action="append",
        metavar="[PRODUCT=]VALUE",
        help="no images: a threshold of your own (with --camera: of that camera), which promises no false-alarm rate; "
        "where products differ once for each. Of the program default, or of those that --programs names. Calibrating "
        "again replaces it",
    )
    parser.add_argument(
        "--pixel",
        type=numbers.product_value,
        action="append",
        metavar="[PRODUCT=]VALUE",
        help="with --set: also the map value above which a pixel belongs to a region; default: as it is",
    )


def require_sense(args: argparse.Namespace) -> None:
    """Refuse options that say nothing beside or without --set.

    Raises:
        ConfigError: naming the option.
    """
    if args.set is None:
        if args.pixel is None:
            return
        raise ConfigError(
            "--pixel goes with --set",
            found="--pixel with --data, whose images set it",
            expected="--set, for a threshold of your own",
            next_step="andon calibrate --bundle BUNDLE --set PRODUCT=VALUE --pixel PRODUCT=VALUE, or leave --pixel out",
        )
    if given := [name for name, default in ABOUT_IMAGES.items() if getattr(args, name) != default]:
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigError(
            f"{option} goes with --data",
            found=f"{option} with --set, which looks at no images and promises nothing",
            expected="one or the other",
            next_step=f"leave {option} out; or give --data with good images in place of --set",
        )


def main(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """Write them; what else the bundle records of these products and programs, and all others, stays as it is.

    Raises:
        ProductError, ConfigError: an unknown product or program, or two values for one.
        BundleError: the bundle cannot be changed.
    """
    products = options.chosen_products(bundle, args.products)
    names = options.chosen_programs(bundle, args.programs or ["default"])
    values = by_product("--set", "PRODUCT=VALUE", args.set, products)
    pixels = by_product("--pixel", "PRODUCT=VALUE", args.pixel or (), list(values))
    when = calibration_time(bundle.manifest)
    found = {
        product: {name: _chosen(bundle, product, name, value, pixels.get(product), when, args.camera) for name in names}
        for product, value in values.items()
    }
    updated = bundle.save_thresholds(found, args.camera)
    where = "" if args.camera is None else f" at camera {args.camera}"
    camera = "" if args.camera is None else f" --camera {quoted(args.camera)}"
    for product, entries in found.items():
        for name, entry in entries.items():
            before = bundle.threshold(product, name, args.camera)
            was = "none" if before is None else f"{before.value:.6g} ({promise(before)})"
            pixel = "" if entry.pixel is None else f", pixel {entry.pixel:.6g}"
            print(f"{product}{where}, program {name}: threshold {entry.value:.6g}{pixel}, before: {was}")
    if args.camera is None:
        say_apart(updated, list(found), names)
    again = f"andon calibrate --bundle {quoted(bundle.path)} --data GOOD-IMAGES{camera}"
    print(f"set by hand: no false-alarm rate is promised. {again} replaces them by thresholds that promise one")
    print(f"written to {bundle.root}, now bundle {updated.id}")
    return {
        "ok": True,
        "bundle": updated.id,
        "origin": "set by hand",
        "thresholds": {p: {n: t.model_dump(exclude={"images"}) for n, t in e.items()} for p, e in found.items()},
    }


def say_apart(bundle: Bundle, products: Sequence[str], programs: Sequence[str]) -> None:
    """Say which cameras have thresholds of these products and programs of their own, where those of all do not hold."""
    apart = [
        camera
        for camera in bundle.manifest.camera_thresholds
        if any(bundle.own_threshold(p, n, camera) for p in products for n in programs)
    ]
    if apart:
        print(f"thresholds of their own, which stay as they are: {', '.join(apart)} (--camera)")


def _chosen(
    bundle: Bundle, product: str, program: str, value: float, pixel: float | None, when: str, camera: str | None
) -> Threshold:
    """Of the calibration before it keeps what it does not replace: the pixel threshold, the images that this one comes
    from, which are no test images therefore, and what was cut out of them."""
    chosen = Threshold(
        value=value,
        false_alarm_rate=1.0,
        samples=0,
        pixel=pixel,
        program=program,
        source=f"set by hand, {datetime.now(timezone.utc):%Y-%m-%d}, andon calibrate --set",
        set_at=when,
    )
    if (before := bundle.threshold(product, program, camera)) is None:
        return chosen
    kept = {"pixel": before.pixel if pixel is None else pixel, "images": before.images, "crop": before.crop}
    return chosen.model_copy(update=kept)
