"""What the alarm boards are told of delivery, and when."""

from __future__ import annotations

from typing import Any

from andon.runtime.deliverywatch import DeliveryWatch
from andon.runtime.mqtt.delivery import DeliveryHealth
from andon.runtime.mqtt.publisher import LinkState
from andon.runtime.stored import OutboxStats

UP = LinkState(True, "")
AWAY = LinkState(False, "nothing listens there")
REFUSED = LinkState(True, "", refused=(("a/verdict", "Not authorized"),))


def health(link: LinkState, loss: str = "", degraded: str | None = None) -> DeliveryHealth:
    return DeliveryHealth({"cam0": link}, OutboxStats(0, 0, 0, 0.0, degraded, None, 0), 0, loss)


def told(*looks: DeliveryHealth) -> list[tuple[Any, ...]]:
    said: list[tuple[Any, ...]] = []
    watch = DeliveryWatch(lambda *words: said.append(words))
    answers = [watch.look(each) for each in looks]
    assert sum(answers) == len(said)
    return said


def test_a_loss_in_an_outage_is_told_and_each_cause_once() -> None:
    assert told(
        health(AWAY),
        health(AWAY),
        health(AWAY, "caps"),
        health(AWAY, "caps, more"),
        health(AWAY),
        health(AWAY, "caps"),
        health(UP, "caps"),
        health(UP, "caps", "database or disk is full"),
        health(UP),
        health(UP),
        health(UP, "caps"),
    ) == [
        (True, "nothing listens there", False),
        (True, "caps; nothing listens there", True),
        (True, "caps; database or disk is full", True),
        (False, "", False),
        (True, "caps", False),
    ]


def test_a_connection_that_has_just_been_lost_hides_no_other() -> None:
    young = LinkState(False, "connection lost", since=float("inf"))
    links = {"cam0": young, "cam1": AWAY}
    assert DeliveryHealth(links, health(UP).outbox, 0).troubles(5.0) == {"away": "nothing listens there"}


def test_another_cause_is_told_although_the_trouble_goes_on() -> None:
    assert [why for _, why, _ in told(health(AWAY), health(REFUSED))] == ["nothing listens there", REFUSED.trouble]


def test_all_is_well_is_told_once_and_only_when_connected() -> None:
    """A board may have been restored with an alarm of the last run."""
    young = LinkState(False, "not connected yet", since=float("inf"))
    assert told(health(young), health(young), health(UP), health(UP), health(young)) == [(False, "", False)]
