"""Messages against the published JSON Schemas, and the identifiers."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from andon.runtime import types
from andon.runtime.types import Region, Verdict
from andon.runtime.verdict import Ids, decode_id, dumps, encode_id, mark_replayed, payload, readable, timestamp
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker, ValidationError

SCHEMAS = Path(types.__file__).parents[1] / "configs" / "schema"


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=FormatChecker())


def example(**changes: Any) -> Verdict:
    now = datetime(2026, 11, 21, 22, 28, 32, 104_000, tzinfo=timezone.utc)
    fields: dict[str, Any] = {
        "id": Ids().next(),
        "camera": "cam0",
        "seq": 7,
        "ts_capture": now,
        "ts_judged": now + timedelta(milliseconds=12),
        "label": "NG",
        "reason": "score_above_threshold",
        "score": 3.42,
        "threshold": 2.8,
        "regions": (Region((412, 96, 44, 31), 900, 3.42),),
        "method": "hvq",
        "bundle": "9f2c",
        "memory_version": 17,
        "latency_ms": {"encode": 6.1, "total": 12.4},
    }
    return Verdict(**{**fields, **changes})


@pytest.mark.parametrize("name", ["verdict", "alarm", "status", "metrics", "command", "command-result"])
def test_schemas_are_schemas(name: str) -> None:
    validator(name)


def test_verdict_is_what_the_contract_says() -> None:
    document = json.loads(payload(example()))
    validator("verdict").validate(document)
    assert document["ts_capture"] == "2026-11-21T22:28:32.104Z" and document["replayed"] is False
    assert document["regions"] == [{"bbox": [412, 96, 44, 31], "area": 900, "peak": 3.42}]


@pytest.mark.parametrize("reason", types.UNKNOWN_REASONS)
def test_every_unknown_reason_is_in_the_contract(reason: str) -> None:
    document = json.loads(payload(example(label="UNKNOWN", reason=reason, score=float("nan"), regions=())))
    validator("verdict").validate(document)
    assert document["score"] is None


def test_unlisted_reason_and_missing_score_are_outside_the_contract() -> None:
    for wrong in (example(label="UNKNOWN", reason="tired"), example(label="OK", score=None)):
        with pytest.raises(ValidationError):
            validator("verdict").validate(json.loads(payload(wrong)))


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(
    score=st.none() | numbers,
    threshold=st.none() | numbers,
    peak=numbers,
    latency=numbers,
    part=st.none() | st.text(st.characters(codec=None, categories=None), max_size=30),
    zone=st.integers(-14, 14),
)
def test_any_verdict_is_json_and_can_be_marked(
    score: float | None, threshold: float | None, peak: float, latency: float, part: str | None, zone: int
) -> None:
    moment = datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=zone)))
    verdict = example(
        label="UNKNOWN",
        reason="not_a_number",
        score=score,
        threshold=threshold,
        regions=(Region((0, 0, 1, 1), 1, peak),),
        latency_ms={"total": abs(latency)},
        part_id=part,
        ts_capture=moment,
    )
    fresh = payload(verdict)
    assert b"NaN" not in fresh.replace(json.dumps(part and readable(part), ensure_ascii=False).encode(), b"")
    document = json.loads(fresh, parse_constant=lambda name: pytest.fail(name))
    assert document["part_id"] == (part and readable(part))
    validator("verdict").validate(document)
    assert datetime.fromisoformat(document["ts_capture"].replace("Z", "+00:00")) == moment
    marked = mark_replayed(fresh)
    assert json.loads(marked) == {**document, "replayed": True} and mark_replayed(marked) == marked


def test_text_that_is_no_unicode_stays_readable_and_unique() -> None:
    names = [name.decode("utf-8", "surrogateescape") for name in (b"Geh\xe4use", b"Geh\xe5use", "Gehäuse".encode())]
    assert [readable(name) for name in names] == [r"Geh\xe4use", r"Geh\xe5use", "Gehäuse"]
    assert readable("A-\ud83d") == r"A-\ud83d" and readable("A-\U0001f600") == "A-\U0001f600"
    keyed = {"\udce4": ["\udce4", "\\", '"']}
    assert json.loads(dumps(keyed)) == {r"\xe4": [r"\xe4", "\\", '"']}


def test_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        timestamp(datetime(2026, 1, 1))


def test_message_without_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="replayed"):
        mark_replayed(b"{}")


@given(st.lists(st.integers(-(2**40), 2**62), min_size=2, max_size=40))
def test_ids_ascend_whatever_the_clock_does(clock: list[int]) -> None:
    ticks = iter(clock)
    ids = Ids(clock_ns=lambda: next(ticks) * 1_000_000)
    given_out = [ids.next() for _ in clock]
    assert given_out == sorted(set(given_out))
    after = Ids(given_out[-1], clock_ns=lambda: 0)
    assert after.next() > given_out[-1]


def test_an_id_says_when_it_was_given_as_ulids_do() -> None:
    """The milliseconds in its first ten characters, then random bits: that of another station differs."""
    moment = 1_795_300_112_105
    one, other = (Ids(clock_ns=lambda: moment * 1_000_000 + 999_999).next() for _ in range(2))
    assert decode_id(one) >> 80 == moment and one[:10] == other[:10] and one != other
    assert Ids(entropy=bytes, clock_ns=lambda: moment * 1_000_000).next() == f"{one[:10]}{'0' * 16}"
    assert encode_id(469) == f"{'0' * 24}EN"


@given(st.integers(0, 2**128 - 1))
def test_ids_encode_and_decode(value: int) -> None:
    assert decode_id(encode_id(value)) == value and len(encode_id(value)) == 26


def test_not_an_id() -> None:
    for text in ("", "x" * 26, "0" * 25):
        with pytest.raises(ValueError, match="ULID"):
            decode_id(text)


@pytest.mark.parametrize(
    ("name", "document", "good"),
    [
        ("trigger", {"part_id": "A-1"}, True),
        ("trigger", {}, False),
        ("trigger", {"part_id": "A", "camera": "x"}, False),
        ("trigger", {"part_id": "A", "ts": "2026-11-21T22:28:32.104Z"}, True),
        ("trigger", {"part_id": "A", "ts": "2026-11-21 22:28"}, False),
        ("trigger", {"part_id": "A", "late": 1}, False),
        ("acknowledge", {}, True),
        ("acknowledge", {"kind": "defect", "by": "Ada", "schema": "andon.command/1", "id": "1"}, True),
        ("acknowledge", {"kind": "fire"}, False),
        ("threshold", {"threshold": 3.5, "product": "mono"}, True),
        ("threshold", {"threshold": None}, True),
        ("threshold", {"threshold": "high"}, False),
        ("memory", {"action": "freeze"}, True),
        ("memory", {"action": "rollback", "version": 3}, True),
        ("memory", {"action": "freeze", "version": 3}, False),
        ("memory", {"action": "reference", "by": "Ada"}, True),
        ("memory", {"action": "reference", "version": 3}, False),
        ("memory", {"action": "forget"}, False),
        ("product", {"product": "poly"}, True),
        ("rebuild", {}, True),
        ("rebuild", [], False),
    ],
)
def test_commands(name: str, document: Any, good: bool) -> None:
    schema = json.loads((SCHEMAS / "command.json").read_text())
    checker = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]})
    assert checker.is_valid(document) is good
