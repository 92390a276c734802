"""A small method, a short training and its checkpoint, for the tests of training."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from andon.cli import main

SETTINGS = ("backbone.weights=random:0", "schedule.steps=4", "schedule.warmup=1", "augment.images=0")
SETS = [part for s in SETTINGS for part in ("--set", s)]


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/train/toy.py: a small method for the loop."""
    spec = spec_from_file_location("andon_toy", Path(__file__).with_name("toy.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short training on two products; nobody changes it."""
    folder = tmp_path_factory.mktemp("run") / "hvq"
    arguments = ["train", "--method", "hvq", "--data", str(synthetic_data), "--products", "grid,stripes"]
    assert main([*arguments, "--out", str(folder), "--seed", "3", *SETS]) == 0
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `andon train` says when it refuses."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 1
    return capsys.readouterr().err
