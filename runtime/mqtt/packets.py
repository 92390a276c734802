"""How large a message is on its way, and which of those that were sent nobody has been seen to take."""

from __future__ import annotations

from dataclasses import dataclass

#: No broker has a limit below so many bytes that we would want to know of.
HEAVY = 2048


@dataclass(frozen=True)
class Heavy:
    """A message of more than HEAVY bytes that was sent; nothing says yet that the broker took any so large.

    before: packet ids in flight when it was sent; an acknowledgement of one of them proves nothing.
    """

    kind: str
    size: int
    before: frozenset[int]


def packet_size(topic: str, payload: bytes, qos: int, protocol: str = "5") -> int:
    """Bytes of a PUBLISH packet without properties, all headers included."""
    rest = 2 + len(topic.encode()) + (2 if qos else 0) + (protocol == "5") + len(payload)  # packet id, properties
    length = 1
    while rest >= 128**length:  # a variable byte integer: seven bits a byte
        length += 1
    return 1 + length + rest
