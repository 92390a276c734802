"""`andon export`: a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..runtime.bundlefiles import require_new
from ..runtime.commands.numbers import count
from ..runtime.errors import ConfigError, quoted
from ..train.registry import list_methods

if TYPE_CHECKING:
    from ..runtime.dataset import Dataset
    from ..runtime.manifest import Manifest, Variant
    from ..train.checkpoint import Provenance as CheckpointProvenance
    from ..train.method import AnomalyModel
    from .bundle import Provenance
    from .exporter import Export
    from .frames import Evidence


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `andon export`."""
    parser.add_argument("--method", required=True, choices=list_methods(), help="method to export")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint; default: the method's newest one")
    parser.add_argument("--fp16", action="store_true", help="add FP16 stages")
    parser.add_argument("--int8", action="store_true", help="add INT8 stages (and the FP16 ones they fall back to)")
    parser.add_argument(
        "--fp32-stage", action="append", default=[], metavar="NAME", help="keep this stage FP32 in every variant"
    )
    parser.add_argument("--data", metavar="SPEC", help="images to verify on; default: the set the checkpoint is from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="bundle; default bundles/METHOD-DATA-UTC")
    parser.add_argument("--tar", action="store_true", help="also write the bundle as DIR.tar, a new file")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="setting of the method's cut"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="threads for the torch reference; default: all")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Export, verify, write, say what comes next."""
    import torch

    from ..train.checkpoint import load_checkpoint, newest_checkpoint, read_provenance
    from . import bundle, verify
    from .exporter import Request, export_bundle
    from .methods import get_cut
    from .nextstep import calibrate_step

    if args.out:  # now: what is there, another bundle's tar too, is found before the work, and not replaced
        require_new(args.out)
        if args.tar:
            require_new(bundle.tar_path(args.out))
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    checkpoint = args.checkpoint or newest_checkpoint(args.method)
    origin = read_provenance(checkpoint)
    if origin.method != args.method:
        raise ConfigError(
            f"{checkpoint} is a checkpoint of another method",
            found=origin.method,
            expected=args.method,
            next_step=f"andon export --method {origin.method} --checkpoint {quoted(checkpoint)}",
        )
    _say(f"checkpoint {checkpoint} ({origin.data}, {', '.join(origin.classes)})")
    model = load_checkpoint(checkpoint)
    staged = get_cut(args.method)(model, parse_options(args.option))
    started = time.perf_counter()
    evidence = _evidence(args.data, origin, model)
    _say(f"evidence: {len(evidence.good)} {evidence.good.source}; {len(evidence.labelled)} {evidence.labelled.source}")
    variants: tuple[Variant, ...] = ("fp16", "int8") if args.int8 else ("fp16",) if args.fp16 else ()
    request = Request(args.out, variants, frozenset(args.fp32_stage))
    export = export_bundle(model, staged, evidence, _provenance(origin, model), request, _say)
    _say(verify.table(export.checks))
    packed = bundle.pack(export.path) if args.tar else None
    _summary(export, time.perf_counter() - started, packed)
    _say(calibrate_step(export.path, args.data or _training_set(origin)))
    return {
        "ok": True,
        "bundle": str(export.path),
        "tar": None if packed is None else str(packed),
        "method": args.method,
        "checkpoint": str(checkpoint),
        "variants": list(export.manifest.variants),
        "bytes": export.report["bytes"],
        "fallbacks": {v: entry["fallbacks"] for v, entry in export.report["variants"].items()},
        "checks": verify.record(export.checks),
        "seconds": export.seconds,
    }


def parse_options(pairs: list[str]) -> Mapping[str, Any]:
    """``key=value`` settings of a cut; values are read as YAML.

    Raises:
        ConfigError: a setting without ``=``, or a value that is not YAML.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError("an --option cannot be read", found=pair, expected="key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--option {pair}: the value is not YAML",
                found=value,
                expected="a number, a word, or a list such as [a, b]",
                next_step="quote the option for the shell, and close its brackets and quotes",
            ) from error
    return options


def _evidence(spec: str | None, origin: CheckpointProvenance, model: AnomalyModel) -> Evidence:
    """Frames of --data, else of the set the checkpoint is from; not those that training skipped, nor tests it saw."""
    from ..runtime.crop import cropped
    from ..runtime.dataset import open_dataset
    from ..runtime.fingerprint import counted, tally
    from . import frames

    dataset = open_dataset(spec or _training_set(origin))
    dataset = dataset if spec else replace(dataset, spec=origin.data)
    dataset = replace(dataset, samples=cropped(dataset.samples, origin.crops))
    dataset, skipped = without_skipped(dataset, origin)
    if skipped:
        _say(f"skipped {skipped} images that training could not decode")
    seen = seen_tests(dataset, origin)
    if seen:
        _say(f"test images left out of the evidence: {counted(tally(seen.values()))}")
    held = held_out_keys(dataset, origin)
    return frames.gather(dataset, held, origin.classes, model.preprocess, seen=seen.keys())


