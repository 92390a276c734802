"""The examples in docs/ that an operator copies: they are run, not only read."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from andon.runtime.broker import EmbeddedBroker
from paho.mqtt.enums import CallbackAPIVersion

DOCS = Path(__file__).parents[2] / "docs"
STATION = "andon/v1/plant1/line3/press-2/cam0"


def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("THE SYSTEMD UNIT IS NOT TESTED: no systemd-analyze here")
    text = (DOCS / "systemd" / "andon@.service").read_text().replace("/opt/andon/bin/andon", "/bin/true")
    unit = tmp_path / "andon@.service"
    unit.write_text(text)
    done = subprocess.run([program, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    for wanted in ("Type=notify", "WatchdogSec=", "User=andon", "StateDirectory=", "NoNewPrivileges=yes"):
        assert wanted in text


def test_unit_leaves_cameras_and_gpu_to_the_line() -> None:
    lines = (DOCS / "systemd" / "andon@.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    # Any of the first three allows some devices, which denies all others.
    hiding = {"ProtectClock", "DeviceAllow", "DevicePolicy", "PrivateDevices", "PrivateTmp", "TemporaryFileSystem"}
    assert not hiding & settings.keys()
    # What ProtectClock would do besides is done otherwise.
    assert settings["CapabilityBoundingSet"] == ""
    assert settings["SystemCallFilter"] == "@system-service"
    # Strict leaves nothing to write to, and archived bundles are unpacked there.
    assert settings["ProtectSystem"] == "strict" and "/tmp" in settings["ReadWritePaths"].split()


def test_engines_are_built_where_the_service_looks_for_them() -> None:
    unit = (DOCS / "systemd" / "andon@.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    cache = next(word for word in settings["Environment"].split() if word.startswith("XDG_CACHE_HOME="))
    program = settings["ExecStart"].split()[0]
    told = (DOCS / "operations.md").read_text()
    assert f"sudo -u {settings['User']} env {cache} {program} build --bundle" in told
    assert f"--groups {settings['SupplementaryGroups'].replace(' ', ',')} {settings['User']}" in told
    assert f"/var/cache/{settings['CacheDirectory']}" == cache.partition("=")[2]


def publish(port: int, user: str, topic: str) -> int:
    """Reason code of the PUBACK."""
    codes: list[int] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.username_pw_set(user, "secret")
    client.on_publish = lambda _c, _d, _mid, reason, _p: codes.append(reason.value)
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.publish(topic, b"{}", 1).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()
    return codes[0]


def test_acl_lets_everyone_do_what_they_must_and_no_more(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    for user in ("press-2", "viewer", "control"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, "secret"], check=True, capture_output=True)
    shutil.copy(DOCS / "mosquitto" / "acl", tmp_path / "acl")
    settings = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {tmp_path / 'acl'}"]
    allowed = {
        ("press-2", f"{STATION}/verdict"),
        ("press-2", f"{STATION}/status"),
        ("press-2", f"{STATION}/alarm"),
        ("press-2", f"{STATION}/cmd/trigger/result"),
        ("press-2", "homeassistant/device/andon_plant1_line3_press-2_cam0/config"),
        ("control", f"{STATION}/cmd/acknowledge"),
    }
    forbidden = {
        ("press-2", "andon/v1/plant1/line3/press-3/cam0/verdict"),
        ("press-2", f"{STATION}/cmd/trigger"),
        ("press-2", "homeassistant/status"),
        ("viewer", f"{STATION}/verdict"),
        ("viewer", f"{STATION}/cmd/trigger"),
        ("control", f"{STATION}/verdict"),
        ("control", "andon/v1/plant2/line3/press-2/cam0/cmd/trigger"),
    }
    with EmbeddedBroker(settings=settings) as broker:
        refused = {(user, topic) for user, topic in allowed | forbidden if publish(broker.port, user, topic) == 135}
    assert refused == forbidden


def test_mosquitto_takes_the_example_configuration(tmp_path: Path) -> None:
    """Read up to the certificates, which are the plant's."""
    text = (DOCS / "mosquitto" / "mosquitto.conf").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("cafile", "certfile", "keyfile", "listener"))]
    lines = [
        line.replace("/etc/mosquitto/", f"{tmp_path}/").replace("/var/lib/mosquitto", str(tmp_path)) for line in lines
    ]
    (tmp_path / "passwords").write_text("")
    shutil.copy(DOCS / "mosquitto" / "acl", tmp_path / "acl")
    with EmbeddedBroker(settings=[line for line in lines if line and not line.startswith("#")]) as broker:
        assert broker.pid is not None


def test_node_red_flow_is_whole() -> None:
    nodes: list[dict[str, Any]] = json.loads((DOCS / "node-red" / "flow.json").read_text())
    known = {node["id"] for node in nodes}
    assert len(known) == len(nodes)
    for node in nodes:
        assert {target for wires in node.get("wires", []) for target in wires} <= known
        assert node.get("broker", "andon-broker") == "andon-broker" or node["type"] == "mqtt-broker"
        if "topic" in node:
            levels = node["topic"].split("/")
            assert levels[:2] == ["andon", "v1"] and levels[6] in ("verdict", "alarm", "status", "cmd")
            assert levels[6] != "cmd" or len(levels) in (8, 9)


def test_node_red_keeps_its_session_and_may_trigger_more_than_once() -> None:
    nodes = {node["id"]: node for node in json.loads((DOCS / "node-red" / "flow.json").read_text())}
    broker = nodes["andon-broker"]
    # Node-RED makes the session a clean one where there is no client id, and unsubscribes at every end unless told.
    assert (broker["cleansession"], broker["autoUnsubscribe"]) == (False, False) and int(broker["sessionExpiry"]) > 0
    assert broker["clientid"]
    inject = next(node for node in nodes.values() if node["type"] == "inject")
    assert "id" not in json.loads(inject["payload"]), "a repeated id is answered from memory"
    (numbered,) = inject["wires"][0]
    told = nodes[numbered]["func"]
    assert "msg.payload.id = msg._msgid" in told and "msg.payload.ts = new Date().toISOString()" in told
    assert nodes[numbered]["wires"] == [["andon-trigger"]]
