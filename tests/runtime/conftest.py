"""Small synthetic bundles: stages as ONNX text, all else derived; stations with a memory; a data set; commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from andon.cli import main
from andon.runtime.bundle import hash_file, write_manifest
from andon.runtime.manifest import Manifest
from andon.runtime.memoryconfig import MemoryConfig

from . import trtdouble
from .memorystation import CONFIG, Station, memory_parts  # type: ignore[import-not-found]
from .parts import level, write  # type: ignore[import-not-found]

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}

#: uint8 frame [1,4,4,3] -> features [1,3], logits [1,2]
ENCODE = """encode (uint8[1,4,4,3] image) => (float[1,3] u, float[1,2] logits) {
    x = Cast<to=1>(image)
    m = ReduceMean<axes=[1,2], keepdims=0>(x)
    k = Constant<value = float {0.01}>()
    u = Mul(m, k)
    logits = Slice(u, start, stop, axis)
}"""
#: features [1,3] -> map [1,1,1,3], score [1]
SCORE = """score (float[1,3] u) => (float[1,1,1,3] map, float[1] score) {
    shape = Constant<value = int64[4] {1,1,1,3}>()
    map = Reshape(u, shape)
    score = ReduceMax<axes=[1], keepdims=0>(u)
}"""
#: Options of every command that judges.
ENGINE = ("--backend", "onnxruntime", "--threads", 1)


def parse(text: str) -> onnx.ModelProto:
    """ONNX model of a graph in ONNX text form, checked, opset 17."""
    initializers = {"start": [0], "stop": [2], "axis": [1]}
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text)
    for name, values in initializers.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def _tensors(values: Any) -> dict[str, dict[str, Any]]:
    return {
        v.name: {
            "shape": [d.dim_value for d in v.type.tensor_type.shape.dim],
            "dtype": _DTYPES[v.type.tensor_type.elem_type],
        }
        for v in values
    }


def build(
    root: Path,
    *,
    stages: Mapping[str, tuple[str, Mapping[str, str]]],
    program: list[dict[str, Any]],
    state: Mapping[str, np.ndarray] | None = None,
    class_bound: tuple[str, ...] = (),
    tables: Mapping[str, np.ndarray] | None = None,
    outputs: Mapping[str, Any] | None = None,
    classes: tuple[str, ...] = ("a", "b"),
    npz: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    report: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """Write a bundle. stages: name -> (ONNX text, input -> source). npz: further files, path -> arrays."""
    (root / "stages").mkdir(parents=True)
    (root / "state").mkdir()
    described = {}
    size = [4, 4]
    for name, (text, sources) in stages.items():
        model = parse(text)
        onnx.save(model, str(root / f"stages/{name}.fp32.onnx"))
        inputs = _tensors(model.graph.input)
        for key, source in sources.items():
            inputs[key]["source"] = source
            if source == "frame":
                size = inputs[key]["shape"][1:3]
        described[name] = {
            "files": {"fp32": f"stages/{name}.fp32.onnx"},
            "inputs": inputs,
            "outputs": _tensors(model.graph.output),
            "opset": 17,
        }
    entries: dict[str, dict[str, Any]] = {"state": {}, "tables": {}}
    for kind, arrays in (("state", state or {}), ("tables", tables or {})):
        for name, array in arrays.items():
            np.savez(root / f"state/{name}.npz", values=array)
            entries[kind][name] = {
                "shape": array.shape,
                "dtype": array.dtype.name,
                "file": f"state/{name}.npz",
                "key": "values",
            }
            if name in class_bound:
                entries[kind][name]["class_bound"] = True
    for name, arrays in (npz or {}).items():
        (root / name).parent.mkdir(exist_ok=True)
        np.savez(root / name, allow_pickle=False, **arrays)
    if report is not None:
        (root / "report.json").write_text(json.dumps(report))
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest, count = hash_file(path)
        files[path.relative_to(root).as_posix()] = {"sha256": digest, "bytes": count}
    manifest = Manifest.model_validate(
        {
            "schema": "andon.bundle/1",
            "method": "synthetic",
            "name": "synthetic",
            "created": "2026-01-01T00:00:00Z",
            "andon": "0",
            "checkpoint_sha256": "",
            "backbone": {"id": "none", "weights": "none", "sha256": ""},
            "preprocess": {"height": size[0], "width": size[1]},
            "classes": classes,
            "stages": described,
            "variants": ["fp32"],
            **entries,
            "program": program,
            "outputs": outputs or {"score": "score.score", "map": "score.map", "logits": "encode.logits"},
            "files": files,
            **extra,
        }
    )
    write_manifest(root, manifest)
    return root


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """build() into a fresh folder under tmp_path; `make_bundle()` alone makes a small working bundle."""
    count = 0

    def make(**parts: Any) -> Path:
        nonlocal count
        count += 1
        defaults: dict[str, Any] = {
            "stages": {"encode": (ENCODE, {"image": "frame"}), "score": (SCORE, {"u": "encode.u"})},
            "program": [{"run": "encode"}, {"run": "score"}],
        }
        return build(tmp_path / f"bundle{count}", **{**defaults, **parts})

    return make


@pytest.fixture
def memory_bundle(make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """memorystation.memory_parts() made into a bundle."""
    return lambda *parts, **more: make_bundle(**memory_parts(*parts, **more))


@pytest.fixture
def station(memory_bundle: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Station]]:
    """Stations that share a state folder, as a line and its restarts do."""
    opened: list[Station] = []
    own: list[Path] = []

    def make(config: MemoryConfig = CONFIG, bundle: Path | None = None, program: str = "default") -> Station:
        if bundle is None:
            own[:] = own or [memory_bundle()]
        opened.append(Station(bundle or own[0], tmp_path / "state", config, program))
        return opened[-1]

    yield make
    for each in opened:
        if each.detector.program._engines:
            each.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Good parts 1..40 of brightness, defects 61..64, in MVTec layout; masks cover the left half."""
    root = tmp_path / "data"
    for product in "ab":
        for i in range(40):
            write(root / product / "train" / "good" / f"{i:03}.png", level(i + 1, product))
        for i in range(8):
            write(root / product / "test" / "good" / f"{i:03}.png", level(5 * i + 3, product))
        for i in range(4):
            write(root / product / "test" / "bright" / f"{i:03}.png", level(i + 61, product))
            mask = np.zeros((8, 8), np.uint8)
            mask[:, :4] = 255
            write(root / product / "ground_truth" / "bright" / f"{i:03}_mask.png", mask)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON object and all output of a command."""
    capsys.readouterr()
    code = main([str(a) for a in arguments] + ["--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.out + captured.err


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> trtdouble.World:
    """TensorRT and CUDA are doubles."""
    return trtdouble.install(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where TensorRT's plans are kept."""
    return tmp_path / "plans"
