"""`andon run`: run a line until it is told to stop."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="line configuration (YAML)")
    parser.add_argument("--bundle", type=Path, help="bundle folder or .tar, instead of the configuration's")
    parser.add_argument("--backend", choices=("auto", "onnxruntime", "tensorrt"), help="instead of the configuration's")
    parser.add_argument("--variant", choices=("auto", "fp32", "fp16", "int8"), help="instead of the configuration's")
    parser.add_argument("--broker", metavar="HOST:PORT", help="instead of the configuration's")
    parser.add_argument("--threads", type=int, help="CPU threads of the engines (default: all)")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--max-frames", type=int, metavar="N", help="stop after N verdicts")
    end.add_argument("--until-end", action="store_true", help="stop when every source has ended")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the line; the closing summary.

    Raises:
        AndonError: it cannot start as configured.
    """
    from ..app import LineApp
    from ..logs import configure_logging
    from ..startup import Options

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
    return summary
