"""A network camera that goes away and comes back, against a real RTSP server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.commands.check import Finding, _camera, _guard
from andon.runtime.errors import SourceError
from andon.runtime.lineconfig import CameraConfig
from andon.runtime.slot import LanePolicy, Missed, Slots
from andon.runtime.source import make_source
from andon.runtime.source.camera import Camera, CameraState
from andon.runtime.source.decoders import require_stream
from andon.runtime.source.pipelines import rtsp_element
from andon.runtime.sourceconfig import RtspSource
from andon.runtime.types import Frame

#: How often the server is killed and started again; `make soak` and evidence runs raise it.
CYCLES = int(os.environ.get("ANDON_RTSP_CYCLES", "2"))


class Server:
    """Killed without farewell or stopped with one."""

    def __init__(self, port: int):
        self.port = port
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        script = Path(__file__).with_name("rtsp_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if "serving" not in line:
            said = self.process.stderr.read()
            if "GstRtspServer" in said:
                pytest.skip("gir1.2-gst-rtsp-server-1.0 is not installed: apt-get install gir1.2-gst-rtsp-server-1.0")
            raise AssertionError(said)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(10)
            self.process = None


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Server(port)
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        running.process.send_signal(signal.SIGCONT)
    running.stop()


class Line:
    """One RTSP camera beside a test picture, and a consumer that notes when each one's frames came."""

    def __init__(self, port: int):
        cameras: dict[str, Any] = {
            "rtsp": {"source": {"kind": "rtsp", "url": f"rtsp://127.0.0.1:{port}/cam"}, "stale_after": 1.5},
            "other": {"source": {"kind": "test", "fps": 20, "width": 64, "height": 48}},
        }
        configs = {name: CameraConfig.model_validate(config) for name, config in cameras.items()}
        self.slots = Slots({name: LanePolicy() for name in configs})
        self.states: list[CameraState] = []
        self.cameras = [
            Camera(name, config, make_source(name, config), self.slots, self.states.append)
            for name, config in configs.items()
        ]
        self.times: dict[str, list[float]] = {"rtsp": [], "other": []}
        self.missed: list[Missed] = []

    def __enter__(self) -> Line:
        for camera in self.cameras:
            camera.start()
        return self

    def __exit__(self, *_: object) -> None:
        for camera in self.cameras:
            camera.stop()
        self.slots.close()
        assert all(camera.join(10) for camera in self.cameras)

    def pump(self, enough: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not enough():
            if time.monotonic() > until:
                return False
            item = self.slots.take(0.1)
            if isinstance(item, Frame):
                self.times[item.camera].append(time.monotonic())
            elif item is not None:
                self.missed.append(item)
        return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_camera_comes_back_and_the_other_is_not_delayed(server: Server, how: signal.Signals) -> None:
    with Line(server.port) as line:
        assert line.pump(lambda: len(line.times["rtsp"]) >= 5, 15), line.states
        rtsp = line.cameras[0]
        for cycle in range(CYCLES):
            if how == signal.SIGSTOP and server.process is not None:
                server.process.send_signal(how)
            else:
                server.stop(how)
            assert line.pump(lambda: rtsp.state.state == "down", 15), "the loss is noticed"
            if cycle == 0:
                said = line.pump(lambda: any(item.reason == "camera_stale" for item in line.missed), 15)
                assert said, "its absence is said"
            if how == signal.SIGSTOP and server.process is not None:
                server.process.send_signal(signal.SIGCONT)
            else:
                server.start()
            before = len(line.times["rtsp"])
            assert line.pump(lambda before=before: len(line.times["rtsp"]) >= before + 5, 10), (
                f"back within 10 s of the server, cycle {cycle}: {rtsp.state}"
            )
            assert rtsp.state.state == "live"
        assert rtsp.state.restarts >= CYCLES
        assert all(item.camera == "rtsp" for item in line.missed)
        gaps = [later - earlier for earlier, later in zip(line.times["other"], line.times["other"][1:], strict=False)]
        assert line.cameras[1].state.restarts == 0
        assert sorted(gaps)[int(0.99 * len(gaps))] < 0.5, "the other camera's frames kept coming"


def test_a_server_that_is_not_there_is_waited_for(server: Server) -> None:
    server.stop()
    with Line(server.port) as line:
        rtsp = line.cameras[0]
        assert line.pump(lambda: rtsp.state.restarts >= 2, 15)
        assert "127.0.0.1" in rtsp.state.detail or "connect" in rtsp.state.detail.lower()
        server.start()
        assert line.pump(lambda: len(line.times["rtsp"]) >= 3, 15)


def test_check_asks_the_camera_what_it_sends(server: Server, no_decoder: Callable[[str], None]) -> None:
    """A green check, and a line whose camera never came up, where its decoder was not installed."""

    def look(path: str) -> Finding:
        source = {"kind": "rtsp", "url": f"rtsp://127.0.0.1:{server.port}/{path}"}
        return _guard("camera", _camera("cam", CameraConfig.model_validate({"source": source, "product": "mono"})))

    found = look("cam")
    assert found.ok and found.found.endswith("\nit sends MJPEG")
    found = look("nothing")
    assert not found.ok and "Not found" in found.found
    no_decoder("image/jpeg")
    found = look("cam")
    assert not found.ok and "missing decoder: MJPEG, which the camera sends" in found.found
    assert "gstreamer1.0-libav" in found.found


@contextmanager
def describing(answer: bytes) -> Iterator[int]:
    """A camera that answers every DESCRIBE alike; its port."""

    class Answers(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            method, number = b"", b""
            for line in self.rfile:
                if not line.strip():
                    status, _, rest = (answer if method == b"DESCRIBE" else b"200 OK\r\n\r\n").partition(b"\r\n")
                    self.wfile.write(b"RTSP/1.0 %b\r\n%b\r\n%b" % (status, number, rest))
                    method = b""
                elif not method:
                    method = line.split()[0]
                elif line.lower().startswith(b"cseq:"):
                    number = line.strip()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as camera:
        threading.Thread(target=camera.serve_forever, daemon=True).start()
        yield camera.server_address[1]
        camera.shutdown()


def asked(answer: bytes) -> str:
    with describing(answer) as port:
        url = f"rtsp://127.0.0.1:{port}/cam"
        return require_stream(rtsp_element(RtspSource.model_validate({"kind": "rtsp", "url": url})), {})


@pytest.mark.parametrize(
    ("media", "name"),
    [(b"26", "MJPEG"), (b"96\r\na=rtpmap:96 H264/90000", "H.264"), (b"28", "RTP payload type 28")],
)
def test_a_stream_that_the_camera_need_not_name_has_a_name(media: bytes, name: str) -> None:
    """JPEG is payload type 26 without a word more, of which check said that the camera sends None."""
    text = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP %b\r\na=control:a\r\n" % media
    head = b"200 OK\r\nContent-Type: application/sdp\r\nContent-Length: %d\r\n\r\n" % len(text)
    assert asked(head + text) == name


def test_a_camera_that_serves_another_client_is_no_wrong_password() -> None:
    with pytest.raises(SourceError, match=r"Not Enough Bandwidth(.|\n)*stop the line first"):
        asked(b"453 Not Enough Bandwidth\r\n\r\n")
