"""A mosquitto of our own on loopback, for the demo, tests and stations without a broker."""

from __future__ import annotations

import getpass
import logging
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import DeliveryError
from .tempfolder import TemporaryFolder

log = logging.getLogger(__name__)
_START_TIMEOUT = 10.0
#: One that ran for so many seconds is started again at once, else after a pause that doubles between these two.
_STEADY = 60.0
_PAUSES = (1.0, 60.0)


class EmbeddedBroker:
    """Started by :meth:`start` on a loopback port, stopped with us; a context manager.

    Args:
        port: TCP port; 0 takes a free one.
        settings: further lines of mosquitto.conf; those of a listener apply to ours.
        persistence: folder in which retained messages outlive the broker; None: they do not.

    Attributes:
        port: the port it listens on.
    """

    host = "127.0.0.1"

    def __init__(self, port: int = 0, settings: Sequence[str] = (), persistence: Path | None = None):
        self.port = port
        self._settings = tuple(settings)
        self._persistence = persistence
        self._folder: TemporaryFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._command: list[str] = []
        self._started_at = 0.0
        self._pause = 0.0
        self._again_at: float | None = None  # None: no end was noticed since the last start

    def start(self) -> EmbeddedBroker:
        """Start mosquitto and wait until it accepts connections.

        Raises:
            DeliveryError: mosquitto is not installed, or ended at once; with its own words.
        """
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise DeliveryError(
                "the embedded broker needs mosquitto",
                found="no program mosquitto",
                expected="mosquitto 2.0 or newer",
                next_step="apt-get install -y mosquitto, or set broker.embedded: false and name a broker",
            )
        self.port = _bindable(self.port)
        self._folder = TemporaryFolder("broker")
        folder = Path(self._folder.name)
        (folder / "mosquitto.conf").write_text(self._configuration())
        self._command = [*_bound_to_us(), program, "-c", str(folder / "mosquitto.conf")]
        self._spawn(folder)
        self._wait(folder)
        return self

    def _spawn(self, folder: Path) -> None:
        with (folder / "mosquitto.log").open("wb") as said:
            self._process = subprocess.Popen(
                self._command,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the line, which still has verdicts to deliver
            )
        self._started_at, self._again_at = time.monotonic(), None

    def attend(self) -> None:
        """If it has ended by itself, start it again on the same port, without waiting for it; to be called often.

        From the thread that started it: the kernel ends it with that thread.
        """
        if self._process is None or self._folder is None or (code := self._process.poll()) is None:
            return
        now, folder = time.monotonic(), Path(self._folder.name)
        if self._again_at is None:
            first, last = _PAUSES
            steady = now - self._started_at >= _STEADY
            self._pause = 0.0 if steady else min(max(first, 2 * self._pause), last)
            self._again_at = now + self._pause
            ending = f"signal {-code}" if code < 0 else f"exit code {code}"
            when = f"in {self._pause:g} s" if self._pause else "at once"
            log.error("the embedded broker has ended (%s%s); it is started again %s", ending, self._said(folder), when)
        if now < self._again_at:
            return
        try:
            self._spawn(folder)
        except OSError as error:
            self._again_at = now + _PAUSES[1]
            log.error("the embedded broker cannot be started: %s; tried again in %g s", error, _PAUSES[1])
        else:
            log.warning("the embedded broker is started again on %s:%d", self.host, self.port)

    @staticmethod
    def _said(folder: Path) -> str:
        """The end of what it said, as words to append."""
        try:
            said = (folder / "mosquitto.log").read_text(errors="replace").strip()[-300:]
        except OSError:
            return ""
        return f", {said}" if said else ""

    def stop(self) -> None:
        """Ask it to end, then insist; remove its folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def kill(self) -> None:
        """End it without farewell, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configuration(self) -> str:
        lines = [f"listener {self.port} {self.host}", *self._settings]
        if not any(line.startswith("allow_anonymous") for line in self._settings):
            lines.append("allow_anonymous true")
        # Started by root it would change to the user mosquitto, who cannot read our folder or certificates.
        lines.append(f"user {getpass.getuser()}")
        # mosquitto lets a client have only 20 unacknowledged messages unless told otherwise.
        lines += ["max_inflight_messages 1000", "max_queued_messages 100000", "log_type warning", "log_type error"]
        if self._persistence is not None:
            lines += ["persistence true", f"persistence_location {self._persistence}/"]
        return "\n".join(lines) + "\n"

    def _wait(self, folder: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection((self.host, self.port), timeout=0.5).close()
                return
            except OSError:
                time.sleep(0.02)
        said = (folder / "mosquitto.log").read_text(errors="replace").strip()[-500:]
        self.stop()
        raise DeliveryError(
            f"the embedded broker did not start on port {self.port}",
            found=said or f"no connection within {_START_TIMEOUT:g} s",
            expected="a free port and a mosquitto that runs",
            next_step="set broker.port: 0 for a free port",
        )


def _bound_to_us() -> list[str]:
    """Words before the command that make the kernel end it when we are killed; none where setpriv is missing."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "TERM", "--"]


def _bindable(port: int) -> int:
    """The port itself if it is free, a free one for 0.

    Raises:
        DeliveryError: something listens there; mosquitto would end, and we would talk to the other one.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DeliveryError(
                f"the embedded broker did not start on port {port}",
                found=error.strerror,
                expected="a free port",
                next_step="set broker.port: 0 for a free port",
            ) from error
        free: int = probe.getsockname()[1]
        return free


def announcement(state: Path) -> Path:
    """Where a running line with an embedded broker on a free port writes its address, for `andon watch --config`."""
    return state / "broker.address"


@contextmanager
def announced(state: Path, address: str) -> Iterator[None]:
    """Write `address` (HOST:PORT) for others to find while the broker runs."""
    path = announcement(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(address + "\n", encoding="ascii")
    draft.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
