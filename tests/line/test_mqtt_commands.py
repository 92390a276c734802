"""Commands over MQTT: executed once and answered, refused with the reason, limited in rate."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.errors import ConfigError, DeliveryError, NotNowError
from andon.runtime.mqtt.commands import Commands, TokenBucket
from andon.runtime.process import resident_memory

from .connection import validate


@pytest.fixture
def commanded(line: Any, broker: EmbeddedBroker, consumer: Any, base: str) -> Iterator[Any]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def handle(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append((camera, arguments))
        return {"was": 1}

    def refuse(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise DeliveryError(
            "no such product", found=arguments["product"], expected="mono, poly", next_step="andon check"
        )

    def crash(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("oh")

    with line(broker.port, ("cam0",), trigger=handle, acknowledge=handle, product=refuse, rebuild=crash) as running:
        assert running.delivery.wait_connected(10)

        def command(
            name: str, payload: bytes, *, retain: bool = False, answers: int | None = None
        ) -> list[dict[str, Any]]:
            before = len(consumer.of("result"))
            consumer.client.publish(f"{base}/cam0/cmd/{name}", payload, 1, retain)
            if answers is None:
                consumer.until(lambda: len(consumer.of("result")) > before)
            return consumer.of("result")[before:]

        command.calls = calls  # type: ignore[attr-defined]
        command.running = running  # type: ignore[attr-defined]
        yield command


# The consumer sees the commands too; they are JSON only where the test says so.
@pytest.fixture
def consumer(broker: EmbeddedBroker, make_consumer: Any) -> Iterator[Any]:
    topics = "andon/v1/+/+/+/+/"

    def subscribe(client: Any) -> None:
        leaves = ("verdict", "alarm", "status", "metrics", "cmd/+/result")
        client.on_connect = lambda c, *_: c.subscribe([(f"{topics}{leaf}", 1) for leaf in leaves])

    with make_consumer(broker.port, configure=subscribe) as running:
        yield running


def test_command_is_executed_and_answered(commanded: Any) -> None:
    (answer,) = commanded("trigger", b'{"schema":"andon.command/1","id":"t1","part_id":"A-7"}')
    validate(answer)
    assert answer["ok"] and answer["id"] == "t1" and answer["result"] == {"was": 1}
    assert commanded.calls == [("cam0", {"part_id": "A-7"})]


def test_command_repeated_by_id_is_answered_but_not_executed(commanded: Any) -> None:
    (first,) = commanded("acknowledge", b'{"id":"a1","by":"Ada"}')
    (second,) = commanded("acknowledge", b'{"id":"a1","by":"Ada"}')
    assert first == second and len(commanded.calls) == 1


def test_triggers_do_not_make_other_commands_be_forgotten() -> None:
    done: list[str] = []
    answered = threading.Event()
    handlers = {"memory": lambda *_: done.append("rollback"), "trigger": lambda *_: done.append("trigger")}
    commands = Commands(handlers)
    commands.start()

    def send(name: str, payload: dict[str, Any]) -> None:
        commands.receive("cam0", name, json.dumps(payload).encode(), False, lambda *_: answered.set())

    def roll_back() -> None:
        answered.clear()
        send("memory", {"id": "1", "action": "rollback"})
        assert answered.wait(20)

    roll_back()
    for index in range(300):
        send("trigger", {"id": f"{index}", "part_id": "A"})
    roll_back()
    commands.stop()
    assert (done.count("rollback"), done.count("trigger"), commands.counts["repeated"]) == (1, 300, 1)


def test_a_command_that_found_the_line_busy_is_executed_when_it_comes_again() -> None:
    free, answers, done = threading.Event(), queue.SimpleQueue[dict[str, Any]](), []

    def acknowledge(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        free.wait(20)
        done.append(camera)
        return {}

    def send(number: int) -> None:  # each for a camera of its own, or there were too many of one
        payload = f'{{"id":"{number}","by":"Ada"}}'.encode()
        camera = f"cam{number}"
        commands.receive(camera, "acknowledge", payload, False, lambda name, answer: answers.put(json.loads(answer)))

    commands = Commands({"acknowledge": acknowledge})
    commands.start()
    sent = 0
    while answers.empty():  # one is executed, the queue takes so many, and then it is full
        send(sent)
        sent += 1
    refused = answers.get()
    validate(refused)
    assert (refused["id"], refused["error"]) == (str(sent - 1), "busy")
    free.set()
    assert all(answers.get(timeout=20)["ok"] for _ in range(sent - 1))
    send(sent - 1)
    assert answers.get(timeout=20)["ok"]
    commands.stop()
    assert done == [f"cam{number}" for number in range(sent)]


def test_a_command_that_the_line_could_not_begin_is_executed_when_it_comes_again() -> None:
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    problems = [
        NotNowError("the line is still starting", next_step="repeat it when its status says ready"),
        ConfigError("the bundle lacks a product"),
    ]

    def rebuild(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise problems.pop(0)

    commands = Commands({"rebuild": rebuild})
    commands.start()
    says = []
    for _ in range(3):
        commands.receive("cam0", "rebuild", b'{"id":"1"}', False, lambda name, answer: answers.put(json.loads(answer)))
        says.append(answers.get(timeout=20)["error"])
    commands.stop()
    assert says == ["the line is still starting"] + ["the bundle lacks a product"] * 2


@pytest.mark.parametrize(
    ("name", "payload", "says"),
    [
        ("trigger", b"{", "not JSON"),
        ("trigger", b"\xff\xfe", "not JSON"),
        ("trigger", b"[" * 50_000, "not JSON"),
        ("trigger", b'{"part":"A"}', "schema"),
        ("trigger", b"[]", "schema"),
        ("memory", b'{"action":"freeze"}', "does not take"),
        ("threshold", b'{"threshold":NaN}', "not JSON"),
        ("threshold", b'{"threshold":1e999}', "schema"),
        ("selfdestruct", b"{}", "unknown command"),
        ("product", b'{"product":"cat"}', "no such product"),
        ("rebuild", b"", "internal error"),
        ("trigger", rb'{"part_id":"A-\ud800"}', "text cannot be sent on"),
        ("acknowledge", rb'{"id":"\udc00"}', "text cannot be sent on"),
        ("acknowledge", b'{"by":"\xed\xa0\x80"}', "text cannot be sent on"),
        ("acknowledge", rb'{"\ud83d":1}', "schema"),
        ("trigger", rb'{"part_id":"\ud83d\ude00","part":1}', "schema"),
    ],
)
def test_command_that_fails_is_answered_with_the_reason(commanded: Any, name: str, payload: bytes, says: str) -> None:
    (answer,) = commanded(name, payload)
    validate(answer)
    assert not answer["ok"] and says in answer["error"] and commanded.calls == []


@pytest.mark.parametrize(
    ("name", "payload", "expected"),
    [
        ("product", b'{"id":"8","product":"cat"}', "mono, poly"),
        ("selfdestruct", b'{"id":"8"}', "one of acknowledge, product, threshold, trigger, memory, rebuild"),
    ],
)
def test_an_answer_says_what_would_have_been_accepted(commanded: Any, name: str, payload: bytes, expected: str) -> None:
    (answer,) = commanded(name, payload)
    validate(answer)
    assert (answer["ok"], answer["id"], answer["expected"]) == (False, "8", expected)


@pytest.mark.parametrize(
    ("payload", "identifier"),
    [
        (b'{"id":"8","threshold":"hoch"}', "8"),
        (b'{"id":"8","threshold":1e999}', "8"),
        (b'{"id":8,"threshold":"hoch"}', None),
        (b'{"id":"%b","threshold":"hoch"}' % (b"x" * 65), None),
        (b'{"id":"","threshold":"hoch"}', None),
        (rb'{"id":"\ud800","threshold":1}', None),
        (b'["id"]', None),
        (b'{"id":"8"', None),
    ],
)
def test_a_refused_command_keeps_an_id_that_fits_the_schema(
    commanded: Any, payload: bytes, identifier: str | None
) -> None:
    (answer,) = commanded("threshold", payload)
    validate(answer)
    assert not answer["ok"] and answer["id"] == identifier


def test_a_command_beyond_the_rate_keeps_its_id(commanded: Any, consumer: Any, base: str) -> None:
    for index in range(100):
        consumer.client.publish(f"{base}/cam0/cmd/acknowledge", b'{"id":"%d"}' % index, 1)
    consumer.until(lambda: any("too many" in (r["error"] or "") for r in consumer.of("result")))
    assert all(answer["id"] for answer in consumer.of("result"))


@pytest.mark.parametrize("result", [{"score": float("nan")}, {"engine": object()}])
def test_a_result_that_cannot_be_said_does_not_end_the_commands(
    line: Any, consumer: Any, broker: EmbeddedBroker, base: str, result: dict[str, Any]
) -> None:
    with line(broker.port, acknowledge=lambda camera, arguments: result, trigger=lambda *_: {"done": True}) as running:
        assert running.delivery.wait_connected(10)
        for name, payload in (("acknowledge", b'{"id":"1"}'), ("trigger", b'{"id":"2","part_id":"A"}')):
            consumer.client.publish(f"{base}/cam0/cmd/{name}", payload, 1)
        consumer.wait_for("result", 2)
    answers = {answer["id"]: (answer["ok"], answer["error"]) for answer in consumer.of("result")}
    assert answers == {"1": (False, "internal error"), "2": (True, None)}


def test_an_answer_that_cannot_be_sent_does_not_end_the_commands() -> None:
    answered = threading.Event()

    def away(name: str, answer: bytes) -> None:
        raise OSError("no connection")

    commands = Commands({"rebuild": lambda *_: {}})
    commands.start()
    commands.receive("cam0", "rebuild", b"", False, away)
    commands.receive("cam0", "rebuild", b"", False, lambda name, answer: answered.set())
    assert answered.wait(20)
    commands.stop()


def test_a_trigger_does_not_wait_behind_other_commands() -> None:
    """Its part would get a later picture. A product sent before it is its part's even so, also from behind."""
    calls: list[dict[str, Any]] = []
    answers: dict[str, threading.Event] = {name: threading.Event() for name in ("acknowledge", "product", "trigger")}
    reached, gate = threading.Event(), threading.Event()

    def hold(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        assert gate.wait(20)
        return {}

    def note(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        calls.append(arguments)
        return {}

    commands = Commands({"acknowledge": hold, "product": hold, "trigger": note})
    commands.start()

    def send(name: str, payload: bytes, camera: str = "cam0") -> None:
        commands.receive(camera, name, payload, False, lambda name, answer: answers[name].set())

    try:
        send("acknowledge", b"{}")
        assert reached.wait(20)
        send("trigger", b'{"part_id": "A"}')
        assert calls == [{"part_id": "A"}] and answers["trigger"].is_set() and not answers["acknowledge"].is_set()
        send("product", b'{"product": "poly"}')
        send("trigger", b'{"part_id": "B"}')
        send("trigger", b'{"part_id": "C"}', camera="cam1")
        gate.set()
        assert answers["product"].wait(20)
        send("trigger", b'{"part_id": "D"}')
    finally:
        gate.set()
        commands.stop()
    assert calls[1:] == [{"part_id": "B", "product": "poly"}, {"part_id": "C"}, {"part_id": "D"}]


def test_a_product_that_is_refused_as_busy_is_no_triggers() -> None:
    calls: list[dict[str, Any]] = []
    commands = Commands({"product": lambda *_: {}, "trigger": lambda camera, arguments: calls.append(arguments)})
    refused: list[bytes] = []
    for index in range(100):  # not started: none of them is done, and the queue fills
        product = b'{"product": "p%d"}' % index
        commands.receive(f"cam{index}", "product", product, False, lambda _, answer: refused.append(answer))
        commands.receive(f"cam{index}", "trigger", b'{"part_id": "A"}', False, lambda *_: None)
    waiting = 100 - len(refused)
    assert refused and waiting and all(b"busy" in answer for answer in refused)
    assert [each.get("product") for each in calls] == [f"p{i}" for i in range(waiting)] + [None] * len(refused)


def test_commands_that_wait_at_a_stop_are_answered_and_may_come_again() -> None:
    reached, gate, again, done = threading.Event(), threading.Event(), threading.Event(), []
    answers: dict[str, list[str | None]] = {}

    def hold(camera: str, arguments: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        assert gate.wait(20)
        done.append(arguments["by"])
        return {}

    def send(number: str) -> None:
        def answer(name: str, payload: bytes) -> None:
            answers.setdefault(number, []).append(json.loads(payload)["error"])
            if number == "2":  # it is answered while the first is still at hand
                gate.set()
            if number == "3" and len(answers["3"]) == 2:
                again.set()

        payload = json.dumps({"id": number, "by": number}).encode()
        commands.receive("cam0", "acknowledge", payload, False, answer)

    commands = Commands({"acknowledge": hold})
    commands.start()
    send("1")
    assert reached.wait(20)
    send("2")
    commands.stop()
    send("3")
    assert done == ["1"] and answers == {"1": [None], "2": ["the line is stopping"], "3": ["the line is stopping"]}
    commands.start()
    for number in ("1", "2", "3"):
        send(number)
    assert again.wait(20)
    commands.stop()
    assert done == ["1", "2", "3"] and answers["1"] == [None, None]


@pytest.mark.parametrize("busy", [False, True])
def test_a_product_that_is_refused_leaves_a_trigger_the_one_that_waits(busy: bool) -> None:
    """Refused because the queue is full, or because the line knows no such product, as it will say in its turn."""
    parts: list[dict[str, Any]] = []
    commands = Commands(
        {"trigger": lambda camera, arguments: parts.append(arguments)}, lambda camera, product: product != "scerw"
    )
    answers: list[bytes] = []

    def send(name: str, payload: bytes, camera: str = "cam0") -> None:  # not started: commands wait
        commands.receive(camera, name, payload, False, lambda _, answer: answers.append(answer))

    if not busy:
        send("product", b'{"product": "scerw"}')
        send("trigger", b'{"part_id": "A"}')
        assert parts.pop() == {"part_id": "A"}
    send("product", b'{"product": "poly"}')
    for index in range(100 if busy else 0):
        send("acknowledge", b"{}", f"other{index}")
    send("product", b'{"product": "mono"}' if busy else b'{"product": "scerw"}')
    assert any(b"busy" in answer for answer in answers) is busy
    send("trigger", b'{"part_id": "B"}')
    assert parts == [{"part_id": "B", "product": "poly"}]


def test_retained_command_is_refused(
    commanded: Any, line: Any, consumer: Any, broker: EmbeddedBroker, base: str
) -> None:
    commanded.running.delivery.stop()
    consumer.client.publish(f"{base}/cam0/cmd/trigger", b'{"part_id":"old"}', 1, True).wait_for_publish(5)
    commanded.running.delivery.start()
    consumer.until(lambda: any("retained" in (r["error"] or "") for r in consumer.of("result")))
    assert commanded.calls == []


def test_a_retained_command_is_refused_while_connected_and_may_be_cleared(
    commanded: Any, consumer: Any, base: str
) -> None:
    (answer,) = commanded("trigger", b'{"id":"old","part_id":"old"}', retain=True)
    assert answer["error"] == "a retained command is not executed" and answer["id"] == "old"
    for name in ("trigger", "acknowledge", "rebuild"):  # of these two, an empty message is a whole command
        consumer.client.publish(f"{base}/cam0/cmd/{name}", b"", 1, True)
    (answer,) = commanded("acknowledge", b'{"id":"after"}')
    assert answer["id"] == "after" and commanded.calls == [("cam0", {})], "clearing a topic is no command"


def test_ten_thousand_malformed_commands_leave_no_trace(
    commanded: Any, consumer: Any, base: str, eventually: Any
) -> None:
    counts = commanded.running.commands.counts
    for index in range(2000):
        consumer.client.publish(f"{base}/cam0/cmd/x{index}", b"{", 1)
    eventually(lambda: counts["limited"] + counts["refused"] == 2000, 30)
    before = resident_memory()["resident"]
    for index in range(8000):
        consumer.client.publish(f"{base}/cam0/cmd/y{index}", b'{"id":"%d"' % index + b"x" * 200, 1)
    eventually(lambda: counts["limited"] + counts["refused"] == 10_000, 60)
    grown = resident_memory()["resident"] - before
    assert grown < 20, f"{grown} MB more resident memory"
    assert len(consumer.of("result")) < 60 and len(commanded.running.commands._buckets) < 10
    commanded("acknowledge", b"{}", answers=0)  # answers to those before may still be on their way
    consumer.until(lambda: [r["ok"] for r in consumer.of("result") if r["command"] == "acknowledge"] == [True])


def test_oversized_command_is_not_taken(commanded: Any, consumer: Any, base: str) -> None:
    consumer.client.publish(f"{base}/cam0/cmd/trigger", b'{"part_id":"' + b"x" * 100_000 + b'"}', 1).wait_for_publish(5)
    (answer,) = commanded("acknowledge", b"{}")
    assert answer["command"] == "acknowledge" and commanded.calls == [("cam0", {})]


def test_rate_is_limited_and_said(commanded: Any, consumer: Any, base: str) -> None:
    for _ in range(100):
        consumer.client.publish(f"{base}/cam0/cmd/acknowledge", b"{}", 1)
    consumer.until(lambda: any("too many" in (r["error"] or "") for r in consumer.of("result")))
    consumer.until(lambda: sum(commanded.running.commands.counts.values()) == 100)
    assert 20 <= len(commanded.calls) <= 30


def test_token_bucket() -> None:
    clock = [0.0]
    bucket = TokenBucket(2.0, 3, lambda: clock[0])
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    clock[0] = 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_unknown_handler_is_refused() -> None:
    with pytest.raises(ValueError, match="not a command"):
        Commands({"dance": lambda camera, arguments: None})
    assert issubclass(ConfigError, Exception)
