"""Reading a YAML configuration into its pydantic model, with errors that name file, line, key and the nearest key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML without its yes, no, on, off, true and false: where a switch is meant pydantic reads the word.

    As truth values they would be taken for 1 and 0 where a number is meant: `pixel_threshold: off`, `deadline_ms: on`.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path, model: type[M]) -> M:
    """Read and validate `path`; validators find its folder as ``info.context["base"]``.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, an unknown key or a refused value; all problems of the
            file are named at once, each with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the configuration cannot be read",
            found=getattr(error, "strerror", None) or error,
            expected="a YAML file",
            next_step="check the path; configs/ holds examples",
        ) from error
    try:
        root = yaml.compose(text, Loader=_Loader)
        lines = dict(_positions(root, (), path))
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML", found=error, next_step=f"mend {path} at the line named") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        step = f"write one, or copy one of configs/ to {path}"
        what = f"{path}: the configuration is {'empty' if data is None else 'not one of keys and values'}"
        raise ConfigError(what, found=found, expected="keys and values", next_step=step)
    try:
        return model.model_validate(data, context={"base": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_problem(path, item, lines, model) for item in _sorted(error, lines)),
            next_step=f"mend {path}; every key is described in configs/schema",
        ) from error


def secret(name: str, env: str | None, file: Path | None) -> str | None:
    """A password or token from the environment or a file (its last newline does not count); None if neither is named.

    A configuration names one of them (settings.py).

    Raises:
        ConfigError: named, but not there, empty or not UTF-8.
    """
    if env is not None:
        value = os.environ.get(env, "")
        if not value:
            raise ConfigError(f"{name}: the environment variable {env} is not set", next_step=f"export {env}=...")
        with _utf8(name, f"the environment variable {env}"):
            value.encode()  # bytes of another encoding come as lone surrogates, which nobody could send
        return value
    if file is not None:
        try:
            with _utf8(name, f"the file {file}"):
                value = file.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise ConfigError(f"{name}: the file {file} cannot be read", found=error) from error
        if not value:
            raise ConfigError(f"{name}: the file {file} is empty")
        return value
    return None


@contextmanager
def _utf8(name: str, where: str) -> Iterator[None]:
    """Say of a secret that it is not UTF-8, but not what it is."""
    try:
        yield
    except UnicodeError:
        raise ConfigError(
            f"{name}: {where} holds what is not UTF-8",
            found="bytes of another encoding",
            expected="UTF-8 text",
            next_step="write it again, best in ASCII",
        ) from None


def _positions(node: yaml.Node | None, at: KeyPath, path: Path) -> Iterator[tuple[KeyPath, int]]:
    """Key path -> line (from 1) of every key; a key given twice is refused, which plain YAML loading lets pass."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in seen:
                raise ConfigError(f"{path}:{line}: the key '{'.'.join((*at, name))}' is given twice")
            seen.add(name)
            yield (*at, name), line
            yield from _positions(value, (*at, name), path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, str(index)), value.start_mark.line + 1
            yield from _positions(value, (*at, str(index)), path)


def _key(item: Any, lines: dict[KeyPath, int]) -> KeyPath:
    """The error's location without what pydantic adds for unions (the tag), so that it is a path of the file."""
    at: KeyPath = ()
    location = [str(part) for part in item["loc"]]
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if (*at, part) in lines or (last and item["type"] in ("missing", "extra_forbidden")):
            at = (*at, part)
    return at


def _sorted(error: ValidationError, lines: dict[KeyPath, int]) -> list[Any]:
    return sorted(error.errors(include_url=False), key=lambda item: _line(_key(item, lines), lines))


def _line(key: KeyPath, lines: dict[KeyPath, int]) -> int:
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that stands inside an annotation: of unions, Annotated, dict values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _known(model: type[BaseModel], location: Sequence[Any]) -> set[str]:
    """Names of the keys that are allowed where an unknown one was found; `location` as pydantic gives it."""
    models = [model]
    for part in location[:-1]:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models(field.annotation)]
        else:  # a key of a dict, or the tag of a discriminated union
            tagged = [m for m in models if part in get_args(getattr(m.model_fields.get("kind"), "annotation", None))]
            models = tagged or models
    return {name for m in models for name in m.model_fields}


def _problem(path: Path, item: Any, lines: dict[KeyPath, int], model: type[BaseModel]) -> str:
    key = _key(item, lines)
    where = f"{path}:{_line(key, lines)}: {'.'.join(key) or 'configuration'}"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key[-1], _known(model, item["loc"]), n=1, cutoff=0.5)
        return f"{where}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    if item["type"] == "missing":
        return f"{where}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    shown = item["input"]
    return f"{where}: {message}" + ("" if isinstance(shown, dict | list) else f" (found {shown!r})")
