"""Commands to a running line: triggers, products, thresholds, and what the retained status says of them."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import andon
import pytest
from andon.runtime.broker import EmbeddedBroker
from jsonschema import Draft202012Validator

from .running import LIVE, RunningLine


def test_a_trigger_names_the_next_frame(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 20_000}}})
    for index in range(5):
        assert line.command("cam0", "trigger", part_id=f"A-{index}")["ok"]
    verdicts = consumer.wait_for("verdict", 5)
    assert [(verdict["part_id"], verdict["label"]) for verdict in verdicts] == [(f"A-{i}", "OK") for i in range(5)]
    assert line.app.slots.counts()["cam0"].untriggered > 0, "frames without a trigger were not judged"


def test_a_trigger_is_taken_while_a_command_waits_for_the_judge(
    start_line: Callable[..., RunningLine], consumer: Any
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 60_000}}})
    gate = threading.Event()
    held = line.app.worker.post(lambda: gate.wait(20))
    line.client.publish(f"{line.app.config.topic}/cam0/cmd/acknowledge", b'{"id": "ack"}', qos=1)
    assert line.command("cam0", "trigger", part_id="A-1")["ok"]
    assert line.app.slots.counts()["cam0"].triggers == 1 and not held.done()
    assert not any(answer["id"] == "ack" for answer in consumer.of("result"))
    gate.set()
    (verdict,) = consumer.wait_for("verdict", 1)
    assert (verdict["part_id"], verdict["label"]) == ("A-1", "OK")


def test_a_part_is_judged_as_the_product_that_is_asked_for_unless_there_is_none_such(
    start_line: Callable[..., RunningLine], consumer: Any
) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": {"timeout_ms": 60_000}}})
    for part, product, judged_as in (("A-1", "nut", "mono"), ("A-2", "poly", "poly")):
        gate = threading.Event()
        line.app.worker.post(lambda gate=gate: gate.wait(20))
        line.client.publish(f"{line.app.config.topic}/cam0/cmd/product", json.dumps({"product": product}), qos=1)
        assert line.command("cam0", "trigger", part_id=part)["ok"]
        taken = line.app.slots.counts()["cam0"].triggers
        gate.set()
        verdict = consumer.wait_for("verdict", taken)[-1]
        assert (verdict["part_id"], verdict["label"], verdict["product"]) == (part, "OK", judged_as)


def test_a_product_that_comes_after_a_trigger_is_of_the_parts_behind_it(
    start_line: Callable[..., RunningLine], consumer: Any
) -> None:
    trigger = {"delay_ms": 1_000, "timeout_ms": 60_000}
    line = start_line({"cam0": {"source": LIVE, "product": "mono", "queue": 8, "trigger": trigger}})
    assert line.command("cam0", "trigger", part_id="A-1")["ok"]
    assert line.command("cam0", "product", product="poly")["ok"]
    assert not consumer.of("verdict"), "the product came before the part's picture"
    assert line.command("cam0", "trigger", part_id="A-2")["ok"]
    verdicts = consumer.wait_for("verdict", 2)
    assert [(v["part_id"], v["product"]) for v in verdicts] == [("A-1", "mono"), ("A-2", "poly")]


def test_a_trigger_without_a_frame_is_unknown(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    dead = {"kind": "gstreamer", "pipeline": "videotestsrc is-live=true ! valve drop=true"}
    cameras = {"cam0": {"source": dead, "product": "mono", "stale_after": None, "trigger": {"timeout_ms": 300}}}
    start_line(cameras).command("cam0", "trigger", part_id="A-1")
    (verdict,) = consumer.wait_for("verdict", 1)
    assert (verdict["part_id"], verdict["label"], verdict["reason"]) == ("A-1", "UNKNOWN", "no_frame")


def test_commands_change_the_line_and_are_answered(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}}, alarm={"k": 2, "n": 3})
    answer = line.command("cam0", "threshold", threshold=-1.0, by="me")
    assert answer["result"] == {"product": "mono", "before": 0.5, "now": -1.0, "cameras": ["cam0"]}
    shown = line.app.state.snapshot()["overrides"]["camera_thresholds"]["cam0"]["mono"]
    assert (shown["value"], shown["in_force"]) == (-1.0, True)
    consumer.until(lambda: any(alarm["state"] == "raised" for alarm in consumer.of("alarm")))
    assert line.command("cam0", "threshold", threshold=None)["result"]["now"] == 0.5
    consumer.until(lambda: consumer.of("alarm")[-1]["state"] == "latched")
    assert line.command("cam0", "acknowledge", by="me")["result"] == {"acknowledged": ["defect"]}
    consumer.until(lambda: consumer.of("alarm")[-1]["state"] == "cleared")
    assert line.command("cam0", "product", product="poly")["result"] == {"before": "mono", "now": "poly"}
    consumer.until(lambda: consumer.of("verdict")[-1]["product"] == "poly")
    consumer.until(lambda: consumer.of("status")[-1]["product"] == "poly")
    for name, arguments in [
        ("product", {"product": "nut"}),
        ("memory", {"action": "snapshot"}),
        ("threshold", {"threshold": 1, "product": "nut"}),
    ]:
        refused = line.command("cam0", name, **arguments)
        assert not refused["ok"] and refused["error"], name
    assert consumer.of("verdict")[-1]["product"] == "poly"


def test_the_retained_status_says_which_thresholds_commands_have_set(
    start_line: Callable[..., RunningLine], broker: EmbeddedBroker, consumer: Any, make_consumer: Any
) -> None:
    schema = json.loads((Path(andon.__file__).parent / "configs/schema/status.json").read_text())

    def said(watcher: Any, camera: str, what: str = "threshold_overrides") -> Any:
        return ([status.get(what) for status in watcher.of("status", camera)] or [None])[-1]

    def by_command(watcher: Any) -> list[Any]:
        return [said(watcher, "cam0"), said(watcher, "cam1")]

    cameras = {name: {"source": LIVE, "product": "mono"} for name in ("cam0", "cam1")}
    line = start_line(cameras)
    consumer.until(lambda: by_command(consumer) == [{}, {}])
    assert line.command("cam0", "threshold", threshold=0.6)["result"]["cameras"] == ["cam0"]
    consumer.until(lambda: by_command(consumer) == [{"mono": 0.6}, {}])
    assert said(consumer, "cam0", "thresholds") == {"mono": 0.6, "poly": 0.5}
    assert said(consumer, "cam1", "thresholds") == {"mono": 0.5, "poly": 0.5}
    with make_consumer(broker.port) as later:
        later.until(lambda: by_command(later) == [{"mono": 0.6}, {}])
    line.app.stop()
    line.thread.join(20)
    assert {name: each["thresholds"]["mono"] for name, each in line.summary["cameras"].items()} == {
        "cam0": 0.6,
        "cam1": 0.5,
    }
    consumer.forget()
    line = start_line(cameras)
    consumer.until(lambda: by_command(consumer) == [{"mono": 0.6}, {}])
    answer = line.command("cam1", "threshold", threshold=0.7, cameras="all")
    assert answer["result"] == {"product": "mono", "before": 0.5, "now": 0.7, "cameras": ["cam0", "cam1"]}
    consumer.until(lambda: by_command(consumer) == [{"mono": 0.7}, {"mono": 0.7}])
    assert line.command("cam1", "threshold", threshold=None)["result"]["now"] == 0.5
    consumer.until(lambda: by_command(consumer) == [{"mono": 0.7}, {}])
    assert line.command("cam1", "threshold", threshold=None, cameras="all")["ok"]
    consumer.until(lambda: by_command(consumer) == [{}, {}])
    refused = line.command("cam1", "threshold", threshold=0.1, cameras="some")
    assert not refused["ok"] and "'some' is not one of ['all']" in refused["found"]
    for status in consumer.of("status"):
        Draft202012Validator(schema).validate(status)


def test_a_threshold_is_the_cameras_that_was_asked_for(start_line: Callable[..., RunningLine], consumer: Any) -> None:
    """Two lanes with other lenses and light: every part of the second one became NG."""
    line = start_line({name: {"source": LIVE, "product": "mono"} for name in ("cam0", "cam1")})
    assert line.command("cam0", "threshold", threshold=-1.0)["ok"]
    consumer.until(lambda: [v["label"] for v in consumer.of("verdict", "cam0")][-1:] == ["NG"])
    seen = len(consumer.of("verdict", "cam1"))
    consumer.until(lambda: len(consumer.of("verdict", "cam1")) > seen + 1)
    assert {(v["label"], v["threshold"]) for v in consumer.of("verdict", "cam1")} == {("OK", 0.5)}
    answer = line.command("cam1", "rebuild")
    assert answer["result"]["cameras"] == ["cam0", "cam1"]
    consumer.until(lambda: consumer.of("status", "cam0")[-1]["ready"] is True)
    assert line.command("cam1", "memory", action="reference")["result"]["cameras"] == ["cam1"]
    assert line.command("cam1", "memory", action="reset")["result"]["cameras"] == ["cam0", "cam1"]


def test_a_command_that_cannot_be_kept_is_refused_and_changes_nothing(
    start_line: Callable[..., RunningLine], consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("andon.runtime.overrides.write_atomic", full)
    line = start_line({"cam0": {"source": LIVE, "product": "mono"}})
    for name, value in (("product", "poly"), ("threshold", 0.9)):
        refused = line.command("cam0", name, **{name: value})
        assert not refused["ok"] and "stays as it was" in refused["error"] and "No space" in refused["found"]
        assert refused["next"].startswith("make room in ")
    seen = len(consumer.of("verdict"))
    last = consumer.wait_for("verdict", seen + 2)[-1]
    assert (last["product"], last["threshold"]) == ("mono", 0.5)
