"""Verdicts as MQTT messages (schema ``andon.verdict/1``) and the identifiers that consumers dedupe and sort by."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from .types import Verdict

SCHEMA = "andon.verdict/1"
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {character: value for value, character in enumerate(_CROCKFORD)}
_FRESH = b'"replayed":false}'
_REPLAYED = b'"replayed":true}'
_SURROGATE = re.compile("[\ud800-\udfff]")


class Ids:
    """Monotonic ULIDs (https://github.com/ulid/spec): 26 characters that sort in the order they were given.

    The order never rests on the wall clock: a clock that stands or jumps back makes the identifier before count up
    by one. With ``floor`` (the outbox's last identifier) that holds across restarts too. Thread-safe.

    Args:
        floor: an identifier that all new ones come after.
        clock_ns: wall clock in nanoseconds.
        entropy: source of random bytes.
    """

    def __init__(
        self,
        floor: str | None = None,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        entropy: Callable[[int], bytes] = os.urandom,
    ):
        self._last = decode_id(floor) if floor else 0
        self._clock_ns = clock_ns
        self._entropy = entropy
        self._lock = threading.Lock()

    def next(self) -> str:
        """A new identifier, greater than every one before it."""
        with self._lock:
            milliseconds = max(0, self._clock_ns() // 1_000_000) & (2**48 - 1)
            fresh = milliseconds << 80 | int.from_bytes(self._entropy(10), "big")
            same_tick = milliseconds <= self._last >> 80
            self._last = self._last + 1 if same_tick else fresh
            return encode_id(self._last)


def encode_id(value: int) -> str:
    """128 bits as 26 characters of Crockford's base 32."""
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


def decode_id(text: str) -> int:
    """Inverse of :func:`encode_id`.

    Raises:
        ValueError: the text is not a ULID.
    """
    if len(text) != 26 or any(character not in _VALUES for character in text):
        raise ValueError(f"not a ULID: {text!r}")
    value = 0
    for character in text:
        value = value << 5 | _VALUES[character]
    return value


def timestamp(moment: datetime | None = None) -> str:
    """UTC RFC 3339 with milliseconds, as in ``2026-11-21T22:28:32.104Z``. A naive time is an error of the caller.

    Raises:
        ValueError: the time carries no zone.
    """
    moment = datetime.now(timezone.utc) if moment is None else moment
    if moment.tzinfo is None:
        raise ValueError(f"time without a zone: {moment.isoformat()}")
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def number(value: float | None) -> float | None:
    """A finite float, or None: JSON has neither NaN nor infinity."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def readable(text: str) -> str:
    r"""The text with escapes in place of what UTF-8 has no form for, so that it can be written, sent and read.

    Python gives such characters (lone surrogates) to a file name that is not UTF-8: a Latin-1 ``Geh\xe4use`` becomes
    those ten characters, and two names stay two.
    """
    return _SURROGATE.sub(lambda found: _escaped(found[0]), text)


def _escaped(surrogate: str) -> str:
    code = ord(surrogate)
    byte = code - 0xDC00  # surrogateescape (PEP 383) keeps the bytes 0x80 to 0xff of a name there
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{code:04x}"


def dumps(document: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON; every payload becomes bytes here. Text from outside is made :func:`readable` where need be.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # inside a JSON string, where the backslash is itself escaped
        return _SURROGATE.sub(lambda found: "\\" + _escaped(found[0]), text).encode()


def encode(document: Mapping[str, Any]) -> bytes:
    """A message for the outbox; ``replayed`` comes last, so that :func:`mark_replayed` need not parse.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    body = {name: value for name, value in document.items() if name != "replayed"}
    body["replayed"] = False
    return dumps(body)


def payload(verdict: Verdict) -> bytes:
    """The message of one verdict (configs/schema/verdict.json). Non-finite numbers become null."""
    return encode(
        {
            "schema": SCHEMA,
            "id": verdict.id,
            "seq": verdict.seq,
            "ts_capture": timestamp(verdict.ts_capture),
            "ts_judged": timestamp(verdict.ts_judged),
            "camera": verdict.camera,
            "part_id": verdict.part_id,
            "product": verdict.product,
            "label": verdict.label,
            "reason": verdict.reason,
            "score": number(verdict.score),
            "threshold": number(verdict.threshold),
            "regions": [
                {"bbox": [int(side) for side in region.bbox], "area": int(region.area), "peak": number(region.peak)}
                for region in verdict.regions
            ],
            "method": verdict.method,
            "bundle": verdict.bundle,
            "memory_version": verdict.memory_version,
            "latency_ms": {
                stage: round(finite, 3)
                for stage, value in verdict.latency_ms.items()
                if (finite := number(value)) is not None
            },
            "evidence": verdict.evidence,
        }
    )


def mark_replayed(message: bytes) -> bytes:
    """The same message with ``replayed`` true. A message that :func:`encode` did not make is an error.

    Raises:
        ValueError: the message does not end in the replayed flag.
    """
    if message.endswith(_REPLAYED):
        return message
    if not message.endswith(_FRESH):
        raise ValueError("message does not end in the replayed flag")
    return message[: -len(_FRESH)] + _REPLAYED


def whole(message: bytes, camera: str, kind: str, identifier: str) -> bool:
    """Whether a stored message is still one that :func:`encode` made: of this camera and kind, with this identifier.

    What a disk has changed within a number or a text, so that it is still JSON, is not seen.
    """
    if not isinstance(message, bytes) or not message.endswith((_FRESH, _REPLAYED)):
        return False
    try:
        document = json.loads(message)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(document, dict)
        and (document.get("id"), document.get("camera")) == (identifier, camera)
        and str(document.get("schema")).startswith(f"andon.{kind}/")
    )
