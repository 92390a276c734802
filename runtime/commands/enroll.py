"""`andon enroll` on the device: a new product from a few good images and the bundle of another, without torch."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..crop import box_in, crop_for, crop_of, described, told
from ..dataset import folder_name
from ..engine.select import open_backend
from ..enrolment.enroll import enroll
from ..enrolment.features import memory_of
from ..enrolment.foreground import choose
from ..enrolment.support import picture_sizes, read_support, support_paths
from ..errors import ConfigError, quoted
from ..fingerprint import read_report
from ..manifest import Crop, Roi
from ..wiring import parse_source
from . import numbers

#: Methods that keep a memory of normal, into which a product can be enrolled; the others are trained on every product.
METHODS = ("foct", "knn")
_SHOTS, _FOREGROUND = 4, "auto"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon enroll`."""
    parser.add_argument("--method", choices=METHODS, default="foct", help="memory method (foct)")
    parser.add_argument("--support", type=Path, required=True, metavar="DIR", help="images of good parts")
    parser.add_argument("--shots", type=numbers.count, default=_SHOTS, metavar="K", help="how many of them (4)")
    parser.add_argument(
        "--seed", type=numbers.natural, metavar="N", help="draw them at random; default: the first by name"
    )
    parser.add_argument("--name", help="the product; default: the folder's name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new bundle; default bundles/METHOD-NAME-UTC")
    parser.add_argument(
        "--backbone-bundle",
        type=Path,
        metavar="DIR|TAR",
        help="bundle of the same method whose engines to use; without it they are exported, which needs torch",
    )
    parser.add_argument(
        "--foreground",
        default=_FOREGROUND,
        metavar="HOW",
        help="auto (GrabCut) | all (textures) | mask:FILE-OR-FOLDER | onnx:FILE[,MEAN,STD] | sam:ENCODER,DECODER",
    )
    parser.add_argument(
        "--roi",
        type=numbers.roi,
        metavar="X,Y,WIDTH,HEIGHT",
        help="what to cut out of the images, as the line's roi does; default: what is cut out for --backbone-bundle, "
        "where the images are of the size of those it was made from, else nothing",
    )
    parser.add_argument(
        "--threads", type=numbers.count, metavar="N", help="onnxruntime's threads; default: every CPU it may use"
    )


def support_crop(paths: Sequence[Path], name: str, roi: Roi | None, source: Bundle | None = None) -> Crop | None:
    """What to cut out of the support: what --roi says, else what is cut out of such pictures for the bundle of engines;
    it is printed.

    A product may come from another camera than those of that bundle: pictures of other sizes are taken whole.

    Raises:
        SourceError: an image cannot be read, --roi does not fit the pictures, or they are of several sizes.
        ConfigError: the bundle cuts out this for one product and that for another, and nobody says which it is.
    """
    sizes = picture_sizes(paths)
    if roi is not None:
        crop = crop_for(roi, sizes, name)
        print(*described({name: crop}, "as --roi says"), sep="\n")
        return crop
    crops = {} if source is None else {p: crop_of(source, p) for p in source.manifest.classes}
    fitting = {crop for crop in crops.values() if crop is not None and any(box_in(crop, *size) for size in sizes)}
    if not fitting:
        return None
    if len({*crops.values()}) > 1:
        raise ConfigError(
            f"what is to be cut out of the pictures of {name}?",
            found="; ".join(f"{p}: {'nothing' if crop is None else told(crop)}" for p, crop in crops.items()),
            expected="--roi, as the bundle of engines has several answers",
            next_step="repeat the command with --roi X,Y,WIDTH,HEIGHT (0,0,WIDTH,HEIGHT of the picture: all of it)",
        )
    (crop,) = fitting
    print(*described({name: crop}, "as for the bundle of engines"), sep="\n")
    return crop


def product_name(args: argparse.Namespace) -> str:
    """--name, or the support folder's name; of a folder `good` its product folder's.

    Raises:
        ConfigError: --name cannot name a product, as it is no name of a folder.
    """
    if args.name is not None:
        name = str(args.name)
        if not name.strip(" .") or not name.isprintable() or "/" in name or "\\" in name:
            cleaned = _safe(name).strip("-.")
            raise ConfigError(
                "--name cannot be the name of a product",
                found=repr(name),
                expected="one word or several, without slashes",
                next_step=f"--name {cleaned or 'bolt'}",
            )
        return name
    folder = args.support.resolve() if ".." in args.support.parts else args.support.absolute()
    while folder.name.lower() in ("good", "ok", "train") and folder.parent != folder:
        folder = folder.parent
    return _safe(folder_name(folder)) or "product"


