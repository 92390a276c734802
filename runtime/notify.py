"""systemd's notification protocol (sd_notify(3)): ready, watchdog, stopping. Without systemd nothing happens."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from .verdict import readable

log = logging.getLogger(__name__)


class Notifier:
    """Sends to the socket that systemd names in NOTIFY_SOCKET. Where nobody listens there, that is said once.

    Attributes:
        watchdog_interval: seconds between feedings that systemd asks for (half of WatchdogSec); None: it asks for none.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        asked = environment.get("WATCHDOG_PID") in (None, str(os.getpid())) and self._address
        microseconds = environment.get("WATCHDOG_USEC", "") if asked else ""
        self.watchdog_interval = int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) else None
        self._unheard = False

    def ready(self, status: str) -> None:
        """The service is up."""
        self._send(f"READY=1\nSTATUS={status}")

    def starting(self, status: str, seconds: float) -> None:
        """Still starting; systemd shall wait ``seconds`` more (engines may take minutes to build)."""
        self._send(f"STATUS={status}\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def feed(self, status: str) -> None:
        """Frames are judged: keep the watchdog quiet."""
        self._send(f"WATCHDOG=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        """The service is going down in good order."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.sendto(readable(text).encode(), self._address)
        except OSError as error:  # a line that judges needs nobody who listens
            if not self._unheard:
                log.warning("systemd does not hear: NOTIFY_SOCKET %s: %s", self._address.replace("\0", "@"), error)
            self._unheard = True
