"""Sources with a real GStreamer: pixels, part ids, refusals, ends."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import andon
import cv2
import numpy as np
import pytest
from andon.runtime.errors import ConfigError, SourceError
from andon.runtime.lineconfig import load_line
from andon.runtime.machine import CAMERA_ELEMENTS
from andon.runtime.source import EndOfSource, make_source
from andon.runtime.source.gstreamer import CAPS, PACKAGES, GstreamerCamera, gst, unpack
from andon.runtime.source.pipelines import csi, rtsp, usb
from andon.runtime.sourceconfig import CsiSource, GstreamerSource, UsbSource
from hypothesis import given, settings
from hypothesis import strategies as st

from .sources import camera, play


@pytest.mark.parametrize("size", [(64, 48), (41, 30), (37, 23), (39, 1), (1, 39)])
@pytest.mark.parametrize("player", ["direct", "gstreamer"])
def test_odd_widths_keep_every_pixel(tmp_path: Path, size: tuple[int, int], player: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (shot,) = play(camera({"kind": "folder", "path": tmp_path, "player": player}))
    loaded = shot.load()
    assert loaded.flags.c_contiguous and loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, image[:, :, ::-1])


def test_a_decoder_that_is_missing_is_named_with_what_has_it(video: Path, no_decoder: Callable[[str], None]) -> None:
    """GStreamer's first line says "a plug-in", and that alone gets into the alarm."""
    config = camera({"kind": "file", "path": video, "realtime": False})
    assert len(list(play(config))) == 10
    no_decoder("image/jpeg")
    with pytest.raises(SourceError) as told:
        list(play(config))
    assert told.value.what.startswith("decodebin: Missing decoder: ") and "JPEG" in told.value.what
    assert "apt-get install gstreamer1.0-libav (on a Jetson nvidia-l4t-gstreamer)" in told.value.what
    assert "image/jpeg" in str(told.value.found), "all of it"


@settings(deadline=None)
@given(
    width=st.integers(1, 40), height=st.integers(1, 20), padding=st.integers(0, 9), offset=st.integers(0, 7),
    short=st.booleans(), bgrx=st.booleans(),
)  # fmt: skip
def test_rows_are_unpacked_by_their_stride(
    width: int, height: int, padding: int, offset: int, short: bool, bgrx: bool
) -> None:
    channels = 4 if bgrx else 3
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=7)
    data = bytes(offset) + rows.tobytes()
    data = data[: len(data) - padding] if short else data
    stride = channels * width + padding
    unpacked = unpack(data, width, height, stride, offset, bgrx=bgrx)
    np.testing.assert_array_equal(unpacked, pixels[:, :, [2, 1, 0]] if bgrx else pixels)
    assert unpacked.flags.c_contiguous and unpacked.flags.owndata, "of memory that a camera fills anew"
    with pytest.raises(SourceError, match="does not fit"):
        unpack(data[: len(data) - padding - 1 if not short else -1], width, height, stride, offset, bgrx=bgrx)


@pytest.mark.parametrize("form", ["BGRx", "RGB", "BGR", "RGBx", "BGRA", "I420", "NV12", "YUY2", "GRAY8"])
@pytest.mark.parametrize("width", [64, 41])
def test_a_frame_has_the_colours_that_videoconvert_gives_it(form: str, width: int) -> None:
    """BGRx goes to the sink as it is: nothing is converted of frames that are left out."""
    modules = gst()
    text = f"videotestsrc num-buffers=1 pattern=smpte ! video/x-raw,format={form},width={width},height=34"
    plain = modules.Gst.parse_launch(f"{text} ! videoconvert ! video/x-raw,format=RGB ! appsink name=out")
    plain.set_state(modules.Gst.State.PLAYING)
    buffer = plain.get_by_name("out").try_pull_sample(10 * modules.Gst.SECOND).get_buffer()
    packed = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8).reshape(34, -1)
    plain.set_state(modules.Gst.State.NULL)
    source = GstreamerCamera(text, live=False, keep_all=True)
    with closing(source):
        source.open()
        shot = source.read(10)
        assert shot is not None
        image = shot.load()
        caps = source._pipeline._sink.get_static_pad("sink").get_current_caps().get_structure(0)
    if form in ("BGRx", "RGB"):  # anything else becomes what this version of videoconvert chooses, of the same colours
        assert caps.get_string("format") == form
    np.testing.assert_array_equal(image, packed[:, : 3 * width].reshape(34, width, 3))
    assert form == "GRAY8" or len(np.unique(image.reshape(-1, 3), axis=0)) > 6, "a picture of many colours"


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


def test_an_element_that_a_package_brings_is_told_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As aravissrc, where it is not installed."""
    monkeypatch.setitem(PACKAGES, "nosuchsrc", "apt-get install libnosuch")
    with pytest.raises(SourceError) as error:
        make_source("cam", camera({"kind": "gstreamer", "pipeline": "nosuchsrc camera-name=x ! videoconvert"})).check()
    assert error.value.next_step == "apt-get install libnosuch"
    assert set(CAMERA_ELEMENTS) <= set(PACKAGES)


def test_every_camera_of_the_example_can_be_copied_the_commented_ones_too(tmp_path: Path) -> None:
    """Their pipelines parse, or lack an element whose package is told."""
    text = (Path(andon.__file__).parent / "configs/lines/cameras.yaml").read_text(encoding="utf-8")
    (line := tmp_path / "line.yaml").write_text(re.sub(r"^  # (gige|  )", r"  \1", text, flags=re.MULTILINE))
    cameras = load_line(line).cameras
    assert {"pattern", "gige", "gige-colour", "usb0", "csi0"} <= set(cameras)
    for name in ("gige", "gige-colour"):
        source = cameras[name].source
        assert isinstance(source, GstreamerSource) and source.pipeline.startswith("aravissrc camera-name=NAME ! ")
        try:
            make_source(name, cameras[name]).check()
        except SourceError as error:
            assert error.next_step in PACKAGES.values()
        behind = source.pipeline.partition(" ! ")[2]  # what is known of it everywhere: the rest links
        fake = "appsrc" if "bayer" in behind else "videotestsrc"
        make_source(name, camera({"kind": "gstreamer", "pipeline": f"{fake} ! {behind}"})).check()


def test_the_command_to_try_a_refused_pipeline_by_hand_is_one_command() -> None:
    """The formats of the sink have a semicolon between them, and a shell would end the command there."""
    pipeline = 'v4l2src device="/dev/my cam" !\n video/x-raw(memory:NVMM),width=64 ! nosuchelement'
    with pytest.raises(SourceError, match="nosuchelement") as error:
        make_source("cam", camera({"kind": "gstreamer", "pipeline": pipeline})).check()
    command = str(error.value.next_step).partition("gst-launch-1.0 ")[2]
    said = subprocess.run(["sh", "-c", f"printf '%s ' {command}"], capture_output=True, text=True, check=False)
    assert said.stderr == "" and said.stdout.startswith(" ".join(pipeline.split()))
    assert f"! videoconvert ! {CAPS} ! appsink name=s " in said.stdout


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


@settings(deadline=None, max_examples=25)
@given(fps=st.floats(20, 300), count=st.integers(2, 12))
def test_playback_keeps_its_rate(fps: float, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("parts")
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:02d}.png"), np.zeros((4, 4, 3), np.uint8))
    started = time.monotonic()
    assert len(list(play(camera({"kind": "folder", "path": folder, "fps": fps})))) == count
    assert time.monotonic() - started >= (count - 1) / fps * 0.99
