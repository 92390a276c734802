"""Tests that need the real thing. Elsewhere they are skipped, and the summary says that they did not run and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from andon.runtime.engine.probe import tensorrt_missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = tensorrt_missing()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.device)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"NOT RUN on a GPU: {missing}"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "plans"
