"""Real brokers, a consumer, bundles, judges and configurations for the tests of the line."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.detector import Detector
from andon.runtime.judge import Judge
from andon.runtime.lineconfig import BrokerConfig, CameraConfig, JudgeConfig
from andon.runtime.overrides import Overrides
from andon.runtime.startup import Options
from andon.runtime.verdict import Ids
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from .connection import Line  # type: ignore[import-not-found]
from .running import RunningLine, at  # type: ignore[import-not-found]

BASE = "andon/v1/site/line/station"


@dataclass
class Received:
    topic: str
    document: dict[str, Any]
    retain: bool
    raw: bytes


@dataclass
class Consumer:
    """A subscriber that keeps everything, with a session that outlives connections and, if saved, the broker."""

    port: int
    topic: str = "andon/v1/#"
    messages: list[Received] = field(default_factory=list)
    configure: Callable[[paho.Client], None] = lambda client: None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        name = f"consumer-{uuid.uuid4().hex[:12]}"
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda c, *_: c.subscribe(self.topic, qos=1)
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = self._take
        self.configure(self.client)

    def _take(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        if "/evidence/" in message.topic:
            return  # a picture, not a document
        with self._changed:
            document = json.loads(message.payload)
            self.messages.append(Received(message.topic, document, message.retain, bytes(message.payload)))
            self._changed.notify_all()

    def __enter__(self) -> Consumer:
        lasting = Properties(PacketTypes.CONNECT)
        lasting.SessionExpiryInterval = 3600
        self.client.connect("127.0.0.1", self.port, clean_start=False, properties=lasting)
        self.client.loop_start()
        assert self._subscribed.wait(10), "the consumer could not subscribe"
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def of(self, leaf: str, camera: str | None = None) -> list[dict[str, Any]]:
        """Documents of one topic leaf, in order of arrival."""
        with self._changed:
            return [
                m.document
                for m in self.messages
                if m.topic.endswith(f"/{leaf}") and (camera is None or f"/{camera}/" in m.topic)
            ]

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until the condition holds."""
        with self._changed:
            if not self._changed.wait_for(condition, seconds):
                raise AssertionError(f"not within {seconds} s; {len(self.messages)} messages have come")

    def wait_for(self, leaf: str, count: int, seconds: float = 20.0) -> list[dict[str, Any]]:
        """The documents of a leaf once there are `count` different ids."""
        with self._changed:
            enough = self._changed.wait_for(lambda: len({d.get("id") for d in self.of(leaf)}) >= count, seconds)
            assert enough, f"{len({d.get('id') for d in self.of(leaf)})} of {count} within {seconds} s"
        return self.of(leaf)

    def forget(self) -> None:
        with self._changed:
            self.messages.clear()


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


@pytest.fixture
def consumer(broker: EmbeddedBroker) -> Iterator[Consumer]:
    with Consumer(broker.port) as running:
        yield running


@pytest.fixture
def make_consumer() -> type[Consumer]:
    return Consumer


