"""`andon watch`: verdicts, alarms and status as they arrive over MQTT, one line each."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from ..broker import announcement
from ..configfile import load
from ..errors import ConfigError, DeliveryError
from ..lineconfig import BrokerConfig, LineConfig
from ..mqtt.client import explain, explain_connack, make_client, tls_context
from ..whereabouts import broker_at, state_elsewhere, state_folder
from . import numbers

_REMEMBERED = 100_000
#: Seconds after which silence is remarked on. What is retained comes at once.
_SILENCE = 5.0
#: For a login that is none or the wrong one.
_LOGIN = "give --config, which has the station's login, or --username and --password-file of one that may read"
#: Slashes of andon/v1/<site>/<line>/<station>/<camera>/#
_CAMERA_LEVEL = 6
_RED, _GREEN, _YELLOW, _DIM, _BOLD, _PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[2m", "\033[1m", "\033[0m"
_COLOURS = {"NG": _BOLD + _RED, "OK": _GREEN, "UNKNOWN": _YELLOW, "raised": _BOLD + _RED, "latched": _RED}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `andon watch`."""
    parser.add_argument("--config", type=Path, help="line configuration: its broker, login and topics")
    parser.add_argument("--broker", metavar="HOST:PORT", help="broker, instead of the configuration's")
    parser.add_argument("--username", help="login that may read, instead of the configuration's; with --password-file")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="file that holds its password")
    parser.add_argument("--topic", help="base topic; default: the line's, or andon/v1/# without a configuration")
    parser.add_argument("--count", type=numbers.count, help="end after so many verdicts")
    parser.add_argument(
        "--wait", type=numbers.seconds, default=0, help="seconds to wait for a broker that is not there yet"
    )
    parser.add_argument("--timeout", type=numbers.seconds, help="end after so many seconds without a verdict")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write each verdict to FILE, one JSON object a line"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Print messages until --count, --timeout or Ctrl-C; returns the summary.

    Raises:
        ConfigError: no broker is named, --topic is none, or half a login. DeliveryError: the broker refuses.
    """
    broker, topic = _where(args)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    with _recorder(args.out) as record:
        watch = Watch(colour=colour, quiet=False, record=record)
        with _interrupt(watch):
            watch.follow(broker, topic, args.count, args.timeout, args.wait)
    summary = watch.summary()
    print(_summary_line(summary), flush=True)
    short = args.count is not None and summary["verdicts"] < args.count and not watch.interrupted
    return {"ok": not short, **summary}


class Watch:
    """What has been seen. Verdicts are deduped by id, as every consumer has to."""

    def __init__(
        self,
        *,
        colour: bool,
        quiet: bool,
        out: Callable[[str], None] | None = None,
        record: Callable[[bytes], object] | None = None,
    ):
        self.interrupted = False
        self._record = record
        self._colour = colour
        self._out = out or (lambda line: print(line, flush=True))
        self._quiet = quiet
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._labels: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._refusal: DeliveryError | None = None
        self._heard = False  # anything that a line has published
        self._granted: float | None = None  # when the subscription was, until silence was remarked on
        self._at = time.monotonic()

    def follow(
        self, broker: BrokerConfig, topic: str, count: int | None, timeout: float | None, wait: float = 0
    ) -> None:
        """Subscribe and take messages until the end is reached; a lost connection is taken up again."""
        client = make_client(broker, f"andon-watch-{os.getpid()}", None, tls_context(broker.tls))
        client.on_connect = lambda c, _d, _f, reason, _p: self._connected(c, reason, broker, topic)
        client.on_subscribe = lambda _c, _d, _mid, reasons, _p: self._subscribed(reasons[0], topic)
        client.on_message = lambda _c, _d, message: self.take(message.topic, bytes(message.payload), message.retain)
        self._connect(client, broker, time.monotonic() + wait)
        self._at = time.monotonic()
        while not self._ended(count, timeout):
            lost = client.loop(0.2) != paho.MQTT_ERR_SUCCESS
            if self._refusal is not None:
                raise self._refusal
            if self._granted is not None and time.monotonic() - self._granted > _SILENCE:
                self._remark_silence(broker, topic)
            if lost and not self.interrupted:
                self._say(f"-- connection to {broker.host}:{broker.port} lost, waiting for it", _YELLOW)
                self._reconnect(client, count, timeout)
        if not self.interrupted:  # whoever interrupts has not waited
            self._remark_silence(broker, topic)
        client.disconnect()

    def take(self, topic: str, payload: bytes, retained: bool) -> None:
        """One message. What is not ours or not JSON is counted, not shown."""
        try:
            document = json.loads(payload)
            self._show(topic.split("/"), document, payload, retained)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            self._counts["foreign"] += 1

    def _show(self, levels: list[str], document: dict[str, Any], payload: bytes, retained: bool) -> None:
        schema, camera = document["schema"], levels[5]
        self._heard = self._heard or schema.startswith("andon.")
        if schema == "andon.verdict/1":
            self._verdict(camera, document, payload)
        elif schema == "andon.alarm/1":
            self._alarm(camera, document, retained)
        elif schema == "andon.status/1":
            note = " (as of before)" if retained else ""
            # What the will says of the outbox was so when the connection was set up.
            waiting = document["outbox"]["messages"] if document["state"] != "offline" else 0
            backlog = f", {waiting} waiting in its outbox" if waiting else ""
            overrides = document.get("threshold_overrides", {}).items()
            overridden = "".join(f", threshold of {product} by command: {value:g}" for product, value in overrides)
            own = document.get("configured_thresholds", {}).items()
            overridden += "".join(f", threshold of {product} by configuration: {value:g}" for product, value in own)
            colour = _RED if document["state"] == "offline" else _DIM
            self._say(f"-- {camera} is {document['state']}{note}{backlog}{overridden}", colour)
        elif schema == "andon.command-result/1":
            outcome = "done" if document["ok"] else f"failed: {document['error']} ({document['found']})"
            self._say(f"-- {camera} command {document['command']} {outcome}", _DIM)

    def summary(self) -> dict[str, Any]:
        """Counts so far."""
        return {
            "verdicts": sum(self._labels.values()),
            **{label: self._labels[label] for label in ("OK", "NG", "UNKNOWN")},
            "replayed": self._counts["replayed"],
            "repeated": self._counts["repeated"],
            "alarms": self._counts["alarms"],
            "foreign": self._counts["foreign"],
        }

    def _verdict(self, camera: str, verdict: dict[str, Any], payload: bytes) -> None:
        identifier = verdict["id"]
        if identifier in self._seen:
            self._counts["repeated"] += 1
            return
        self._seen[identifier] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        self._at = time.monotonic()
        if self._record is not None:
            self._record(payload + b"\n")
        self._labels[verdict["label"]] += 1
        self._counts["replayed"] += bool(verdict["replayed"])
        self._say(verdict_line(camera, verdict), _COLOURS.get(verdict["label"], ""))

    def _alarm(self, camera: str, alarm: dict[str, Any], retained: bool) -> None:
        event = alarm["event"]
        # A retained message is the present state; its event may be of one kind while another stands.
        if event is None or retained:
            for entry in alarm["alarms"]:
                text = f"!! {camera} {entry['kind']} is {entry['state']}: {entry['detail']}"
                self._say(text, _COLOURS.get(entry["state"], _YELLOW))
            return
        self._counts["alarms"] += 1
        note = " (replayed)" if alarm["replayed"] else ""
        text = f"!! {camera} {event['kind']} {event['from']} -> {event['to']}{note}: {event['detail']}"
        self._say(text, _COLOURS.get(event["to"], _YELLOW))

    def _say(self, text: str, colour: str) -> None:
        if not self._quiet:
            # What comes over the network does not get to steer the terminal.
            text = "".join(letter if letter.isprintable() else "?" for letter in text)
            self._out(f"{colour}{text}{_PLAIN}" if self._colour and colour else text)

    def _ended(self, count: int | None, timeout: float | None) -> bool:
        if self.interrupted or (count is not None and sum(self._labels.values()) >= count):
            return True
        return timeout is not None and time.monotonic() - self._at > timeout

    def _connected(self, client: paho.Client, reason: Any, broker: BrokerConfig, topic: str) -> None:
        if reason.is_failure:
            self._refusal = DeliveryError(
                "the broker refuses the connection",
                found=explain_connack(reason, broker),
                next_step=_LOGIN if reason.value in (4, 5, 134, 135) else None,
            )
            return
        client.subscribe(topic, qos=1)
        self._say(f"-- watching {topic} on {broker.host}:{broker.port}", _DIM)

    def _remark_silence(self, broker: BrokerConfig, topic: str) -> None:
        """mosquitto grants every subscription and holds back what the login may not read, which looks like a line
        without parts; but for the status, which is retained. A filter below a camera's topic may leave that out.
        """
        if self._granted is not None and not self._heard and topic.count("/") <= _CAMERA_LEVEL:
            login = "clients without a login" if broker.username is None else f"'{broker.username}'"
            self._say(
                f"-- nothing came, not even the status that the broker keeps of every line: none has been connected to "
                f"it, or {login} may not read {topic}: see the broker's ACL (docs/mosquitto/acl) or give --username "
                "and --password-file of a login that may",
                _YELLOW,
            )
        self._granted = None

    def _subscribed(self, reason: Any, topic: str) -> None:
        """A broker that refuses would be silent like a line without parts."""
        self._granted = time.monotonic()
        if reason.is_failure:
            self._refusal = DeliveryError(
                f"the broker refuses the subscription to {topic}",
                found=reason,
                expected="a login that may read the line's topics",
                next_step="allow it in the broker's ACL, or name a topic that is allowed with --topic",
            )

    def _connect(self, client: paho.Client, broker: BrokerConfig, deadline: float) -> None:
        while True:
            try:
                client.connect(broker.host, broker.port, broker.keepalive)
                return
            except (OSError, ValueError) as error:
                if time.monotonic() >= deadline or self.interrupted:
                    raise DeliveryError(
                        "the broker cannot be reached",
                        found=explain(error, broker),
                        next_step="name it with --broker HOST:PORT, or start it",
                    ) from error
                time.sleep(0.2)

    def _reconnect(self, client: paho.Client, count: int | None, timeout: float | None) -> None:
        while not self._ended(count, timeout):
            try:
                client.reconnect()
                return
            except OSError:
                time.sleep(0.5)


@contextmanager
def _recorder(path: Path | None) -> Iterator[Callable[[bytes], object] | None]:
    """A function that appends to a new file at `path`, written as it comes; None without a path."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        yield file.write


