"""`andon calibrate`: thresholds per product from good images that training left out, with the promise behind them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from ...calib.threshold import PixelQuantile, conformal_threshold, rank, stricter
from .. import groups
from ..bundle import Bundle
from ..crop import as_bundle, crop_of, read_image, same_pixels
from ..dataset import open_dataset, split_readable
from ..detector import Detector
from ..engine.select import open_backend
from ..errors import CalibrationError, ConfigError, quoted
from ..fingerprint import counted, image_hash, pack
from ..manifest import Threshold
from ..newest import calibration_time
from ..unseen import Unseen, unseen_good
from . import byhand, options


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon calibrate`."""
    parser.description = (
        "Set the thresholds of a bundle from good images that the model has not seen. What is promised is about parts "
        "of which it has seen no picture: where training had several pictures of a part (a burst, exposures, a video) "
        "and was not told so with --group-by, the images it held out show parts that it knows, and new parts raise "
        "more false alarms than promised. Then give pictures of new parts with --data."
    )
    options.add_bundle(parser)
    from_where = parser.add_mutually_exclusive_group(required=True)
    from_where.add_argument(
        "--data",
        help="the training set (its held-out good images are used), or new images of good parts; told apart by content",
    )
    byhand.configure(parser, from_where)
    from_where.add_argument(
        "--forget-camera",
        type=options.camera_name,
        metavar="NAME",
        help="calibrate nothing: take out the thresholds that this camera has of its own",
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.01,
        metavar="P",
        help="promised bound on good parts judged NG (0.01)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="make the bound hold for these thresholds with this probability, not only on average; needs more images",
    )
    parser.add_argument(
        "--products", nargs="+", metavar="NAME", help="only these products; the others keep the thresholds they have"
    )
    parser.add_argument(
        "--programs", nargs="+", metavar="NAME", help="only these programs; default: all, with --set the default one"
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX|CSV",
        help=f"{groups.HELP}; all of them then count as one. Default: as training had it (andon train --group-by)",
    )
    options.add_roi(parser, "what was cut out for training, or for the thresholds that are there")
    parser.add_argument(
        "--camera",
        type=options.camera_name,
        metavar="NAME",
        help="thresholds of this camera of a line alone (its name in the line's configuration), from its own pictures; "
        "they stand before those of all cameras, which stay as they are. Stations of before cannot read such a bundle",
    )
    options.add_on_corrupt(parser)
    options.add_engine(parser, program=False)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it; nothing is written unless every product and program that is asked for can keep the promise.

    Raises:
        CalibrationError: too few images for the promise; the message names how many are needed.
        AndonError: bundle, data set or engine cannot be used.
    """
    byhand.require_sense(args)
    if args.forget_camera is not None:
        return _forget(args)
    with Bundle.load(args.bundle) as bundle:
        camera = "" if args.camera is None else f" --camera {quoted(args.camera)}"
        if args.set is not None:
            bundle.require_folder(f"andon calibrate --set PRODUCT=VALUE{camera}")
            return byhand.main(args, bundle)
        bundle.require_folder(f"andon calibrate --data {quoted(args.data)}{camera}")  # before the work, not after it
        return _calibrate(args, bundle)


def _forget(args: argparse.Namespace) -> dict[str, Any]:
    """Take a camera's own thresholds out of the bundle.

    Raises:
        ConfigError: something to calibrate is named, too, or this camera has none.
    """
    others = {name: getattr(args, name) for name in ("camera", "products", "programs", "group_by", "roi", "confidence")}
    if given := [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]:
        raise ConfigError(
            f"--forget-camera calibrates nothing, and takes out all that {args.forget_camera} has",
            found=", ".join(given),
            expected="--bundle and --forget-camera alone",
            next_step=f"leave {' and '.join(given)} out, or do the one and then the other",
        )
    with Bundle.load(args.bundle) as bundle:
        updated = bundle.forget_camera(args.forget_camera)
        print(f"thresholds of all cameras hold at {args.forget_camera} again: {bundle.root}, now bundle {updated.id}")
        return {"ok": True, "bundle": updated.id, "forgotten": args.forget_camera}


def _calibrate(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    with open_backend(args.backend, threads=args.threads) as backend:
        dataset = open_dataset(args.data)
        products = options.chosen_products(bundle, args.products)
        names = options.chosen_programs(bundle, args.programs)
        options.say_remarks(dataset)
        dataset = as_bundle(dataset, bundle, args.roi, options.progress, products, names[0], args.camera)
        unseen = unseen_good(bundle, dataset, products, args.group_by)
        samples, skipped = split_readable(unseen.samples, args.on_corrupt)
        origin = unseen.origin
        unseen = replace(unseen, samples=samples)
        parts = sum(map(unseen.count, products))
        print(f"{len(samples)} good images{'' if parts == len(samples) else f' of {parts} parts'}: {origin}")
        if unseen.left_out:
            print(f"left out: {counted(unseen.left_out)}")
        if unseen.kept:
            print(
                f"kept for `andon eval`: {unseen.kept} further good images, the fifth of a good/bad folder that is its "
                "test; a folder of new good images alone is used whole"
            )
        if unseen.remark:
            print(unseen.remark)
        options.say_skipped(skipped)
        _require_promise(products, unseen, args)
        source = f"{origin} of {dataset.spec}, {datetime.now(timezone.utc):%Y-%m-%d}, andon calibrate"
        found: dict[str, dict[str, Threshold]] = {product: {} for product in products}
        with options.progress(len(samples) * len(names), "calibrate") as bar:
            for name in names:
                with options.open_detector(bundle, backend, args, program=name) as detector:
                    for product in products:
                        found[product][name] = _threshold(detector, product, unseen, args, source, bar)
        updated = bundle.save_thresholds(found, args.camera)
        _print(found)
        if args.confidence is None:
            _say_stricter(products, unseen, args.false_alarm_rate)
        print(f"written to {bundle.root}, now bundle {updated.id}")
        _print_cameras(updated, products, names, args.camera)
        thresholds = {p: {n: t.model_dump(exclude={"images"}) for n, t in e.items()} for p, e in found.items()}
        return {
            "ok": True,
            "bundle": updated.id,
            "camera": args.camera,
            "origin": origin,
            "images": len(samples),
            "parts": parts,
            "left_out": unseen.left_out,
            "kept": unseen.kept,
            "skipped": [s.key for s in skipped],
            "thresholds": thresholds,
        }


def _require_promise(products: Sequence[str], unseen: Unseen, args: argparse.Namespace) -> None:
    """Refuse before the work what its end would refuse.

    Raises:
        CalibrationError: a product has too few images for the promise.
    """
    counts = {product: unseen.count(product) for product in products}
    for product in products:
        parts = _parts(unseen, product)
        try:
            conformal_threshold([0.0] * len(parts), args.false_alarm_rate, args.confidence, product, _several(parts))
        except CalibrationError as error:
            able = [p for p, n in counts.items() if rank(n, args.false_alarm_rate, args.confidence) is not None]
            if not able:
                raise
            raise CalibrationError(
                error.what,
                found=error.found,
                expected=error.expected,
                next_step=f"{error.next_step}; --products {' '.join(map(quoted, able))} calibrates those that have "
                f"enough with this rate, then --products {quoted(product)} gives this one a rate of its own",
            ) from error


def _threshold(
    detector: Detector, product: str, unseen: Unseen, args: argparse.Namespace, source: str, bar: Any
) -> Threshold:
    detector.program.reset()
    scores: list[float] = []
    pixels: PixelQuantile | None = None
    parts, samples = _parts(unseen, product), [s for s in unseen.samples if s.product == product]
    crop = samples[0].crop
    for sample in samples:
        result = detector.judge_image(read_image(sample), product)
        scores.append(float("nan") if result.score is None else result.score)
        if result.map is not None:
            pixels = pixels or PixelQuantile(len(samples) * result.map.size)
            pixels.add(result.map)
        bar.update(1)
    return Threshold(
        value=conformal_threshold(scores, args.false_alarm_rate, args.confidence, product, _several(parts)),
        false_alarm_rate=args.false_alarm_rate,
        confidence=args.confidence,
        samples=unseen.count(product),
        pixel=(pixels or PixelQuantile(0)).value(),
        program=detector.program_name,
        source=source,
        images=pack(image_hash(s.path) for s in samples),
        variant=detector.program.variant,
        backend=detector.backend.name,
        crop=None if crop == detector.bundle.manifest.crops.get(product) else crop,
        set_at=calibration_time(detector.bundle.manifest),
    )


def _print_cameras(bundle: Bundle, products: Sequence[str], programs: Sequence[str], camera: str | None) -> None:
    """Say at which cameras of a line the thresholds hold, and which part of the picture that makes them judge."""
    if camera is not None:
        print(f"they hold at camera {camera} alone, in place of those of all cameras")
    where = "at every camera without a roi of its own" if camera is None else f"at {camera}, unless it has a roi"
    if narrowed := [p for p in products if _narrowed(bundle, p, programs, camera)]:
        print(
            f"from now on a line judges this part of the pictures of {', '.join(narrowed)} {where}, and not what the "
            "model was trained on" + ("; for one camera alone calibrate with --camera NAME" if camera is None else "")
        )
    if camera is None:
        byhand.say_apart(bundle, products, programs)


def _narrowed(bundle: Bundle, product: str, programs: Sequence[str], camera: str | None) -> bool:
    """Whether the thresholds are of another part of the picture than the model was trained on."""
    trained = bundle.manifest.crops.get(product)
    return any(not same_pixels(crop_of(bundle, product, program, camera), trained) for program in programs)


def _parts(unseen: Unseen, product: str) -> list[str]:
    """The part of each of a product's samples."""
    return [unseen.parts.get(s.key, s.key) for s in unseen.samples if s.product == product]


