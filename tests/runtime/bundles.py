"""Bundles that tests change, and what refuses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from andon.runtime.bundle import DIGEST, MANIFEST, Bundle
from andon.runtime.errors import BundleError
from andon.runtime.manifest import Threshold

MakeBundle = Callable[..., Path]
ROOT = Path(__file__).parents[2]
OPEN = Path.open
THRESHOLD = Threshold(value=1.0, false_alarm_rate=0.05, samples=19)


def rewrite(root: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change the manifest; `sign` makes its hash fit again, so that only the content is wrong."""
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (root / MANIFEST).write_bytes(raw)
    if sign:
        (root / DIGEST).write_text(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n")


def refused(root: Path, match: str) -> BundleError:
    with pytest.raises(BundleError, match=match) as error:
        Bundle.load(root)
    return error.value
