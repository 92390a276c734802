"""The camera thread: cameras that come and go, fall silent, are skipped or waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from andon.runtime.errors import SourceError
from andon.runtime.lineconfig import CameraConfig
from andon.runtime.slot import LanePolicy, Missed, Slots, Trigger
from andon.runtime.source import EndOfSource, Shot, make_source
from andon.runtime.source.camera import Camera, CameraState
from andon.runtime.types import Frame

from .sources import camera


class Flaky:
    """A source that delivers, falls silent, breaks or refuses to open, as its script says: one word per opening."""

    def __init__(self, script: list[str]):
        self.script, self.opened, self.mode, self.count = script, 0, "", 0

    def check(self) -> str:
        return "flaky"

    def open(self) -> None:
        self.mode = self.script[min(self.opened, len(self.script) - 1)]
        self.opened += 1
        if self.mode == "refuse":
            raise SourceError("cannot be opened", found=f"at {self.opened}")
        if self.mode == "bug":
            raise RuntimeError("a plug-in's bug")

    def read(self, timeout: float) -> Shot | None:
        time.sleep(0.005)
        if self.mode == "silent":
            time.sleep(timeout)
            return None
        if self.mode == "break":
            raise SourceError("cable pulled")
        if self.mode == "end":
            raise EndOfSource
        if self.mode == "hesitant":
            self.count += 1
            if self.count % 2:
                return None
        if self.mode == "once":
            self.mode = "silent"
        return Shot(load=lambda: np.zeros((4, 4, 3), np.uint8))

    def close(self) -> None:
        self.mode = "closed"


class Running:
    def __init__(self, source: Any, config: CameraConfig):
        self.states: list[CameraState] = []
        self.slots = Slots({"cam": LanePolicy(config.drop, config.queue)})
        self.camera = Camera("cam", config, source, self.slots, self.states.append)

    def __enter__(self) -> Running:
        self.camera.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.camera.stop()
        self.slots.close()
        assert self.camera.join(5), "the camera thread must end"

    def items(self, seconds: float) -> list[Frame | Missed]:
        until, found = time.monotonic() + seconds, []
        while (left := until - time.monotonic()) > 0:
            if (item := self.slots.take(left)) is not None:
                found.append(item)
        return found


def live(**settings_: Any) -> CameraConfig:
    return camera({"kind": "test"}, stale_after=0.3, stale_verdict_every=0.5, retry_max=0.3, **settings_)


@pytest.mark.parametrize("trouble", ["once", "break", "end", "refuse", "bug"])
def test_a_camera_in_trouble_is_rebuilt_and_says_so(trouble: str, eventually: Callable[..., None]) -> None:
    source = Flaky([trouble, trouble, "deliver"])
    with Running(source, live()) as running:
        eventually(lambda: source.opened >= 3 and running.camera.state.state == "live")
        assert running.camera.state.restarts >= 2
    words = [state.state for state in running.states]
    assert "down" in words and words[-1] == "stopped"
    assert words.count("down") <= 2, "one state change, one word"


def test_a_camera_that_never_delivers_is_stale_at_a_low_rate() -> None:
    source = Flaky(["refuse"])
    with Running(source, live()) as running:
        items = running.items(1.9)
    assert 4 <= source.opened <= 9, "pauses of about 0.25, 0.3, 0.3, ... seconds between the attempts"
    reasons = [item.reason for item in items if isinstance(item, Missed)]
    assert set(reasons) == {"camera_stale"} and len(items) == len(reasons)
    assert 2 <= len(reasons) <= 4, "at 0.3 s, then every 0.5 s"
    assert [item.seq for item in items] == list(range(1, len(items) + 1))
    assert [state.state for state in running.states] == ["down", "stopped"], "said once, whatever the details"


class OneOrTwo(Flaky):
    """At each opening so many frames, then it breaks; remembers how long the pause before would have been next."""

    def __init__(self, frames: int):
        super().__init__(["deliver"])
        self.frames, self.given = frames, 0
        self.pauses: list[float] = []
        self.running: Running | None = None

    def open(self) -> None:
        super().open()
        self.given = 0
        assert self.running is not None
        self.pauses.append(self.running.camera._retry)

    def read(self, timeout: float) -> Shot | None:
        self.given += 1
        if self.given > self.frames:
            raise SourceError("cable pulled")
        return super().read(timeout)


@pytest.mark.parametrize(
    ("steady", "pauses"), [(3600.0, [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 9.0, 9.0]), (0.0, [0.25] + 7 * [0.5])]
)
def test_only_a_camera_that_delivered_for_a_while_is_rebuilt_quickly_again(
    steady: float, pauses: list[float], monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    monkeypatch.setattr("andon.runtime.source.camera.STEADY", steady)
    monkeypatch.setattr("andon.runtime.source.camera.random.uniform", lambda low, high: 0.0)  # nothing is waited for
    source = OneOrTwo(2)
    source.running = Running(source, camera({"kind": "test"}, retry_max=9))
    with source.running:
        eventually(lambda: len(source.pauses) >= len(pauses))
    assert source.pauses[: len(pauses)] == pauses


class Plugged(Flaky):
    """Delivers while it is plugged in."""

    plugged = False

    def __init__(self) -> None:
        super().__init__(["deliver"])

    def read(self, timeout: float) -> Shot | None:
        if not self.plugged:
            raise SourceError("cable pulled")
        return super().read(timeout)


def test_every_outage_is_said_when_it_has_lasted_long_enough() -> None:
    source = Plugged()
    config = camera({"kind": "test"}, stale_after=0.2, stale_verdict_every=3600, retry_max=0.3)

    def comes(kind: type[Frame | Missed]) -> bool:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if isinstance(running.slots.take(1), kind):
                return True
        return False

    with Running(source, config) as running:
        assert comes(Missed)
        source.plugged = True
        assert comes(Frame)
        source.plugged = False
        assert comes(Missed), "the second outage is silent for as long as the first one's repetition would have been"


def test_a_camera_that_may_be_silent_is_left_alone() -> None:
    source = Flaky(["silent"])
    with Running(source, camera({"kind": "test"}, stale_after=None)) as running:
        assert running.items(0.8) == []
    assert source.opened == 1


@pytest.mark.parametrize("player", ["direct", "gstreamer"])
def test_waiting_for_the_time_to_play_is_not_silence(
    tmp_path: Path, make_images: Callable[..., Path], player: str
) -> None:
    folder = make_images(tmp_path / "parts", [10, 20])
    config = camera({"kind": "folder", "path": folder, "fps": 0.6, "player": player}, drop="block", stale_after=1.2)
    with Running(make_source("cam", config), config) as running:
        items = []
        while not (running.camera.finished and not running.slots.waiting("cam")):
            if (item := running.slots.take(0.2)) is not None:
                items.append(item)
    assert [item.part_id for item in items] == ["part000", "part001"], "1.7 s apart"
    assert running.camera.state.state == "ended"


def test_a_watched_folder_is_live_as_long_as_it_can_be_read(
    tmp_path: Path, make_images: Callable[..., Path], eventually: Callable[..., None]
) -> None:
    folder = make_images(tmp_path / "in", [])
    config = camera({"kind": "folder", "path": folder, "watch": True}, retry_max=0.3)
    with Running(make_source("cam", config), config) as running:
        eventually(lambda: running.camera.state.state == "live")
        away = folder.rename(tmp_path / "away")
        eventually(lambda: running.camera.state.state == "down")
        away.rename(folder)
        eventually(lambda: running.camera.state.state == "live")
        assert not running.slots.waiting("cam"), "without a part there is no verdict"


def test_max_fps_skips_and_counts() -> None:
    with Running(Flaky(["deliver"]), live(max_fps=10)) as running:
        frames = running.items(1.05)
    assert 8 <= len(frames) <= 13
    assert running.camera.state.skipped > 20


def test_max_fps_does_not_hold_back_the_frame_of_a_trigger() -> None:
    with Running(Flaky(["deliver"]), live(max_fps=0.1)) as running:
        while not running.camera.state.skipped:
            running.slots.take(1)
        at = time.monotonic()
        running.slots.trigger("cam", Trigger("A-7731", at, at + 3))
        item = None
        while item is None or item.part_id is None:
            item = running.slots.take(5)
    assert isinstance(item, Frame), "in ten seconds another part would be in view"


def test_blocking_loses_nothing_and_a_slow_line_is_no_stall(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(tmp_path / "parts", list(range(30)))
    config = camera({"kind": "folder", "path": folder, "player": "gstreamer"}, drop="block", stale_after=0.2)
    with Running(make_source("cam", config), config) as running:
        parts = []
        while not (running.camera.finished and not running.slots.waiting("cam")):
            if (item := running.slots.take(0.2)) is not None:
                parts.append(item.part_id)
                time.sleep(0.3 if len(parts) < 3 else 0)
    assert parts == [f"part{index:03d}" for index in range(30)]
    assert [state.state for state in running.states] == ["live", "ended"]


def test_time_spent_waiting_for_room_is_not_silence() -> None:
    source = Flaky(["hesitant"])
    config = camera({"kind": "test"}, drop="block", stale_after=0.2)
    with Running(source, config) as running:
        for _ in range(3):
            time.sleep(0.4)
            assert running.slots.take(1) is not None
    assert source.opened == 1 and running.camera.state.restarts == 0


def test_a_file_that_breaks_is_failed_not_played_again() -> None:
    source = Flaky(["break"])
    with Running(source, camera({"kind": "gstreamer", "pipeline": "x", "live": False})) as running:
        items = running.items(0.5)
    assert source.opened == 1 and running.camera.state.state == "failed"
    assert [item.reason for item in items] == ["bad_frame"]


class Hanging(Flaky):
    """A source of which one call does not come back until it is let go."""

    def __init__(self, call: str):
        super().__init__(["once", "deliver"])
        self.call, self.entered, self.free = call, threading.Event(), threading.Event()

    def hang(self, call: str) -> None:
        if call == self.call:
            self.entered.set()
            assert self.free.wait(60)

    def open(self) -> None:
        super().open()
        self.hang("open")

    def read(self, timeout: float) -> Shot | None:
        shot = super().read(timeout)
        self.hang("read")
        return None if shot is None else Shot(load=self.load)

    def load(self) -> Any:
        self.hang("load")
        return np.zeros((4, 4, 3), np.uint8)

    def close(self) -> None:
        super().close()
        self.hang("close")


@pytest.mark.parametrize("call", ["open", "read", "load", "close"])
def test_a_source_that_does_not_come_back_is_down_and_stale(call: str, eventually: Callable[..., None]) -> None:
    source = Hanging(call)
    config = camera({"kind": "test"}, stale_after=0.2, stale_verdict_every=3600, retry_max=0.3, drop="block")
    try:
        with Running(source, config) as running:
            assert source.entered.wait(60)
            missed: list[Missed] = []

            def stale() -> bool:
                running.camera.look()
                item = running.slots.take(0.05)
                missed.extend([item] if isinstance(item, Missed) else [])
                return bool(missed)

            eventually(stale)
            assert running.camera.state.state == "down"
            if call != "close":  # before that one the camera said so itself
                assert f"not come back from '{call}' for 0.2 s" in running.camera.state.detail
            assert [stale() for _ in range(5)] and [item.reason for item in missed] == ["camera_stale"], "once"
            source.free.set()
            source.call = ""
            eventually(lambda: running.slots.take(0.1) is not None and running.camera.state.state == "live")
            running.camera.look()
            assert running.camera.state.state == "live"
    finally:
        source.free.set()


def test_who_says_that_a_source_hangs_waits_for_nothing(eventually: Callable[..., None]) -> None:
    """It feeds systemd's watchdog, too. A frame waits here for engines that are not open yet."""
    source = Hanging("close")
    with Running(source, camera({"kind": "test"}, stale_after=0.2, drop="block")) as running:
        assert source.entered.wait(60)
        assert running.slots.waiting("cam") == 1
        eventually(lambda: running.camera.look() or running.slots.waiting("cam") == 2)
        source.free.set()


def test_a_file_that_opens_slowly_gives_no_verdict_of_its_own(
    eventually: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor an alarm before it had the time that a share with many files may take, whatever is stale for a camera."""
    source = Hanging("open")
    with Running(source, camera({"kind": "gstreamer", "pipeline": "x", "live": False}, stale_after=0.2)) as running:
        assert source.entered.wait(60)
        time.sleep(0.4)
        running.camera.look()
        assert running.camera.state.state == "starting"
        monkeypatch.setattr("andon.runtime.source.camera.CALL_DEFAULT", 0.3)
        eventually(lambda: running.camera.look() or running.camera.state.state == "down")
        assert not running.slots.waiting("cam")
        source.free.set()
        eventually(lambda: running.camera.state.state == "live")
