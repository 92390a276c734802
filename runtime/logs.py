"""Log lines: one per state change, key=value where a machine may want to read them; journald adds the time."""

from __future__ import annotations

import logging
import os
import sys
import time


class _Utc(logging.Formatter):
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    @staticmethod
    def converter(timestamp: float | None = None) -> time.struct_time:
        """Time stamps are UTC, like those of the messages."""
        return time.gmtime(timestamp)


def configure_logging(level: str) -> None:
    """Log to standard error; under systemd (JOURNAL_STREAM) without the time, which the journal has."""
    handler = logging.StreamHandler(sys.stderr)
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    handler.setFormatter(_Utc(f"{stamp}%(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