@pytest.fixture
def base() -> str:
    """Topic of the station."""
    return BASE


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., None]:
    return eventually


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = Path(tempfile.mkdtemp(prefix="andon-small-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"DISK FULL IS NOT TESTED HERE: mount is refused ({mounted.stderr.decode().strip()})")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def line(tmp_path: Path, base: str) -> Callable[..., Line]:
    """A line's connection to the broker at a port; broker settings and command handlers are given by name."""

    def make(port: int, cameras: tuple[str, ...] = ("cam0",), **handlers: Any) -> Line:
        settings = {"port": port, "retry_max": 0.5}
        names = [name for name in handlers if name in BrokerConfig.model_fields]
        settings |= {name: handlers.pop(name) for name in names}
        return Line(tmp_path, base, BrokerConfig(**settings), cameras, handlers)

    return make


@pytest.fixture
def producer_script() -> Path:
    return Path(__file__).with_name("producer.py")


#: Map = mean over the channels / 255 at 32x32, score = its largest value.
BRIGHTNESS = """judge (uint8[1,32,32,3] image) => (float[1,1,32,32] map, float[1] score) {
    x = Cast<to=1>(image)
    k = Constant<value = float {0.00392156862745098}>()
    y = Mul(x, k)
    m = ReduceMean<axes=[3], keepdims=0>(y)
    shape = Constant<value = int64[4] {1,1,32,32}>()
    map = Reshape(m, shape)
    score = ReduceMax<axes=[1,2,3], keepdims=0>(map)
}"""
#: The same with a logarithm of (brightest - 1/255): NaN for a black frame.
NAN_WHEN_BLACK = BRIGHTNESS.replace("score = ReduceMax", "s = ReduceMax").replace(
    "\n}", "\n    e = Constant<value = float {0.0039}>()\n    d = Sub(s, e)\n    score = Sqrt(d)\n}"
)


#: Another model for the same parts: they score a hundredth.
DIM = BRIGHTNESS.replace("0.00392156862745098", "0.0000392156862745098")


def write_bundle(
    root: Path,
    text: str = BRIGHTNESS,
    thresholds: float | None = 0.5,
    golden: Any = None,
    report: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """A bundle of one stage for the products mono and poly; NG above 0.5 unless told otherwise.

    golden: arrays of its golden set. report: its report.json.
    """
    import numpy as np
    import onnx.parser
    from andon.runtime.bundle import hash_file, write_manifest
    from andon.runtime.manifest import Manifest

    (root / "stages").mkdir(parents=True)
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(root / "stages/judge.onnx"))
    if golden is not None:
        (root / "golden").mkdir()
        np.savez(root / "golden/golden.npz", allow_pickle=False, **golden)
    if report is not None:
        (root / "report.json").write_text(json.dumps(report))
    paths = [name for name in ("stages/judge.onnx", "golden/golden.npz", "report.json") if (root / name).is_file()]
    files = {name: dict(zip(("sha256", "bytes"), hash_file(root / name), strict=True)) for name in paths}
    threshold = {"value": thresholds, "false_alarm_rate": 0.05, "samples": 20, "pixel": 0.5}
    manifest = {
        "schema": "andon.bundle/1",
        "method": "brightness",
        "name": "brightness",
        "created": "2026-01-01T00:00:00Z",
        "andon": "0",
        "checkpoint_sha256": "",
        "backbone": {"id": "none", "weights": "none", "sha256": ""},
        "preprocess": {"height": 32, "width": 32},
        "classes": ["mono", "poly"],
        "stages": {
            "judge": {
                "files": {"fp32": "stages/judge.onnx"},
                "inputs": {"image": {"shape": [1, 32, 32, 3], "dtype": "uint8", "source": "frame"}},
                "outputs": {
                    "map": {"shape": [1, 1, 32, 32], "dtype": "float32"},
                    "score": {"shape": [1], "dtype": "float32"},
                },
                "opset": 17,
            }
        },
        "variants": ["fp32"],
        "program": [{"run": "judge"}],
        "outputs": {"score": "judge.score", "map": "judge.map"},
        "thresholds": {} if thresholds is None else {name: {"default": threshold} for name in ("mono", "poly")},
        "files": files,
        **extra,
    }
    write_manifest(root, Manifest.model_validate(manifest))
    return root


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def make_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture
def make_judge(tmp_path: Path, bundle: Path) -> Iterator[Callable[..., Judge]]:
    """Judges of one camera, cam, or of several alike, that share a state folder; settings of the camera are given by
    name."""
    opened: list[Detector] = []

    def make(
        path: Path = bundle,
        memory: Any = None,
        judge: Mapping[str, Any] | None = None,
        cameras: tuple[str, ...] = ("cam",),
        **settings: Any,
    ) -> Judge:
        detector = Detector.open(path, backend="onnxruntime", threads=1)
        opened.append(detector)
        overrides = Overrides(tmp_path / "state")
        camera = CameraConfig.model_validate({"source": {"kind": "test"}, **settings})
        alike = dict.fromkeys(cameras, camera)
        return Judge(detector, alike, JudgeConfig(**judge or {}), overrides, Ids().next, memory)

    yield make
    for detector in opened:
        detector.close()


@pytest.fixture
def nan_when_black() -> str:
    return NAN_WHEN_BLACK


@pytest.fixture
def dim() -> str:
    return DIM


@pytest.fixture
def nan_bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "nan-bundle", NAN_WHEN_BLACK)


def write_images(folder: Path, shades: list[int], size: tuple[int, int] = (40, 30)) -> Path:
    """Grey PNGs part000.png, part001.png, ... of these shades; size is (width, height)."""
    import cv2
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for index, shade in enumerate(shades):
        cv2.imwrite(str(folder / f"part{index:03d}.png"), np.full((size[1], size[0], 3), shade, np.uint8))
    return folder


@pytest.fixture
def make_images() -> Callable[..., Path]:
    return write_images


@pytest.fixture
def no_decoder() -> Iterator[Callable[[str], None]]:
    """Hides all decoders of a media type from decodebin, as where they are not installed."""
    from andon.runtime.source.decoders import decoders
    from andon.runtime.source.gstreamer import gst

    hidden = {}

    def hide(media: str) -> None:
        for name in decoders(media):
            factory = gst().Gst.ElementFactory.find(name)
            hidden[factory] = factory.get_rank()
            factory.set_rank(0)

    yield hide
    for factory, rank in hidden.items():
        factory.set_rank(rank)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A file of ten MJPEG frames."""
    from andon.runtime.source.gstreamer import gst

    path, modules = tmp_path / "video.avi", gst()
    made = f"videotestsrc num-buffers=10 ! video/x-raw,width=64,height=48 ! jpegenc ! avimux ! filesink location={path}"
    pipeline = modules.Gst.parse_launch(made)
    pipeline.set_state(modules.Gst.State.PLAYING)
    assert pipeline.get_bus().timed_pop_filtered(20 * modules.Gst.SECOND, modules.Gst.MessageType.EOS)
    pipeline.set_state(modules.Gst.State.NULL)
    return path


def write_line(path: Path, cameras: dict[str, Any], **sections: Any) -> Path:
    """A line configuration; a broker of its own is started unless another is named."""
    import yaml

    document = {"site": "site", "line": "line", "station": "station", "cameras": cameras}
    path.write_text(yaml.safe_dump({**document, "broker": {"embedded": True, "port": 0}, **sections}))
    return path


@pytest.fixture
def make_line(tmp_path: Path) -> Callable[..., Path]:
    return lambda cameras, **sections: write_line(tmp_path / "line.yaml", cameras, **sections)


@pytest.fixture
def start_line(
    broker: EmbeddedBroker, consumer: Any, bundle: Path, make_line: Any
) -> Iterator[Callable[..., RunningLine]]:
    """Starts lines in this process; they are stopped at the end."""
    lines: list[RunningLine] = []

    def start(cameras: dict[str, Any], **sections: Any) -> RunningLine:
        ready = threading.Event()
        path = make_line(cameras, **{"bundle": str(bundle), "broker": at(broker), **sections})
        app = LineApp(Options(config=path, backend="onnxruntime", threads=1), on_ready=lambda app: ready.set())
        line = RunningLine(app, broker.port, consumer)
        lines.append(line)
        line.thread.start()
        assert ready.wait(20)
        assert app.delivery.wait_connected(10)
        return line

    yield start
    for line in lines:
        line.app.stop()
        line.thread.join(20)
        assert not line.thread.is_alive()
        line.client.loop_stop()
