"""The messages that docs/mqtt.md shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from andon.runtime import types

PAGE = Path(types.__file__).parents[1] / "docs" / "mqtt.md"


def examples() -> list[tuple[str, dict[str, Any]]]:
    """Topic below the station's, and the message, of every block of JSON on the page, which all have a topic."""
    text = PAGE.read_text(encoding="utf-8")
    said = r"^`(cam0/[\w/]+)`:.*(?:\n.+)*"  # a paragraph that begins with the topic
    found = re.findall(said + r"\n\n```json\n((?:.+\n)*?)```", text, re.MULTILINE)
    assert len(found) == text.count("```json"), "a block of JSON without a line that names its topic"
    return [(topic, json.loads(message)) for topic, message in found]
