"""Every stage of every registered method's edge preset is parsed and built by TensorRT-RTX: FP32, FP16 and INT8.

TensorRT-RTX is a sister of the TensorRT on the Jetson with the same ONNX parser family and strongly typed networks; it
builds without a GPU. It shows that types are explicit and operators are taken. It cannot show that an engine runs, how
fast, or that the Jetson's own version accepts the same file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from andon.train.registry import list_methods
from onnx import TensorProto, helper

from .edge import CLASSES, STORED, VARIANTS, edge, stage_model

SCRIPT = Path(__file__).parents[1] / "fixtures" / "trt_rtx_build.py"

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
)


def build(*files: Path) -> list[dict[str, Any]]:
    """Results of the build script; a crash names the file it happened on."""
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, files)], capture_output=True, text=True, timeout=240)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(results) != len(files):
        unfinished = files[len(results)].name if len(results) < len(files) else files[-1].name
        pytest.fail(f"TensorRT-RTX died on {unfinished} (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return results


def stages_are_built(folder: Path, method: str, variant: str, *how: tuple[str, ...]) -> None:
    """Fail with what the builder says of any stage that it refuses."""
    files = []
    for stage in edge(method, *how).staged.stages:
        files.append(folder / f"{stage.name}.{variant}.onnx")
        onnx.save(stage_model(method, stage.name, variant, *how), str(files[-1]))
    refused = [r for r in build(*files) if not r["ok"]]
    assert not refused, "\n".join(f"{Path(r['file']).name}: {error}" for r in refused for error in r["errors"])


@pytest.mark.parametrize("variant", (*VARIANTS, STORED))
@pytest.mark.parametrize("method", list_methods())
def test_every_stage_is_parsed_and_built(method: str, variant: str, tmp_path: Path) -> None:
    stages_are_built(tmp_path, method, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("method", "classes", "overrides"),
    [("vpdm", CLASSES, ("prototypes.scope=position",)), ("hvq", ("only",), ())],
    ids=["vpdm-positions", "hvq-one-product"],
)
def test_what_few_images_or_products_change_is_built_too(
    method: str, classes: tuple[str, ...], overrides: tuple[str, ...], variant: str, tmp_path: Path
) -> None:
    stages_are_built(tmp_path, method, variant, classes, overrides)


def _save(path: Path, node: onnx.NodeProto, kind: int, shape: list[int], extra: list[Any] | None = None) -> Path:
    info = helper.make_tensor_value_info
    inputs = [info("x", kind, shape), *(extra or [])]
    graph = helper.make_graph([node], "g", inputs, [info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_the_builder_refuses_what_it_should(tmp_path: Path) -> None:
    """The test above can fail: an unknown operator, mixed types and a uint8 product are refused with their node."""
    half = helper.make_tensor_value_info("h", TensorProto.FLOAT16, [1, 4, 4])
    files = [
        _save(tmp_path / "det.onnx", helper.make_node("Det", ["x"], ["y"], name="det"), TensorProto.FLOAT, [1, 4, 4]),
        _save(
            tmp_path / "mixed.onnx",
            helper.make_node("Add", ["x", "h"], ["y"], name="sum"),
            TensorProto.FLOAT,
            [1, 4, 4],
            [half],
        ),
        _save(
            tmp_path / "uint8.onnx", helper.make_node("Transpose", ["x"], ["y"], name="turn"), TensorProto.UINT8, [2, 3]
        ),
    ]
    results = build(*files)
    assert [r["ok"] for r in results] == [False, False, False]
    for result, name in zip(results, ("det", "sum", "turn"), strict=True):
        assert name in " ".join(result["errors"])
