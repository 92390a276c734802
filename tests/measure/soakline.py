"""The line of a soak run: four cameras of four kinds at 5 frames per second, in a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

FPS = 5
_RTSP_SERVER = Path(__file__).parents[1] / "line" / "rtsp_server.py"
#: Seconds that the line may take to start, and to judge and deliver what waits after SIGTERM.
START, STOP = 120.0, 120.0


def free_port() -> int:
    """A TCP port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_pictures(folder: Path, count: int = 24, side: int = 300) -> Path:
    """Grey pictures with a grid, noise and on every sixth a dark scratch, part000.png ..."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    for index in range(count):
        image = random.normal(120, 6, (side, side)).astype(np.float32)
        image[:: side // 6] -= 40
        image[:, :: side // 6] -= 40
        if index % 6 == 5:
            start, end = random.integers(0, side, (2, 2)).tolist()
            cv2.line(image, start, end, 20.0, 3)
        cv2.imwrite(str(folder / f"part{index:03d}.png"), np.clip(image, 0, 255).astype(np.uint8))
    return folder


@contextmanager
def rtsp_camera() -> Iterator[str]:
    """Address of a network camera served by a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(_RTSP_SERVER), str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if "serving" not in process.stdout.readline():
            raise SystemExit("the RTSP server did not start: apt-get install gir1.2-gst-rtsp-server-1.0")
        yield f"rtsp://127.0.0.1:{port}/cam"
    finally:
        process.kill()
        process.wait()


def cameras(pictures: Path, dataset: str, rtsp: str, product: str) -> dict[str, Any]:
    """One camera of each kind that this machine can have."""
    common = {"product": product, "queue": 4}
    return {
        "pattern": {"source": {"kind": "test", "fps": FPS}, **common},
        "folder": {"source": {"kind": "folder", "path": str(pictures), "fps": FPS, "loop": True}, **common},
        "dataset": {
            "source": {"kind": "dataset", "data": dataset, "fps": FPS, "loop": True, "player": "gstreamer"},
            **common,
            "product": "auto",
        },
        "rtsp": {"source": {"kind": "rtsp", "url": rtsp}, "max_fps": FPS, **common},
    }


class Line:
    """`andon run` as a process; a context manager that ends it whatever happens."""

    def __init__(self, folder: Path, bundle: Path, cameras: dict[str, Any], broker: tuple[str, int], threads: int):
        self.web = free_port()
        self._folder = folder
        document = {
            "site": "soak",
            "line": "line",
            "station": "station",
            "state": str(folder / "state"),
            "cameras": cameras,
            "broker": {"host": broker[0], "port": broker[1], "retry_max": 5},
            "evidence": {"max_bytes": 20_000_000},
            "web": {"port": self.web},
        }
        (folder / "line.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        self._command = [
            *(sys.executable, "-m", "andon.cli", "run", "--config", str(folder / "line.yaml")),
            *("--bundle", str(bundle.absolute()), "--threads", str(threads), "--json"),
        ]

    def __enter__(self) -> Line:
        with (self._folder / "run.json").open("wb") as out, (self._folder / "run.log").open("wb") as log:
            self._process = psutil.Popen(self._command, stdout=out, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def alive(self) -> bool:
        """Whether it still runs."""
        return bool(self._process.poll() is None)

    def wait_ready(self) -> None:
        """Until engines are open, cameras deliver and the broker takes.

        Raises:
            SystemExit: it ended, or is not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + START
        while self.alive() and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/readyz", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"the line did not become ready:\n{self.log()[-3000:]}")

    def look(self) -> dict[str, float]:
        """Resident memory in MB, descriptors, threads, CPU seconds so far, and messages in the outbox."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            outbox = next(f.samples[0].value for f in families if f.name == "andon_mqtt_spool_messages")
        with self._process.oneshot():
            cpu = self._process.cpu_times()
            return {
                "rss": self._process.memory_info().rss / 1e6,
                "descriptors": float(self._process.num_fds()),
                "threads": float(self._process.num_threads()),
                "cpu": cpu.user + cpu.system,
                "outbox": outbox,
            }

    def stop(self) -> dict[str, Any]:
        """SIGTERM; its closing summary.

        Raises:
            SystemExit: it does not end, or ends with an error.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP)
        except psutil.TimeoutExpired:
            raise SystemExit(f"the line did not end within {STOP:g} s of SIGTERM:\n{self.log()[-3000:]}") from None
        if status != 0:
            raise SystemExit(f"the line ended with status {status}:\n{self.log()[-3000:]}")
        lines = (self._folder / "run.json").read_text(encoding="utf-8").splitlines()
        summary: dict[str, Any] = json.loads(lines[-1])
        return summary

    def log(self) -> str:
        """What it has said."""
        return (self._folder / "run.log").read_text(encoding="utf-8", errors="replace")
