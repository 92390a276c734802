"""`andon eval`: a data set through the engines, and the figures it is usually judged by."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..bundle import Bundle, require_own_thresholds
from ..bydefect import defect_metrics
from ..byparts import part_metrics
from ..byproduct import by_product
from ..calibrated import other_engines
from ..crop import as_bundle, as_judged
from ..dataset import Dataset, Sample, open_dataset, split_readable
from ..detector import Detector
from ..engine.base import Backend
from ..engine.select import open_backend
from ..evaluation import Evaluated, Judged, evaluate, percentiles
from ..fingerprint import read_report
from ..groups import HELP, several, tested_parts
from ..perimage import write_images
from ..promise import by_hand, promise
from ..quality import AUPRO_LIMIT, Metrics
from ..recorded import Origin, decided_by, from_verdicts, origin, read_verdicts, thresholds_of
from ..testset import choose, unseen_tests
from ..torchfigures import TorchFigures, past_of, torch_figures
from ..tradeoff import BUNDLES, LINES, Point, trade_offs
from ..tried import said_of, use_thresholds
from ..unlike import Held, held, not_compared, over_promise, unlike_calibration
from . import evalsense, evaltext, fewshot, numbers, options, unlabelled

#: Where the workstation side offers the study of all methods (export/study.py), which the device side cannot import.
STUDY = "andon.study"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon eval`."""
    parser.description = (
        "Judge a labelled data set with a bundle's engines and print the figures. pixel_AUPRO is the area under the "
        f"per-region overlap curve up to a false positive rate of {AUPRO_LIMIT:g}, divided by that; pixel_AP the "
        "average precision of pixels. Pixel figures are there where every defective image has a mask."
    )
    options.add_bundle(parser, required=False)
    parser.add_argument("--data", help="elpv or a folder (MVTec or good/bad layout; any with --unlabelled)")
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="nobody has labelled the pictures, which lie in whatever folders and are of one product (--products): "
        "scores, labels and regions, no figures of quality",
    )
    options.add_engine(parser)
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="default: test")
    parser.add_argument(
        "--product",
        choices=("given", "auto"),
        default="given",
        help="auto: the bundle's classifier chooses the product",
    )
    parser.add_argument("--products", nargs="+", metavar="NAME", help="only these products")
    parser.add_argument(
        "--limit", type=numbers.count, metavar="N", help="at most N images a product, good and defective evenly"
    )
    parser.add_argument("--samplers", action="store_true", help="also every other program of the bundle, with its cost")
    parser.add_argument(
        "--verdicts", type=Path, metavar="FILE", help="judge nothing: take the verdicts that `andon watch --out` wrote"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="put the AUROC that training measured in torch beside these, if of the same images",
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX|CSV",
        help=f"{HELP}; figures are then by part, too, and a part counts once beside the promise. Default: as training "
        "had it (andon train --group-by)",
    )
    parser.add_argument(
        "--camera",
        type=options.camera_name,
        metavar="NAME",
        help="judge by the thresholds that `andon calibrate --camera NAME` set; of recorded verdicts take those of "
        "that camera",
    )
    options.add_roi(parser, "what was cut out for the thresholds, or for training")
    options.add_on_corrupt(parser)
    parser.add_argument(
        "--threshold",
        type=numbers.product_value,
        action="append",
        metavar="[PRODUCT=]VALUE",
        help="try a threshold in place of the bundle's (with --verdicts: of the line's), each product that differs "
        "once; nothing is stored",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write what was decided of each image, a line of a .jsonl or a row of a .csv",
    )
    parser.add_argument("--report", type=Path, metavar="HTML", help="write a report with heatmaps, histograms and ROC")

    fewshot.configure(parser)
    for point in entry_points(group=STUDY):
        point.load().configure(parser)
    fewshot.add_results(parser)


