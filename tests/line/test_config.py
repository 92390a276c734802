"""The line configuration: what is refused, and how the refusal reads; the published schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from andon.runtime.configfile import secret
from andon.runtime.errors import ConfigError
from andon.runtime.lineconfig import CameraConfig, LineConfig, load_line, schema
from andon.runtime.startup import Options, bundle_path, effective
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
GOOD = """
site: s
line: l
station: st
cameras:
  cam0:
    source: {kind: folder, path: parts}
    product: mono
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "line.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_line(path)
    return str(error.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD + "bundle: ../bundles/hvq-*\n")
    config = load_line(path)
    assert config.cameras["cam0"].source.path == tmp_path / "parts"
    assert config.bundle == tmp_path.parent / "bundles" / "hvq-*"
    assert config.topic == "andon/v1/s/l/st"


def test_a_data_set_is_relative_to_the_file_unless_it_is_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "line.yaml"
    monkeypatch.chdir(tmp_path)
    for data, found in (("../parts", str(tmp_path / "parts")), ("elpv", "elpv"), ("./elpv", str(path.parent / "elpv"))):
        path.write_text(GOOD.replace("kind: folder, path: parts", f"kind: dataset, data: {data}"))
        assert load_line(path).cameras["cam0"].source.data == found


@pytest.mark.parametrize(("word", "on"), [("yes", True), ("Off", False), ("true", True), ("FALSE", False)])
def test_switches_are_read_in_all_words_of_yaml(tmp_path: Path, word: str, on: bool) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD + f"alarm: {{latch: {word}}}\n")
    assert load_line(path).alarm.latch is on


def test_links_are_followed_when_they_are_used(tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
    current, folder, path = tmp_path / "bundles" / "current", tmp_path / "etc", tmp_path / "etc" / "line.yaml"
    current.symlink_to("v1")
    folder.mkdir()
    (folder / "ca1.pem").touch()
    (folder / "ca.pem").symlink_to("ca1.pem")
    path.write_text(GOOD + "bundle: ../bundles/current\nbroker: {tls: {ca: ca.pem}}\n")
    config = load_line(path)
    assert config.broker is not None and config.broker.tls is not None
    assert config.broker.tls.ca == folder / "ca.pem", "renewed by a new link, as certbot and Kubernetes do"
    assert bundle_path(config) == tmp_path / "bundles" / "v1"
    current.unlink()
    current.symlink_to("v2")
    assert bundle_path(config) == tmp_path / "bundles" / "v2", "what `rebuild` takes"


@pytest.mark.parametrize(
    ("change", "line", "told"),
    [
        ("    max_fsp: 3\n", 9, "cameras.cam0.max_fsp: unknown key; did you mean 'max_fps'?"),
        ("brokre: {}\n", 9, "brokre: unknown key; did you mean 'broker'?"),
        ("broker: {tls: {caa: x}}\n", 9, "broker.tls.caa: unknown key; did you mean 'ca'?"),
        ("alarm: {k: 9, n: 2}\n", 9, "alarm: needs clear < k <= n"),
        ("    deadline_ms: .nan\n", 9, "cameras.cam0.deadline_ms: Input should be"),
        ("    deadline_ms: yes\n", 9, "cameras.cam0.deadline_ms: Input should be a valid number"),
        ("    roi: [0, 0, on, 9]\n", 9, "cameras.cam0.roi.2: Input should be a valid integer"),
        ("judge: {pixel_threshold: off}\n", 9, "judge.pixel_threshold: Input should be a valid number"),
        ("judge: {pixel_threshold: false}\n", 9, "judge.pixel_threshold: Input should be a valid number"),
        ("judge: {thresholds: {mono: yes}}\n", 9, "judge.thresholds.mono: Input should be a valid number"),
        ("    product: poly\n", 9, "'cameras.cam0.product' is given twice"),
        ("  status: {source: {kind: test}}\n", 5, "cannot be called 'status'"),
        ("  c1: {source: {kind: tset}}\n", 9, "does not match any of the expected tags"),
        ("  c1: {source: {kind: test, widht: 9}}\n", 9, "c1.source.widht: unknown key; did you mean 'width'?"),
        ("  c1: {source: {kind: rtsp, url: 'rtsp://me:word@cam/x'}}\n", 9, "no user name or password in the URL"),
        ("  'a/b': {source: {kind: test}}\n", 9, "String should match pattern"),
        ("memory: {drift: {window: 7}}\n", 9, "memory.drift: drift could never be warned of"),
        ("web: {host: 0.0.0.0}\n", 9, "needs token_env or token_file"),
        ("web: {token_env: A, token_file: b}\n", 9, "web: needs one of token_env and token_file, found both"),
        ("broker: {password_env: A, password_file: b}\n", 9, "needs one of password_env and password_file, found both"),
        (
            "  c1: {source: {kind: rtsp, url: 'rtsp://x/y', password_env: A, password_file: b}}\n",
            9,
            "cameras.c1.source: needs one of password_env and password_file, found both",
        ),
    ],
)
def test_what_is_refused_names_file_line_and_key(tmp_path: Path, change: str, line: int, told: str) -> None:
    message = refused(tmp_path, GOOD + change)
    assert told in message
    assert f"line.yaml:{line}:" in message


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, GOOD.replace("site: s\n", "") + "    roi: [0, 0, 0, 4]\nbundel: x\n")
    assert [part in message for part in ("site: this key is required", "cameras.cam0.roi", "bundel")] == [True] * 3


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n", "\tx: 1\n"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    said = refused(tmp_path, text)
    assert "line.yaml" in said and "next:" in said
    assert ("is empty" in said) is (text == "")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_line(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:1883", "127.0.0.1", 1883), ("[::1]:1883", "::1", 1883), ("broker.plant:8883", "broker.plant", 8883)],
)
def test_a_broker_on_the_command_line_keeps_the_rest(tmp_path: Path, address: str, host: str, port: int) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD + "broker: {embedded: true, port: 0, keepalive: 7}")
    broker = effective(Options(config=path, broker=address)).broker
    assert broker is not None
    assert (broker.host, broker.port, broker.embedded, broker.keepalive) == (host, port, False, 7)


