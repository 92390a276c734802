"""The cuts, one module per method: ``cut(model, options) -> StagedModel`` (contract: export/stage.py).

A cut is found by its method's name and imported when it is asked for; nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ...runtime.errors import ConfigError
from ...train.method import AnomalyModel
from ..stage import StagedModel


class Cut(Protocol):
    """Cuts a trained model into stages.

    model: in eval mode, on the CPU, float32. options: the method's own settings, as given by ``--option key=value``;
    a cut refuses (ConfigError) the ones it does not know.
    """

    def __call__(self, model: AnomalyModel, options: Mapping[str, Any]) -> StagedModel: ...


def list_cuts() -> tuple[str, ...]:
    """Names of the methods that have a cut, sorted."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__"))


def get_cut(method: str) -> Cut:
    """The cut of a method.

    Raises:
        ConfigError: the method has none.
    """
    if method not in list_cuts():
        raise ConfigError(
            f"method {method!r} cannot be exported: it has no cut",
            found=f"no export/methods/{method}.py",
            expected=", ".join(list_cuts()) or "a cut",
            next_step="see docs/add-a-method.md",
        )
    cut: Cut = import_module(f".{method}", __package__).cut
    return cut
