"""README.md is held to: its commands exist as written, the demo runs them, its links lead somewhere, packages ship."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import tomllib
from andon import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("andon ")]
DEMO = (ROOT / ".ci" / "demo").read_text(encoding="utf-8")


def parsed(arguments: list[str]) -> argparse.Namespace:
    """As the command line parses them; the parser raises on what it does not know."""
    parser = cli._parser(arguments[0])
    return parser.parse_args(arguments)


def options(arguments: list[str]) -> set[str]:
    return {a for a in arguments if a.startswith("--")}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses_and_its_files_exist(line: str) -> None:
    arguments = shlex.split(line)[1:]
    args = parsed(arguments)
    config = getattr(args, "config", None)
    assert config is None or (ROOT / config).is_file(), f"no {config}"


def test_the_demo_runs_what_the_readme_says() -> None:
    """Every command of the main job, with at least the options that the README gives it."""
    script = [shlex.split(line.partition(" >")[0]) for line in re.findall(r"run (andon .*)", DEMO)]
    ran = {words[1]: words[1:] for words in script}
    for words in ran.values():
        parsed([re.sub(r"\$\w+", "hvq", word) for word in words])
    told = {shlex.split(line)[1]: shlex.split(line)[1:] for line in COMMANDS}
    assert set(ran) >= {"train", "export", "calibrate", "run", "watch", "eval"}
    for name in set(ran) & set(told):
        assert options(told[name]) <= options(ran[name]), name


def test_every_command_is_in_the_table() -> None:
    rows = " ".join(line for line in README.splitlines() if line.startswith("| `andon"))
    for name in cli.COMMANDS:
        assert re.search(rf"`(andon )?{name}`", rows), f"{name} is not in README's table of commands"


def test_options_named_in_the_table_exist() -> None:
    for row in (line for line in README.splitlines() if line.startswith("| `andon")):
        name = re.match(r"\| `andon (\w+)`", row)
        assert name is not None
        parser = argparse.ArgumentParser()
        import_module(cli.COMMANDS[name[1]][0]).configure(parser)
        for option in re.findall(r"`(--[\w-]+)`", row):
            assert option in parser.format_help(), f"andon {name[1]} has no {option}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_scripts_that_make_runs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for script in re.findall(r"\.ci/\w+", makefile):
        assert (ROOT / script).is_file(), f"make runs {script}, which is not there"
    for name in re.findall(r"-m andon\.cli (\w+)", makefile):
        assert name in cli.COMMANDS, f"make runs andon {name}, which is no command"


def test_every_package_ships() -> None:
    """The explicit list of DESIGN.md 2: a package that is missing from it works here and nowhere else."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tops = ("calib", "configs", "export", "runtime", "train")
    found = {"andon"} | {
        ".".join(("andon", *path.parent.relative_to(ROOT).parts))
        for top in tops
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found
    bare = [p for top in tops for p in (ROOT / top).rglob("*.py") if not (p.parent / "__init__.py").is_file()]
    assert not bare, "modules outside of a package"


def test_every_environment_variable_is_in_the_users_documents() -> None:
    sources = [
        ROOT / "cli.py",
        *(p for room in ("runtime", "calib", "train", "export") for p in (ROOT / room).rglob("*.py")),
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    read = {*re.findall(r"""["'](ANDON_[A-Z_]+)["']""", code)}
    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert len(read) > 3 and "STATE_DIRECTORY" in told
    assert {name for name in read if f"`{name}`" not in told} == set()
