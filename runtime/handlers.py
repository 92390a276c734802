"""What the commands of the MQTT contract do to a running line; each gives a result.

They run on the commands' thread, one after another; `trigger` runs on its connection's thread when it arrives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .detector import AUTO
from .errors import ConfigError, NotNowError
from .lineconfig import TriggerConfig
from .mqtt.commands import Handler
from .slot import Trigger

if TYPE_CHECKING:
    from .app import LineApp
#: Without a trigger section a camera answers triggers within this.
TRIGGER_TIMEOUT = 1.0


class Handlers:
    """The line's side of the commands; whatever belongs to the judging thread is done there, between two frames."""

    def __init__(self, app: LineApp):
        self._app = app

    def table(self) -> Mapping[str, Handler]:
        """Command name -> handler."""
        return {
            "acknowledge": self.acknowledge,
            "product": self.product,
            "threshold": self.threshold,
            "trigger": self.trigger,
            "memory": self.memory,
            "rebuild": self.rebuild,
        }

    def acknowledge(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Acknowledge one kind of alarm, or all."""
        worker, board = self._app.worker, self._app.boards[camera]

        def act() -> list[str]:
            events = board.acknowledge(arguments.get("kind"), arguments.get("by"))
            worker.alarm(camera, events)
            return [event.kind for event in events]

        return {"acknowledged": worker.call(act)}

    def product(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Change the product that a camera expects, from the next frame on."""

        def act() -> dict[str, Any]:
            changed = self._judge().set_product(camera, arguments["product"], arguments.get("by"))
            self._app.boards[camera].reset_window()
            self._app.state.expects(camera, changed["now"])
            return {**changed}

        result = self._app.worker.call(act)
        self._app.delivery.announce(camera)
        return result

    def takes(self, camera: str, product: str) -> bool:
        """Whether :meth:`product` would take it now, from any thread; no while engines are built: it may time out."""
        judge = self._app.worker.judge
        return judge is not None and judge.takes(camera, product)

    def threshold(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Override the threshold of a product at this camera, or at all of them; null takes the override back."""
        everywhere = "cameras" in arguments

        def act() -> dict[str, Any]:
            judge = self._judge()
            product = arguments.get("product") or judge.product_of(camera)
            if product == AUTO:
                classes = judge.detector.bundle.manifest.classes
                if len(classes) > 1:
                    raise ConfigError("which product?", found="product: auto", expected=", ".join(classes))
                product = classes[0]
            before = judge.threshold(product, camera)
            judge.set_threshold(product, arguments["threshold"], arguments.get("by"), None if everywhere else camera)
            self._app.say_thresholds(judge)
            cameras = judge.expecting(product) if everywhere else [camera]
            return {"product": product, "before": before, "now": judge.threshold(product, camera), "cameras": cameras}

        result = self._app.worker.call(act)
        self._app.delivery.announce(None if everywhere else camera)
        return result

    def trigger(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Announce a part; its verdict follows, UNKNOWN if no frame comes in time. Must not wait for anything.

        One that is late gets no more time for it: its part has gone on, and a picture would be of the next.

        Raises:
            ConfigError: its `ts` is no time. See :meth:`andon.runtime.slot.Slots.trigger`.
        """
        judge = self._app.worker.judge  # none while engines are built: then the line has no product to expect yet
        expected = None if judge is None else judge.product_of(camera)
        trigger = trigger_of(self._app.config.cameras[camera].trigger, arguments, expected)
        self._app.slots.trigger(camera, trigger)
        return {"part_id": arguments["part_id"]}

    def memory(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Freeze, unfreeze, snapshot, roll back or reset the line's memory, or a new drift reference for the camera."""
        worker = self._app.worker

        def act() -> dict[str, Any]:
            if worker.memory is None:
                raise ConfigError(
                    "this line has no online memory",
                    next_step="use a bundle with a memory and set memory.enabled in the configuration",
                )
            action = arguments["action"]
            acted_on = [camera] if action == "reference" else list(self._app.config.cameras)
            return {**worker.memory.command(action, {**arguments, "camera": camera}), "cameras": acted_on}

        return worker.call(act)

    def rebuild(self, camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Have the whole line take the bundle as it is now (a new calibration or export) and build its engines; status
        says when ready.

        A bundle that is refused changes nothing. Commands that come while it is read wait.
        """
        self._judge()
        return {"ready": False, "bundle": self._app.rebuild().id, "cameras": list(self._app.config.cameras)}

    def _judge(self) -> Any:
        judge = self._app.worker.judge
        if judge is None:
            raise NotNowError("the line is still starting", next_step="repeat it when its status says ready")
        return judge


def trigger_of(settings: TriggerConfig | None, arguments: Mapping[str, Any], expected: str | None) -> Trigger:
    """The trigger that a command `trigger` means, come just now.

    settings: of its camera. arguments: the command's, with `late` where it may have lain unread. expected: the product
    that the camera expects, where somebody knows.

    Raises:
        ConfigError: its `ts` is no time.
    """
    now, delay = time.monotonic(), settings.delay_ms / 1000 if settings else 0.0
    timeout = settings.timeout_ms / 1000 if settings else TRIGGER_TIMEOUT
    age = _age(arguments["ts"]) if "ts" in arguments else 0.0
    late = max(age, arguments.get("late", 0.0))
    trigger = Trigger(
        arguments["part_id"],
        at=now + delay,  # not from `ts`: clocks that are a little off would shift every picture
        deadline=now + delay + timeout - late,
        product=arguments.get("product"),
        expected=expected,
    )
    if age < -timeout:  # one of the clocks is wrong: nothing says when it was sent
        detail = f"the trigger's ts is {-age:.1f} s ahead of this station's clock"
        return replace(trigger, deadline=now - timeout, detail=detail)
    if late >= 0.1:
        return replace(trigger, detail=f"no frame came in time for the trigger, which came {late:.1f} s late")
    return trigger


def _age(ts: str) -> float:
    """Seconds since an RFC 3339 time, by this station's clock; below 0: it lies ahead.

    Raises:
        ConfigError: it is no time.
    """
    try:
        # Python 3.10 reads neither a Z nor any other number of digits than three or six.
        digits = re.sub(r"\.(\d+)", lambda part: f".{part[1]:0<6.6}", ts.replace("Z", "+00:00"))
        return (datetime.now(timezone.utc) - datetime.fromisoformat(digits)).total_seconds()
    except (ValueError, OverflowError) as error:
        raise ConfigError("the trigger's ts is no time", found=ts, expected="e.g. 2026-11-21T22:28:32.104Z") from error
