"""Every TensorRT name that our code uses exists in the bindings of the versions whose branch uses it.

The code is read, not run: for each version the branches that it would not take are left out (`strongly_typed(trt)`,
`version(trt) >= (a, b)`, `hasattr(x, "name")`), and every name in what remains must exist in that version's real
bindings. This shows that names exist; it cannot show that arguments are right.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import operator
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import trt_bindings
from tqdm import tqdm

ENGINE = Path(__file__).parents[2] / "runtime" / "engine"
#: trt.py and whatever imports it
FILES = sorted(p.name for p in ENGINE.glob("*.py") if p.name == "trt.py" or "from .trt import" in p.read_text())
VERSIONS = tuple(trt_bindings.WHEELS)
_COMPARE = {ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq}


class Reader:
    """Walks a module as one TensorRT version would run it and collects the names it uses.

    rooted: dotted names that start at the module (`trt.DataType.HALF`). attributes: other attribute names.
    """

    def __init__(self, version: str, names: Mapping[str, frozenset[str]]):
        self.version = tuple(int(part) for part in version.split("."))
        self.names = names
        self.everywhere = frozenset().union(*names.values())
        self.rooted: set[tuple[str, ...]] = set()
        self.attributes: set[tuple[str, str]] = set()

    def read(self, module: ast.Module) -> Reader:
        """Everything public, and the private functions that it comes to call in this version."""
        private = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef) and n.name.startswith("_")}
        todo = [n for n in module.body if not (isinstance(n, ast.FunctionDef) and n.name in private)]
        while todo:
            self._collect(todo.pop(), private, todo)
        return self

    def _collect(self, tree: ast.AST, private: dict[str, ast.FunctionDef], todo: list[ast.stmt]) -> None:
        for node in self._reached(tree):
            if isinstance(node, ast.Name) and node.id in private:
                todo.append(private.pop(node.id))
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            chain = _chain(node)
            if chain and chain[0] == "trt":
                self.rooted.add(tuple(chain[1:]))
            elif chain[:2] == ["self", "_trt"]:
                self.rooted.add(tuple(chain[2:])) if len(chain) > 2 else None
            else:
                self.attributes.add((".".join(chain) or f"(...).{node.attr}", node.attr))

    def _reached(self, tree: ast.AST) -> Iterator[ast.AST]:
        yield tree
        if isinstance(tree, ast.If | ast.IfExp):
            verdict = self._decide(tree.test)
            yield from self._reached(tree.test)
            body = tree.body if isinstance(tree.body, list) else [tree.body]
            orelse = tree.orelse if isinstance(tree.orelse, list) else [tree.orelse]
            for child in (*(body if verdict is not False else ()), *(orelse if verdict is not True else ())):
                yield from self._reached(child)
            return
        for child in ast.iter_child_nodes(tree):
            yield from self._reached(child)

    def _decide(self, test: ast.expr) -> bool | None:
        """What a condition is in this version; None if it does not depend on it."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self._decide(value) for value in test.values]
            if isinstance(test.op, ast.And):
                return False if False in parts else True if set(parts) == {True} else None
            return True if True in parts else False if set(parts) == {False} else None
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
            if test.func.id == "strongly_typed":
                return self.version >= (10, 0)
            if test.func.id == "hasattr" and isinstance(test.args[1], ast.Constant):
                return self._has(test.args[0], str(test.args[1].value))
        if isinstance(test, ast.Compare) and isinstance(test.left, ast.Call) and _called(test.left) == "version":
            return bool(_COMPARE[type(test.ops[0])](self.version, ast.literal_eval(test.comparators[0])))
        return None

    def _has(self, owner: ast.expr, name: str) -> bool:
        chain = _chain(owner)
        rooted = chain[1:] if chain[:1] == ["trt"] else chain[2:] if chain[:2] == ["self", "_trt"] else None
        if rooted is None:
            return name in self.everywhere
        return name in self.names.get(".".join(rooted), frozenset())


