"""Options that several commands share, and what they open."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..bundle import Bundle
from ..dataset import Dataset, Sample
from ..detector import Detector
from ..engine.select import BACKENDS
from ..errors import ConfigError
from ..manifest import CAMERA, Variant
from ..remarks import remarks
from ..wiring import programs
from . import numbers

VARIANTS: tuple[Variant, ...] = ("fp32", "fp16", "int8")


def add_bundle(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--bundle."""
    parser.add_argument(
        "--bundle", type=Path, required=required, metavar="DIR|TAR", help="bundle, a directory or a .tar"
    )


def add_engine(
    parser: argparse.ArgumentParser, *, program: bool = True, auto: str = "fp16 on tensorrt, else fp32"
) -> None:
    """--backend, --variant (`auto`: what that means), --threads and, unless the command runs them all, --program."""
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="auto: tensorrt where it can run (default)"
    )
    parser.add_argument("--variant", choices=("auto", *VARIANTS), default="auto", help=f"precision; auto: {auto}")
    parser.add_argument(
        "--threads", type=numbers.count, metavar="N", help="onnxruntime's threads; default: every CPU it may use"
    )
    if program:
        parser.add_argument("--program", default="default", metavar="NAME", help="one of the bundle's programs")


def add_roi(parser: argparse.ArgumentParser, default: str) -> None:
    """--roi, as `andon train` has it; default: what is cut out without it."""
    parser.add_argument(
        "--roi",
        type=numbers.product_roi,
        action="append",
        metavar="[PRODUCT=]X,Y,WIDTH,HEIGHT",
        help="what to cut out of the images, in pixels, as the line's roi does; where products differ once for each. "
        f"Default: {default}",
    )


def camera_name(text: str) -> str:
    """The name of a line's camera, for --camera."""
    if not re.fullmatch(CAMERA, text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a camera: 1 to 64 of the characters A-Z, a-z, 0-9, '_', '.' and '-', as in the "
            "line's configuration"
        )
    return text


def require_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written before the work for it is done; its folder is made.

    Raises:
        ConfigError: naming the option.
    """
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written",
            found=error,
            expected="a file in a folder that this user may write",
            next_step=f"name another file with {option}",
        ) from error


def exclude(option: str, others: Mapping[str, object], why: str = "") -> None:
    """Refuse options that cannot be heeded beside another. others: each with its value, false where it is not given.

    Raises:
        ConfigError: naming those that are given.
    """
    if given := [name for name, value in others.items() if value]:
        raise ConfigError(
            f"{option} and {' and '.join(given)} exclude each other",
            found=f"{option} with {', '.join(given)}",
            expected=f"{option} without {'it' if len(given) == 1 else 'them'}{why}",
            next_step=f"leave {' and '.join(given)} out, or {option}",
        )


def add_on_corrupt(parser: argparse.ArgumentParser) -> None:
    """--on-corrupt, as `andon train` has it."""
    parser.add_argument(
        "--on-corrupt", choices=("error", "skip"), default="error", help="what to do about an undecodable image"
    )


def say_remarks(dataset: Dataset) -> None:
    """Say what of a set is passed over or nearly black."""
    for text in remarks(dataset):
        print(f"warning: {text}")


def say_skipped(skipped: Sequence[Sample]) -> None:
    """Say which images --on-corrupt skip left out."""
    if skipped:
        print(f"skipped {len(skipped)} undecodable images: {', '.join(s.key for s in skipped[:5])}")


def choose_variant(requested: str, bundle: Bundle, backend: str) -> Variant:
    """The precision to run: as requested, else fp16 where the backend is a GPU and the bundle has it, else fp32."""
    if requested != "auto":
        return requested  # type: ignore[return-value]
    return "fp16" if backend == "tensorrt" and "fp16" in bundle.manifest.variants else "fp32"


def open_detector(bundle: Bundle, backend: Any, args: argparse.Namespace, **options: Any) -> Detector:
    """The detector that the shared options ask for; bundle and backend stay the caller's."""
    variant = choose_variant(args.variant, bundle, backend.name)
    program = options.pop("program", None) or getattr(args, "program", "default")
    return Detector(bundle, backend, variant, program, **options)


def program_names(bundle: Bundle) -> list[str]:
    """The default program first."""
    return list(programs(bundle.manifest))


def chosen_products(bundle: Bundle, names: Sequence[str] | None) -> list[str]:
    """Those that --products names, each once; without it all of the bundle.

    Raises:
        ProductError: the bundle does not know one.
    """
    products = list(dict.fromkeys(names or bundle.manifest.classes))
    for product in products:
        bundle.class_index(product)
    return products


def chosen_programs(bundle: Bundle, names: Sequence[str] | None) -> list[str]:
    """Those that --programs names; without it all of the bundle.

    Raises:
        ConfigError: the bundle has no such program.
    """
    known = program_names(bundle)
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(
            f"the bundle has no program {unknown[0]}",
            found=unknown[0],
            expected=", ".join(known),
            next_step="name some of these with --programs, or leave it out: thresholds for all",
        )
    return list(names or known)


def progress(total: int | None, what: str, unit: str = "img") -> Any:
    """A progress bar with ETA, without a total a count; plain lines at long intervals where there is no terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        mininterval=10 if quiet else 0.2,
        disable=os.environ.get("ANDON_QUIET") == "1",
    )
