"""The live page's HTTP server: a handful of GET routes and one POST, on the standard library's threading server.

Bound to loopback it asks for no token, but answers only requests that name a loopback host (DNS rebinding). Bound
elsewhere every request but /healthz and the style sheet needs the token: ``Authorization: Bearer``, or the cookie that
the login form sets. A POST needs the header X-Andon, which a foreign page cannot send without our consent.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..configfile import secret
from ..errors import AndonError, ConfigError, DeliveryError
from ..health import Check
from ..lineconfig import WebConfig
from ..metrics import CONTENT_TYPE
from ..verdict import dumps, number

log = logging.getLogger("andon.web")

_STATIC = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_COOKIE = "andon_token"
_MAX_BODY = 4096
#: Connections at once; each has a thread and a descriptor, and the line needs some for cameras, broker and disk. A
#: browser keeps up to six, an idle one is closed after _Handler.timeout seconds.
CONNECTIONS = 64


@dataclass(frozen=True)
class Backend:
    """What the server shows and does; called on its threads."""

    state: Callable[[], dict[str, Any]]
    picture: Callable[[str, int, bool], bytes | None]
    cameras: tuple[str, ...]
    acknowledge: Callable[[str, str | None, str | None], dict[str, Any]]
    metrics: Callable[[], bytes]
    alive: Callable[[], list[Check]]
    ready: Callable[[], list[Check]]


def page_token(config: WebConfig) -> str | None:
    """The token that the configuration names, None if it names none.

    Raises:
        ConfigError: it is not there, or is not what every browser and client sends alike in a header.
    """
    token = secret("web.token", config.token_env, config.token_file)
    if token is None or (token.isascii() and token.isprintable() and token == token.strip()):
        return token
    kinds = ["characters outside ASCII"] * (not token.isascii()) + ["spaces at its ends"] * (token != token.strip())
    raise ConfigError(
        "web.token: the token cannot be sent as it is in a header",
        found=" and ".join(kinds) or "control characters",
        expected="printable ASCII without spaces at its ends",
        next_step="make a new one: openssl rand -hex 24",
    )


class WebServer:
    """Serves from :meth:`__enter__` to :meth:`__exit__`, on one thread that accepts and one per connection.

    Attributes:
        port, url: where it listens.

    Raises:
        DeliveryError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, backend: Backend, token: str | None):
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), _Handler)
        except OSError as error:
            raise DeliveryError(
                f"the live page cannot be served on {host}:{port}",
                found=error.strerror,
                expected="an address of this machine with a free port",
                next_step="set web.port: 0 for a free port, or web: null for no page",
            ) from error
        self._server.backend = backend
        self._server.token = token
        self.port = int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="andon-web", daemon=True)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser's kept-alive connection must not hold up the end of the line
    request_queue_size = 32
    backend: Backend
    token: str | None

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """On a thread of its own; one too many is closed at once."""
        if not self._free.acquire(blocking=False):
            log.debug("%s: more than %d connections", client_address, CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was started that could release it
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no news; anything else is logged, the server goes on."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug("%s: %s", client_address, error)
        else:
            log.error("%s: %s", client_address, error, exc_info=error)


class _Server6(_Server):
    """On an IPv6 address; on :: Linux takes IPv4 as well."""

    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "andon"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """Pages, state, pictures, metrics, health."""
        url = urlsplit(self.path)
        if url.path == "/healthz":
            self._checks(self.server.backend.alive())
        elif url.path != "/page.css" and not self._admitted():
            return
        elif url.path == "/readyz":
            self._checks(self.server.backend.ready())
        elif url.path in _STATIC:
            name, kind = _STATIC[url.path]
            self._send(HTTPStatus.OK, kind, files("andon.runtime.web").joinpath(name).read_bytes())
        elif url.path == "/api/state":
            self._json(HTTPStatus.OK, self.server.backend.state())
        elif url.path == "/metrics":
            self._send(HTTPStatus.OK, CONTENT_TYPE, self.server.backend.metrics())
        elif url.path.startswith("/api/picture/"):
            self._picture(unquote(url.path.removeprefix("/api/picture/")), parse_qs(url.query))
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        """Login and acknowledge."""
        length = _whole(self.headers.get("Content-Length", ""))
        if length is None or length > _MAX_BODY:
            self.close_connection = True
            self._json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"a body of at most {_MAX_BODY} bytes"})
            return
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        if path == "/login":
            self._login(body)
        elif not self._admitted():
            return
        elif self.headers.get("X-Andon") is None:
            self._json(HTTPStatus.FORBIDDEN, {"error": "the header X-Andon is missing"})
        elif path == "/api/acknowledge":
            self._acknowledge(body)
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    # -- who may ---------------------------------------------------------------------------------------------------

    def _admitted(self) -> bool:
        token = self.server.token
        if token is None:
            if _is_loopback(self.headers.get("Host", "")):
                return True
            self._json(HTTPStatus.FORBIDDEN, {"error": "this page is for this machine only"})
            return False
        if any(hmac.compare_digest(given.encode(), token.encode()) for given in self._given_tokens()):
            return True
        if "text/html" in self.headers.get("Accept", ""):
            self._send(HTTPStatus.UNAUTHORIZED, "text/html; charset=utf-8", _LOGIN.encode())
        else:
            self._json(HTTPStatus.UNAUTHORIZED, {"error": "a token is needed: Authorization: Bearer ..."})
        return False

    def _given_tokens(self) -> list[str]:
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        tokens = [value.strip()] if kind.lower() == "bearer" else []
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            return tokens
        return tokens if cookie is None else [*tokens, cookie.value]

    def _login(self, body: bytes) -> None:
        token = self.server.token
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        if token is None or not hmac.compare_digest(given.encode(), token.encode()):
            self._send(HTTPStatus.UNAUTHORIZED, "text/html; charset=utf-8", _LOGIN.encode())
            return
        cookie = SimpleCookie({_COOKIE: given})[_COOKIE]
        for name, value in (("httponly", True), ("samesite", "Strict"), ("path", "/"), ("max-age", 30 * 86400)):
            cookie[name] = value
        self._send(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie.OutputString()})

    # -- answers -----------------------------------------------------------------------------------------------------

    def _picture(self, camera: str, query: dict[str, list[str]]) -> None:
        width = _whole(query.get("width", ["640"])[0])
        if camera not in self.server.backend.cameras or width is None or not 16 <= width <= 4096:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such camera or width"})
            return
        picture = self.server.backend.picture(camera, width, query.get("heat", ["1"])[0] == "1")
        if picture is None:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no picture yet"})
            return
        self._send(HTTPStatus.OK, "image/jpeg", picture)

    def _acknowledge(self, body: bytes) -> None:
        try:
            asked = json.loads(body or b"{}")
            camera, kind = asked["camera"], asked.get("kind")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._json(HTTPStatus.BAD_REQUEST, {"error": 'expected {"camera": ..., "kind": ...}'})
            return
        if camera not in self.server.backend.cameras or (kind is not None and not isinstance(kind, str)):
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such camera"})
            return
        try:
            self._json(HTTPStatus.OK, self.server.backend.acknowledge(camera, kind, "live page"))
        except AndonError as error:
            self._json(HTTPStatus.CONFLICT, {"error": error.what, "next": error.next_step})
        except KeyError:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such alarm"})

    def _checks(self, checks: list[Check]) -> None:
        good = all(check.ok for check in checks)
        document = {"ok": good, "checks": {c.name: {"ok": c.ok, "detail": c.detail} for c in checks}}
        self._json(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, document)

    def _json(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        try:
            body = dumps(document)
        except ValueError:  # a score that is not a number
            body = dumps(_finite(document))
        self._send(status, "application/json", body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""
        log.debug(format, *args)


def _whole(text: str) -> int | None:
    """A number in a request; None for what is none, such as the superscript that str.isdigit lets pass."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _finite(value: Any) -> Any:
    """The same with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return number(value) if isinstance(value, float) else value


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Andon</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="stylesheet" href="/page.css"></head><body><form method="post" action="/login" class="panel login">
<h1>Andon</h1><label>Token <input type="password" name="token" autofocus autocomplete="current-password"></label>
<button>Open</button></form></body></html>"""