def _training_set(origin: CheckpointProvenance) -> str:
    """The set that the checkpoint is from, as it is found from any directory."""
    return origin.data_path or origin.data


def without_skipped(dataset: Dataset, origin: CheckpointProvenance) -> tuple[Dataset, int]:
    """The set without the images that `andon train --on-corrupt skip` left out, and how many those are.

    A file that was mended since is used. It is known by its content, in a checkpoint without contents by its key.
    """
    from ..runtime.dataset import split_readable
    from ..runtime.fingerprint import Seen

    if not origin.skipped:
        return dataset, 0
    if origin.fingerprints:
        known = Seen(origin.fingerprints).sort(dataset.samples)
        gone = {k.sample.key for k in known if k.use == "skipped"}
    else:
        named = dataset.select(keys={s.key for s in dataset.samples} & {*origin.skipped})
        gone = {s.key for s in split_readable(named.samples, "skip")[1]}
    return dataset.select(keys={s.key for s in dataset.samples} - gone), len(gone)


def seen_tests(dataset: Dataset, origin: CheckpointProvenance) -> dict[str, str]:
    """Test images whose content training saw: their keys, and what it was used for. `andon eval` leaves out the same.

    Those that it could not decode do not count; of a checkpoint without contents there is nothing to know.

    Raises:
        SourceError: an image cannot be read.
    """
    from ..runtime.fingerprint import Seen

    if not origin.fingerprints:
        return {}
    tests = dataset.select(split="test", products=set(dataset.products) & {*origin.classes}).samples
    known = Seen(origin.fingerprints).sort(tests)
    return {k.sample.key: k.use for k in known if k.use not in (None, "skipped")}


def held_out_keys(dataset: Dataset, origin: CheckpointProvenance) -> tuple[str, ...]:
    """Keys of the good images that were held out, in this set: it may be the same one named at another depth."""
    from ..runtime.fingerprint import Seen

    keys = (*origin.constants, *origin.holdout)
    if not origin.fingerprints or {*keys} <= {s.key for s in dataset.samples}:
        return keys
    known = Seen(origin.fingerprints).sort(dataset.select(good=True).samples)
    return tuple(k.sample.key for k in known if k.use in ("constants", "thresholds")) or keys


def _provenance(origin: CheckpointProvenance, model: AnomalyModel) -> Provenance:
    from ..runtime.manifest import Backbone
    from .bundle import Provenance

    backbone = origin.backbone or Backbone(
        id=model.config.backbone.id, weights="trained with the method", sha256=origin.weights_sha256
    )
    licenses = {}
    if backbone.license:
        licenses[f"weights of {backbone.id}"] = backbone.license
    licenses[f"images of {Path(origin.data).name}"] = origin.data_license or "not stated"
    return Provenance(
        backbone=backbone,
        checkpoint_sha256=origin.weights_sha256,
        data=origin.data,
        preset=model.config.preset,
        licenses=licenses,
        holdout=origin.holdout,
        constants=origin.constants,
        fingerprints=origin.fingerprints,
        parts=origin.parts,
        group_by=model.config.group_by,
        crops=origin.crops,
        pictures=origin.pictures,
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _summary(export: Export, seconds: float, packed: Path | None) -> None:
    sizes = export.report["bytes"]
    for variant, size in sizes.items():
        share = {key: f"{size[key] / 1e6:.2f} MB ({size[key] / sizes['fp32'][key]:.0%} of fp32)" for key in size}
        _say(f"{variant}: stages {share['stages']}, with state {share['total']}")
    for line in narrow_lines(export.manifest, export.report["variants"]):
        _say(line)
    kept = sum(check.ok for check in export.checks)
    warned = f", {len(export.checks) - kept} warned of" if kept < len(export.checks) else ""
    _say(f"{kept} checks passed{warned} in {seconds:.0f} s")
    _say(f"bundle {packed or export.path}")


def narrow_lines(manifest: Manifest, variants: Mapping[Variant, Any]) -> Iterator[str]:
    """What is narrow in every variant, and every stage that is wider than its variant's name says. variants: as in
    report.json."""
    for variant, entry in variants.items():
        for stage, counts in entry["quantised"].items():
            done = f"computes {counts['nodes']} of {counts['of']} products in INT8"
            yield f"{variant}: stage {stage} {done}, the others in FP16"
        for stage, stored in entry["stored"].items():
            if counts := stored.get("int8"):
                done = f"stores the weights of {counts['nodes']} of {counts['of']} further nodes as INT8"
                yield f"{variant}: stage {stage} {done}, computed in FP16"
        for stage, about in manifest.stages.items():
            if stage in entry["fallbacks"]:
                yield f"{variant}: stage {stage} fell back to a wider precision: {entry['fallbacks'][stage]}"
            elif reason := about.fallback.get(variant):
                yield f"{variant}: stage {stage} uses {Path(about.files[variant]).name}: {reason}"