def _safe(name: str) -> str:
    """A name with what a shell or a file system could take amiss replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def default_out(method: str, name: str) -> Path:
    """bundles/METHOD-NAME-UTC, under $ANDON_BUNDLES if set."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return Path(os.environ.get("ANDON_BUNDLES", "bundles")) / f"{method}-{_safe(name)}-{stamp}"


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run it.

    Raises:
        ConfigError: no backbone bundle, one of another method, or too few images.
    """
    if args.backbone_bundle is None:
        raise ConfigError(
            "no bundle to take the engines from",
            found="no --backbone-bundle",
            expected=f"any {args.method} bundle",
            next_step=f"give --backbone-bundle, or make one on a workstation: andon enroll --method {args.method}",
        )
    started = time.monotonic()
    name = product_name(args)
    target = args.out or default_out(args.method, name)
    foreground = choose(args.foreground)
    with Bundle.load(args.backbone_bundle) as source, open_backend("onnxruntime", threads=args.threads) as backend:
        if source.manifest.method != args.method:
            raise _other_method(args, source.manifest.method)
        candidates = parse_source(memory_of(source).candidates)
        patches = source.manifest.stages[candidates.name].outputs[candidates.output].shape[0]
        crop = support_crop(support_paths(args.support, args.shots, args.seed), name, args.roi, source)
        size, grid = source.manifest.preprocess, round(patches**0.5)
        support = read_support(args.support, args.shots, size, grid, foreground, args.seed, crop)
        bundle = enroll(source, backend, name, support, target)
    return summarize(bundle, time.monotonic() - started)


def same_again(args: argparse.Namespace, method: str, backbone_bundle: object = None) -> str:
    """The command as it was given, to be pasted, with another method or bundle of engines."""
    parts = [f"andon enroll --method {method} --support {quoted(args.support)}"]
    given = {
        "shots": None if args.shots == _SHOTS else args.shots,
        "seed": args.seed,
        "name": args.name,
        "out": args.out,
        "foreground": None if args.foreground == _FOREGROUND else args.foreground,
        "roi": None if args.roi is None else ",".join(map(str, args.roi)),
        "threads": args.threads,
        "backbone-bundle": backbone_bundle,
    }
    parts += [f"--{option} {quoted(value)}" for option, value in given.items() if value is not None]
    return " ".join(parts)


def _other_method(args: argparse.Namespace, method: str) -> ConfigError:
    """The bundle's engines are those of another method, which may be one that nothing can be enrolled into."""
    if method in METHODS:
        found, step = method, same_again(args, method, args.backbone_bundle)
    else:
        found = f"{method}, which is trained on every product and keeps no memory to enroll one into"
        step = (
            f"{same_again(args, args.method)} (exports the engines itself, on a workstation), or with "
            f"--backbone-bundle of a {args.method} bundle; for {method} itself: andon train --method {method} with the "
            "new product's images in --data"
        )
    what = f"{args.backbone_bundle} is a bundle of another method"
    return ConfigError(what, found=found, expected=f"a bundle of {args.method}", next_step=step)


def summarize(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """Print what was made and what comes next; the JSON object."""
    product, report = bundle.manifest.classes[0], read_report(bundle)
    shots, repeated = len(report["enrolled"]["support"]), report["enrolled"]["repeated"]
    foreground = report["foreground"]
    shown = quoted(bundle.path)
    calibrate = f"andon calibrate --bundle {shown} --data FOLDER (new good images in FOLDER/{product}/good)"
    if repeated:
        print(
            f"warning: {len(repeated)} of {shots + len(repeated)} support images are copies of another and are left "
            f"out: {', '.join(repeated)}"
        )
    if report["enrolled"]["alike"]:
        print(
            "warning: the support images are much alike (copies, a burst of one part, a rigid fixture?): the "
            "provisional threshold rests on little more than the camera's noise and may judge good parts NG. Give "
            f"images of different parts, each laid down anew, or set it from more of them: {calibrate}"
        )
    memory = memory_of(bundle)
    valid = bundle.array(bundle.manifest.state[memory.valid])
    rows = int(valid.sum())
    share = "" if foreground is None else f", {foreground:.0%} of the patches foreground"
    print(f"{product}: {rows} memory rows from {shots} good image{'s' * (shots != 1)}{share}, in {seconds:.1f} s")
    threshold = bundle.threshold(product)
    if threshold is not None:
        promise = f"{threshold.false_alarm_rate:.0%} of good parts may be judged NG"
        print(f"provisional threshold {threshold.value:.3f}: {promise}")
    print(f"bundle {bundle.path}")
    print(f"for a threshold that is not provisional: {calibrate}")
    print(f"next: andon verify --bundle {shown}")
    return {
        "ok": True,
        "bundle": str(bundle.path),
        "method": bundle.manifest.method,
        "product": product,
        "shots": shots,
        "repeated": repeated,
        "alike": report["enrolled"]["alike"],
        "rows": rows,
        "foreground": foreground,
        "seconds": round(seconds, 2),
        "thresholds": {
            n: t.model_dump(exclude={"images"}) for n, t in bundle.manifest.thresholds.get(product, {}).items()
        },
    }
