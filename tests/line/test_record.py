"""`andon record`: whole pictures of the configured cameras as files, without a bundle."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from andon import cli
from andon.calib.atomic import write_new
from andon.runtime import pictures, record, record_summary
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.commands.record import _lane
from andon.runtime.dataset import Sample, open_dataset
from andon.runtime.errors import ConfigError
from andon.runtime.groups import parts_of
from andon.runtime.images import read_rgb
from andon.runtime.lineconfig import BrokerConfig, load_line
from andon.runtime.mqtt.triggers import TriggerListener
from andon.runtime.pictures import GROUP_BY, PictureFolder, encode_png, file_name
from andon.runtime.record import Lane, PacedSlots, Recording
from andon.runtime.slot import LanePolicy, Trigger
from andon.runtime.source import Shot, make_source
from andon.runtime.startup import line_at_rest, sole_user
from andon.runtime.types import Frame
from andon.train.holdout import split_good

from .running import LIVE  # type: ignore[import-not-found]
from .sources import camera  # type: ignore[import-not-found]
from .test_camera import Flaky  # type: ignore[import-not-found]

NOON = datetime(2026, 11, 23, 12, 0, 0, 7, timezone.utc)
RANDOM = np.random.default_rng(0)
BALL = {**LIVE, "pattern": "ball"}


def noise(height: int = 30, width: int = 40) -> np.ndarray[Any, Any]:
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def frame(image: Any, at: datetime = NOON, part_id: str | None = None) -> Frame:
    return Frame("cam0", 1, at, 0.0, image, part_id)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, dict[str, Any], str]]]:
    """`andon record` in this process: exit code, the JSON object, all that was said."""
    root, commands = logging.getLogger(), logging.getLogger("andon.commands")
    before = list(root.handlers), root.level, commands.level

    def main(*arguments: object) -> tuple[int, dict[str, Any], str]:
        code = cli.main(["record", *map(str, arguments), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]), said.out + said.err

    yield main
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    commands.setLevel(before[2])


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Twelve different pictures part000.png, ..."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(12):
        cv2.imwrite(str(folder / f"part{index:03d}.png"), noise())
    return folder


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_whole_pictures_lie_in_the_set_lossless_and_named_by_time_and_part(
    tmp_path: Path, parts: Path, make_line: Any, run: Any
) -> None:
    source = {"kind": "folder", "path": str(parts)}
    line = make_line({"cam0": {"source": source, "roi": [1, 2, 20, 20]}})
    code, said, text = run("--config", line, "--out", tmp_path / "set/nut/good")
    found = images(tmp_path / "set/nut/good")
    assert code == 0 and said["pictures"] == 12 and said["ended"] == "sources", text
    assert said["bytes"] == sum(path.stat().st_size for path in found)
    for path, original in zip(found, images(parts), strict=True):
        assert re.fullmatch(rf"\d{{8}}T\d{{6}}\.\d{{6}}Z_cam0_part-{original.stem}\.png", path.name)
        assert np.array_equal(read_rgb(path), read_rgb(original)), "the roi cuts nothing"
    assert said["next"] == f"andon train --method hvq --data {tmp_path / 'set'} --roi 1,2,20,20"
    cli._parser("train").parse_args(said["next"].split()[1:])
    assert open_dataset(tmp_path / "set").products == ("nut",)
    assert not (tmp_path / "state").exists(), "nothing else is made"


def test_the_next_command_trains_on_what_was_recorded_alone(
    tmp_path: Path, parts: Path, make_line: Any, run: Any
) -> None:
    arguments = ("--config", make_line({"cam0": {"source": {"kind": "folder", "path": str(parts)}}}), "--out")
    (tmp_path / "set/bolt/good").mkdir(parents=True)
    _, said, _ = run(*arguments, tmp_path / "set/nut/train/good")
    assert said["next"] == f"andon train --method hvq --data {tmp_path / 'set'} --products nut"
    (tmp_path / "set/photos").mkdir()
    _, said, _ = run(*arguments, tmp_path / "set/nut/train/good")
    assert f"--data {tmp_path / 'set/nut'} --group-by" in said["next"], "what is no set is not looked through"


@pytest.mark.parametrize(("folder", "good"), [("scratch", "good"), ("test/scratch", "train/good")])
def test_after_defective_parts_the_next_command_is_one_that_runs(
    tmp_path: Path, parts: Path, make_line: Any, run: Any, folder: str, good: str
) -> None:
    line = make_line({"cam0": {"source": {"kind": "folder", "path": str(parts)}}})
    arguments = ("--config", line, "--camera", "cam0", "--out")
    _, said, text = run(*arguments, tmp_path / "set/nut" / folder)
    into = tmp_path / "set/nut" / good
    assert said["next"] == f"andon record --config {line} --out {into} --camera cam0 --count 200", "no set yet"
    assert "warning: training looks for good parts" in text
    assert run(*arguments, into)[0] == 0
    _, said, _ = run(*arguments, tmp_path / "set/nut" / folder)
    assert said["next"] == f"andon eval --bundle BUNDLE --data {tmp_path / 'set'}"
    assert {s.label for s in open_dataset(tmp_path / "set").samples} == {"good", "scratch"}
    into.rename(into.with_name("Good"))  # which is read as good, too
    assert run(*arguments, tmp_path / "set/nut" / folder)[1]["next"].startswith("andon eval")


def test_a_folder_beside_it_that_nobody_may_enter_is_no_set(
    tmp_path: Path, parts: Path, make_line: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lost+found, which every disk that is mounted as the set has."""
    (tmp_path / "set/lost+found").mkdir(parents=True)
    is_dir = Path.is_dir

    def refused(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refused)
    line = make_line({"cam0": {"source": {"kind": "folder", "path": str(parts)}}})
    code, said, text = run("--config", line, "--out", tmp_path / "set/nut/good")
    assert code == 0 and said["pictures"] == 12, text
    assert said["next"] == f"andon train --method hvq --data {tmp_path / 'set/nut'}"


