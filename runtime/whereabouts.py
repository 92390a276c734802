"""Where a line's broker and its state are, for whoever looks for them.

Imports neither numpy nor OpenCV: `andon watch` starts beside a line that judges, `andon doctor` where they are missing.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError, quoted
from .lineconfig import BrokerConfig, LineConfig


def broker_at(address: str, settings: BrokerConfig | None = None) -> BrokerConfig:
    """The broker that --broker names, with the other settings of a configuration's.

    address: HOST:PORT; an IPv6 address stands in brackets, as in a URL.

    Raises:
        ConfigError: it is no address.
    """
    named, _, port = address.rpartition(":")
    host = named[1:-1] if named.startswith("[") and named.endswith("]") else named
    plain = host == named and ":" in host  # IPv6 without brackets: where does the address end?
    if not host or plain or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"--broker {address} is no address",
            found=address,
            expected="HOST:PORT with a port from 1 to 65535, an IPv6 address in brackets: [::1]:1883",
            next_step="give both, e.g. --broker 127.0.0.1:1883",
        )
    base = settings or BrokerConfig()
    return base.model_copy(update={"host": host, "port": int(port), "embedded": False})


def state_folder(config: LineConfig, file: Path) -> Path:
    """Where outbox, overrides and memory live."""
    named = config.state or os.environ.get("STATE_DIRECTORY")
    return Path(named) if named else file.absolute().parent / "state"


def state_elsewhere(config: LineConfig, file: Path, command: str) -> str:
    """Where a service may keep this line's state, and how `command` looks there; empty where the configuration or the
    environment says which folder it is. systemd tells $STATE_DIRECTORY to the service alone."""
    if config.state or os.environ.get("STATE_DIRECTORY"):
        return ""
    return (
        "a service keeps its state elsewhere unless 'state' names the folder; to look there: "
        f"STATE_DIRECTORY=/var/lib/andon/{quoted(file.stem)} andon {command} --config {quoted(file)}"
    )
