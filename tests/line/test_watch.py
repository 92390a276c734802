"""andon watch: what a person sees, and what counts."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from andon.cli import main
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.commands import watch as watching
from andon.runtime.commands.watch import Watch, verdict_line
from andon.runtime.errors import DeliveryError
from andon.runtime.lineconfig import BrokerConfig
from andon.runtime.mqtt.bench import delivery_benchmark
from paho.mqtt.enums import CallbackAPIVersion

DOCS = Path(__file__).parents[2] / "docs"
WATCH = [sys.executable, "-m", "andon.cli", "watch", "--json"]
TOPIC = "andon/v1/site/line/station/cam0"
VERDICT = {
    "schema": "andon.verdict/1",
    "id": "01M80DF54YZNT5CHPNH1W5RVHP",
    "ts_capture": "2026-11-22T01:20:58.011Z",
    "label": "NG",
    "reason": "score_above_threshold",
    "score": 3.42,
    "threshold": 2.8,
    "product": "mono",
    "part_id": "A-7",
    "regions": [{}],
    "latency_ms": {"total": 12.44},
    "replayed": False,
}


def run(*arguments: str) -> tuple[int, dict[str, Any], str, str]:
    done = subprocess.run([*WATCH, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


def test_a_verdict_is_one_readable_line() -> None:
    line = verdict_line("cam0", VERDICT)
    for wanted in ("01:20:58.011", "cam0", "NG", "3.42", "2.8", "mono", "part A-7", "12.4 ms", "1 region"):
        assert wanted in line
    assert "replayed" not in line and "replayed" in verdict_line("cam0", {**VERDICT, "replayed": True})
    unknown = {**VERDICT, "label": "UNKNOWN", "reason": "engine_error", "score": None, "latency_ms": {}}
    assert "engine_error" in verdict_line("cam0", unknown)


def test_a_retained_alarm_shows_all_that_stand_not_its_last_transition() -> None:
    """After an outage that is `delivery`, and a defect stood unseen."""
    lines: list[str] = []
    watch = Watch(colour=False, quiet=False, out=lines.append)
    stand = [{"kind": kind, "state": "latched", "detail": f"{kind} detail"} for kind in ("defect", "delivery")]
    event = {"kind": "delivery", "from": "raised", "to": "latched", "detail": "back"}
    board = {"schema": "andon.alarm/1", "event": event, "alarms": stand, "replayed": False}
    watch.take(f"{TOPIC}/alarm", json.dumps(board).encode(), retained=True)
    assert lines == ["!! cam0 defect is latched: defect detail", "!! cam0 delivery is latched: delivery detail"]
    assert watch.summary()["alarms"] == 0
    watch.take(f"{TOPIC}/alarm", json.dumps(board).encode(), retained=False)
    assert lines[2:] == ["!! cam0 delivery raised -> latched: back"] and watch.summary()["alarms"] == 1
    watch.take(f"{TOPIC}/alarm", json.dumps({**board, "alarms": []}).encode(), retained=True)
    assert len(lines) == 3, "what is cleared is not said"


def test_colours_dedupe_and_foreign_messages() -> None:
    lines: list[str] = []
    watch = Watch(colour=True, quiet=False, out=lines.append)
    for _ in range(2):
        watch.take(f"{TOPIC}/verdict", json.dumps(VERDICT).encode(), False)
    assert len(lines) == 1 and lines[0].startswith("\033[1m\033[31m") and lines[0].endswith("\033[0m")
    for foreign in (
        b"{",
        b"[]",
        b"[" * 50_000,
        b'"x"',
        b"{}",
        b'{"schema":"andon.verdict/1"}',
        b'{"schema":"andon.alarm/1","event":1}',
    ):
        watch.take(f"{TOPIC}/verdict", foreign, False)
    watch.take("andon/v1", json.dumps(VERDICT).encode(), False)
    summary = watch.summary()
    assert (summary["verdicts"], summary["NG"], summary["repeated"], summary["foreign"]) == (1, 1, 1, 8)


def test_a_status_says_which_thresholds_commands_and_the_configuration_have_set() -> None:
    lines: list[str] = []
    watch = Watch(colour=False, quiet=False, out=lines.append)
    status = {"schema": "andon.status/1", "state": "online", "outbox": {"messages": 0}}
    own = {"threshold_overrides": {}, "configured_thresholds": {"mono": 0.7}}
    for overrides in ({}, {"threshold_overrides": {}}, {"threshold_overrides": {"mono": 0.6}}, own):
        watch.take(f"{TOPIC}/status", json.dumps({**status, **overrides}).encode(), False)
    plain = "-- cam0 is online"
    told = [f"{plain}, threshold of mono by {whom}" for whom in ("command: 0.6", "configuration: 0.7")]
    assert [line.strip() for line in lines] == [plain, plain, *told]


def test_what_waits_in_the_outbox_is_not_said_of_a_station_that_has_died() -> None:
    lines: list[str] = []
    watch = Watch(colour=False, quiet=False, out=lines.append)
    for state in ("stopped", "offline"):
        status = {"schema": "andon.status/1", "state": state, "outbox": {"messages": 3}}
        watch.take(f"{TOPIC}/status", json.dumps(status).encode(), False)
    assert lines == ["-- cam0 is stopped, 3 waiting in its outbox", "-- cam0 is offline"], "the will is of the connect"


def test_messages_cannot_steer_the_terminal() -> None:
    lines: list[str] = []
    watch = Watch(colour=False, quiet=False, out=lines.append)
    watch.take(f"{TOPIC}/verdict", json.dumps({**VERDICT, "part_id": "\033[2J\r\nfine"}).encode(), False)
    assert "\033" not in lines[0] and "\n" not in lines[0] and "\r" not in lines[0]


def test_follows_a_real_line(tmp_path: Path, broker: EmbeddedBroker, producer_script: Path) -> None:
    address = f"127.0.0.1:{broker.port}"
    watch = subprocess.Popen(
        [*WATCH, "--broker", address, "--count", "40", "--timeout", "30"], stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout is not None and "watching andon/v1/#" in watch.stdout.readline()
    subprocess.run([sys.executable, str(producer_script), str(tmp_path), str(broker.port), "40", "200"], check=True)
    out, _ = watch.communicate(timeout=30)
    summary = json.loads(out.splitlines()[-1])
    assert watch.returncode == 0 and summary["ok"] and summary["verdicts"] == summary["OK"] == 40
    assert "cam1 is online" in out and "\033" not in out


def test_too_few_verdicts_is_a_failure(broker: EmbeddedBroker) -> None:
    code, summary, _, _ = run("--broker", f"127.0.0.1:{broker.port}", "--count", "1", "--timeout", "1")
    assert code == 1 and not summary["ok"] and summary["verdicts"] == 0


def test_ctrl_c_ends_with_the_summary(broker: EmbeddedBroker) -> None:
    watch = subprocess.Popen([*WATCH, "--broker", f"127.0.0.1:{broker.port}"], stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    out, _ = watch.communicate(timeout=30)
    assert watch.returncode == 0 and "0 verdicts" in out and json.loads(out.splitlines()[-1])["ok"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--broker", "127.0.0.1:1"), "nothing listens there"),
        (("--broker", "nowhere"), "HOST:PORT"),
        ((), "--broker HOST:PORT"),
    ],
)
def test_refusals(arguments: tuple[str, ...], says: str) -> None:
    code, answer, _, err = run(*arguments)
    assert code == 1 and not answer["ok"] and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("topic", "watched"),
    [
        ("#", "#"),
        ("andon/v1/", "andon/v1/#"),
        ("andon/v1/#", "andon/v1/#"),
        ("andon/v1/+/line", "andon/v1/+/line/#"),
        ("andon/#/x", None),
        ("a+b", None),
    ],
)
def test_a_topic_is_followed_as_it_is_meant_or_refused(topic: str, watched: str | None, broker: EmbeddedBroker) -> None:
    code, answer, out, err = run("--broker", f"127.0.0.1:{broker.port}", "--topic", topic, "--timeout", "0.1")
    if watched is None:
        assert code == 1 and "is no MQTT filter" in answer["error"] and "Traceback" not in err
    else:
        assert code == 0 and f"-- watching {watched} on" in out


def test_a_subscription_that_the_broker_refuses_is_said() -> None:
    """It would be as silent as a line without parts. mosquitto grants every one; others answer Not authorized."""

    def refuse(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK, success
            request = connection.recv(1024)
            connection.sendall(b"\x90\x04" + request[2:4] + b"\x00\x87")  # SUBACK of its packet id, Not authorized
            connection.recv(1024)  # until the other end closes

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        watch = Watch(colour=False, quiet=True)
        with pytest.raises(DeliveryError, match="refuses the subscription to andon/v1/#") as caught:
            watch.follow(BrokerConfig(host="127.0.0.1", port=listener.getsockname()[1]), "andon/v1/#", None, 30)
    assert "Not authorized" in str(caught.value.found)


def test_where_the_port_of_a_service_is_found_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    path = tmp_path / "line3.yaml"
    camera = "cameras: {c: {source: {kind: test}}}"
    path.write_text(f"site: s\nline: l\nstation: p\n{camera}\nbroker: {{embedded: true, port: 0}}\n")
    command = f"STATE_DIRECTORY=/var/lib/andon/line3 andon watch --config {path}"
    assert main(["watch", "--config", str(path)]) != 0
    assert command in capsys.readouterr().err
    path.write_text(f"{path.read_text()}state: {tmp_path}\n")
    assert main(["watch", "--config", str(path)]) != 0
    told = capsys.readouterr().err
    assert f"no broker.address in {tmp_path}" in told and "STATE_DIRECTORY" not in told


def test_delivery_benchmark_counts_what_it_says(tmp_path: Path) -> None:
    result = delivery_benchmark(200, rate=100.0, paced=20, folder=tmp_path)
    assert (result["count"], result["paced"]) == (200, 20) and result["verdicts_per_second"] > 0
    latency = result["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker with the access control of docs/mosquitto, in which press-2 has written its status."""
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    for user in ("press-2", "viewer", "stranger"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, "secret"], check=True, capture_output=True)
    (tmp_path / "pw").write_text("secret\n")
    shutil.copy(DOCS / "mosquitto" / "acl", tmp_path / "acl")
    settings = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {tmp_path / 'acl'}"]
    with EmbeddedBroker(settings=settings) as broker:
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        client.username_pw_set("press-2", "secret")
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        status = {"schema": "andon.status/1", "state": "online", "outbox": {"messages": 0}}
        topic = "andon/v1/plant1/line3/press-2/cam0/status"
        client.publish(topic, json.dumps(status).encode(), 1, retain=True).wait_for_publish(30)
        client.disconnect()
        client.loop_stop()
        yield broker


