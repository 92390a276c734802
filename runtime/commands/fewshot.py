"""`andon eval --few-shot`: support draws, frozen and online, as tables and, with --results, as records."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..crop import as_bundle
from ..dataset import Dataset, open_dataset, split_readable
from ..engine.select import open_backend
from ..enrolment.fewshot import FeatureCache, Steps, draw_support, enroll_draw, frozen
from ..enrolment.foreground import choose
from ..enrolment.stream import QUANTILES, SETTINGS, Gain, Setting, baseline, plan_stream, run_stream, view_stream
from ..errors import ConfigError, quoted
from ..fewshot_report import Drawn, write_fewshot_report
from ..results import merge_results
from . import numbers, options

#: What --settings measures.
CHOICES = {"default": SETTINGS[:1], "others": SETTINGS[1:], "all": SETTINGS, "quantiles": QUANTILES}
Record = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the few-shot evaluation."""
    group = parser.add_argument_group("few-shot evaluation (--few-shot)")
    group.add_argument(
        "--few-shot", type=numbers.counts, metavar="K,K", help="support sizes, e.g. 1,2,4, with a foct bundle's engines"
    )
    group.add_argument("--seeds", type=numbers.count, default=5, metavar="N", help="support draws 0 to N-1 (5)")
    group.add_argument(
        "--orders", type=numbers.count, default=3, metavar="N", help="stream orders of what depends on them (3)"
    )
    group.add_argument(
        "--ct-steps", type=numbers.naturals, default=(0, 10), metavar="N,N", help="CT steps a frame (0,10)"
    )
    group.add_argument(
        "--online",
        type=numbers.shares,
        metavar="P,P",
        help="also online calibration, on streams with these shares of anomalies, e.g. 0,0.1; without it there is none",
    )
    group.add_argument(
        "--settings",
        choices=tuple(CHOICES),
        default="default",
        help="online: the default rule, the rest of the table, all of it, or the default with other quantiles",
    )
    group.add_argument("--foreground", default="auto", metavar="HOW", help="as in andon enroll (auto)")


def add_results(parser: argparse.ArgumentParser) -> None:
    """--results, unless the study of all methods has brought it: its default is for the study alone."""
    if (study := parser.get_default("results")) is None:
        parser.add_argument("--results", type=Path, metavar="FILE", help="--few-shot: also merge the records into FILE")
    parser.set_defaults(results=None, study_results=study)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it.

    Raises:
        AndonError: bundle, data set or settings cannot be used.
    """
    if args.bundle is None or args.data is None:
        raise ConfigError(
            "the few-shot evaluation needs engines and images",
            found=f"--bundle {args.bundle}, --data {args.data}",
            expected="a foct bundle and a data set",
            next_step="andon eval --bundle FOCT-BUNDLE --data elpv --few-shot 1,2,4",
        )
    with Bundle.load(args.bundle) as bundle, open_backend("onnxruntime", threads=args.threads) as backend:
        dataset = open_dataset(args.data)
        options.say_remarks(dataset)
        dataset = as_bundle(dataset, bundle, args.roi, options.progress, args.products)
        samples, skipped = split_readable(dataset.samples, args.on_corrupt)
        options.say_skipped(skipped)
        dataset = replace(dataset, samples=tuple(samples))
        products, left_out = _measurable(dataset, args)
        with options.progress(len(dataset), "features") as bar:
            cache = FeatureCache(bundle, backend, dataset, bar.update)
        bundle_id = bundle.id
    name = "elpv" if args.data == "elpv" else Path(args.data).resolve().name
    # Folders by name only: the record is read on other machines.
    base = {"set": name, "command": _command(args, "BUNDLE", name if name == "elpv" else f"$ANDON_DATA/{name}")}
    records: list[Record] = []
    with options.progress(0, "scores") as bar:
        for product in products:
            for shots in args.few_shot:
                for seed in range(args.seeds):
                    keys = {**base, "product": product, "shots": shots, "seed": seed, "metric": "image_AUROC"}
                    records += _draw(cache, args, keys, bar.update)
    means = _means(records)
    _print(means)
    report = _report(cache, args, bundle_id, products, means) if args.report else None
    if args.results is not None:
        merge_results(args.results, records)
        print(f"{len(records)} records merged into {args.results}")
    return {
        "ok": True,
        "records": records,
        "means": means,
        "left_out": left_out,
        "skipped": [s.key for s in skipped],
        "report": None if report is None else str(report),
    }


def _measurable(dataset: Dataset, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The products that can be measured, and of the others why not; these are warned of.

    Raises:
        ConfigError: none can be.
    """
    found = {product: _lacks(dataset, product, args) for product in args.products or dataset.products}
    left_out = {product: why for product, why in found.items() if why}
    products = [product for product in found if product not in left_out]
    if not products:
        raise ConfigError(
            f"no product of {dataset.spec} can be measured",
            found="; ".join(f"{product}: {why}" for product, why in left_out.items()),
            expected="good training images, and good and defective test images",
            next_step="add images of what is missing, or name another --data",
        )
    for product, why in left_out.items():
        print(f"warning: {product} is left out: {why}")
    return products, left_out


def _lacks(dataset: Dataset, product: str, args: argparse.Namespace) -> str:
    """Of which images the product has too few for what is asked; empty: it has enough."""
    rates = args.online or ()
    support = max(args.few_shot) + (1 if any(rate < 1 for rate in rates) else 0)
    defects = 2 if any(rate > 0 for rate in rates) else 1  # half of them for the stream, the rest is held out
    mine = [s for s in dataset.samples if s.product == product]
    needs = (
        ("good training images", sum(s.split == "train" and s.good for s in mine), support),
        ("good test images", sum(s.split == "test" and s.good for s in mine), 1),
        ("defective test images", sum(s.split == "test" and not s.good for s in mine), defects),
    )
    return ", ".join(f"{count} {what} where {least} are needed" for what, count, least in needs if count < least)


