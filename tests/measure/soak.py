"""`make soak`: four cameras for half an hour, the broker away for 30 s: does the line grow, slow down, lose anything?

Writes a Markdown page with --out and exits with 1 if a verdict that was judged did not arrive, or the line failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.bundle import Bundle
from tqdm import tqdm

from . import soakreport
from .consumer import Consumer
from .machine import newest_bundle
from .soakline import Line, cameras, rtsp_camera, write_pictures

#: Share of the run that is warm-up: caches fill, the allocator finds its size.
WARM_UP = 0.2
#: Seconds for the last verdicts on their way from the broker to the consumer.
PATIENCE = 60.0


@dataclass(frozen=True)
class Sample:
    """One look at the line. at: seconds since the first; cpu, system: CPU seconds of the line, of the whole machine."""

    at: float
    rss: float
    descriptors: float
    threads: float
    cpu: float
    system: float
    outbox: float
    verdicts: int
    latency: dict[str, float]


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--bundle", type=Path, help="default: the newest under bundles/")
    parser.add_argument("--data", default="elpv", help="data set of the data set camera: elpv or a folder")
    parser.add_argument("--outage", type=float, default=30, metavar="S", help="seconds without broker, in the middle")
    parser.add_argument("--every", type=float, default=5, metavar="S", help="seconds between samples")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    args = parser.parse_args(argv)
    measured = soak(args, args.bundle or newest_bundle())
    page = soakreport.page(measured)
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    return 1 if measured["lost"] else 0


def soak(args: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """The whole run; what was measured, as plain JSON values."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="andon-soak-")))
        with Bundle.load(bundle) as loaded:
            facts = {"bundle": loaded.id, "method": loaded.manifest.method, "product": loaded.manifest.classes[0]}
        (folder / "broker").mkdir()
        broker = stack.enter_context(EmbeddedBroker(persistence=folder / "broker"))
        rtsp = stack.enter_context(rtsp_camera())
        lanes = cameras(write_pictures(folder / "pictures"), args.data, rtsp, facts["product"])
        consumer = stack.enter_context(Consumer(broker.host, broker.port, list(lanes)))
        line = stack.enter_context(Line(folder, bundle, lanes, (broker.host, broker.port), args.threads))
        line.wait_ready()
        samples = _watch(args, line, broker, consumer)
        summary = line.stop()
        _settle(consumer, summary)
        return {
            **facts,
            "minutes": args.minutes,
            "outage": args.outage,
            "threads": args.threads,
            "cpus": psutil.cpu_count(),
            "warm_up": WARM_UP,
            "samples": [asdict(sample) for sample in samples],
            "quarters": _quarters(consumer, args.minutes * 60),
            **_account(consumer, summary),
            "summary": summary,
        }


def _watch(args: argparse.Namespace, line: Line, broker: EmbeddedBroker, consumer: Consumer) -> list[Sample]:
    """Sample until the time is over; the broker is stopped in the middle."""
    seconds = args.minutes * 60
    away, back = (seconds - args.outage) / 2, (seconds + args.outage) / 2
    began, samples, last = time.monotonic(), [], time.time()
    pending = [(away, broker.stop, "broker stopped"), (back, broker.start, "broker started")] if args.outage else []
    with tqdm(total=round(seconds), desc="soak", unit="s", mininterval=1 if sys.stderr.isatty() else 60) as bar:
        while (at := time.monotonic() - began) < seconds:
            if pending and at >= pending[0][0]:
                _, act, said = pending.pop(0)
                act()
                bar.write(f"{at:.0f} s: {said}", file=sys.stderr)
            if not line.alive():
                raise SystemExit(f"the line ended by itself after {at:.0f} s:\n{line.log()[-3000:]}")
            now = time.time()
            system = psutil.cpu_times()
            busy = sum(system) - system.idle - system.iowait - system.guest - system.guest_nice
            latency = consumer.latency(last, now)
            samples.append(Sample(at, **line.look(), system=busy, verdicts=consumer.count(), latency=latency))
            last = now
            bar.set_postfix_str(f"{samples[-1].rss:.0f} MB, {samples[-1].verdicts} verdicts", refresh=False)
            bar.update(round(at) - bar.n)
            following = [began + args.every * len(samples), began + seconds, *(began + each[0] for each in pending)]
            time.sleep(max(0.0, min(following) - time.monotonic()))
    return samples


def _settle(consumer: Consumer, summary: dict[str, Any]) -> None:
    """Wait for what the broker still holds for the consumer."""
    judged = sum(camera["verdicts"] for camera in summary["cameras"].values())
    deadline = time.monotonic() + PATIENCE
    while consumer.count() < judged and time.monotonic() < deadline:
        time.sleep(0.1)


def _quarters(consumer: Consumer, seconds: float) -> list[dict[str, float]]:
    """Latencies in each quarter of the run."""
    if not consumer.arrivals:
        return [{}] * 4
    end = consumer.arrivals[-1].at
    bounds = [end - seconds * (4 - k) / 4 for k in range(4)] + [end + 1]
    return [consumer.latency(low, high) for low, high in pairwise(bounds)]


def _account(consumer: Consumer, summary: dict[str, Any]) -> dict[str, Any]:
    """Per camera: what the line says it judged against what came. More than was judged is as wrong as less."""
    rows = {}
    for name, tally in consumer.tallies.items():
        judged = summary["cameras"][name]["verdicts"]
        rows[name] = {
            "judged": judged,
            "arrived": len(tally.ids),
            "lost": judged - len(tally.ids),
            "duplicates": tally.duplicates,
            "replayed": tally.replayed,
            "out_of_order": tally.order,
            "labels": dict(sorted(tally.labels.items())),
            "dropped": summary["slots"][name]["dropped"],
            "restarts": summary["cameras"][name]["restarts"],
        }
    return {"cameras": rows, "lost": sum(abs(row["lost"]) for row in rows.values())}


if __name__ == "__main__":
    sys.exit(main())
