"""The other end of the line: counts what arrives, deduped by id, and how late it is."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


@dataclass
class Tally:
    """What came of one camera. order: verdicts that came after a later one."""

    ids: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    replayed: int = 0
    order: int = 0
    last: str = ""


@dataclass(frozen=True)
class Arrival:
    """One verdict: when it came (time.time()), milliseconds of judging and from capture to here."""

    at: float
    judging: float | None
    through: float
    replayed: bool


class Consumer:
    """Subscribes to all verdicts of a broker with a session that outlives an outage; a context manager."""

    def __init__(self, host: str, port: int, cameras: list[str]):
        self.tallies = {name: Tally() for name in cameras}
        self.arrivals: list[Arrival] = []
        self._lock = threading.Lock()
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="andon-soak", protocol=paho.MQTTv5)
        self._client.reconnect_delay_set(1, 2)
        self._client.on_connect = lambda client, *_: client.subscribe("andon/v1/+/+/+/+/verdict", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self.take(message.payload)
        self._where = (host, port)

    def __enter__(self) -> Consumer:
        lasting = Properties(PacketTypes.CONNECT)
        lasting.SessionExpiryInterval = 3600
        self._client.connect(*self._where, clean_start=False, properties=lasting)
        self._client.loop_start()
        if not self._subscribed.wait(20):
            raise SystemExit("the consumer could not subscribe")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def take(self, payload: bytes) -> None:
        """Count one message."""
        verdict: dict[str, Any] = json.loads(payload)
        now = time.time()
        with self._lock:
            tally = self.tallies[verdict["camera"]]
            if verdict["id"] in tally.ids:
                tally.duplicates += 1
                return
            tally.ids.add(verdict["id"])
            tally.order += verdict["id"] < tally.last
            tally.last = max(tally.last, verdict["id"])
            tally.labels[verdict["label"]] += 1
            tally.replayed += verdict["replayed"]
            captured = datetime.fromisoformat(verdict["ts_capture"].replace("Z", "+00:00")).timestamp()
            through = (now - captured) * 1e3
            self.arrivals.append(Arrival(now, verdict["latency_ms"].get("total"), through, verdict["replayed"]))

    def count(self) -> int:
        """Verdicts so far, each counted once."""
        with self._lock:
            return len(self.arrivals)

    def latency(self, since: float, until: float) -> dict[str, float]:
        """p50 and p99 in milliseconds of what arrived in that time: judging, and capture to consumer (`through`).

        Replayed verdicts are left out of the latter: they have waited for the broker. Empty where nothing came.
        """
        with self._lock:
            window = [each for each in self.arrivals if since <= each.at < until]
        judging = [each.judging for each in window if each.judging is not None]
        through = [each.through for each in window if not each.replayed]
        found: dict[str, float] = {}
        for name, values in (("judging", judging), ("through", through)):
            if values:
                p50, p99 = np.percentile(values, (50, 99))
                found |= {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}
        return found
