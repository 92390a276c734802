"""A camera's configuration and what its source gives, for the tests of sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from andon.runtime.lineconfig import CameraConfig
from andon.runtime.source import EndOfSource, Shot, make_source


def camera(source: dict[str, Any], **settings_: Any) -> CameraConfig:
    return CameraConfig.model_validate({"source": source, **settings_})


def play(config: CameraConfig, limit: int = 1000) -> Iterator[Shot]:
    source = make_source("cam", config)
    source.open()
    try:
        while limit:
            try:
                shot = source.read(1.0)
            except EndOfSource:
                return
            if shot is not None:
                limit -= 1
                yield shot
    finally:
        source.close()