def _command(args: argparse.Namespace, bundle: str, data: str) -> str:
    """The command to measure again with."""
    words = ["andon", "eval", "--bundle", bundle, "--data", data, "--few-shot", _commas(args.few_shot)]
    words += ["--seeds", str(args.seeds), "--orders", str(args.orders), "--ct-steps", _commas(args.ct_steps)]
    if args.products:
        words += ["--products", *map(quoted, args.products)]
    if args.online:
        words += ["--online", _commas(args.online), "--settings", args.settings]
    if args.foreground != "auto":
        words += ["--foreground", args.foreground]
    for product, roi in args.roi or ():
        words += ["--roi", f"{product}={_commas(roi)}" if product else _commas(roi)]
    if args.on_corrupt != "error":
        words += ["--on-corrupt", args.on_corrupt]
    return " ".join(words)


def _commas(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _draw(cache: FeatureCache, args: argparse.Namespace, keys: Mapping[str, Any], progress: Any) -> list[Record]:
    """Everything that is measured with one support draw."""
    product, shots, seed = keys["product"], keys["shots"], keys["seed"]
    support = draw_support(cache, product, shots, seed)
    memory = enroll_draw(cache, support, choose(args.foreground), seed)
    lr = cache.manifest.constants["lr"]
    by_setting: dict[tuple[str, str], list[float]] = defaultdict(list)
    for method, steps, _, value in frozen(cache, memory, product, Steps(args.ct_steps, lr, args.orders), progress):
        by_setting[method, f"frozen, ct.steps {steps}" if method == "foct" else "frozen"].append(value)
    records = [{**keys, "method": m, "setting": s, "value": _mean(v)} for (m, s), v in by_setting.items()]
    for rate in args.online or ():
        chosen = CHOICES[args.settings]
        gains: dict[str, list[Gain]] = {setting.name: [] for setting in chosen}
        for order in range(args.orders):
            plan = plan_stream(cache, product, support, rate, seed, order)
            before = {t: baseline(cache, memory, plan, t, progress) for t in {s.transport for s in chosen}}
            for setting in chosen:
                gains[setting.name].append(
                    run_stream(cache, memory, plan, setting, before[setting.transport], progress)
                )
        for setting in chosen:
            records += _online(keys, setting, rate, gains[setting.name])
    return records


def _report(
    cache: FeatureCache, args: argparse.Namespace, bundle_id: str, products: Sequence[str], means: list[Record]
) -> Path:
    """The page: all means, and of what was asked online one stream as an example, the first of draw 0 of a product."""
    setting, shots = CHOICES[args.settings][0], args.few_shot[0]
    views = []
    for product in products:
        for rate in args.online or ():
            support = draw_support(cache, product, shots, 0)
            memory = enroll_draw(cache, support, choose(args.foreground), 0)
            plan = plan_stream(cache, product, support, rate, 0, 0)
            before = baseline(cache, memory, plan, setting.transport, lambda n: None)
            title = f"{product}: one stream with {rate:.0%} anomalies"
            about = (
                f"One stream of those behind a mean above: {shots} shot{'s' if shots > 1 else ''}, support draw (seed) "
                f"0 of {args.seeds}, order 0 of {args.orders}, rule: {setting.name}."
            )
            views.append(view_stream(cache, memory, plan, setting, before, title, about))
    command = _command(args, quoted(args.bundle), quoted(args.data))
    return write_fewshot_report(args.report, cache, bundle_id, _drawn(args), command, means, views)


def _drawn(args: argparse.Namespace) -> Drawn:
    """How support sets and streams were drawn."""
    return Drawn(args.few_shot, args.seeds, args.orders, args.ct_steps, args.foreground)


def _online(keys: Mapping[str, Any], setting: Setting, rate: float, gains: list[Gain]) -> list[Record]:
    """Records of one setting, the mean over orders."""
    title = f"online, {setting.name}, {rate:.0%} anomalies"
    shared = {**keys, "method": "foct" if setting.transport else "knn", "setting": title}
    values = {
        "image_AUROC": [g.online for g in gains],
        "image_AUROC_frozen": [g.frozen for g in gains],
        "gain": [g.online - g.frozen for g in gains],
        "stream_gain": [g.stream_online - g.stream_frozen for g in gains],
        "bad_insertions": [g.bad for g in gains],
        "admitted": [g.admitted for g in gains],
    }
    return [{**shared, "metric": m, "value": _mean(v)} for m, v in values.items() if not np.isnan(_mean(v))]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _means(records: list[Record]) -> list[Record]:
    """One record per product, shots and setting over the seeds (seed None), with sd and n."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["product"], record["shots"], record["method"], record["setting"], record["metric"]].append(record)
    means = []
    for group in groups.values():
        values = [record["value"] for record in group]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        means.append({**group[0], "seed": None, "value": _mean(values), "sd": spread, "n": len(values)})
    return means


def _print(means: list[Record]) -> None:
    """One line each."""
    print(f"{'product':12} {'shots':>5} {'method':5} {'setting':60} {'metric':20} {'mean':>7} {'sd':>6}")
    for r in means:
        line = f"{r['product']:12} {r['shots']:5} {r['method']:5} {r['setting']:60} {r['metric']:20}"
        print(f"{line} {r['value']:7.4f} {r['sd']:6.4f}")
