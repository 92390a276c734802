"""Outbox and delivery as a line has them, for the tests of the connection; messages held against their schemas."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import andon
from andon.runtime.alarm import AlarmBoard, AlarmRule
from andon.runtime.alarm import payload as alarm_payload
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt.commands import Commands
from andon.runtime.mqtt.delivery import Delivery
from andon.runtime.outbox import Outbox
from andon.runtime.types import Region, Verdict
from andon.runtime.verdict import Ids
from jsonschema import Draft202012Validator, FormatChecker

SCHEMAS = Path(andon.__file__).parent / "configs" / "schema"


def validate(document: dict[str, Any]) -> None:
    name = document["schema"].removeprefix("andon.").partition("/")[0]
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(document)


def verdict(ids: Ids, camera: str = "cam0", seq: int = 0) -> Verdict:
    now = datetime.now(timezone.utc)
    regions = (Region((1, 2, 3, 4), 12, 3.0),)
    return Verdict(ids.next(), camera, seq, now, now, "NG", "score_above_threshold", "mono", "A-1", 3.0, 2.0, regions)


class Line:
    """Outbox, delivery and one alarm board per camera, as the runtime has them."""

    def __init__(
        self, folder: Path, base: str, broker: BrokerConfig, cameras: tuple[str, ...], handlers: dict[str, Any]
    ):
        self.outbox = Outbox(folder / "outbox.db")
        self.boards = {camera: AlarmBoard(camera, AlarmRule(k=1, n=1)) for camera in cameras}
        self.commands = Commands(handlers)
        self.delivery = Delivery(
            base,
            cameras,
            broker,
            self.outbox,
            status=lambda camera: {"bundle": "9f2c", "method": "hvq"},
            alarms=lambda camera: alarm_payload(self.ids.next(), camera, self.boards[camera].alarms),
            commands=self.commands,
        )

    def __enter__(self) -> Line:
        self.outbox.open()
        self.ids = Ids(self.outbox.last_id)
        self.delivery.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.delivery.stop()
        self.outbox.close()

    def send(self, count: int = 1, camera: str = "cam0") -> list[str]:
        verdicts = [verdict(self.ids, camera, seq) for seq in range(count)]
        for each in verdicts:
            self.delivery.verdict(each)
        return [each.id for each in verdicts]

    def alarm(self, camera: str, label: str) -> None:
        self.delivery.alarm(self.boards[camera], self.boards[camera].verdict(label), self.ids)
