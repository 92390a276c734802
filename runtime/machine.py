"""What this machine can do for Andon: a finding per thing it needs, with the reason and the remedy (`andon doctor`)."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Literal

from .engine.plans import default_cache
from .engine.probe import l4t_release, tensorrt_needs
from .errors import AndonError
from .lineconfig import BrokerConfig

Status = Literal["ok", "missing", "absent"]
MIN_DISK_BYTES = 1 << 30
#: Elements every line may need, and those that only JetPack has; with what each is for.
ELEMENTS = {
    "appsink": "every camera",
    "videoconvert": "every camera",
    "decodebin": "files and network cameras",
    "v4l2src": "USB cameras",
    "rtspsrc": "network cameras",
    "multifilesrc": "image sequences",
}
JETSON_ELEMENTS = {
    "nvarguscamerasrc": "CSI cameras",
    "nvv4l2decoder": "H.264, H.265 and MJPEG in hardware",
    "nvvidconv": "colour conversion in hardware",
    "nvjpegdec": "JPEG in hardware",
}
#: What only some cameras need; each is in a package of its own (source/gstreamer.py).
CAMERA_ELEMENTS = {
    "aravissrc": "GigE Vision and USB3 Vision cameras",
    "bayer2rgb": "colour cameras that send their raw mosaic",
}
#: What has to be decoded, by its name in RTP; with where it comes from.
CODECS = {"H264": "most network cameras and video files", "H265": "some network cameras and video files"}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. absent: not there, and not needed on this kind of machine.

    found: what is there; why: why it is missing or absent; remedy: what to do.
    """

    name: str
    status: Status
    found: str = ""
    why: str = ""
    remedy: str = ""


def examine(broker: BrokerConfig | None = None, disk: Iterable[Path] = ()) -> list[Finding]:
    """Look at everything. broker: whose reachability to try; disk: further folders that need room."""
    jetson = bool(l4t_release())
    return [
        _system(),
        _jetpack(),
        Finding("Python", "ok", platform.python_version()),
        *_packages(),
        *_tensorrt(jetson),
        _torch(),
        *_gstreamer(jetson),
        _broker(broker or BrokerConfig()),
        _clock(),
        *(_disk(name, path) for name, path in (("working folder", Path.cwd()), ("plan cache", default_cache()))),
        *(_disk(str(path), path) for path in disk),
    ]


def backends(findings: Iterable[Finding]) -> dict[str, str]:
    """Backend -> why it cannot be used here; empty if it can."""
    by_name = {f.name: f for f in findings}
    gpu = [by_name[n] for n in ("driver", "tensorrt", "cuda bindings")]
    cpu = by_name["onnxruntime"]
    return {
        "tensorrt": "; ".join(f.why for f in gpu if f.status != "ok"),
        "onnxruntime": "" if cpu.status == "ok" else cpu.why,
    }


def _system() -> Finding:
    release = Path("/etc/os-release")
    names = (
        dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
        if release.is_file()
        else {}
    )
    name = names.get("PRETTY_NAME", platform.system()).strip('"')
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("system", "ok", f"{name}, {platform.machine()}, {cpus} CPUs")


def _jetpack() -> Finding:
    release = l4t_release()
    if not release:
        return Finding("JetPack", "absent", why="this is not a Jetson (no /etc/nv_tegra_release)")
    # https://developer.nvidia.com/embedded/jetpack-archive
    names = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7", "39": "JetPack 7"}
    major = release.partition(".")[0]
    status: Status = "ok" if major in ("36", "38", "39") else "missing"
    why = "" if status == "ok" else "this release is older or newer than those Andon was made for"
    found = f"{names.get(major, 'unknown JetPack')}, Jetson Linux {release}"
    return Finding("JetPack", status, found, why, "" if status == "ok" else "JetPack 6.2 or 7, see docs/jetson.md")


def _packages() -> list[Finding]:
    found = []
    for name, module in (("numpy", "numpy"), ("OpenCV", "cv2"), ("paho-mqtt", "paho.mqtt.client")):
        found.append(_module(name, module, "pip install -e . in Andon's sources"))
    runtime = _module("onnxruntime", "onnxruntime", "pip install onnxruntime")
    if runtime.status == "ok":
        providers = ", ".join(import_module("onnxruntime").get_available_providers())
        runtime = Finding("onnxruntime", "ok", f"{runtime.found}: {providers}")
    return [*found, runtime]


def _module(name: str, module: str, remedy: str) -> Finding:
    try:
        loaded = import_module(module)
    except (ImportError, OSError) as error:
        return Finding(name, "missing", why=str(error), remedy=remedy)
    return Finding(name, "ok", str(getattr(loaded, "__version__", "")) or _installed(name))


def _installed(package: str) -> str:
    try:
        return installed(package)
    except PackageNotFoundError:
        return "present"


