"""docs/install.md is held to what .ci/setup installs, and .ci/setup to a page that says what it promises."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from andon.cli import COMMANDS

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
SETUP = (ROOT / ".ci" / "setup").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def refusal(folder: Path) -> str:
    """What .ci/setup says on a system without dpkg; it changes nothing."""
    for tool in ("bash", "dirname", "mktemp", "rm", "id"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        [str(folder / "bash"), str(ROOT / ".ci" / "setup"), "demo"],
        env={"PATH": str(folder), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "not a Debian system" in done.stderr
    return done.stderr


def test_where_there_is_no_apt_setup_points_to_a_page_that_has_the_commands(tmp_path: Path) -> None:
    said = refusal(tmp_path)
    page, heading = re.search(r"see (docs/[\w-]+\.md), ([\w ]+):", said).groups()  # type: ignore[union-attr]
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    extras = re.search(r'extras="([\w,]+)"', SETUP)
    assert extras is not None
    assert f"pip install -e '.[{extras[1]}]' -c constraints.txt" in section
    packages = re.search(r"^packages=\((.*?)\)", SETUP, re.MULTILINE | re.DOTALL)
    assert packages is not None
    assert {name for name in packages[1].split() if f" {name}" not in section} == set(), "packages that it lacks"


def test_every_extra_is_explained() -> None:
    told = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE))
    assert told == set(PROJECT["optional-dependencies"])
    for extras in re.findall(r"\.\[([\w,]+)\]", PAGE + (ROOT / "README.md").read_text(encoding="utf-8")):
        assert {*extras.split(",")} <= told


def test_the_page_says_what_each_command_needs() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| none:", "| `workstation`"))]
    told = {name for row in rows for name in re.findall(r"`(\w+)", row.partition(" |")[2])}
    assert {*COMMANDS} <= told


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
