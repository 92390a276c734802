"""The device side: runs without torch and onnx, on Python 3.10, and is light at import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("runtime", "calib")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = sorted(
    ".".join(("andon", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for path in FILES
)
BLOCK = """
import importlib, sys
BLOCKED = {"torch", "torchvision", "timm", "onnx", "matplotlib"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not on the device")
sys.meta_path.insert(0, Block())
"""


def python(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_device_module_imports_without_torch_and_onnx() -> None:
    code = BLOCK + "for name in sys.argv[1:]: importlib.import_module(name)\nprint(*sorted(BLOCKED & set(sys.modules)))"
    assert python(code, *MODULES).strip() == ""


def test_every_device_module_can_be_the_first_to_be_imported() -> None:
    """Modules in a circle can be imported from one end only, and who imports them first decides whether they can."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for module in [m for m in sys.modules if m.partition('.')[0] == 'andon']: del sys.modules[module]\n"
        "    importlib.import_module(name)"
    )
    python(code, *MODULES)


def test_the_block_is_real() -> None:
    with pytest.raises(AssertionError, match="torch is not on the device"):
        python(BLOCK + "import torch")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_3_10_can_read_it(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


def test_the_run_path_imports_nothing_heavy() -> None:
    """Start-up time and memory of the device: no sklearn, scipy or pandas behind the detector."""
    code = BLOCK + (
        "import andon.runtime.detector, andon.runtime.engine.onnxruntime\n"
        "heavy = {'sklearn', 'scipy', 'pandas', 'jsonschema', 'tensorrt', 'pycuda'}\n"
        "print(*sorted(heavy & {m.partition('.')[0] for m in sys.modules}))"
    )
    assert python(code).strip() == ""


def test_watching_a_line_loads_neither_numpy_nor_opencv() -> None:
    """It is started beside a line, over and again. The demo's configuration names a data set, which brings both."""
    demo = str(ROOT / "configs/lines/demo.yaml")
    code = BLOCK + "BLOCKED |= {'numpy', 'cv2'}\nfrom andon.cli import main\nassert main(sys.argv[1:]) == 1"
    said = json.loads(python(code, "watch", "--config", demo, "--broker", "127.0.0.1:1", "--json").splitlines()[-1])
    assert said["error"] == "the broker cannot be reached"


def test_doctor_names_what_is_missing_where_it_is() -> None:
    """Packages that it looks for must not be needed to look for them."""
    gone = {"numpy", "OpenCV", "paho-mqtt", "onnxruntime"}
    code = BLOCK + (
        "BLOCKED |= {'numpy', 'cv2', 'paho', 'onnxruntime'}\nfrom andon.cli import main\n"
        "assert main(['doctor', '--json']) == 1"
    )
    said = json.loads(python(code).splitlines()[-1])
    assert gone <= set(said["missing"]) and said["backend"] is None
    missing = {found["name"]: found for found in said["findings"] if found["status"] == "missing"}
    assert all(missing[name]["why"] and "pip install" in missing[name]["remedy"] for name in gone)
    assert "paho" in missing["broker"]["why"]


def test_the_device_tests_need_no_more_than_the_test_extra() -> None:
    """docs/jetson.md: pip install -e '.[test]', then pytest tests/device."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[^\w-]", need)[0] for need in needs} for extra, needs in extras.items()}
    only = {"PIL" if name == "pillow" else name for name in names["workstation"] - names["test"]}
    assert "torch" in only
    code = BLOCK + f"BLOCKED = {only!r}\nimport pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    collected = python(code, "--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/device"))
    assert "test_on_device.py::test_loops_give_what_onnxruntime_gives" in collected
