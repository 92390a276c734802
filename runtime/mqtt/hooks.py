"""What a connection is given to send beside the outbox, and what it asks of its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..stored import Stored


@dataclass(frozen=True)
class Direct:
    """A message that does not go through the outbox. leaf: topic below the camera."""

    leaf: str
    payload: bytes
    qos: int = 1
    retain: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a connection asks of its surroundings; all are called in the publisher's thread and must not block.

    status: state -> payload of the status topic. alarm: payload of the retained alarm topic.
    command: (name, payload, retained, seconds for which it may have lain unread). acknowledged: messages that the
    broker took. refused: topic and reason, or None when it takes the topic again.
    too_large: kind, bytes and the broker's limit, for each message that is not sent because it exceeds the limit.
    discovery: topic and payload that tell Home Assistant of us, or None.
    """

    status: Callable[[str], bytes]
    alarm: Callable[[], bytes | None]
    command: Callable[[str, bytes, bool, float], None]
    acknowledged: Callable[[list[Stored]], None]
    refused: Callable[[str, str | None], None]
    too_large: Callable[[str, int, int], None]
    discovery: Callable[[], tuple[str, bytes] | None] = lambda: None
