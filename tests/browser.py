"""Pages in a real browser, where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(url: str, *options: str, size: str = "1280,900") -> str:
    """The page's document after six seconds in a real browser."""
    if CHROMIUM is None:
        pytest.skip("THIS PAGE IS NOT TESTED IN A BROWSER: no chromium here (apt-get install chromium)")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=6000", "--dump-dom", "--enable-logging=stderr", url],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    broken = [text for text in done.stderr.splitlines() if "CONSOLE" in text and ("Error" in text or "Refused" in text)]
    assert broken == []
    return done.stdout