def test_a_second_recording_adds_to_the_first(tmp_path: Path, parts: Path, make_line: Any, run: Any) -> None:
    line = make_line({"cam0": {"source": {"kind": "folder", "path": str(parts)}}})
    out = tmp_path / "set/nut/good"
    run("--config", line, "--out", out)
    before = {path: path.read_bytes() for path in images(out)}
    code, said, _ = run("--config", line, "--out", out)
    assert code == 0 and said["folders"] == {str(out): {"product": "nut", "images": 24}}
    assert {path: path.read_bytes() for path in images(out)}.items() >= before.items()
    assert said["next"].endswith(f"--group-by '{GROUP_BY}'"), "each part has two pictures now"
    samples = open_dataset(tmp_path / "set").samples
    assert len(set(parts_of(samples, GROUP_BY).values())) == 12


def test_no_picture_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one microsecond: a clock that was set back, or a trigger that is repeated."""
    folder = PictureFolder(10**9)
    first, second = noise(), noise()
    one = folder.add(tmp_path, frame(first))
    two = PictureFolder(10**9).add(tmp_path, frame(second))
    assert one is not None and two is not None and one != two
    assert np.array_equal(read_rgb(one), first) and np.array_equal(read_rgb(two), second)

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "FAT has no links")

    monkeypatch.setattr(os, "link", link)
    three = folder.add(tmp_path, frame(noise()))
    assert three is not None and three not in (one, two) and np.array_equal(read_rgb(one), first)
    with pytest.raises(FileExistsError):
        write_new(one, b"other")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(each.name for each in (one, two, three))


def test_names_sort_by_time_and_part_ids_cannot_lead_elsewhere() -> None:
    names = [file_name("cam0", NOON.replace(second=second), part) for second, part in ((0, "z"), (1, None), (2, "a"))]
    assert names == sorted(names)
    assert file_name("a", NOON, "../x y/ä") == "20261123T120000.000007Z_a_part-..%2Fx%20y%2F%C3%A4.png"
    long = [file_name("c" * 64, NOON, "p" * 500 + end) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name) < 250 for name in long)
    match = re.search(GROUP_BY, "my_part-a/good/" + file_name("x", NOON, "S-1"))
    assert match is not None and match[1] == "S-1"


def test_a_grey_picture_takes_one_channel_and_comes_back_as_it_was(tmp_path: Path) -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=2)
    (tmp_path / "grey.png").write_bytes(encode_png(grey))
    assert cv2.imread(str(tmp_path / "grey.png"), cv2.IMREAD_UNCHANGED).ndim == 2
    assert np.array_equal(read_rgb(tmp_path / "grey.png"), grey)
    almost = grey.copy()
    almost[5, 5, 2] ^= 1
    (tmp_path / "almost.png").write_bytes(encode_png(almost))
    assert np.array_equal(read_rgb(tmp_path / "almost.png"), almost)


def test_a_camera_that_stands_still_gives_one_picture_and_it_is_said(tmp_path: Path, make_line: Any, run: Any) -> None:
    line = make_line({"cam0": {"source": {**LIVE, "frames": 15}}})
    code, said, text = run("--config", line, "--out", tmp_path / "set/nut/good")
    assert code == 0 and said["cameras"]["cam0"]["pictures"] == 1 and said["cameras"]["cam0"]["duplicates"] >= 10
    assert "10 pictures in a row" in text and "more were left out: pixel by pixel like one" in text
    assert "next:     andon record --config" in text and "andon enroll --support" in text


def test_several_cameras_go_to_folders_of_their_products(
    tmp_path: Path, parts: Path, make_line: Any, make_images: Any, run: Any
) -> None:
    cameras = {
        "a": {"source": {"kind": "folder", "path": str(parts)}, "product": "nut"},
        "b": {"source": {"kind": "folder", "path": str(make_images(tmp_path / "dark", [1, 2, 3]))}, "product": "bolt"},
        "c": {"source": {"kind": "folder", "path": str(tmp_path / "gone")}},
    }
    line = make_line(cameras)
    code, said, text = run("--config", line, "--camera", "a", "--camera", "b", "--out", tmp_path / "set/{product}/good")
    assert code == 0 and {Path(folder).parent.name for folder in said["folders"]} == {"nut", "bolt"}, text
    assert "bolt: 3 good images; of 10 or more some are left" in text and "about 200 of different parts" in text
    views = str(tmp_path / "views/{product}-{camera}/good")
    code, said, _ = run("--config", line, "--camera", "b", "--out", views)
    assert code == 0 and (tmp_path / "views/bolt-b/good").is_dir()


@pytest.mark.parametrize(
    ("cameras", "arguments", "told"),
    [
        ({"a": {"product": "x"}, "b": {"product": "y"}}, ["--out", "set/x/good"], "--out 'set/{product}/good'"),
        ({"a": {}}, ["--out", "set/{product}/good"], "write set/NAME/good"),
        ({"a": {}}, ["--out", "set/{prodct}/good"], "{prodct}"),
        ({"a": {}}, ["--out", "set/x/good", "--camera", "b"], "no camera 'b'"),
        ({"a": {}}, ["--out", "line.yaml/x/good"], "line.yaml is not a folder"),
        ({"a": {"trigger": {}}}, ["--out", "x/good"], "give --every S, which waits for no trigger"),
        ({"a": {"source": {"kind": "file", "path": "no.mp4"}}}, ["--out", "x/good"], "no.mp4"),
        ({"a": {}}, ["--out", "x/good", "--max-bytes", "9"], "room for one picture"),
    ],
)
def test_what_cannot_be_is_refused_with_the_next_step(
    tmp_path: Path, make_line: Any, run: Any, monkeypatch: pytest.MonkeyPatch, cameras: Any, arguments: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = make_line({name: {"source": BALL, **each} for name, each in cameras.items()}, broker=None)
    code, said, text = run("--config", line, *arguments)
    assert code == 1 and said["ok"] is False and told in text


def test_it_ends_at_the_byte_limit_and_leaves_the_disk_free(
    tmp_path: Path, parts: Path, make_line: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = make_line({"cam0": {"source": {"kind": "folder", "path": str(parts)}}})
    code, said, _ = run("--config", line, "--out", tmp_path / "a/good", "--max-bytes", "20kB")
    assert code == 0 and said["ended"] == "max_bytes" and 0 < said["bytes"] <= 20_000
    asked = ("--config", line, "--out", tmp_path / "b/good", "--max-bytes", "20kB", "--count", 12)
    code, said, _ = run(*asked)
    assert code == 1 and said["error"] == "fewer pictures than asked for: --max-bytes"
    free = iter([10**9 + 10**8, 10**9])
    disk = lambda path: SimpleNamespace(f_blocks=10**7, f_frsize=1000, f_bavail=next(free) // 1000)  # noqa: E731
    monkeypatch.setattr(pictures.os, "statvfs", disk)
    code, said, _ = run("--config", line, "--out", tmp_path / "c/good")
    assert code == 1 and "nearly full" in said["error"] and said["pictures"] == 1 and said["ended"] == "disk"


def lane(source: Any, folder: Path, pause: float = 0.0, **settings: Any) -> Lane:
    config = camera({"kind": "test"}, stale_after=0.3, retry_max=0.3, **settings)
    return Lane(record.recording_config(config, free=False), source, pause, lambda product: folder)


class Noisy(Flaky):
    """Flaky, each of whose pictures is another."""

    def read(self, timeout: float) -> Shot | None:
        shot = super().read(timeout)
        return None if shot is None else replace(shot, load=noise)


def test_a_camera_that_drops_and_comes_back_is_recorded_on(tmp_path: Path) -> None:
    source = Noisy(["once", "break", "refuse", "deliver"])
    recording = Recording({"cam": lane(source, tmp_path)}, PictureFolder(10**9), count=20)
    recording.run()
    assert recording.ended == "count" and len(images(tmp_path)) == 20
    assert recording.sources["cam"].state.restarts >= 3


def test_a_camera_that_never_came_is_told_with_its_trouble(tmp_path: Path, eventually: Any) -> None:
    recording = Recording({"cam": lane(Noisy(["refuse"]), tmp_path)}, PictureFolder(10**9))
    with recorded(recording):
        eventually(lambda: recording.sources["cam"].state.restarts >= 2)
    said = record_summary.summary(recording, 0, record_summary.Asked(Path("my line.yaml"), "x"))
    assert said["ok"] is False and said["found"] == "cam: cannot be opened"
    assert said["next"].startswith("andon check --config 'my line.yaml'; if something else has the camera open")


def test_a_slow_disk_holds_up_no_camera_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = pictures.write_new
    monkeypatch.setattr(pictures, "write_new", lambda *args: time.sleep(0.3) or writing(*args))
    recording = Recording({"cam": lane(Noisy(["deliver"]), tmp_path)}, PictureFolder(10**9), seconds=1.5)
    recording.run()
    counts = recording.slots.counts()["cam"]
    written = len(images(tmp_path))
    assert 4 <= written <= 10 and counts.offered > 5 * written
    assert counts.dropped >= counts.offered - written - record._WAITING
    asked = record_summary.Asked(Path("line.yaml"), str(tmp_path))
    assert record_summary.summary(recording, 1, asked)["cameras"]["cam"]["dropped"] == counts.dropped


def test_a_share_that_fails_ends_it_and_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, written = pictures.write_new, []

    def write(path: Path, data: bytes) -> None:
        if len(written) == 3:
            raise OSError(errno.EIO, "Input/output error")
        written.append(path)
        writing(path, data)

    monkeypatch.setattr(pictures, "write_new", write)
    recording = Recording({"cam": lane(Noisy(["deliver"]), tmp_path)}, PictureFolder(10**9))
    recording.run()
    assert recording.failure is not None and "Input/output error" in str(recording.failure)
    assert images(tmp_path) == sorted(written)
    said = record_summary.summary(recording, 1, record_summary.Asked(Path("line.yaml"), "x"))
    assert said["ok"] is False and said["pictures"] == 3


def test_pictures_come_so_many_seconds_apart_but_those_of_triggers_at_once() -> None:
    slots = PacedSlots({"a": LanePolicy(), "b": LanePolicy()}, {"a": 1.0, "b": 0.0})
    assert [slots.wanted("a", at) for at in (10.0, 10.1, 10.94, 10.96, 11.9, 12.0)] == [1, 0, 0, 1, 0, 1]
    assert all(slots.wanted("b", at) for at in (10.0, 10.01, 10.02))
    slots.trigger("a", Trigger("p", at=12.1, deadline=time.monotonic() + 60))
    assert not slots.wanted("a", 12.05) and slots.wanted("a", 12.2)


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    thread = threading.Thread(target=recording.run)
    thread.start()
    try:
        yield
    finally:
        recording.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_each_trigger_is_one_picture_named_by_its_part(
    tmp_path: Path, broker: EmbeddedBroker, make_consumer: Any, base: str, eventually: Any
) -> None:
    config = camera(BALL, trigger={"timeout_ms": 2000}, product="nut")
    lanes = {
        "cam0": Lane(record.recording_config(config, free=False), make_source("cam0", config), 0, lambda p: tmp_path)
    }
    recording = Recording(lanes, PictureFolder(10**9))
    settings = BrokerConfig(host=broker.host, port=broker.port)
    with make_consumer(broker.port) as consumer, TriggerListener(settings, base, ["cam0"], recording.trigger):
        with recorded(recording):
            eventually(lambda: recording.sources["cam0"].state.state == "live")
            for number, part in enumerate(("S-1", "S-2", "S-1")):
                consumer.client.publish(f"{base}/cam0/cmd/trigger", json.dumps({"id": f"{number}", "part_id": part}))
                eventually(lambda number=number: recording.cameras["cam0"].pictures > number)
            consumer.client.publish(f"{base}/cam0/cmd/trigger", "[]")
            answers = consumer.wait_for("result", 4)
        assert [answer["ok"] for answer in answers] == [True, True, True, False]
        assert consumer.of("status") == [], "a recording is not the line"
    assert [re.search(GROUP_BY, path.name)[1] for path in images(tmp_path)] == ["S-1", "S-2", "S-1"]
    assert recording.cameras["cam0"].parts == {"S-1", "S-2"}


def test_a_part_whose_product_nobody_names_is_not_put_anywhere(tmp_path: Path, make_line: Any, eventually: Any) -> None:
    line = make_line({"cam0": {"source": BALL, "trigger": {"timeout_ms": 9000}}})
    arguments = cli._parser("record").parse_args(
        ["record", "--config", str(line), "--out", f"{tmp_path}/s/{{product}}/good"]
    )
    lanes = {"cam0": _lane("cam0", load_line(line).cameras["cam0"], arguments)}
    recording = Recording(lanes, PictureFolder(10**9))
    with recorded(recording):
        recording.trigger("cam0", {"part_id": "whose"})
        recording.trigger("cam0", {"part_id": "known", "product": ".a/b"})
        eventually(lambda: recording.cameras["cam0"].pictures == 1)
    assert recording.cameras["cam0"].missed == {"no_product": 1}
    assert [path.parts[-3] for path in (tmp_path / "s").rglob("*.png")] == ["%2Ea%2Fb"]


def test_a_camera_whose_trigger_never_came_is_not_blamed(tmp_path: Path, eventually: Any) -> None:
    recording = Recording({"cam": lane(Noisy(["ok"]), tmp_path, trigger={})}, PictureFolder(10**9))
    with recorded(recording):
        eventually(lambda: recording.sources["cam"].state.state == "live")
    said = record_summary.summary(recording, 0, record_summary.Asked(Path("line.yaml"), "x"))
    assert said["ok"] is False and said["found"] == "cam: no trigger came"
    assert said["next"].startswith("look at what sends the command trigger") and "--every S" in said["next"]


def test_a_trigger_without_a_picture_is_said(tmp_path: Path, eventually: Any) -> None:
    waiting = lane(Noisy(["silent"]), tmp_path, trigger={"timeout_ms": 100, "delay_ms": 20})
    recording = Recording({"cam": waiting}, PictureFolder(10**9))
    with recorded(recording):
        recording.trigger("cam", {"part_id": "lost"})
        eventually(lambda: recording.cameras["cam"].missed == {"no_frame": 1})
    said = record_summary.summary(recording, 0, record_summary.Asked(Path("line.yaml"), "x"))
    assert said["ok"] is False and "no_frame 1" in said["found"]
    asked: list[Trigger] = []
    recording.slots.trigger = lambda name, trigger: asked.append(trigger)  # type: ignore[method-assign]
    recording.trigger("cam", {"part_id": "p"})
    assert asked[0].deadline - asked[0].at == pytest.approx(0.1), "as the camera's trigger section says"


def test_triggers_are_taken_again_after_the_broker_was_away(tmp_path: Path, base: str, eventually: Any) -> None:
    taken: list[str] = []
    with EmbeddedBroker() as first:
        settings = BrokerConfig(host=first.host, port=first.port, retry_max=0.5)
        listener = TriggerListener(settings, base, ["cam0"], lambda name, asked: taken.append(asked["part_id"]) or {})
        listener.__enter__()
    try:
        with EmbeddedBroker(first.port) as second:
            client = second_client(second.port)

            def heard() -> bool:
                client.publish(f"{base}/cam0/cmd/trigger", json.dumps({"part_id": "p"}))
                time.sleep(0.1)
                return bool(taken)

            eventually(heard)
            client.disconnect()
            client.loop_stop()
    finally:
        listener.__exit__()


def second_client(port: int) -> Any:
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    return client


@pytest.mark.parametrize(
    ("hangup", "numbers"),
    [
        (signal.SIG_DFL, [signal.SIGINT]),
        (signal.SIG_DFL, [signal.SIGTERM]),
        (signal.SIG_DFL, [signal.SIGHUP]),
        (signal.SIG_IGN, [signal.SIGHUP, signal.SIGTERM]),
    ],
    ids=["Ctrl-C", "terminated", "the terminal goes", "started with nohup"],
)
def test_a_signal_ends_it_in_good_order(
    tmp_path: Path, make_line: Any, eventually: Any, hangup: Any, numbers: list[signal.Signals]
) -> None:
    line = make_line({"cam0": {"source": BALL, "product": "ball"}})
    out = tmp_path / "set/ball/good"
    command = [sys.executable, "-m", "andon.cli", "record", "--config", line, "--out", out, "--every", "0", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )
    for number in numbers:
        before = len(images(out)) if out.is_dir() else 0
        eventually(lambda before=before: out.is_dir() and len(images(out)) > before + 3, 20)
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    said = json.loads(stdout.splitlines()[-1])
    assert process.returncode == 0 and said["ended"] == "asked", stderr
    assert f"ending: {numbers[-1].name}" in stderr and "Traceback" not in stderr
    assert said["pictures"] == len(images(out)) == len(list(out.iterdir()))


def test_a_line_that_has_the_camera_is_not_disturbed(tmp_path: Path, make_line: Any, run: Any) -> None:
    pipeline = "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=20/1"
    cameras = {"own": {"source": {"kind": "gstreamer", "pipeline": pipeline}}, "any": {"source": BALL}}
    line = make_line(cameras)
    with sole_user(tmp_path / "state"):
        code, said, _ = run("--config", line, "--camera", "own", "--out", tmp_path / "a/good", "--count", 1)
        assert code == 1 and "is in use" in said["error"] and "stop it first" in said["next"]
        code, said, _ = run("--config", line, "--camera", "any", "--out", tmp_path / "b/good", "--count", 1)
        assert code == 0, said
    with line_at_rest(tmp_path / "state", ""), pytest.raises(ConfigError, match="is in use"):
        sole_user(tmp_path / "state").__enter__()
    (tmp_path / "new").mkdir()
    with line_at_rest(tmp_path / "new", ""):
        assert not list((tmp_path / "new").iterdir()), "with root's run.lock in it the line's user could not start it"


@pytest.mark.parametrize(("count", "thresholds"), [(record_summary.FEWEST, 1), (record_summary.SENSIBLE, 19)])
def test_the_numbers_that_it_names_are_those_of_training(tmp_path: Path, count: int, thresholds: int) -> None:
    """With the hold-out's default share: see configs/edge."""
    (tmp_path / "nut/good").mkdir(parents=True)
    for index in range(count):
        (tmp_path / f"nut/good/{index:04d}.png").touch()
    good: list[Sample] = list(open_dataset(tmp_path).select(split="train").samples)
    assert len(split_good(good, 0.1).thresholds) >= thresholds
