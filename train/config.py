"""Configuration of a training run: a YAML file, overrides on the command line, one validated model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..runtime import configfile
from ..runtime.errors import ConfigError
from .method import MethodConfig
from .registry import get_method

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def default_config(method: str, kind: str = "edge") -> Path:
    """The configuration file that ships for a method. kind: edge (small backbone) or methods (the paper's settings)."""
    return _CONFIGS / kind / f"{method}.yaml"


def load_config(method: str, path: Path | None = None, overrides: Iterable[str] = ()) -> MethodConfig:
    """The validated configuration of a method.

    Args:
        method: method id.
        path: YAML file; the method's edge preset if None.
        overrides: ``dotted.key=value`` each, the value in YAML; applied after the file.

    Raises:
        ConfigError: unknown method, unreadable file, unknown key, refused value, or a file of another method.
    """
    model = get_method(method).config()
    source = path if path is not None else default_config(method)
    config = configfile.load(source, model)
    if config.method != method:
        raise ConfigError(
            f"{source} is not a configuration of {method}",
            found=f"method: {config.method}",
            expected=f"method: {method}",
            next_step=f"use --method {config.method} or another --config",
        )
    return override(config, overrides)


def override(config: MethodConfig, settings: Iterable[str]) -> MethodConfig:
    """The configuration with ``dotted.key=value`` settings applied.

    Raises:
        ConfigError: a setting without "=", an unknown key, a refused value.
    """
    data = config.model_dump(mode="json")
    settings = list(settings)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: no value", expected="KEY=VALUE, e.g. schedule.steps=100")
        _put(data, key.strip(), _value(setting, text), setting)
    try:
        return type(config).model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise ConfigError(
            f"the configuration does not hold with {' '.join(settings)}",
            found=problems,
            next_step=f"see the preset configs/edge/{config.method}.yaml for what there is",
        ) from error


def dump_config(config: MethodConfig) -> str:
    """The configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(before: MethodConfig, after: MethodConfig) -> dict[str, Any]:
    """Settings of `after` that are not those of `before`, by dotted key as `override` takes them."""
    old, new = _leaves(before.model_dump(mode="json")), _leaves(after.model_dump(mode="json"))
    return {key: value for key, value in new.items() if old.get(key) != value}


def _leaves(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _value(setting: str, text: str) -> Any:
    if text.strip().lower() in ("on", "off", "yes", "no"):
        return text.strip()  # words here, as in YAML 1.2; PyYAML would make truth values of them
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting}: the value is not YAML", found=text) from error


def _put(data: dict[str, Any], key: str, value: Any, setting: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(data.get(part), dict):
            raise ConfigError(f"--set {setting}: no section {part!r}", expected=", ".join(map(str, data)))
        data = data[part]
    if last not in data:
        raise ConfigError(f"--set {setting}: unknown key {last!r}", expected=", ".join(map(str, data)))
    data[last] = value
