"""What a running line says of itself at intervals: how delivery stands, and a camera's metrics message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .lineconfig import BrokerConfig
from .mqtt.delivery import DeliveryHealth


def delivery_section(broker: BrokerConfig | None, health: DeliveryHealth) -> dict[str, Any]:
    """`delivery` of a snapshot."""
    return {
        "broker": None if broker is None else f"{broker.host}:{broker.port}",
        "connected": health.connected,
        "reason": health.reason,
        "acknowledged": health.acknowledged,
        "too_large": health.too_large,
        "pictures_skipped": health.pictures_skipped,
        "outbox": vars(health.outbox),
    }


def metrics_fields(snapshot: Mapping[str, Any], camera: str) -> dict[str, Any]:
    """What a camera's metrics message says, from a snapshot of the line."""
    return {
        "frames": snapshot["frames"],
        "fps": snapshot["fps"],
        "labels": snapshot["cameras"][camera]["labels"],
        "latency_ms": snapshot["latency_ms"],
        "slots": snapshot["slots"][camera],
        "outbox": snapshot["delivery"]["outbox"]["messages"],
    }
