"""docs/mqtt.md shows messages that the published schemas take, of every topic."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from .mqttpage import examples  # type: ignore[import-not-found]
from .test_schema import SCHEMAS, validator  # type: ignore[import-not-found]

SHOWN = examples()


def of_command(name: str) -> Draft202012Validator:
    """The schema of one command, strict: `cmd/+` takes any of them."""
    schema = json.loads((SCHEMAS / "command.json").read_text())
    assert name in schema["$defs"], f"there is no command {name}"
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}, format_checker=FormatChecker())


@pytest.mark.parametrize(("topic", "message"), SHOWN, ids=[topic for topic, _ in SHOWN])
def test_every_message_is_what_its_schema_takes(topic: str, message: dict[str, Any]) -> None:
    camera, kind, *rest = topic.split("/")
    if kind == "cmd" and len(rest) == 1:
        of_command(rest[0]).validate(message)
        return
    validator("command-result" if kind == "cmd" else kind).validate(message)
    assert message["camera"] == camera
    if kind == "cmd":
        command, result = rest
        assert result == "result" and message["command"] == command
        assert message["ok"] == (message["error"] is None), "as the station answers"


def test_every_topic_is_shown() -> None:
    kinds = {topic.partition("/")[2] for topic, _ in SHOWN}
    assert {"verdict", "alarm", "status", "metrics"} <= kinds
    commands = {kind for kind in kinds if kind.startswith("cmd/") and not kind.endswith("/result")}
    assert {"cmd/trigger", "cmd/threshold", "cmd/memory"} <= commands
    assert {f"{command}/result" for command in commands} <= kinds, "a command without its answer"


def test_answers_are_of_the_commands_that_are_shown() -> None:
    asked = {topic: message for topic, message in SHOWN if "cmd/" in topic and not topic.endswith("/result")}
    for topic, message in SHOWN:
        if topic.endswith("/result"):
            assert message["id"] == asked[topic.removesuffix("/result")]["id"]


def test_answers_name_the_cameras_that_were_acted_on():
    """As the page says of these commands."""
    said = [message for topic, message in SHOWN if topic.endswith("/result")]
    done = [m for m in said if m["ok"] and m["command"] in ("threshold", "memory", "rebuild")]
    assert done and all(message["result"]["cameras"] for message in done)


def test_metrics_show_nothing_that_the_schema_does_not_describe() -> None:
    """It takes further fields, so a name that is wrong would pass."""
    described = json.loads((SCHEMAS / "metrics.json").read_text())["properties"]
    shown = next(message for topic, message in SHOWN if topic.endswith("/metrics"))
    assert set(shown) == set(described)
