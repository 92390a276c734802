"""What `andon eval` cannot mean, refused before the work."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..perimage import require_kind
from . import options


def of_one_evaluation(args: argparse.Namespace) -> dict[str, object]:
    """Options that a study of many draws or methods does not heed."""
    return {
        "--out": args.out,
        "--threshold": args.threshold,
        "--unlabelled": args.unlabelled,
        "--camera": args.camera,
    }


def require_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, and their options where nothing would be written, before the work."""
    if args.few_shot is not None:
        options.exclude("--few-shot", of_one_evaluation(args))
    if args.out is not None:
        require_kind(args.out)
        options.require_writable(args.out, "--out")
    if args.report is not None:
        options.require_writable(args.report, "--report")


def require_sense(args: argparse.Namespace) -> None:
    """Refuse what lacks bundle or data, and what asks for judging where nothing is judged."""
    if args.bundle is None or args.data is None:
        raise ConfigError(
            "what shall be evaluated?",
            found=f"--bundle {args.bundle}, --data {args.data}",
            expected="a bundle and a data set",
            next_step="andon eval --bundle DIR --data elpv, or andon eval --all elpv (every method)",
        )
    if args.samplers and args.threshold:
        raise ConfigError(
            "--samplers and --threshold exclude each other",
            found=f"--samplers with {len(args.threshold)} --threshold",
            expected="a threshold of one program: each has scores of its own scale",
            next_step="name the program with --program NAME and leave --samplers out",
        )
    asked = "--samplers" if args.samplers else "--product auto" if args.product == "auto" else None
    if args.verdicts is not None and asked is not None:
        raise ConfigError(
            f"{asked} and --verdicts exclude each other",
            found=f"{asked} with --verdicts {args.verdicts}",
            expected="recorded verdicts, which are of one program and of the products that the line judged",
            next_step=f"leave {asked} out to evaluate the verdicts, or --verdicts to evaluate the bundle",
        )
