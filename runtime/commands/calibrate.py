"""`andon calibrate`: thresholds per product from good images that training left out, with the promise behind them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, Literal

from ...calib.threshold import conformal_threshold, pixel_threshold
from ..bundle import Bundle
from ..dataset import Dataset, Sample, open_dataset
from ..detector import Detector
from ..engine.select import open_backend
from ..errors import CalibrationError, ConfigError
from ..images import read_rgb
from ..manifest import Threshold
from . import options

REPORT = "report.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon calibrate`."""
    options.add_bundle(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="the training set (its held-out good images are used), or new images of good parts",
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
    parser.add_argument("--programs", nargs="+", metavar="NAME", help="only these programs; default: all of the bundle")
    options.add_engine(parser, program=False)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it; nothing is written unless every product and program can keep the promise.

    Raises:
        CalibrationError: too few images for the promise; the message names how many are needed.
        AndonError: bundle, data set or engine cannot be used.
    """
    with Bundle.load(args.bundle) as bundle:
        bundle.require_folder(f"andon calibrate --data {args.data}")  # refuse before the work, not after it
        return _calibrate(args, bundle)


def _calibrate(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    with open_backend(args.backend, threads=args.threads) as backend:
        dataset = open_dataset(args.data)
        samples, origin = held_out(bundle, dataset)
        print(f"{len(samples)} good images: {origin}")
        for product in bundle.manifest.classes:  # before the work, too
            count = sum(s.product == product for s in samples)
            conformal_threshold([0.0] * count, args.false_alarm_rate, args.confidence, product)
        known = options.program_names(bundle)
        names = args.programs or known
        if unknown := [n for n in names if n not in known]:
            raise ConfigError(f"the bundle has no program {unknown[0]}", found=unknown[0], expected=", ".join(known))
        source = f"{origin} of {dataset.spec}, {datetime.now(timezone.utc):%Y-%m-%d}, andon calibrate"
        found: dict[str, dict[str, Threshold]] = {product: {} for product in bundle.manifest.classes}
        with options.progress(len(samples) * len(names), "calibrate") as bar:
            for name in names:
                with options.open_detector(bundle, backend, args, program=name) as detector:
                    for product in bundle.manifest.classes:
                        mine = [s for s in samples if s.product == product]
                        found[product][name] = _threshold(detector, product, mine, args, source, bar)
        updated = bundle.save_thresholds(found)
        _print(found)
        print(f"written to {bundle.root}, now bundle {updated.id}")
        thresholds = {p: {n: t.model_dump() for n, t in entries.items()} for p, entries in found.items()}
        return {"ok": True, "bundle": updated.id, "origin": origin, "images": len(samples), "thresholds": thresholds}


def held_out(bundle: Bundle, dataset: Dataset) -> tuple[list[Sample], str]:
    """Good images that the model has not been fitted to, never from a test split, and what they are.

    The images that training kept for this if the data set has them. A data set with none of them is taken as new
    images of good parts: its good images outside the test split.

    Raises:
        CalibrationError: the data set has some of them but not all, or no usable image that the model has not seen.
    """
    keys, constants = _recorded(bundle, "holdout"), _recorded(bundle, "constants")
    products = [p for p in bundle.manifest.classes if p in dataset.products]
    if missing := [p for p in bundle.manifest.classes if p not in products]:
        raise CalibrationError(
            f"{dataset.spec} has no images of {', '.join(missing)}",
            found=", ".join(dataset.products),
            expected=", ".join(bundle.manifest.classes),
            next_step="give a data set with every product of the bundle",
        )
    usable = [s for s in dataset.select(split="train", products=products, good=True).samples]
    present = [s for s in usable if s.key in keys]
    if present and len(present) < len(keys):
        raise CalibrationError(
            f"{dataset.spec} has only some of the images that training held out",
            found=f"{len(present)} of {len(keys)}",
            expected="all of them, or none (new images of good parts)",
            next_step="give the same --data as in training",
        )
    if present:
        return present, "held out by training"
    if known := [s for s in usable if s.key in constants]:
        raise CalibrationError(
            f"training kept no image of {dataset.spec} for thresholds, the set was too small",
            found=f"{len(known)} images that set the model's constants, and those it was trained on",
            expected="good images that training has not seen",
            next_step="collect some and give their folder with --data",
        )
    return usable, "new good images, none of them held out by training"


def _recorded(bundle: Bundle, use: Literal["holdout", "constants"]) -> frozenset[str]:
    """Keys of the good images that training kept for that use, from the bundle's report."""
    if REPORT not in bundle.manifest.files:
        return frozenset()
    report = json.loads((bundle.root / REPORT).read_text())
    return frozenset(report.get(use, ()))


def _threshold(
    detector: Detector, product: str, samples: Sequence[Sample], args: argparse.Namespace, source: str, bar: Any
) -> Threshold:
    detector.program.reset()
    scores, maps = [], []
    for sample in samples:
        result = detector.judge_image(read_rgb(sample.path), product)
        scores.append(float("nan") if result.score is None else result.score)
        if result.map is not None:
            maps.append(result.map.copy())
        bar.update(1)
    return Threshold(
        value=conformal_threshold(scores, args.false_alarm_rate, args.confidence, product),
        false_alarm_rate=args.false_alarm_rate,
        confidence=args.confidence,
        samples=len(scores),
        pixel=pixel_threshold(maps),
        program=detector.program_name,
        source=source,
    )


def _print(found: dict[str, dict[str, Threshold]]) -> None:
    width = max(len("product"), *(len(p) for p in found))
    print(f"{'product':<{width}}  {'program':<12}  threshold  pixel      false alarms  images")
    for product, entries in found.items():
        for name, t in entries.items():
            promise = f"<= {t.false_alarm_rate:.3g}"
            pixel = "" if t.pixel is None else f"{t.pixel:.4g}"
            print(f"{product:<{width}}  {name:<12}  {t.value:<9.4g}  {pixel:<9}  {promise:<12}  {t.samples}")