def _chain(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def aliases(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """Local names bound to a part of the module: ``kinds = trt.DataType``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            chain = _chain(node.value)
            if chain[:1] == ["trt"]:
                found[node.targets[0].id] = tuple(chain[1:])
    return found


def ours() -> frozenset[str]:
    """Attribute names that are not TensorRT's: defined in runtime/engine, or of the modules and types used there."""
    known: set[str] = set()
    for value in (
        "",
        b"",
        0,
        0.0,
        [],
        {},
        (),
        set(),
        Path(),
        ValueError(),
        io.BytesIO(),
        hashlib.sha256(),
        Path().stat(),
        tqdm(disable=True, total=1),
    ):
        known.update(dir(value))
    for path in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.Attribute) and _chain(node)[:1] == ["self"] and isinstance(node.ctx, ast.Store):
                known.add(node.attr)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in sys.stdlib_module_names or alias.name == "numpy":
                        known.update(dir(importlib.import_module(alias.name)))
    from andon.runtime.manifest import Stage, Tensor

    for model in (Stage, Tensor):
        known.update(model.model_fields)
    return frozenset(known)


def names(version: str) -> dict[str, frozenset[str]]:
    try:
        return trt_bindings.names(version)
    except FileNotFoundError as error:
        pytest.skip(f"the bindings of TensorRT {version} cannot be had here: {error}")


def missing(source: str, version: str, bindings: Mapping[str, frozenset[str]], every: frozenset[str]) -> list[str]:
    """TensorRT names in `source` that the version lacks. every: attribute names of all versions together."""
    tree = ast.parse(source)
    reader = Reader(version, bindings).read(tree)
    short, mine = aliases(tree), ours()
    gone = []
    rooted = set(reader.rooted)
    for chain, attribute in reader.attributes:
        head, *rest = chain.split(".")
        if head in short:
            rooted.add((*short[head], *rest))
        elif attribute in every and attribute not in mine and attribute not in reader.everywhere:
            gone.append(f"{chain} (in other versions only)")
        elif attribute not in every and attribute not in mine:
            gone.append(f"{chain} (in no version)")
    for dotted in rooted:
        owner, name = ("", dotted[0]) if len(dotted) == 1 else (".".join(dotted[:-1]), dotted[-1])
        if len(dotted) <= 2 and name not in bindings.get(owner, frozenset()):
            gone.append("trt." + ".".join(dotted))
    return sorted(gone)


@pytest.fixture(scope="module")
def every_attribute() -> frozenset[str]:
    return frozenset().union(*(attributes for v in VERSIONS for attributes in names(v).values()))


def test_the_files_are_found() -> None:
    assert {"trt.py", "tensorrt.py", "build.py"} <= set(FILES)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_names_exist(file: str, version: str, every_attribute: frozenset[str]) -> None:
    gone = missing((ENGINE / file).read_text(), version, names(version), every_attribute)
    assert not gone, f"runtime/engine/{file} uses what TensorRT {version} does not have: {', '.join(gone)}"


@pytest.mark.parametrize(
    ("source", "lacking"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", {"11.4"}),
        ("if strongly_typed(trt):\n    pass\nelse:\n    config.set_flag(trt.BuilderFlag.FP16)", set()),
        ("x = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED", {"8.6"}),
        ("size = e.device_memory_size_v2 if hasattr(e, 'device_memory_size_v2') else e.device_memory_size", set()),
        ("size = e.device_memory_size", {"11.4"}),
        ("context.execute_asink_v3(0)", set(VERSIONS)),
        ("if version(trt) < (10, 0):\n    e.get_binding_name(0)", set()),
        ("e.get_binding_name(0)", {"10.3", "10.13", "10.16", "11.4"}),
        ("def _old(e):\n    e.get_binding_name(0)\nif not strongly_typed(trt):\n    _old(e)", set()),
        ("def _old(e):\n    e.get_binding_name(0)\n_old(e)", {"10.3", "10.13", "10.16", "11.4"}),
        ("kinds = trt.DataType\nx = kinds.NOPE", set(VERSIONS)),
    ],
)
def test_the_reader_finds_what_is_missing(source: str, lacking: set[str], every_attribute: frozenset[str]) -> None:
    assert {v for v in VERSIONS if missing(source, v, names(v), every_attribute)} == lacking
