"""andon doctor: each thing once, with why and what to do; on a Jetson, without TensorRT, with and without a broker."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from andon.cli import main
from andon.runtime import machine
from andon.runtime.engine.select import open_backend

from . import trtdouble


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["doctor", "--json", *arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.out


def by_name(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in result["findings"]}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andon.runtime.engine.probe.cuda_devices", lambda: (0, "no NVIDIA driver (libcuda.so.1)"))
    monkeypatch.setattr("andon.runtime.engine.probe._module", lambda name: False)


def test_a_machine_without_a_gpu_runs_on_onnxruntime(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, result, text = doctor(capsys)
    assert result["backend"] == "onnxruntime"
    found = by_name(result)
    assert found["driver"]["status"] == found["tensorrt"]["status"] == "absent"
    assert found["onnxruntime"]["found"].endswith("CPUExecutionProvider")
    assert "backend tensorrt: cannot be used: no NVIDIA driver" in text
    for name in ("system", "JetPack", "Python", "torch", "clock", "disk: plan cache", "nvv4l2decoder", "broker"):
        assert name in found
    for finding in result["findings"]:
        assert finding["found"] if finding["status"] == "ok" else finding["why"], finding


def test_on_a_jetson_what_is_not_there_is_missing(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "l4t_release", lambda: "36.4.3")
    code, result, text = doctor(capsys)
    found = by_name(result)
    assert code == 1 and not result["ok"]
    assert found["JetPack"] == {**found["JetPack"], "status": "ok", "found": "JetPack 6, Jetson Linux 36.4.3"}
    assert {"driver", "tensorrt", "cuda bindings"} <= set(result["missing"])
    assert "do: it comes with JetPack: make the environment with --system-site-packages" in text


@pytest.mark.parametrize(("release", "status"), [("", "absent"), ("36.4.3", "missing")])
def test_a_codec_without_a_decoder_is_said(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], release: str, status: str
) -> None:
    """decodebin is there without one, and was said to be all that network cameras need."""
    monkeypatch.setattr(machine, "l4t_release", lambda: release)
    there = {"video/x-h265": ["avdec_h265"]}
    monkeypatch.setattr("andon.runtime.source.decoders.decoders", lambda media: there.get(media, []))
    _, result, text = doctor(capsys)
    found = by_name(result)
    assert (found["H.264 decoder"]["status"], found["H.265 decoder"]["status"]) == (status, "ok")
    assert found["H.265 decoder"]["found"].startswith("avdec_h265, for ")
    assert "apt-get install gstreamer1.0-libav" in found["H.264 decoder"]["remedy"] and "most network cameras" in text


@pytest.mark.parametrize(("there", "status"), [(True, "ok"), (False, "absent")])
def test_the_elements_of_gige_cameras_are_listed_and_nobody_must_have_them(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: bool, status: str
) -> None:
    monkeypatch.setattr("andon.runtime.source.gstreamer.has_element", lambda name: there or name != "aravissrc")
    _, result, text = doctor(capsys)
    assert by_name(result)["aravissrc"]["status"] == status and "aravissrc" not in result["missing"]
    assert "GigE Vision and USB3 Vision" in text
    assert ("do: apt-get install libaravis-0.8-0" in text) == (not there)


def test_with_tensorrt_and_pycuda_it_is_the_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trtdouble.install(monkeypatch, "10.3.0")
    _, result, text = doctor(capsys)
    found = by_name(result)
    assert result["backend"] == "tensorrt" and "andon run uses tensorrt" in text
    assert (found["tensorrt"]["found"], found["cuda bindings"]["found"]) == ("10.3.0", "pycuda")


@pytest.mark.parametrize("broken", ["tensorrt", "pycuda.driver"])
def test_a_module_that_does_not_load_is_missing_and_another_backend_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    """As where a container lacks TensorRT's libraries, or pycuda was compiled for another CUDA."""
    trtdouble.install(monkeypatch, "10.3.0")
    monkeypatch.setattr("andon.runtime.engine.probe._module", lambda name: name in ("tensorrt", "pycuda"))
    monkeypatch.setattr(machine, "l4t_release", lambda: "36.4.3")
    monkeypatch.setitem(sys.modules, "pycuda", package := ModuleType("pycuda"))
    package.__path__ = []
    monkeypatch.delitem(sys.modules, broken)
    monkeypatch.setattr(sys, "meta_path", [Unloadable(broken), *sys.meta_path])
    assert open_backend("auto", threads=1).name == "onnxruntime"
    code, result, text = doctor(capsys)
    found = by_name(result)[{"tensorrt": "tensorrt", "pycuda.driver": "cuda bindings"}[broken]]
    assert code == 1 and found["status"] == "missing" and found["why"] == f"{broken} does not load: libx.so.10 is gone"
    assert "backend tensorrt: cannot be used" in text and result["backend"] == "onnxruntime"


class Unloadable:
    """A finder whose module lacks a library."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self._name:
            raise ImportError("libx.so.10 is gone")


def test_a_broker_that_is_not_there_does_not_fail_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, result, _ = doctor(capsys, "--broker", f"127.0.0.1:{port}")
    broker = by_name(result)["broker"]
    assert broker["status"] == "missing" and str(port) in broker["why"] and "outbox" in broker["remedy"]
    assert result["ok"] == (not set(result["missing"]) - {"broker", "clock"}) and code == (0 if result["ok"] else 1)
    code, result, _ = doctor(capsys, "--broker", "nowhere")
    assert code == 1 and "is no address" in result["error"]


def test_a_missing_package_and_a_full_disk_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import_module = machine.import_module

    def without(name: str) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return import_module(name)

    monkeypatch.setattr(machine, "import_module", without)
    monkeypatch.setattr(machine, "MIN_DISK_BYTES", 1 << 60)
    monkeypatch.setattr("andon.runtime.engine.probe.cuda_devices", lambda: (0, "no NVIDIA driver"))
    code, result, text = doctor(capsys)
    found = by_name(result)
    assert code == 1 and result["backend"] is None and "no backend can be used" in text
    assert "pip install onnxruntime" in found["onnxruntime"]["remedy"]
    assert found["disk: working folder"]["status"] == "missing"