@pytest.mark.parametrize(
    "address", ["nowhere", ":1883", "[]:1883", "h:", "h:x", "h:0", "h:99999", "h:\u00b2", "::1:1883"]
)
def test_what_is_no_address_of_a_broker_is_refused(tmp_path: Path, address: str) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match="is no address"):
        effective(Options(config=path, broker=address))


def test_secrets_come_from_environment_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").write_text("from file\n")
    monkeypatch.setenv("ANDON_TEST_WORD", "from environment")
    assert secret("x", None, tmp_path / "word") == "from file"
    assert secret("x", "ANDON_TEST_WORD", None) == "from environment"
    assert secret("x", None, None) is None
    with pytest.raises(ConfigError, match="ANDON_TEST_NOTHING is not set"):
        secret("x", "ANDON_TEST_NOTHING", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        secret("x", None, tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"Schl\xfcssel")
    monkeypatch.setenv("ANDON_TEST_LATIN", os.fsdecode(b"Schl\xfcssel"))
    for named in ({"env": "ANDON_TEST_LATIN", "file": None}, {"env": None, "file": tmp_path / "latin"}):
        with pytest.raises(ConfigError, match="not UTF-8") as error:
            secret("x", **named)
        assert "Schl" not in str(error.value)


def test_published_schema_is_the_models() -> None:
    published = json.loads((ROOT / "configs/schema/line.json").read_text())
    assert published == schema(), "run: python -m andon.runtime.lineconfig > configs/schema/line.json"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/lines").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_lines_are_valid(path: Path) -> None:
    Draft202012Validator(schema()).validate(yaml.safe_load(path.read_text()))
    assert load_line(path).cameras


def undescribed(model: Any, at: str = "") -> list[str]:
    document = model.model_json_schema()
    sections = {"LineConfig": document, **document["$defs"]}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section.get("properties", {}).items()
        if not field.get("description")
    ]


def test_every_key_is_described() -> None:
    assert undescribed(LineConfig) == []


def test_a_watched_folder_may_be_silent_unless_the_user_says_otherwise() -> None:
    def silence(**camera: object) -> float | None:
        return CameraConfig.model_validate(camera).silence

    folder = {"kind": "folder", "path": "parts"}
    assert silence(source={"kind": "test"}) == silence(source=folder) == 5
    assert silence(source={**folder, "watch": True}) is None
    assert silence(source={**folder, "watch": True}, stale_after=60) == 60
    assert silence(source={**folder, "fps": 0.1}) == 15, "a picture every ten seconds is no silence of ten seconds"
    assert silence(source={**folder, "fps": 0.1}, stale_after=None) is None


def test_what_plays_as_fast_as_it_is_taken_waits_for_the_judge() -> None:
    def policy(**camera: object) -> str:
        return CameraConfig.model_validate(camera).drop_policy

    folder = {"kind": "folder", "path": "parts"}
    assert policy(source=folder) == "block"
    assert policy(source={**folder, "fps": 5}) == "latest"
    assert policy(source={"kind": "test"}) == "latest"
    assert policy(source={"kind": "file", "path": "a.mp4"}) == "latest"
    assert policy(source={"kind": "file", "path": "a.mp4", "realtime": False}) == "block"
    assert policy(source={"kind": "gstreamer", "pipeline": "x"}) == "latest"
    assert policy(source={"kind": "gstreamer", "pipeline": "x", "live": False}) == "block"
    assert policy(source=folder, drop="latest") == "latest"