def verdict_line(camera: str, verdict: dict[str, Any]) -> str:
    """One verdict for a person: time, camera, label, score against threshold, part, reason."""
    moment = verdict["ts_capture"][11:23]
    score = "-" if verdict["score"] is None else f"{verdict['score']:.4g}"
    threshold = "-" if verdict["threshold"] is None else f"{verdict['threshold']:.4g}"
    relation = ">" if verdict["label"] == "NG" else "<=" if verdict["label"] == "OK" else "?"
    fields = [
        f"{moment} {camera:<8} {verdict['label']:<7} {score:>9} {relation:<2} {threshold:<9}",
        verdict["product"] or "",
        f"part {verdict['part_id']}" if verdict["part_id"] else "",
        f"{verdict['latency_ms']['total']:.1f} ms" if "total" in verdict["latency_ms"] else "",
        verdict["reason"] if verdict["label"] == "UNKNOWN" else "",
        _regions(len(verdict["regions"])),
        "(replayed)" if verdict["replayed"] else "",
    ]
    return "  ".join(field for field in fields if field).rstrip()


def _regions(count: int) -> str:
    return "" if count == 0 else "1 region" if count == 1 else f"{count} regions"


def _summary_line(summary: dict[str, Any]) -> str:
    text = "{verdicts} verdicts: {OK} OK, {NG} NG, {UNKNOWN} UNKNOWN; {replayed} replayed, {alarms} alarm changes"
    repeated = f"; {summary['repeated']} came twice and were counted once" if summary["repeated"] else ""
    return text.format(**summary) + repeated


