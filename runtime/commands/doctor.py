"""`andon doctor`: what this machine can do, what is missing, why, and how to get it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..configfile import load
from ..lineconfig import BrokerConfig, LineConfig
from ..machine import Finding, backends, examine
from ..whereabouts import broker_at

#: What a line runs without, if worse: verdicts wait for the broker, times are off without a synchronised clock
ADVISORY = frozenset({"broker", "clock"})


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon doctor`."""
    parser.add_argument("--config", type=Path, help="line configuration whose broker is tried")
    parser.add_argument("--broker", metavar="HOST:PORT", help="broker to try; default 127.0.0.1:1883")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Examine the machine. ok: there is a backend to judge with and nothing that this machine needs is missing, except
    what a run can do without for a while (ADVISORY).

    Raises:
        ConfigError: the configuration or --broker cannot be read.
    """
    findings = examine(_broker(args))
    unusable = backends(findings)
    best = next((name for name, why in unusable.items() if not why), "")
    for finding in findings:
        print(_line(finding))
    for name, why in unusable.items():
        print(f"backend {name}: {'can be used' if not why else 'cannot be used: ' + why}")
    print(f"andon run uses {best}" if best else "no backend can be used: see above")
    missing = [f.name for f in findings if f.status == "missing"]
    return {
        "ok": bool(best) and not set(missing) - ADVISORY,
        "backend": best or None,
        "backends": unusable,
        "missing": missing,
        "findings": [asdict(f) for f in findings],
    }


def _broker(args: argparse.Namespace) -> BrokerConfig | None:
    broker = load(args.config, LineConfig).broker if args.config else None
    return broker_at(args.broker, broker) if args.broker else broker


def _line(finding: Finding) -> str:
    mark = {"ok": "ok     ", "missing": "MISSING", "absent": "-      "}[finding.status]
    text = " - ".join(part for part in (finding.found, finding.why) if part)
    line = f"{mark}  {finding.name:<21} {text}"
    return f"{line}\n{'':<31}do: {finding.remedy}" if finding.status != "ok" and finding.remedy else line
