"""`andon run`: run a line until it is told to stop."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import AndonError
from . import numbers


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="line configuration (YAML)")
    parser.add_argument("--bundle", type=Path, help="bundle folder or .tar, instead of the configuration's")
    parser.add_argument("--backend", choices=("auto", "onnxruntime", "tensorrt"), help="instead of the configuration's")
    parser.add_argument("--variant", choices=("auto", "fp32", "fp16", "int8"), help="instead of the configuration's")
    parser.add_argument("--broker", metavar="HOST:PORT", help="instead of the configuration's")
    parser.add_argument("--threads", type=numbers.count, help="CPU threads of the engines (default: all)")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--max-frames", type=numbers.count, metavar="N", help="stop after N verdicts")
    end.add_argument("--until-end", action="store_true", help="stop when every source has ended")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the line; the closing summary, "ok" False if a source failed or no verdict is OK or NG.

    Raises:
        AndonError: it cannot start as configured.
    """
    from ..app import LineApp
    from ..logs import configure_logging
    from ..process import limit_arenas
    from ..startup import Options

    limit_arenas()
    configure_logging(args.log_level)
    options = Options(
        config=args.config,
        bundle=args.bundle,
        backend=args.backend,
        variant=args.variant,
        broker=args.broker,
        threads=args.threads,
        max_frames=args.max_frames,
        until_end=args.until_end,
    )
    summary = LineApp(options).run()
    if not args.json:
        print(json.dumps(summary, indent=1, default=str))
    _say(summary)
    return summary


def _say(summary: dict[str, Any]) -> None:
    """What nobody should have to look for in the summary: that a run does not count, and what could not be judged."""
    from ..summary import counted

    if not summary["ok"]:
        error = AndonError(
            summary["error"], found=summary["found"], expected=summary["expected"], next_step=summary["next"]
        )
        print(f"andon run: {error}", file=sys.stderr)
    elif summary["unknown"]:
        total = sum(sum(row.values()) for row in summary["verdicts"].values())
        count = sum(summary["unknown"].values())
        print(f"andon run: {count} of {total} verdicts {counted(summary['unknown'])}", file=sys.stderr)
