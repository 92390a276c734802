"""Which methods there are. A method is found by its folder; nothing of it is imported until it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from .method import MethodSpec

_METHODS = Path(__file__).parent / "methods"


def list_methods() -> tuple[str, ...]:
    """Names of all registered methods, sorted."""
    return tuple(sorted(p.parent.name for p in _METHODS.glob("*/__init__.py")))


def _module(name: str) -> ModuleType:
    if name not in list_methods():
        raise ConfigError(
            f"unknown method {name!r}",
            found=name,
            expected=", ".join(list_methods()),
            next_step="choose one of these with --method",
        )
    return import_module(f".methods.{name}", __package__)


def get_method(name: str) -> MethodSpec:
    """The spec of a method.

    Raises:
        ConfigError: there is no such method.
    """
    spec: MethodSpec = _module(name).METHOD
    return spec
