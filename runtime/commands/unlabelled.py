"""`andon eval --unlabelled`: scores, labels and regions of pictures that nobody has labelled."""

from __future__ import annotations

import argparse
from typing import Any

from ..bundle import Bundle, require_own_thresholds
from ..byproduct import by_product
from ..calibrated import other_engines
from ..crop import as_bundle
from ..dataset import Sample, split_readable
from ..detector import Detector
from ..engine.select import open_backend
from ..errors import quoted
from ..evaluation import Judged, latency_table, percentiles
from ..perimage import write_images
from ..tried import said_of, use_thresholds
from ..unlabelled import Scored, open_unlabelled, product_of, score
from . import evaltext, options

#: So many pictures are printed; a file has all of them.
_PRINTED = 20


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it.

    Raises:
        AndonError: an option needs labels, or bundle, pictures, product or engine cannot be used.
    """
    needing = {name: getattr(args, name[2:].replace("-", "_")) for name in ("--verdicts", "--checkpoint", "--group-by")}
    needing |= {"--samplers": args.samplers, "--product auto": args.product == "auto"}
    options.exclude("--unlabelled", needing, ": there are no figures of quality, and the pictures are of one product")
    with Bundle.load(args.bundle) as bundle, open_backend(args.backend, threads=args.threads) as backend:
        if args.camera is not None:
            require_own_thresholds(bundle.manifest, args.camera)
        product = product_of(bundle, args.products)
        tried = by_product("--threshold", "PRODUCT=VALUE", args.threshold or (), [product])
        dataset = open_unlabelled(args.data, product)
        options.say_remarks(dataset)
        dataset = as_bundle(dataset, bundle, args.roi, options.progress, program=args.program, camera=args.camera)
        samples, skipped = split_readable(_some(dataset.samples, args.limit), args.on_corrupt)
        options.say_skipped(skipped)
        with options.open_detector(bundle, backend, args) as detector:
            detector.use_thresholds(bundle, args.camera)
            before = use_thresholds(detector, tried)
            with options.progress(len(samples), "eval") as bar:
                scored = score(detector, samples, bar.update)
            program = detector.program
            value = t.value if (t := detector.threshold(product)) else None
            remark = evaltext.at_camera(args.camera)
            print(
                f"{bundle.manifest.name}: {bundle.manifest.method}, {backend.name} {program.variant}, program "
                f"{program.name}; {len(samples)} pictures that nobody has labelled, judged as {product}"
            )
            at = [] if args.camera is None else [args.camera]
            for other in other_engines(bundle, [program.name], program.variant, backend.name, {product: [value]}, at):
                print(f"warning: {other}")
            for text in said_of(before, detector).values():
                print(f"{product}: {text}")
            _print(scored, detector, product)
            if args.out is not None:
                write_images(args.out, scored.judged, bundle.id, program.name)
                print(f"{len(scored.judged)} pictures in {args.out}")
            if args.report is not None:
                from ..unlabelled_report import write_report

                write_report(args.report, detector, dataset, product, scored, remark)
            return {
                "ok": True,
                "bundle": bundle.id,
                "method": bundle.manifest.method,
                "backend": backend.name,
                "variant": program.variant,
                "program": program.name,
                "data": args.data,
                "unlabelled": True,
                "product": product,
                "camera": args.camera,
                "threshold": value,
                "thresholds_tried": tried or None,
                "images": len(scored.judged),
                "labels": {label: scored.count(label) for label in ("OK", "NG", "UNKNOWN")},
                "scores": scored.spread() or None,
                "latency_ms": percentiles(scored.latency_ms),
                "images_per_second": len(scored.judged) / scored.seconds,
                "skipped": [s.key for s in skipped],
                "out": None if args.out is None else str(args.out),
                "report": None if args.report is None else str(args.report),
            }


def _some(samples: tuple[Sample, ...], limit: int | None) -> list[Sample]:
    """All of them, or so many evenly spaced ones."""
    count = min(len(samples), limit or len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _print(scored: Scored, detector: Detector, product: str) -> None:
    """Labels, scores, the highest ones by picture, and what it took."""
    threshold = detector.threshold(product)
    limit = f", threshold {threshold.value:.6g}" if threshold else ""
    counts = ", ".join(f"{scored.count(label)} {label}" for label in ("OK", "NG", "UNKNOWN"))
    spread = scored.spread()
    scores = f", scores {spread['min']:.4g} to {spread['max']:.4g}, median {spread['median']:.4g}" if spread else ""
    print(f"{product}: {counts}{limit}{scores}")
    if threshold is None:
        print(
            f"warning: the bundle has no threshold for {product}, so nothing is OK or NG: andon calibrate --bundle "
            f"{quoted(detector.bundle.path)} --data GOOD-IMAGES, or try one with --threshold VALUE"
        )
    for judged in scored.highest_first()[:_PRINTED]:
        print(_line(judged))
    if (more := len(scored.judged) - _PRINTED) > 0:
        print(f"... and {more} more, of lower scores; --out FILE has all")
    print(latency_table(scored.latency_ms))
    print(f"{len(scored.judged) / scored.seconds:.1f} images a second")


def _line(judged: Judged) -> str:
    found = f"  {len(judged.regions)} region{'s' * (len(judged.regions) != 1)}" if judged.label == "NG" else ""
    return f"{judged.label:<7}  {judged.score:>9.4g}  {judged.sample.key}{found or ('  ' + judged.reason).rstrip()}"