def _several(parts: list[str]) -> list[str] | None:
    """None where every picture shows a part of its own: then nothing needs to be said of parts."""
    return parts if len({*parts}) < len(parts) else None


def _say_stricter(products: Sequence[str], unseen: Unseen, rate: float) -> None:
    """Where the images promise less than was asked for, which costs defects: who wants it less strict can have it."""
    for product in products:
        number = unseen.count(product)
        if (less := stricter(number, rate)) is not None:
            what = "images" if _several(_parts(unseen, product)) is None else "parts"
            print(
                f"{product}: {number} {what} keep {rate:g} with a threshold that promises {less[0]:.3g}; less strict, "
                f"the next they can promise: --false-alarm-rate {less[1]:g}"
            )


def _print(found: dict[str, dict[str, Threshold]]) -> None:
    width = max(len("product"), *(len(p) for p in found))
    print(f"{'product':<{width}}  {'program':<12}  threshold  pixel      false alarms  images")
    for product, entries in found.items():
        for name, t in entries.items():
            promise = f"<= {t.false_alarm_rate:.3g}"
            pixel = "" if t.pixel is None else f"{t.pixel:.4g}"
            print(f"{product:<{width}}  {name:<12}  {t.value:<9.4g}  {pixel:<9}  {promise:<12}  {t.samples}")
