"""What `andon eval` prints of an evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..bydefect import ByDefect, defect_table, told
from ..byparts import part_table
from ..detector import Detector
from ..errors import quoted
from ..evaluation import Evaluated, confusion_table, latency_table
from ..fingerprint import counted
from ..quality import Metrics, mean_metrics, table
from ..recorded import Origin
from ..tradeoff import OPTIMISTIC, Point, better, block
from ..unlike import Held, beside

#: Share of false alarms within which a threshold is looked for where none was promised.
_ALLOWED = 0.1


def figures(detector: Detector, evaluated: Evaluated, whose: Origin | None, *, auto: bool) -> None:
    """Of what they are, and all figures that the engines' scores, labels and latencies give."""
    bundle, program = detector.bundle.manifest, detector.program
    if whose is not None:
        print(f"{whose}, {len(evaluated.judged)} images")
        if unlike := whose.unlike(detector.bundle):
            print(f"warning: {unlike}")
    else:
        mode = "chosen by the classifier" if auto else "given"
        engine = f"{detector.backend.name} {program.variant}, program {program.name}"
        print(f"{bundle.name}: {bundle.method}, {engine}, product {mode}, {len(evaluated.judged)} images")
    print(table(evaluated.products))
    print(confusion_table(evaluated))
    rates = {"threshold": "threshold", "F1": "F1", "false_alarm_rate": "false alarms", "miss_rate": "missed"}
    rates["unknown_rate"] = "UNKNOWN"
    for product, metrics in evaluated.products.items():
        cells = [f"{label} {metrics[key]:.4g}" for key, label in rates.items() if metrics.get(key) is not None]
        basis = "  (threshold of the best F1: not calibrated yet)" if product in evaluated.uncalibrated else ""
        print(f"{product}: {', '.join(cells)}{basis}")
    for product, text in evaluated.unknown().items():
        print(f"warning: {product}: {text}")
    for product, share in evaluated.right_product.items():
        defective = evaluated.right_product_defective.get(product)
        also = "" if defective is None else f", {defective:.1%} of the defective ones"
        print(f"{product}: the classifier finds the product of {share:.1%} of the good images{also}")
    print(latency_table(evaluated.latency_ms))
    print(f"{len(evaluated.judged) / evaluated.seconds:.1f} images a second")


def by_parts(by_part: Mapping[str, Metrics]) -> None:
    """The figures by part, which say what they count, where there are any."""
    if by_part:
        print(f"{part_table(by_part)}\nby part: each counts once, with the share of its images")


def by_defects(by_defect: ByDefect) -> None:
    """The figures by type of defect, of products that have several."""
    if found := told(by_defect):
        print(defect_table(found))


def trade_offs(points: Mapping[str, Sequence[Point]]) -> None:
    """What other thresholds would do, a block for each product."""
    shown = {product: found for product, found in points.items() if found}
    if shown:
        print(f"what other thresholds would do to these images ({OPTIMISTIC}):")
    for product, found in shown.items():
        print(block(product, found))


def each_product(texts: Mapping[str, str]) -> None:
    """A line for each product of which something is said."""
    for product, text in texts.items():
        print(f"{product}: {text}")


def next_threshold(points: Mapping[str, Sequence[Point]], detector: Detector, args: argparse.Namespace) -> None:
    """One line on how to go on where present thresholds miss many defects that others would find within the promise."""
    found = {}
    for product, each in points.items():
        own = detector.threshold(product)
        has_promised = own is not None and own.promises
        if (point := better(each, own.false_alarm_rate if own and has_promised else _ALLOWED)) is not None:
            found[product] = point.shown
    if found:
        values = [quoted(f"{product}={value}") for product, value in found.items()]
        tried = " ".join(f"--threshold {value}" for value in values)
        kept = " ".join(f"--set {value}" for value in values)
        kept += "" if args.program == "default" else f" --programs {quoted(args.program)}"
        print(
            f"next, to miss fewer: andon eval {_same_images(args)} {tried}; to keep it: andon calibrate --bundle "
            f"{quoted(args.bundle)} {kept}{_at(args.camera)} (by hand: it promises nothing)"
        )


def _same_images(args: argparse.Namespace) -> str:
    """The options by which `andon eval` judges the same images in the same way."""
    these = f"--bundle {quoted(args.bundle)} --data {quoted(args.data)}"
    these += "" if args.products is None else "".join([" --products", *(f" {quoted(name)}" for name in args.products)])
    for name, usual in (("split", "test"), ("product", "given"), ("program", "default"), ("on_corrupt", "error")):
        value = getattr(args, name)
        these += "" if value == usual else f" --{name.replace('_', '-')} {quoted(value)}"
    for name in ("limit", "verdicts"):
        value = getattr(args, name)
        these += "" if value is None else f" --{name} {quoted(value)}"
    for product, region in args.roi or ():
        these += f" --roi {quoted((f'{product}=' if product else '') + ','.join(map(str, region)))}"
    return these + _at(args.camera)


def at_camera(camera: str | None) -> str:
    """Say at which camera of a line it would be judged so; what was said."""
    if camera is None:
        return ""
    text = f"judged as at camera {camera}"
    print(text)
    return text


def _at(camera: str | None) -> str:
    return "" if camera is None else f" --camera {quoted(camera)}"


def left_out(seen: Mapping[str, int] | None) -> str:
    """Say that test images were left out; what was said."""
    if not seen:
        return ""
    text = f"test images left out of the figures: {counted(seen)}"
    print(text)
    return text


def promised(
    detector: Detector,
    promises: Mapping[str, Held],
    unlike: Mapping[str, str],
    apart: Mapping[str, str],
    camera: str | None,
) -> None:
    """Of every product the rate beside the promise, kept or not, and what of it could not be compared."""
    for product, found in promises.items():
        print(f"{product}: {unlike.get(product) or beside(found)}")
    each_product(apart)
    if unlike:
        print(
            "next, if the line looks like this: train again with such images among the good ones, or move the "
            f"thresholds alone: andon calibrate --bundle {quoted(detector.bundle.path)} --data FOLDER"
            f"{_at(camera)} (good images of every product)"
        )


def samplers(results: dict[str, Any]) -> str:
    """One line a program: quality against cost."""
    width = max(len("program"), *(len(name) for name in results))
    names = ("image_AUROC", "pixel_AUPRO", "unknown_rate")
    lines = ["  ".join([f"{'program':<{width}}", *names, "ms p50"])]
    for name, result in results.items():
        mean = mean_metrics(result["products"])
        cells = [f"{mean[k]:>{len(k)}.3f}" if mean.get(k) is not None else "-".rjust(len(k)) for k in names]
        lines.append("  ".join([f"{name:<{width}}", *cells, f"{result['latency_ms']['total']['p50']:6.1f}"]))
    return "\n".join(lines)
