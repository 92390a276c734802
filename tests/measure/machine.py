"""What a measurement says about the machine and the code it was made with; no names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def machine() -> str:
    """Processor, CPUs that may be used, memory and system, in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def software() -> str:
    """Python, the packages that do the work, and the commit."""
    found = [f"Python {platform.python_version()}"]
    for package in ("onnxruntime", "torch", "numpy", "paho-mqtt"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return ", ".join([*found, f"commit {git.stdout.strip()}"] if git.returncode == 0 else found)


def newest_bundle() -> Path:
    """The newest folder under bundles/.

    Raises:
        SystemExit: there is none.
    """
    found = [path for path in (ROOT / "bundles").glob("*/") if not path.name.startswith(".")]
    if not found:
        raise SystemExit("no bundle under bundles/: run `make demo` first, or name one (BUNDLE=..., SOAK_BUNDLE=...)")
    return max(found, key=lambda path: path.stat().st_mtime)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