@dataclass(frozen=True)
class _Tested:
    """What is evaluated: the images, what was left out of them, and which part each shows, where that is known."""

    dataset: Dataset
    samples: list[Sample]
    skipped: list[Sample]
    seen: dict[str, int] | None
    remark: str
    parts: dict[str, str] | None

    @property
    def grouped(self) -> bool:
        """Whether some part has several images."""
        return bool(self.parts and several(self.samples, self.parts))


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it.

    Raises:
        AndonError: bundle, data set, product or engine cannot be used.
    """
    if getattr(args, "all", None) is not None:
        options.exclude("--all", evalsense.of_one_evaluation(args))
        args.results = args.results or args.study_results
        study: dict[str, Any] = next(iter(entry_points(group=STUDY))).load().main(args)
        return study
    evalsense.require_files(args)
    if args.few_shot is not None:
        if args.results is not None:
            options.require_writable(args.results, "--results")
        return fewshot.main(args)
    evalsense.require_sense(args)
    if args.unlabelled:
        return unlabelled.main(args)
    with Bundle.load(args.bundle) as bundle, open_backend(args.backend, threads=args.threads) as backend:
        if args.camera is not None and args.verdicts is None:
            require_own_thresholds(bundle.manifest, args.camera)
        torch = None if args.checkpoint is None else torch_figures(args.checkpoint, bundle)  # refused before the work
        tested = _tested(args, bundle)
        tried = by_product(
            "--threshold", "PRODUCT=VALUE", args.threshold or (), sorted({s.product for s in tested.samples})
        )
        recorded, whose, lines = _recorded(args, tested.samples, bundle, tried)
        names = [args.program] + [n for n in options.program_names(bundle) if args.samplers and n != args.program]
        results: dict[str, Any] = {}
        for name in names:
            with options.open_detector(bundle, backend, args, program=name) as detector:
                detector.use_thresholds(bundle, args.camera)
                before = use_thresholds(detector, tried)
                if recorded is None:
                    samples = tested.samples if args.roi or name == args.program else None
                    evaluated = _run(detector, samples or as_judged(tested.samples, bundle, name, args.camera), args)
                else:
                    evaluated, before = recorded, lines
                results[name] = _evaluated(args, detector, tested, evaluated, whose, before, torch)
        if args.samplers:
            print(evaltext.samplers(results))
        variant = options.choose_variant(args.variant, bundle, backend.name)
        return {
            "ok": True,
            **_about(bundle, backend, variant, args, whose),
            "thresholds_tried": tried or None,
            **results[args.program],
            **({"samplers": results} if args.samplers else {}),
        }


def _tested(args: argparse.Namespace, bundle: Bundle) -> _Tested:
    """The images that are asked for; what is left out of them is said."""
    dataset = open_dataset(args.data)
    options.say_remarks(dataset)
    dataset = as_bundle(dataset, bundle, args.roi, options.progress, args.products, args.program, args.camera)
    chosen = choose(dataset, args.split, args.products, args.limit)
    samples, skipped = split_readable(chosen, args.on_corrupt)
    options.say_skipped(skipped)
    samples, seen = unseen_tests(bundle, samples, dataset.spec)
    remark = ". ".join(filter(None, [evaltext.at_camera(args.camera), evaltext.left_out(seen)]))
    parts, about_parts = tested_parts(samples, args.group_by, str(read_report(bundle).get("group_by", "")))
    if about_parts:
        print(f"warning: {about_parts}")
    return _Tested(dataset, samples, skipped, seen, remark, parts)


def _evaluated(
    args: argparse.Namespace,
    detector: Detector,
    tested: _Tested,
    evaluated: Evaluated,
    whose: Origin | None,
    before: Mapping[str, float | None],
    torch: TorchFigures | None,
) -> dict[str, Any]:
    """What one program's evaluation comes to: printed, written where it is the one that was asked for, and as JSON.

    before: the thresholds (the bundle's, or the line's) of the products for which others are tried.
    """
    judged = evaluated.judged
    evaltext.figures(detector, evaluated, whose, auto=args.product == "auto")
    if whose is None:  # verdicts do not say what engines gave them
        _warn_of_engines(detector, args.camera)
    by_defect = defect_metrics(judged)
    evaltext.by_defects(by_defect)
    by_part = part_metrics(judged, tested.parts) if tested.parts is not None and tested.grouped else {}
    evaltext.by_parts(by_part)
    promises = held(detector, judged, tested.parts)
    unlike, over = unlike_calibration(promises), over_promise(promises)
    apart = not_compared(detector, judged, tested.parts)
    evaltext.promised(detector, promises, unlike, apart, args.camera)
    chosen = by_hand(detector.bundle, detector.program_name, args.camera)
    unpromised = {
        p: f"its threshold was {promise(chosen[p])}"
        for p, metrics in evaluated.products.items()
        if p in chosen
        and p not in before
        and metrics.get("threshold") == chosen[p].value  # a line may have had another
    }
    evaltext.each_product(unpromised)
    own = BUNDLES if whose is None else LINES
    instead = said_of(before, detector, own)
    evaltext.each_product(instead)
    points = trade_offs(evaluated, before, own)
    evaltext.trade_offs(points)
    result = as_dict(evaluated) | {
        "by_defect": by_defect,
        "by_part": by_part or None,
        "trade_off": {product: [point.as_dict() for point in found] for product, found in points.items()},
        "promises": {product: _promise(found) for product, found in promises.items()},
        "unlike": list(unlike),
        "over_promise": list(over),
        "not_compared": list(apart),
        "by_hand": list(unpromised),
        "seen": tested.seen,
        "skipped": [s.key for s in tested.skipped],
    }
    if detector.program_name != args.program:
        return result
    compared: dict[str, str] = {}
    if torch is not None:
        beside = torch.beside(evaluated, tested.dataset, args.split, past_of(detector, judged, whose is not None))
        result |= {"torch": beside.torch, "not_beside_torch": beside.apart, "torch_differs": beside.past or None}
        compared = beside.texts()
        evaltext.each_product(compared)
    if args.out is not None:
        result["out"] = _images(args.out, detector, judged, tested.parts, whose)
    if args.report:
        remarks = [*over.items(), *unlike.items(), *apart.items(), *unpromised.items()]
        remarks += [*instead.items(), *compared.items()]
        made = _report(
            args.report, detector, tested.dataset, evaluated, promises, by_part, points, remarks, tested.remark, whose
        )
        result["report"] = str(made)
    if not before:
        evaltext.next_threshold(points, detector, args)
    return result


def _images(
    path: Path,
    detector: Detector,
    judged: Sequence[Judged],
    parts: Mapping[str, str] | None,
    whose: Origin | None,
) -> str:
    """Write what was decided of each image; verdicts do not say by what program, nor several bundles' by which."""
    if whose is None:
        write_images(path, judged, detector.bundle.id, detector.program_name, parts)
    else:
        write_images(path, judged, whose.bundles[0] if len(whose.bundles) == 1 else None, None, parts)
    print(f"{len(judged)} images in {path}")
    return str(path)


