"""`andon eval`: a data set through the engines, and the figures it is usually judged by."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..byparts import part_metrics, part_table
from ..calibrated import other_engines
from ..crop import as_bundle, as_judged
from ..dataset import Dataset, Sample, open_dataset, split_readable
from ..detector import Detector
from ..engine.base import Backend
from ..engine.select import open_backend
from ..errors import ConfigError, quoted
from ..evaluation import Evaluated, confusion_table, evaluate, latency_table, percentiles
from ..fingerprint import Seen, counted, read_report, tally
from ..groups import HELP, several, tested_parts
from ..promise import by_hand, promise
from ..quality import Metrics, mean_metrics, table
from ..recorded import Origin, from_verdicts, origin, read_verdicts
from ..torchfigures import TorchFigures, torch_figures
from ..unlike import Held, beside, held, not_compared, over_promise, unlike_calibration
from . import fewshot, numbers, options

#: Where the workstation side offers the study of all methods (export/study.py), which the device side cannot import.
STUDY = "andon.study"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon eval`."""
    options.add_bundle(parser, required=False)
    parser.add_argument("--data", help="elpv or a folder (MVTec or good/bad layout)")
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
    options.add_roi(parser, "what was cut out for the thresholds, or for training")
    options.add_on_corrupt(parser)
    parser.add_argument("--report", type=Path, metavar="HTML", help="write a report with heatmaps, histograms and ROC")

    fewshot.configure(parser)
    for point in entry_points(group=STUDY):
        point.load().configure(parser)
    fewshot.add_results(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it.

    Raises:
        AndonError: bundle, data set, product or engine cannot be used.
    """
    if getattr(args, "all", None) is not None:
        args.results = args.results or args.study_results
        study: dict[str, Any] = next(iter(entry_points(group=STUDY))).load().main(args)
        return study
    if args.report is not None:
        options.require_writable(args.report, "--report")
    if args.few_shot is not None:
        if args.results is not None:
            options.require_writable(args.results, "--results")
        return fewshot.main(args)
    _require_sense(args)
    with Bundle.load(args.bundle) as bundle, open_backend(args.backend, threads=args.threads) as backend:
        torch = None if args.checkpoint is None else torch_figures(args.checkpoint, bundle)  # refused before the work
        dataset = open_dataset(args.data)
        options.say_remarks(dataset)
        dataset = as_bundle(dataset, bundle, args.roi, options.progress, args.products, args.program)
        chosen = choose(dataset, args.split, args.products, args.limit)
        samples, skipped = split_readable(chosen, args.on_corrupt)
        options.say_skipped(skipped)
        samples, seen = unseen_tests(bundle, samples, dataset.spec)
        remark = _print_seen(seen)
        parts, about_parts = tested_parts(samples, args.group_by, str(read_report(bundle).get("group_by", "")))
        if about_parts:
            print(f"warning: {about_parts}")
        grouped = bool(parts and several(samples, parts))
        recorded, whose = _recorded(args.verdicts, samples, bundle)
        names = [args.program] + [n for n in options.program_names(bundle) if args.samplers and n != args.program]
        results: dict[str, Any] = {}
        for name in names:
            with options.open_detector(bundle, backend, args, program=name) as detector:
                shown = samples if args.roi or name == args.program else as_judged(samples, bundle, name)
                evaluated = recorded or _run(detector, shown, auto=args.product == "auto")
                _print(detector, evaluated, whose, auto=args.product == "auto")
                if whose is None:  # verdicts do not say what engines gave them
                    for other in other_engines(bundle, [name], detector.program.variant, backend.name):
                        print(f"warning: {other}")
                by_part = part_metrics(evaluated.judged, parts) if parts is not None and grouped else {}
                _print_parts(by_part)
                promises = held(detector, evaluated.judged, parts)
                unlike, over = unlike_calibration(promises), over_promise(promises)
                apart = not_compared(detector, evaluated.judged, parts)
                _print_promises(detector, promises, unlike, apart)
                unpromised = _unpromised(bundle, name, evaluated)
                results[name] = as_dict(evaluated) | {
                    "by_part": by_part or None,
                    "promises": {product: _promise(found) for product, found in promises.items()},
                    "unlike": list(unlike),
                    "over_promise": list(over),
                    "not_compared": list(apart),
                    "by_hand": list(unpromised),
                    "seen": seen,
                    "skipped": [s.key for s in skipped],
                }
                if torch is not None and name == args.program:
                    found = _beside_torch(torch, evaluated, dataset, args.split)
                    results[name]["torch"], results[name]["not_beside_torch"] = found
                if args.report and name == args.program:
                    remarks = [*over.items(), *unlike.items(), *apart.items(), *unpromised.items()]
                    made = _report(args.report, detector, dataset, evaluated, promises, by_part, remarks, remark, whose)
                    results[name]["report"] = str(made)
        if args.samplers:
            print(_samplers(results))
        variant = options.choose_variant(args.variant, bundle, backend.name)
        return {
            "ok": True,
            **_about(bundle, backend, variant, args, whose),
            **results[args.program],
            **({"samplers": results} if args.samplers else {}),
        }


def choose(dataset: Dataset, split: str, products: Sequence[str] | None, limit: int | None) -> list[Sample]:
    """The images to judge; with a limit, evenly spaced over good and defective ones of each product.

    Raises:
        ConfigError: none is left.
    """
    chosen = dataset.select(split=None if split == "all" else split, products=products).samples  # type: ignore[arg-type]
    if not chosen:
        raise ConfigError(
            f"{dataset.spec} has no images in its {split} split",
            found=dataset.describe(),
            expected="at least one image",
            next_step="choose another --split",
        )
    if limit is None:
        return list(chosen)
    kept: list[Sample] = []
    for product in sorted({s.product for s in chosen}):
        groups = [[s for s in chosen if s.product == product and s.good == good] for good in (True, False)]
        share = [min(len(groups[0]), max(limit - len(groups[1]), (limit + 1) // 2))]
        share.append(min(len(groups[1]), limit - share[0]))
        for group, count in zip(groups, share, strict=True):
            kept += [group[i * len(group) // count] for i in range(count)]
    return kept


def unseen_tests(bundle: Bundle, samples: Sequence[Sample], spec: str) -> tuple[list[Sample], dict[str, int] | None]:
    """Samples without the test images that the making of the bundle saw (or skipped), and how many those are by use.

    A good/bad folder is split by position, so images that are added to it move others from train to test; and sets are
    copied together. Images of the train split stay: who asks for them knows. None for a bundle without a record.

    Raises:
        ConfigError: no image is left.
        SourceError: an image cannot be read.
    """
    known = Seen.of(bundle)
    if known is None:
        return list(samples), None
    tests = [s for s in samples if s.split == "test"]
    use = {k.sample.key: k.use for k in known.sort(tests)}
    seen = tally(use.values())
    kept = [s for s in samples if use.get(s.key) is None]
    if not kept:
        raise ConfigError(
            f"no test image of {spec} is new to the model",
            found=counted(seen) or "no image",
            expected="images that neither training nor thresholds have seen",
            next_step="give other images with --data",
        )
    return kept, seen


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


def _require_sense(args: argparse.Namespace) -> None:
    """Refuse what lacks bundle or data, and what asks for judging where nothing is judged."""
    if args.bundle is None or args.data is None:
        raise ConfigError(
            "what shall be evaluated?",
            found=f"--bundle {args.bundle}, --data {args.data}",
            expected="a bundle and a data set",
            next_step="andon eval --bundle DIR --data elpv, or andon eval --all elpv (every method)",
        )
    asked = "--samplers" if args.samplers else "--product auto" if args.product == "auto" else None
    if args.verdicts is not None and asked is not None:
        raise ConfigError(
            f"{asked} and --verdicts exclude each other",
            found=f"{asked} with --verdicts {args.verdicts}",
            expected="recorded verdicts, which are of one program and of the products that the line judged",
            next_step=f"leave {asked} out to evaluate the verdicts, or --verdicts to evaluate the bundle",
        )


def _recorded(
    file: Path | None, samples: Sequence[Sample], bundle: Bundle
) -> tuple[Evaluated, Origin] | tuple[None, None]:
    """The recorded verdicts of the samples and whose they are; nothing where none are given."""
    if file is None:
        return None, None
    verdicts = read_verdicts(file)
    whose = origin(verdicts, samples, file, bundle)
    return from_verdicts(verdicts, samples), whose


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
        "verdicts": None if whose is None else {"file": str(whose.file), "bundles": list(whose.bundles)},
    }


def _run(detector: Detector, samples: Sequence[Sample], *, auto: bool) -> Evaluated:
    with options.progress(len(samples), f"eval {detector.program_name}") as bar:
        return evaluate(detector, samples, auto=auto, step=bar.update)


def _print(detector: Detector, evaluated: Evaluated, whose: Origin | None, *, auto: bool) -> None:
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


def _print_seen(seen: Mapping[str, int] | None) -> str:
    """Say that test images were left out; what was said."""
    if not seen:
        return ""
    text = f"test images left out of the figures: {counted(seen)}"
    print(text)
    return text


def _promise(found: Held) -> dict[str, Any]:
    """The JSON form of a rate beside its promise."""
    counts = {"images": found.images, "parts": found.parts, "alarms": found.alarms}
    return {"false_alarm_rate": found.rate, "promised": found.promise, **counts}


def _print_parts(by_part: Mapping[str, Metrics]) -> None:
    """The figures by part, which say what they count, where there are any."""
    if by_part:
        print(f"{part_table(by_part)}\nby part: each counts once, with the share of its images")


def _print_promises(
    detector: Detector, promises: Mapping[str, Held], unlike: Mapping[str, str], apart: Mapping[str, str]
) -> None:
    """Of every product the rate beside the promise, kept or not, and what of it could not be compared."""
    for product, found in promises.items():
        print(f"{product}: {unlike.get(product) or beside(found)}")
    for product, text in apart.items():
        print(f"{product}: {text}")
    if unlike:
        print(
            "next, if the line looks like this: train again with such images among the good ones, or move the "
            f"thresholds alone: andon calibrate --bundle {quoted(detector.bundle.path)} --data FOLDER (good "
            "images of every product)"
        )


def _unpromised(bundle: Bundle, program: str, evaluated: Evaluated) -> dict[str, str]:
    """Of which products somebody has chosen the threshold; what was said."""
    chosen = by_hand(bundle, program)
    said = {p: f"its threshold was {promise(chosen[p])}" for p in evaluated.products if p in chosen}
    for product, text in said.items():
        print(f"{product}: {text}")
    return said


def _beside_torch(
    recorded: TorchFigures, evaluated: Evaluated, dataset: Dataset, split: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The torch model's image AUROC of the products that were evaluated, printed beside the engines'.

    Of a product that was evaluated with other images there is none, as a difference would say nothing of the export;
    the second has why.
    """
    torch: dict[str, float | None] = {}
    apart: dict[str, str] = {}
    for product, metrics in evaluated.products.items():
        if why := recorded.other_images(product, metrics, dataset, split):
            apart[product] = why
            print(f"{product}: image AUROC not beside torch's: {why}")
            continue
        torch[product] = recorded.products.get(product, {}).get("image_AUROC")
        values = [("torch", torch[product]), ("engines", metrics["image_AUROC"])]
        shown = ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in values)
        print(f"{product}: image AUROC {shown}")
    return torch, apart


def _samplers(results: dict[str, Any]) -> str:
    """One line a program: quality against cost."""
    width = max(len("program"), *(len(name) for name in results))
    names = ("image_AUROC", "pixel_AUPRO", "unknown_rate")
    lines = ["  ".join([f"{'program':<{width}}", *names, "ms p50"])]
    for name, result in results.items():
        mean = mean_metrics(result["products"])
        cells = [f"{mean[k]:>{len(k)}.3f}" if mean.get(k) is not None else "-".rjust(len(k)) for k in names]
        lines.append("  ".join([f"{name:<{width}}", *cells, f"{result['latency_ms']['total']['p50']:6.1f}"]))
    return "\n".join(lines)


def _report(
    path: Path,
    detector: Detector,
    dataset: Dataset,
    evaluated: Evaluated,
    promises: Mapping[str, Held],
    by_part: Mapping[str, Metrics],
    remarks: Sequence[tuple[str, str]],
    remark: str,
    whose: Origin | None,
) -> Path:
    from ..evaluation_report import write_report

    return write_report(path, detector, dataset, evaluated, promises, by_part, remarks, remark, whose)
