"""`andon train`: images of good parts to a checkpoint."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..runtime import groups
from ..runtime.commands.numbers import natural, product_roi, seconds
from .registry import list_methods


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `andon train`."""
    parser.add_argument("--method", choices=list_methods(), help="method to train")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration; default configs/edge/METHOD.yaml")
    parser.add_argument(
        "--data", metavar="SPEC", help="elpv, or a folder: MVTec layout, good/ beside defect folders, or several such"
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX|CSV",
        help=f"{groups.HELP}; all of them are trained on or none, as thresholds promise nothing about new parts "
        "otherwise. The setting group_by",
    )
    parser.add_argument(
        "--roi",
        type=product_roi,
        action="append",
        metavar="[PRODUCT=]X,Y,WIDTH,HEIGHT",
        help="cut this out of every image (and its mask), in pixels, as the line's roi does; where products differ "
        "once for each. The bundle brings it to calibrate, eval, enroll and the line",
    )
    parser.add_argument("--products", metavar="A,B", help="train these products of the set only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the checkpoint; default runs/METHOD-...")
    parser.add_argument("--seed", type=natural, metavar="N", help="seed of every random generator")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. schedule.steps=100"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with an interrupted run, with its options; only --data may be given, for a set that was moved",
    )
    parser.add_argument("--save-every", type=seconds, metavar="S", help="seconds between resume points (60)")
    parser.add_argument("--no-eval", action="store_true", help="skip the evaluation on the test images")
    parser.add_argument("--on-corrupt", choices=("error", "skip"), help="what to do about an undecodable image (error)")
    parser.add_argument("--device", metavar="NAME", help="auto | cpu | cuda (auto)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, write the checkpoint."""
    from .distributed import process_group
    from .request import Request
    from .run import train

    with process_group(), ExitStack() as held:
        request = Request.from_arguments(args, held)
        try:
            return train(request)
        except Exception:  # any: what had nothing to keep leaves no folder that looks like a run
            if args.resume is None:
                request.withdraw()
            raise