def _tensorrt(jetson: bool) -> list[Finding]:
    """On a Jetson these are missing; elsewhere onnxruntime does the work and they are merely absent."""
    found = []
    for need in tensorrt_needs():
        finding = Finding(need.name, "ok", need.found)
        if need.met and need.name == "tensorrt":
            finding = _module("tensorrt", "tensorrt", need.remedy)  # for its version
        elif not need.met:
            finding = Finding(need.name, "missing", why=need.why, remedy=need.remedy)
        found.append(finding if jetson or finding.status == "ok" else replace(finding, status="absent"))
    return found


def _torch() -> Finding:
    try:
        return Finding("torch", "ok", f"{installed('torch')}: train and export work here")
    except PackageNotFoundError:
        return Finding(
            "torch",
            "absent",
            why="a line device needs none; train and export do",
            remedy="pip install -e '.[workstation]' in Andon's sources",
        )


def _gstreamer(jetson: bool) -> list[Finding]:
    try:
        from .source.gstreamer import PACKAGES, gst, has_element
    except ImportError as error:  # of a package that is named already, with its remedy
        return [Finding("GStreamer", "missing", why=f"it cannot be looked at: {error}")]
    try:
        version = ".".join(str(part) for part in gst().Gst.version()[:3])
    except AndonError as error:
        return [Finding("GStreamer", "missing", why=f"{error.what}: {error.found}", remedy=error.next_step or "")]
    found = [Finding("GStreamer", "ok", version)]
    found += [
        _element(
            name, use, has_element, "missing", "apt-get install gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
        )
        for name, use in ELEMENTS.items()
    ]
    found += [_element(name, use, has_element, "absent", PACKAGES[name]) for name, use in CAMERA_ELEMENTS.items()]
    status: Status = "missing" if jetson else "absent"
    remedy = "apt-get install nvidia-l4t-gstreamer" if jetson else ""
    found += [_element(name, use, has_element, status, remedy) for name, use in JETSON_ELEMENTS.items()]
    return found + [_decoder(name, use, status) for name, use in CODECS.items()]


def _decoder(encoding: str, use: str, otherwise: Status) -> Finding:
    """Elements of GStreamer's own plug-ins find files and cameras, but decode none of these."""
    from .source.decoders import ENCODINGS, decoders
    from .source.gstreamer import DECODERS

    name, media = ENCODINGS[encoding]
    if there := decoders(media):
        return Finding(f"{name} decoder", "ok", f"{', '.join(there)}, for {use}")
    return Finding(f"{name} decoder", otherwise, why=f"none is installed: {use} cannot be decoded", remedy=DECODERS)


def _element(name: str, use: str, has: Callable[[str], bool], otherwise: Status, remedy: str) -> Finding:
    if has(name):
        return Finding(name, "ok", f"for {use}")
    return Finding(name, otherwise, why=f"no such GStreamer element: {use}", remedy=remedy)


def _broker(broker: BrokerConfig) -> Finding:
    mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if broker.embedded:
        if mosquitto:
            return Finding("broker", "ok", f"embedded: {mosquitto}")
        return Finding("broker", "missing", why="no mosquitto to start", remedy="apt-get install mosquitto")
    where = f"{broker.host}:{broker.port}"
    try:
        from .mqtt.probe import probe

        probe(broker, f"andon-doctor-{os.getpid()}")
    except ImportError as error:  # paho-mqtt's, which is named already
        return Finding("broker", "missing", why=f"it cannot be asked: {error}")
    except AndonError as error:
        remedy = "start it, or name another with --broker or --config; verdicts wait in the outbox meanwhile"
        return Finding("broker", "missing", why=error.what, remedy=remedy)
    return Finding("broker", "ok", f"{where} answers")


def _clock() -> Finding:
    """The kernel knows whether anything keeps its clock: adjtimex(2) returns TIME_ERROR if not."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "adjtimex"):
        return Finding("clock", "absent", why="this system does not say whether its clock is synchronised")
    state = libc.adjtimex(ctypes.create_string_buffer(512))  # modes 0: read only
    if 0 <= state < 5:
        return Finding("clock", "ok", "synchronised")
    return Finding(
        "clock",
        "missing",
        why="not synchronised: capture times in verdicts may be wrong",
        remedy="timedatectl set-ntp true, or install chrony",
    )


def _disk(name: str, path: Path) -> Finding:
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.1f} GB free ({path})"
    if not os.access(existing, os.W_OK):
        return Finding(f"disk: {name}", "missing", found, f"{existing} cannot be written", "choose another folder")
    if free < MIN_DISK_BYTES:
        return Finding(f"disk: {name}", "missing", found, "less than 1 GB free", "make room; the outbox needs it")
    return Finding(f"disk: {name}", "ok", found)
