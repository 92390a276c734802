"""Throughput and latency of the delivery path alone: from the verdict to the broker's PUBACK, fsync included."""

from __future__ import annotations

import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..broker import EmbeddedBroker
from ..errors import DeliveryError
from ..lineconfig import BrokerConfig
from ..outbox import Outbox
from ..stored import Stored
from ..types import Region, Verdict
from ..verdict import Ids
from .delivery import Delivery

_PATIENCE = 60.0


def delivery_benchmark(
    count: int = 5000, *, rate: float = 50.0, paced: int = 250, folder: Path | None = None
) -> dict[str, Any]:
    """Send ``count`` verdicts as fast as they go, then ``paced`` ones at ``rate`` per second, to our own mosquitto.

    Args:
        folder: where the outbox is kept; the numbers depend on that disk. None: the system's temporary folder.

    Returns:
        verdicts_per_second; latency_ms at the given rate with p50, p95, p99, max; count, paced, rate.

    Raises:
        DeliveryError: mosquitto is missing, or acknowledgements do not come.
    """
    with tempfile.TemporaryDirectory(prefix="andon-bench-", dir=folder) as place, EmbeddedBroker() as broker:
        meter = _Meter()
        with Outbox(Path(place) / "outbox.db") as outbox:
            config = BrokerConfig(host=broker.host, port=broker.port)
            base = "andon/v1/bench/bench/bench"
            with Delivery(base, ["cam0"], config, outbox, acknowledged=meter.acknowledged) as delivery:
                if not delivery.wait_connected(_PATIENCE):
                    raise DeliveryError("the benchmark's broker does not answer", found=delivery.health().reason)
                ids = Ids()
                seconds = meter.run(delivery, ids, count, pause=0.0)[0]
                latencies = sorted(meter.run(delivery, ids, paced, pause=1.0 / rate)[1])
    return {
        "verdicts_per_second": round(count / seconds, 1),
        "latency_ms": {
            name: round(1e3 * latencies[min(len(latencies) - 1, int(len(latencies) * share))], 3)
            for name, share in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
        },
        "count": count,
        "paced": paced,
        "rate": rate,
    }


class _Meter:
    """Times from handing a verdict over to its acknowledgement, by outbox key."""

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._taken: dict[int, float] = {}
        self._changed = threading.Condition()

    def acknowledged(self, messages: list[Stored]) -> None:
        now = time.perf_counter()
        with self._changed:
            self._taken.update((message.key, now) for message in messages)
            self._changed.notify_all()

    def run(self, delivery: Delivery, ids: Ids, count: int, pause: float) -> tuple[float, list[float]]:
        """Seconds from the first verdict to the last acknowledgement, and each one's latency in seconds."""
        self._sent.clear()
        self._taken.clear()
        began = time.perf_counter()
        for index in range(count):
            verdict = _verdict(ids.next(), index)
            at = time.perf_counter()
            self._sent[delivery.verdict(verdict)] = at
            if pause:
                time.sleep(max(0.0, began + (index + 1) * pause - time.perf_counter()))
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._taken) >= count, _PATIENCE):
                raise DeliveryError("acknowledgements are missing", found=len(self._taken), expected=count)
            taken = dict(self._taken)
        return max(taken.values()) - began, [taken[key] - at for key, at in self._sent.items()]


def _verdict(identifier: str, index: int) -> Verdict:
    """A verdict of ordinary size: one region, four stages."""
    now = datetime.now(timezone.utc)
    return Verdict(
        identifier,
        "cam0",
        index,
        now,
        now,
        "NG",
        "score_above_threshold",
        product="mono",
        part_id=f"A-{index}",
        score=3.42,
        threshold=2.8,
        regions=(Region((412, 96, 44, 31), 900, 3.42),),
        method="hvq",
        bundle="9f2c4d",
        latency_ms={"encode": 6.1, "match": 3.8, "score": 0.4, "total": 12.4},
    )
