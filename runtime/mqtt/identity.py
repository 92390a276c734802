"""One name for the parts of a topic: client ids and Home Assistant's device ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence


def joined(parts: Sequence[str], separator: str, illegal: str = "") -> str:
    """The parts as one name that no other parts have.

    Args:
        parts: ..., station, camera; two at least.
        separator: one character between them.
        illegal: regular expression of characters that the name must not have; each becomes the separator.

    Names may contain the separator, so that `press` and `left-top` would be one with `press-left` and `top`. A hash of
    the parts is added where they cannot be told from the name. Stations keep theirs (press-2): if no other part
    contains the separator, what the others leave is the station's.
    """
    legal = [re.sub(illegal, separator, part) if illegal else part for part in parts]
    name = separator.join(legal)
    if legal == list(parts) and not any(separator in part for part in (*parts[:-2], parts[-1])):
        return name
    return separator.join((name, hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]))
