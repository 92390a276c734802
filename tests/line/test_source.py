"""Sources with a real GStreamer: pixels, part ids, refusals, ends, and cameras that come and go."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.images import on_disk
from andon.runtime.lineconfig import CameraConfig, CsiSource, UsbSource
from andon.runtime.slot import LanePolicy, Missed, Slots, Trigger
from andon.runtime.source import EndOfSource, Shot, make_source
from andon.runtime.source.camera import Camera, CameraState
from andon.runtime.source.gstreamer import GstreamerCamera, gst, unpack
from andon.runtime.source.pipelines import csi, rtsp, usb
from andon.runtime.source.playlist import Seen, watching
from andon.runtime.types import Frame
from hypothesis import given, settings
from hypothesis import strategies as st


def camera(source: dict[str, Any], **settings_: Any) -> CameraConfig:
    return CameraConfig.model_validate({"source": source, **settings_})


def play(config: CameraConfig, limit: int = 1000) -> Iterator[Shot]:
    source = make_source("cam", config)
    source.open()
    try:
        while limit:
            try:
                shot = source.read(1.0)
            except EndOfSource:
                return
            if shot is not None:
                limit -= 1
                yield shot
    finally:
        source.close()


@pytest.mark.parametrize("size", [(64, 48), (41, 30), (37, 23), (39, 1), (1, 39)])
@pytest.mark.parametrize("player", ["direct", "gstreamer"])
def test_odd_widths_keep_every_pixel(tmp_path: Path, size: tuple[int, int], player: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (shot,) = play(camera({"kind": "folder", "path": tmp_path, "player": player}))
    loaded = shot.load()
    assert loaded.flags.c_contiguous and loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, image[:, :, ::-1])


@settings(deadline=None)
@given(
    width=st.integers(1, 40), height=st.integers(1, 20), padding=st.integers(0, 9), offset=st.integers(0, 7),
    short=st.booleans(),
)  # fmt: skip
def test_rows_are_unpacked_by_their_stride(width: int, height: int, padding: int, offset: int, short: bool) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=7)
    data = bytes(offset) + rows.tobytes()
    data = data[: len(data) - padding] if short else data
    np.testing.assert_array_equal(unpack(data, width, height, 3 * width + padding, offset), pixels)
    with pytest.raises(SourceError, match="does not fit"):
        unpack(data[: len(data) - padding - 1 if not short else -1], width, height, 3 * width + padding, offset)


@pytest.mark.parametrize("through", ["videoconvert", "videoconvert ! queue ! jpegenc quality=100 ! jpegdec"])
def test_parts_and_frames_stay_together_through_a_pipeline(
    tmp_path: Path, make_images: Callable[..., Path], through: str
) -> None:
    shades = [(37 * index) % 251 for index in range(120)]
    folder = make_images(tmp_path / "parts", shades)
    config = camera({"kind": "folder", "path": folder, "player": "gstreamer", "through": through})
    seen = [(shot.part_id, int(shot.load()[5, 5, 1])) for shot in play(config)]
    assert [part for part, _ in seen] == [f"part{index:03d}" for index in range(120)]
    assert max(abs(shade - expected) for (_, shade), expected in zip(seen, shades, strict=True)) <= 2


def test_pictures_of_different_sizes_go_through_one_pipeline(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    for index, size in enumerate([(40, 30), (51, 33), (40, 30), (16, 90)]):
        make_images(tmp_path / f"{index}", [10 * index], size)
    config = camera({"kind": "folder", "path": tmp_path, "player": "gstreamer"})
    assert [shot.load().shape for shot in play(config)] == [(30, 40, 3), (33, 51, 3), (30, 40, 3), (90, 16, 3)]


def test_a_data_set_brings_its_products(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    for product in ("bolt", "nut"):
        make_images(tmp_path / product / "train" / "good", [1])
        make_images(tmp_path / product / "test" / "good", [2, 3])
        make_images(tmp_path / product / "test" / "scratch", [4])
    shots = list(play(camera({"kind": "dataset", "data": str(tmp_path)})))
    assert [shot.product for shot in shots] == ["bolt"] * 3 + ["nut"] * 3
    assert shots[0].part_id == "bolt/test/good/part000"
    assert len({shot.part_id for shot in shots}) == 6
    assert len(list(play(camera({"kind": "dataset", "data": str(tmp_path), "limit": 4})))) == 4


def test_names_that_are_no_utf8_give_parts_of_their_own(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    """As a PLC or an old Windows share writes them."""
    folder = make_images(tmp_path / "nut" / "good", [10, 20, 30, 40, 50])
    for index, name in enumerate((b"Geh\xe4use.png", b"Geh\xe5use.png")):
        (folder / f"part{index:03d}.png").rename(folder / os.fsdecode(name))
    expected = {r"Geh\xe4use", r"Geh\xe5use", "part002", "part003", "part004"}
    assert {shot.part_id for shot in play(camera({"kind": "folder", "path": folder}))} == expected
    dataset = {"kind": "dataset", "data": str(tmp_path), "split": "train"}
    shots = list(play(camera(dataset))) + list(play(camera({**dataset, "split": "test"})))
    assert {shot.part_id for shot in shots} == {f"nut/good/{name}" for name in expected}


@pytest.mark.parametrize("player", ["direct", "gstreamer"])
@pytest.mark.parametrize("content", [b"\x89PNG nothing more", b"P5\n100000 100000\n255\n and some"])
def test_a_corrupt_file_is_named_and_the_rest_is_played(
    tmp_path: Path, make_images: Callable[..., Path], player: str, content: bytes
) -> None:
    folder = make_images(tmp_path / "parts", [10, 20, 30, 40])
    (folder / "part001.png").write_bytes(content)
    shots = list(play(camera({"kind": "folder", "path": folder, "player": player})))
    assert [shot.part_id for shot in shots] == [f"part{index:03d}" for index in range(4)]
    with pytest.raises(SourceError, match=r"part001\.png"):
        shots[1].load()
    assert [int(shots[index].load()[0, 0, 0]) for index in (0, 2, 3)] == [10, 30, 40]


def test_a_pipeline_that_eats_buffers_loses_those_parts_by_name(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    folder = make_images(tmp_path / "parts", list(range(60)))
    through = "identity drop-probability=0.4"
    shots = list(play(camera({"kind": "folder", "path": folder, "player": "gstreamer", "through": through})))
    assert [shot.part_id for shot in shots] == [f"part{index:03d}" for index in range(60)]
    lost = 0
    for index, shot in enumerate(shots):
        try:
            assert int(shot.load()[0, 0, 0]) == index
        except SourceError as error:
            assert f"part{index:03d}.png was lost in the pipeline" in str(error)
            lost += 1
    assert 0 < lost < 60


def test_elements_may_hold_pictures_back(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(tmp_path / "parts", [5 * index for index in range(30)])
    through = "queue min-threshold-buffers=8"
    shots = list(play(camera({"kind": "folder", "path": folder, "player": "gstreamer", "through": through})))
    assert [int(shot.load()[0, 0, 0]) for shot in shots] == [5 * index for index in range(30)]


def test_elements_that_change_time_stamps_are_refused(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(tmp_path / "parts", [10] * 5)
    config = camera(
        {
            "kind": "folder",
            "path": folder,
            "player": "gstreamer",
            "fps": 50,
            "through": "videorate ! video/x-raw,framerate=33/1",
        }
    )
    with pytest.raises(SourceError, match="time stamps"):
        list(play(config))


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ("videotestsrc ! nosuchelement", "nosuchelement"),
        ("videotestsrc ! ! fakesink", "syntax"),
        ("videotestsrc nosuchproperty=3", "nosuchproperty"),
        ("audiotestsrc", "could not link"),
    ],
)
def test_a_refused_pipeline_carries_gstreamers_words(pipeline: str, told: str) -> None:
    with pytest.raises(SourceError, match="GStreamer refuses") as error:
        make_source("cam", camera({"kind": "gstreamer", "pipeline": pipeline})).check()
    assert told in str(error.value)


def test_what_can_never_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    for config, told in [
        ({"kind": "folder", "path": tmp_path / "none"}, "no folder"),
        ({"kind": "folder", "path": tmp_path}, "no image"),
        ({"kind": "file", "path": tmp_path / "none.mp4"}, "no file"),
        ({"kind": "dataset", "data": str(tmp_path / "none")}, "no data set"),
    ]:
        with pytest.raises(SourceError, match=told):
            make_source("cam", camera(config)).check()
    with pytest.raises(ConfigError, match="ANDON_NO_SUCH"):
        make_source("cam", camera({"kind": "rtsp", "url": "rtsp://x/y", "password_env": "ANDON_NO_SUCH"}))


def test_hardware_elements_are_chosen_where_they_exist() -> None:
    source = CsiSource(kind="csi", sensor=1)
    with pytest.raises(SourceError, match="nvarguscamerasrc"):
        csi(source, lambda name: False)
    assert csi(source, lambda name: True).startswith("nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM)")
    mjpeg = UsbSource(kind="usb", format="mjpeg")
    assert usb(mjpeg, lambda name: False).endswith("! jpegdec")
    assert "nvv4l2decoder mjpeg=1 ! nvvidconv" in usb(mjpeg, lambda name: True)
    network = camera({"kind": "rtsp", "url": 'rtsp://x/"; ! fakesink'}).source
    assert r'location="rtsp://x/\"; ! fakesink" ' in rtsp(network, lambda name: False)
    assert rtsp(network, lambda name: True).endswith("nvvidconv ! video/x-raw,format=BGRx")


def test_a_video_file_plays_to_its_end(tmp_path: Path) -> None:
    Gst = gst().Gst
    clip = tmp_path / "a clip ! with spaces.mkv"
    writer = Gst.parse_launch("videotestsrc num-buffers=12 ! video/x-raw,width=66,height=50,framerate=10/1 ! jpegenc "
                              "! matroskamux ! filesink name=out")  # fmt: skip
    writer.get_by_name("out").set_property("location", str(clip))
    writer.set_state(Gst.State.PLAYING)
    writer.get_bus().timed_pop_filtered(20 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR)
    writer.set_state(Gst.State.NULL)
    config = camera({"kind": "file", "path": clip, "realtime": False})
    shots = list(play(config))
    assert len(shots) == 12
    assert shots[0].load().shape == (50, 66, 3)
    assert len(list(play(camera({"kind": "file", "path": clip, "realtime": False, "loop": True}), 30))) == 30


def test_messages_of_elements_do_not_pile_up_while_frames_come() -> None:
    modules = gst()
    source = GstreamerCamera("videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=50/1")
    with closing(source):
        source.open()
        assert source.read(10) is not None
        pipeline = source._pipeline._pipeline
        for _ in range(1000):
            pipeline.post_message(modules.Gst.Message.new_application(None, modules.Gst.Structure.new_empty("level")))
        assert source.read(10) is not None
        left = pipeline.get_bus().pop_filtered(modules.Gst.MessageType.APPLICATION)
    assert left is None


def test_an_error_is_told_after_the_frames_that_came_before_it() -> None:
    modules = gst()
    source = GstreamerCamera("videotestsrc num-buffers=5 name=cam ! video/x-raw,width=64,height=48", keep_all=True)
    with closing(source):
        source.open()
        assert source.read(10) is not None
        for words in ("cable pulled", "and then some"):
            error = modules.GLib.Error.new_literal(modules.Gst.ResourceError.quark(), words, 1)
            message = modules.Gst.Message.new_error(source._pipeline.element("cam"), error, "")
            source._pipeline._pipeline.post_message(message)
        assert all(source.read(10) is not None for _ in range(4))
        with pytest.raises(SourceError, match="cam: cable pulled"):
            source.read(10)
        source.close()
        source.open()
        assert all(source.read(10) is not None for _ in range(5))
        with pytest.raises(EndOfSource):  # what the first opening suffered from is over
            source.read(10)


@pytest.mark.parametrize(("element", "called"), [("filesrc", "filesrc"), ("filesrc name=top2", "top2")])
def test_a_pipeline_that_is_rebuilt_fails_for_the_same_cause(tmp_path: Path, element: str, called: str) -> None:
    """GStreamer numbers its elements on: each attempt would be another cause, logged and published anew."""
    source = GstreamerCamera(f"{element} location={tmp_path}/none ! decodebin")
    causes = set()
    for _ in range(3):
        with closing(source), pytest.raises(SourceError) as refused:
            source.open()
            source.read(10)
        causes.add(refused.value.what)
    assert causes == {f"{called}: Resource not found."}


def test_a_watched_folder_takes_files_once_they_are_whole(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    source = make_source("cam", camera({"kind": "folder", "path": tmp_path, "watch": True}))
    assert source.check() == "0 images"
    source.open()
    assert source.read(0.01) is None
    make_images(tmp_path, [50, 60])
    assert source.read(0.01) is None, "a file that may still grow is not taken at first sight"
    taken = [source.read(0.01), source.read(0.01)]
    assert [shot.part_id for shot in taken if shot] == ["part000", "part001"]
    assert source.read(0.01) is None
    hidden = tmp_path.rename(tmp_path.with_name("away"))
    with pytest.raises(SourceError, match="no folder"):
        source.read(0.01)
    source.close()
    hidden.rename(tmp_path)
    source.open()
    assert [source.read(0.01) for _ in range(3)] == [None] * 3, "what was judged is not judged again"
    source.close()


def looks(source: Any, count: int) -> list[str]:
    """Part ids of a newly opened source, in so many looks."""
    source.open()
    shots = [source.read(0.001) for _ in range(count)]
    source.close()
    return [shot.part_id for shot in shots if shot is not None]


def test_a_share_that_leaves_an_empty_folder_is_not_judged_again(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    folder = make_images(tmp_path / "in", [10, 20])
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    assert looks(source, 5) == ["part000", "part001"]
    share = folder.rename(tmp_path / "share")
    folder.mkdir()  # the empty mount point
    assert looks(source, 5) == []
    (make_images(tmp_path / "new", [30]) / "part000.png").rename(share / "part002.png")
    folder.rmdir()
    share.rename(folder)
    assert looks(source, 5) == ["part002"], "the one that came meanwhile"


def test_a_file_under_the_name_of_one_that_was_consumed_is_new(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    folder = make_images(tmp_path / "in", [10])
    source = make_source("cam", camera({"kind": "folder", "path": folder, "watch": True}))
    path, done = folder / "part000.png", tmp_path / "done.png"
    assert looks(source, 4) == ["part000"]
    path.unlink()
    assert looks(source, 4) == []
    make_images(folder, [10], (80, 60))
    assert looks(source, 4) == ["part000"], "the next picture"
    taken = path.stat().st_ctime_ns
    path.rename(done)
    assert looks(source, 4) == []
    while done.stat().st_ctime_ns == taken:  # clocks of file systems are coarse
        done.rename(path)
        path.rename(done)
    done.rename(path)
    assert looks(source, 4) == ["part000"], "the same picture, put back to be judged again"


def test_a_file_whose_size_is_set_before_its_content_is_whole_when_nobody_writes(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    content = (make_images(tmp_path / "whole", [70]) / "part000.png").read_bytes()
    source = make_source("cam", camera({"kind": "folder", "path": tmp_path, "pattern": "*.png", "watch": True}))
    source.open()
    path = tmp_path / "part000.png"
    with path.open("wb") as file:
        file.truncate(len(content))
        for position in range(0, len(content), 40):
            before = path.stat().st_mtime_ns
            while path.stat().st_mtime_ns == before:  # clocks of file systems are coarse
                file.seek(position)
                file.write(content[position : position + 40])
                file.flush()
            assert source.read(0.001) is None
    shot = source.read(0.001)
    assert shot is not None and int(shot.load()[0, 0, 0]) == 70
    source.close()


@pytest.mark.parametrize(
    "pattern", ["**/*", "*", "*.png", "**/*.png", "part[01]*", "**/part00?.*", "*/*", "**/b/*", "a/**/*.png"]
)
def test_a_folder_gives_the_images_that_fit_the_pattern(
    pattern: str, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    for folder in ("", "a", "a/b", ".hidden", "a-b"):
        make_images(tmp_path / folder, [10, 20])
        (tmp_path / folder / "part001.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "part009.png").symlink_to(tmp_path / "a" / "part000.png")
    (tmp_path / "part008.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "part007.png").mkdir()
    played = [shot.path for shot in play(camera({"kind": "folder", "path": tmp_path, "pattern": pattern}))]
    assert played and played == [str(path) for path in sorted(tmp_path.glob(pattern)) if on_disk(path)]


def test_files_that_were_taken_are_not_looked_at_again(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number grows for ever where nobody clears them away, and the folder is listed several times a second."""
    folder = make_images(tmp_path, [10] * 8)
    watch = watching(camera({"kind": "folder", "path": folder, "watch": True}).source, Seen())
    assert sum(part is not None for part in itertools.islice(watch, 10)) == 8
    looked: list[Any] = []
    monkeypatch.setattr("andon.runtime.source.playlist.on_disk", looked.append)
    monkeypatch.setattr("andon.runtime.source.playlist._mark", looked.append)
    assert next(watch) is None and looked == []


def test_what_was_consumed_is_not_remembered_for_ever(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    folder = make_images(tmp_path, [10] * 8)
    seen = Seen(remembered=3)
    watch = watching(camera({"kind": "folder", "path": folder, "watch": True}).source, seen)
    assert [part is not None for part in itertools.islice(watch, 10)] == [False] + [True] * 8 + [False]
    for path in sorted(folder.iterdir())[:6]:
        path.unlink()
    assert next(watch) is None
    assert sorted(Path(path).name for path in seen._gone) == ["part003.png", "part004.png", "part005.png"]


# -- the camera thread -------------------------------------------------------------------------------------------------


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


@settings(deadline=None, max_examples=25)
@given(fps=st.floats(20, 300), count=st.integers(2, 12))
def test_playback_keeps_its_rate(fps: float, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("parts")
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:02d}.png"), np.zeros((4, 4, 3), np.uint8))
    started = time.monotonic()
    assert len(list(play(camera({"kind": "folder", "path": folder, "fps": fps})))) == count
    assert time.monotonic() - started >= (count - 1) / fps * 0.99