def test_a_station_may_watch_itself_with_the_access_control_of_the_documents(
    tmp_path: Path, guarded: EmbeddedBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "line.yaml"
    config.write_text(
        "site: plant1\nline: line3\nstation: press-2\ncameras: {cam0: {source: {kind: test}}}\n"
        f"broker: {{port: {guarded.port}, username: press-2, password_file: pw}}\n"
    )
    assert main(["watch", "--config", str(config), "--timeout", "1"]) == 0
    said = capsys.readouterr().out
    assert "-- cam0 is online" in said and "nothing came" not in said
    other = ["--username", "viewer", "--password-file", str(tmp_path / "pw")]
    assert main(["watch", "--config", str(config), "--timeout", "1", *other]) == 0
    assert "-- cam0 is online" in capsys.readouterr().out


def test_a_login_that_may_not_read_is_not_as_silent_as_a_line_without_parts(
    tmp_path: Path, guarded: EmbeddedBroker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mosquitto grants the subscription, with MQTT 5 too, and holds back what the login may not read."""
    monkeypatch.setattr(watching, "_SILENCE", 0.2)
    address = ["--broker", f"127.0.0.1:{guarded.port}"]
    login = ["--username", "stranger", "--password-file", str(tmp_path / "pw")]
    assert main(["watch", *address, *login, "--timeout", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("nothing came") == 1 and "'stranger' may not read andon/v1/#" in said
    assert said.index("nothing came") < said.index("0 verdicts")
    assert main(["watch", *address, "--timeout", "2"]) == 1
    refused = capsys.readouterr().err
    assert "anonymous clients are not allowed" in refused and "--username" in refused
    assert main(["watch", *address, "--username", "viewer"]) == 1
    assert "--password-file FILE" in capsys.readouterr().err