def as_dict(evaluated: Evaluated) -> dict[str, Any]:
    """The JSON form of an evaluation."""
    unknown = sum(j.label == "UNKNOWN" for j in evaluated.judged)
    return {
        "images": len(evaluated.judged),
        "unknown": unknown,
        "products": evaluated.products,
        "mean": evaluated.mean,
        "right_product": evaluated.right_product,
        "right_product_defective": evaluated.right_product_defective,
        "latency_ms": percentiles(evaluated.latency_ms),
        "images_per_second": len(evaluated.judged) / evaluated.seconds,
    }


def _recorded(
    args: argparse.Namespace, samples: Sequence[Sample], bundle: Bundle, tried: Mapping[str, float]
) -> tuple[Evaluated | None, Origin | None, dict[str, float | None]]:
    """The recorded verdicts of the samples, whose they are, and the line's thresholds of the products for which others
    are tried; nothing where no verdicts are given."""
    file = args.verdicts
    if file is None:
        return None, None, {}
    verdicts = read_verdicts(file, args.camera)
    whose = origin(verdicts, samples, file, bundle)
    lines = thresholds_of(verdicts, samples)
    return from_verdicts(decided_by(verdicts, tried), samples), whose, {p: lines.get(p) for p in tried}


def _about(
    bundle: Bundle, backend: Backend, variant: str, args: argparse.Namespace, whose: Origin | None
) -> dict[str, Any]:
    """What was evaluated, on what. Verdicts say neither engine nor program of the line that published them."""
    return {
        "bundle": bundle.id,
        "method": bundle.manifest.method,
        "backend": backend.name if whose is None else None,
        "variant": variant if whose is None else None,
        "data": args.data,
        "split": args.split,
        "product_mode": args.product,
        "program": args.program if whose is None else None,
        "camera": args.camera,
        "verdicts": None if whose is None else {"file": str(whose.file), "bundles": list(whose.bundles)},
    }


def _run(detector: Detector, samples: Sequence[Sample], args: argparse.Namespace) -> Evaluated:
    with options.progress(len(samples), f"eval {detector.program_name}") as bar:
        return evaluate(detector, samples, auto=args.product == "auto", step=bar.update)


def _warn_of_engines(detector: Detector, camera: str | None) -> None:
    """Warn of thresholds that were calibrated with engines whose decisions these have not been shown to keep."""
    bundle, program = detector.bundle, detector.program
    in_force = {p: [t.value if (t := detector.threshold(p)) else None] for p in bundle.manifest.classes}
    at = [] if camera is None else [camera]
    for other in other_engines(bundle, [program.name], program.variant, detector.backend.name, in_force, at):
        print(f"warning: {other}")


def _promise(found: Held) -> dict[str, Any]:
    """The JSON form of a rate beside its promise."""
    counts = {"images": found.images, "parts": found.parts, "alarms": found.alarms}
    return {"false_alarm_rate": found.rate, "promised": found.promise, **counts}


def _report(
    path: Path,
    detector: Detector,
    dataset: Dataset,
    evaluated: Evaluated,
    promises: Mapping[str, Held],
    by_part: Mapping[str, Metrics],
    points: Mapping[str, Sequence[Point]],
    remarks: Sequence[tuple[str, str]],
    remark: str,
    whose: Origin | None,
) -> Path:
    from ..evaluation_report import write_report

    return write_report(path, detector, dataset, evaluated, promises, by_part, points, remarks, remark, whose)
