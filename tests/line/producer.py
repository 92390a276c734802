"""A line without cameras, in a process of its own: verdicts of two cameras through outbox and delivery.

Run as: producer.py FOLDER PORT COUNT RATE. Each verdict that is safe on disk is written to FOLDER/judged.log, so the
file says, whenever the process is killed, what has to arrive.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt.delivery import Delivery
from andon.runtime.outbox import Outbox
from andon.runtime.types import Verdict
from andon.runtime.verdict import Ids

CAMERAS = ("cam0", "cam1")


def main(folder: Path, port: int, count: int, rate: float) -> None:
    broker = BrokerConfig(port=port, retry_max=0.5)
    with Outbox(folder / "outbox.db") as outbox, (folder / "judged.log").open("a") as judged:
        ids = Ids(outbox.last_id)
        topic, status = "andon/v1/site/line/station", {"product": "mono", "ready": True}
        with Delivery(topic, CAMERAS, broker, outbox, inflight=32, status=lambda camera: status) as delivery:
            delivery.wait_connected(0.5)  # what is judged before counts as having waited
            began = time.monotonic()
            for index in range(count):
                now = datetime.now(timezone.utc)
                camera = CAMERAS[index % 2]
                verdict = Verdict(
                    ids.next(), camera, index, now, now, "OK", "score_below_threshold", None, None, 1.0, 2.0
                )
                key = delivery.verdict(verdict)
                if not outbox.wait(key, 10):
                    raise SystemExit("the outbox does not commit")
                print(camera, verdict.id, file=judged, flush=True)
                time.sleep(max(0.0, began + (index + 1) / rate - time.monotonic()))
            delivery.stop(20.0)
            if outbox.stats().messages:
                raise SystemExit(f"{outbox.stats().messages} messages are left")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
