"""Where TensorRT plans are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = "ANDON_CACHE"


def default_cache(root: Path | None = None) -> Path:
    """The folder of plans: plans/ in `root`, else in $ANDON_CACHE, else in the user's cache folder."""
    if given := root or os.environ.get(CACHE):
        return Path(given) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "andon" / "plans"