def _where(args: argparse.Namespace) -> tuple[BrokerConfig, str]:
    """Broker and filter."""
    line = load(args.config, LineConfig) if args.config else None
    broker = line.broker if line is not None and line.broker is not None else BrokerConfig()
    if args.broker is not None:
        broker = broker_at(args.broker, broker)
    elif line is None:
        raise ConfigError("which broker?", next_step="andon watch --broker HOST:PORT, or --config line.yaml")
    elif broker.port == 0:
        elsewhere = state_elsewhere(line, args.config, "watch")
        host, port = _announced(announcement(state_folder(line, args.config)), args.wait, elsewhere)
        broker = broker.model_copy(update={"host": host, "port": port})
    return _login(args, broker), _filter(args.topic or (line.topic if line is not None else "andon/v1"))


def _login(args: argparse.Namespace, broker: BrokerConfig) -> BrokerConfig:
    """The broker with the login of the command line, if there is one.

    Raises:
        ConfigError: half of one.
    """
    if (args.username is None) != (args.password_file is None):
        raise ConfigError(
            "half a login",
            found="--password-file alone" if args.username is None else "--username alone",
            expected="both: the password comes from a file, so that no list of processes shows it",
            next_step="andon watch --username NAME --password-file FILE",
        )
    if args.username is None:
        return broker
    login = {"username": args.username, "password_file": args.password_file, "password_env": None}
    return broker.model_copy(update=login)


def _filter(topic: str) -> str:
    """The MQTT filter of a topic and all below it; the topic may have the wildcard at its end already.

    Raises:
        ConfigError: there is none.
    """
    base = topic.removesuffix("#").rstrip("/")
    if "#" in base or any("+" in level and level != "+" for level in base.split("/")):
        raise ConfigError(
            f"--topic {topic} is no MQTT filter",
            found=topic,
            expected="levels between slashes; + for any one level, # only as the last",
            next_step="andon watch --topic andon/v1/SITE --broker HOST:PORT",
        )
    return f"{base}/#" if base else "#"


def _announced(path: Path, wait: float, elsewhere: str) -> tuple[str, int]:
    """Address of the broker that a running line started on a free port; it is written when the broker runs.

    elsewhere: where else it could be, for the one who asks.

    Raises:
        ConfigError: no line of this configuration runs after `wait` seconds.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            host, _, port = path.read_text(encoding="ascii").strip().rpartition(":")
            return host, int(port)
        except OSError as error:
            if time.monotonic() >= deadline:
                step = "start it with `andon run --config ...`, or give --wait SECONDS or --broker HOST:PORT"
                raise ConfigError(
                    "no line of this configuration is running: its embedded broker's port is open until it does",
                    found=f"no {path.name} in {path.parent}",
                    next_step=f"{step}; {elsewhere}" if elsewhere else step,
                ) from error
            time.sleep(0.1)


@contextmanager
def _interrupt(watch: Watch) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the watch and still print the summary."""

    def end(_signal: int, _frame: object) -> None:
        watch.interrupted = True

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
