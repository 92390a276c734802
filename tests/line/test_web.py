"""The live page: who may see it, what it serves, and what a real browser makes of it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from andon.runtime.app import LineApp
from andon.runtime.broker import EmbeddedBroker
from andon.runtime.bundle import Bundle
from andon.runtime.errors import ConfigError, DeliveryError
from andon.runtime.health import Check
from andon.runtime.lineconfig import WebConfig
from andon.runtime.startup import Options
from andon.runtime.web import server
from andon.runtime.web.server import CONNECTIONS, Backend, WebServer, page_token
from browser import browse

LIVE = {"kind": "test", "width": 64, "height": 48, "fps": 10, "pattern": "white"}


def backend(**changes: Any) -> Backend:
    asked: dict[str, Any] = {
        "state": lambda: {"cameras": {}},
        "picture": lambda camera, width, heat: b"jpeg" if camera == "cam0" else None,
        "cameras": ("cam0", "cam1"),
        "acknowledge": lambda camera, kind, by: {"acknowledged": [kind], "by": by},
        "metrics": lambda: b"andon_engines_open 1.0\n",
        "alive": lambda: [Check("judging", True)],
        "ready": lambda: [Check("judging", True), Check("broker", False, "nothing listens there")],
    }
    return Backend(**{**asked, **changes})


def ask(
    port: int, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


@pytest.fixture
def open_page() -> Iterator[int]:
    with WebServer("127.0.0.1", 0, backend(), None) as server:
        yield server.port


@pytest.fixture
def guarded_page() -> Iterator[int]:
    with WebServer("127.0.0.1", 0, backend(), "sesame") as server:
        yield server.port


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/", 200, "text/html"),
        ("/page.js", 200, "text/javascript"),
        ("/chart.js", 200, "text/javascript"),
        ("/page.css", 200, "text/css"),
        ("/api/state", 200, "application/json"),
        ("/api/picture/cam0?width=320&heat=0", 200, "image/jpeg"),
        ("/api/picture/cam1", 404, "application/json"),
        ("/api/picture/cam9", 404, "application/json"),
        ("/api/picture/cam0?width=1e9", 404, "application/json"),
        ("/api/picture/..%2f..%2fetc%2fpasswd", 404, "application/json"),
        ("/../server.py", 404, "application/json"),
        ("/server.py", 404, "application/json"),
        ("/metrics", 200, "text/plain"),
        ("/healthz", 200, "application/json"),
        ("/readyz", 503, "application/json"),
    ],
)
def test_routes(open_page: int, path: str, status: int, kind: str) -> None:
    found, _, headers = ask(open_page, path)
    assert found == status and headers["Content-Type"].startswith(kind)
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"


def test_not_ready_says_why(open_page: int) -> None:
    checks = json.loads(ask(open_page, "/readyz")[1])["checks"]
    assert checks["broker"] == {"ok": False, "detail": "nothing listens there"} and checks["judging"]["ok"]


@pytest.mark.parametrize("host", ["localhost:80", "127.0.0.1", "[::1]:8090", "127.0.0.9:1"])
def test_loopback_names_are_answered(open_page: int, host: str) -> None:
    assert ask(open_page, "/api/state", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8090", "10.0.0.1", "127.0.0.1.evil.example"])
def test_foreign_names_are_refused(open_page: int, host: str) -> None:
    for path in ("/", "/api/state", "/metrics", "/api/picture/cam0"):
        assert ask(open_page, path, Host=host)[0] == 403


def test_acknowledge_needs_our_header_and_a_known_camera(open_page: int) -> None:
    body = b'{"camera":"cam0","kind":"defect"}'
    assert ask(open_page, "/api/acknowledge", body)[0] == 403
    status, content, _ = ask(open_page, "/api/acknowledge", body, X_Andon="1")
    assert status == 200 and json.loads(content) == {"acknowledged": ["defect"], "by": "live page"}
    for malformed in (b"{", b"[]", b"[" * 4000):
        assert ask(open_page, "/api/acknowledge", malformed, X_Andon="1")[0] == 400
    for unknown in (b'{"camera":"x"}', b'{"camera":"cam0","kind":1}'):
        assert ask(open_page, "/api/acknowledge", unknown, X_Andon="1")[0] == 404
    assert ask(open_page, "/api/acknowledge", b"x" * 5000, X_Andon="1")[0] == 413
    assert ask(open_page, "/api/else", b"{}", X_Andon="1")[0] == 404


def test_token(guarded_page: int) -> None:
    for path in ("/", "/api/state", "/metrics", "/readyz", "/api/picture/cam0", "/page.js"):
        assert ask(guarded_page, path)[0] == 401
        assert ask(guarded_page, path, Authorization="Bearer sesamE")[0] == 401
    assert ask(guarded_page, "/healthz")[0] == 200
    assert ask(guarded_page, "/api/state", Authorization="Bearer sesame", Host="plant.example")[0] == 200
    assert ask(guarded_page, "/api/acknowledge", b'{"camera":"cam0"}', X_Andon="1")[0] == 401
    status, form, _ = ask(guarded_page, "/", Accept="text/html")
    assert status == 401 and b'name="token"' in form


def test_login_sets_a_cookie(guarded_page: int) -> None:
    assert ask(guarded_page, "/login", b"token=wrong")[0] == 401
    status, _, headers = ask(guarded_page, "/login", b"token=sesame")
    cookie = headers["Set-Cookie"]
    assert status == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask(guarded_page, "/api/state", Cookie=cookie.split(";")[0])[0] == 200


@pytest.mark.parametrize("number", ["\xb2", "9" * 5000, "-1", "+2", ""])
def test_what_is_no_number_is_refused_without_a_word(
    open_page: int, caplog: pytest.LogCaptureFixture, number: str
) -> None:
    path = f"/api/picture/cam0?width={quote(number) or '%20'}"
    assert ask(open_page, path)[0] == 404
    head = f"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: {number}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", open_page), 10) as line:
        line.sendall(head.encode("latin-1"))
        assert line.recv(4096).startswith(b"HTTP/1.1 413")
    assert not caplog.records, "anybody could fill the log with it"


def test_slow_clients_do_not_take_all_threads_and_descriptors(open_page: int, eventually: Callable[..., None]) -> None:
    def answered() -> bool:
        with suppress(OSError, http.client.HTTPException):
            return ask(open_page, "/healthz")[0] == 200
        return False

    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", open_page), 10)).sendall(b"GET /")
        assert not any(answered() for _ in range(3)), "one too many"
    eventually(answered)


def test_an_ipv6_address_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with WebServer("::1", 0, backend(), None) as server:
        assert server.url == f"http://[::1]:{server.port}/"
        with urllib.request.urlopen(f"{server.url}healthz", timeout=10) as answer:
            assert answer.status == 200


def test_taken_port_is_said(open_page: int) -> None:
    with pytest.raises(DeliveryError, match="live page"):
        WebServer("127.0.0.1", open_page, backend(), None)


# -- with a real line ------------------------------------------------------------------------------------------------


@contextmanager
def running(config: Path) -> Iterator[LineApp]:
    ready = threading.Event()
    app = LineApp(Options(config=config, backend="onnxruntime", threads=1), on_ready=lambda _: ready.set())
    thread = threading.Thread(target=app.run)
    thread.start()
    try:
        assert ready.wait(30)
        yield app
    finally:
        app.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def line(bundle: Path, broker: EmbeddedBroker, make_line: Any) -> Iterator[LineApp]:
    cameras = {name: {"source": LIVE, "product": "mono"} for name in ("top", "side")}
    sections = {"broker": {"port": broker.port, "retry_max": 0.5}, "web": {"port": 0}, "alarm": {"k": 2, "n": 2}}
    with running(make_line(cameras, bundle=str(bundle), **sections)) as app:
        yield app


def state(app: LineApp) -> dict[str, Any]:
    with urllib.request.urlopen(f"{app.operation.web.url}api/state", timeout=10) as answer:
        return json.load(answer)


def test_page_shows_the_line_and_acknowledges(line: LineApp, consumer: Any, eventually: Callable[..., None]) -> None:
    eventually(lambda: state(line)["cameras"]["top"]["alarms"])
    found = state(line)
    assert found["line"] == {"site": "site", "line": "line", "station": "station"}
    assert found["cameras"]["top"]["verdict"]["label"] == "NG" and all(check["ok"] for check in found["health"])
    assert [alarm["state"] for alarm in found["cameras"]["top"]["alarms"]] == ["raised"]
    port = line.operation.web.port
    status, content, _ = ask(port, "/api/acknowledge", b'{"camera":"top","kind":"defect"}', X_Andon="1")
    assert status == 200 and json.loads(content) == {"acknowledged": ["defect"]}
    assert state(line)["cameras"]["top"]["alarms"][0]["state"] == "acknowledged"
    assert state(line)["cameras"]["side"]["alarms"][0]["state"] == "raised"
    consumer.until(lambda: any(a["state"] == "acknowledged" for a in consumer.of("alarm", "top")))
    assert consumer.of("alarm", "top")[-1]["event"]["by"] == "live page"
    eventually(lambda: heat(port) > 5)


def heat(port: int) -> float:
    """How colourful the picture is: the camera's own is grey."""
    status, content, _ = ask(port, "/api/picture/top?width=64&heat=1")
    assert status == 200
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (48, 64, 3)
    return float(np.ptp(picture.astype(int), axis=2).mean())


def test_readiness_means_it(line: LineApp, broker: EmbeddedBroker, eventually: Callable[..., None]) -> None:
    port = line.operation.web.port
    eventually(lambda: ask(port, "/readyz")[0] == 200)
    broker.stop()
    eventually(lambda: ask(port, "/readyz")[0] == 503)
    checks = json.loads(ask(port, "/readyz")[1])["checks"]
    assert [name for name, check in checks.items() if not check["ok"]] == ["broker"]
    assert ask(port, "/healthz")[0] == 200, "a line without its broker still judges"
    with EmbeddedBroker(broker.port):
        eventually(lambda: ask(port, "/readyz")[0] == 200)


def test_a_score_that_is_not_a_number_does_not_break_the_page(
    nan_bundle: Path, make_line: Any, eventually: Any
) -> None:
    dark = {**LIVE, "pattern": "black"}
    config = make_line(
        {"cam0": {"source": dark, "product": "mono"}}, bundle=str(nan_bundle), broker=None, web={"port": 0}
    )
    with running(config) as app:
        eventually(lambda: state(app)["cameras"]["cam0"]["labels"].get("UNKNOWN", 0) > 2)
        verdict = state(app)["cameras"]["cam0"]["verdict"]
        assert (verdict["reason"], verdict["score"]) == ("not_a_number", None)
    with WebServer("127.0.0.1", 0, backend(state=lambda: {"a": [(float("nan"), 1.5, float("-inf"))]}), None) as server:
        assert json.loads(ask(server.port, "/api/state")[1]) == {"a": [[None, 1.5, None]]}


def test_a_broken_backend_does_not_end_the_server() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("oh")

    with WebServer("127.0.0.1", 0, backend(state=broken), None) as server:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server.port, "/api/state")
        assert ask(server.port, "/healthz")[0] == 200


def test_the_page_goes_by_the_stations_clock_as_it_is_now(tmp_path: Path) -> None:
    """After a jump that was over, every old verdict was shown as of now."""
    script = re.sub(r"^import .*$", "", (Path(server.__file__).parent / "page.js").read_text(), flags=re.MULTILINE)
    harness = """<body><script>(async () => {
        let ahead = 0;
        document.getElementById = () => document.createElement("div");
        globalThis.setTimeout = () => {};
        globalThis.fetch = async () => ({
            ok: true, status: 200, json: async () => ({ cameras: {} }),
            headers: { get: () => new Date(Date.now() + ahead).toUTCString() },
        });
        SCRIPT
        showLine = showDelivery = showLatency = showMemory = () => {};
        const seen = [];
        for (ahead of [3600e3, 0, -3600e3, 900]) { await refresh(); seen.push(Math.round(skew / 60e3)); }
        document.title = JSON.stringify(seen);
    })()</script></body>"""
    page = tmp_path / "clock.html"
    page.write_text(harness.replace("SCRIPT", script))
    assert "<title>[60,0,-60,0]</title>" in browse(page.as_uri())


def test_real_browser_shows_both_cameras(line: LineApp, eventually: Callable[..., None]) -> None:
    eventually(lambda: all(camera["alarms"] for camera in state(line)["cameras"].values()))
    document = browse(line.operation.web.url)
    assert document.count('class="verdict ng"') == 2 and document.count(">Acknowledge<") == 2
    assert "site / line / station" in document and "/api/picture/top" in document
    assert document.count('class="score-line"') == 2 and "No contact" not in document
    assert "acknowledged</dt>" in document and "encode" not in document and "judge</td>" in document


def test_nothing_is_cut_off_on_a_phone(line: LineApp, tmp_path: Path, eventually: Callable[..., None]) -> None:
    eventually(lambda: all(camera["alarms"] for camera in state(line)["cameras"].values()))
    picture = tmp_path / "phone.png"
    browse(line.operation.web.url, f"--screenshot={picture}", "--hide-scrollbars", size="390,1400")
    below_header = cv2.imread(str(picture))[160:]
    assert below_header.shape[1] == 390
    assert len(np.unique(below_header.reshape(-1, 3), axis=0)) > 50, "the page is not blank"
    margins = np.concatenate([below_header[:, :5], below_header[:, -5:]], axis=1)
    assert len(np.unique(margins.reshape(-1, 3), axis=0)) == 1, "cards keep their margin on both sides"


def test_a_square_picture_is_shown_whole(
    bundle: Path, make_line: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    image[:60, :, 1] = image[-60:, :, 0] = 120  # a green band at the top and a blue one at the bottom
    (tmp_path / "parts").mkdir()
    cv2.imwrite(str(tmp_path / "parts/a.png"), image)
    source = {"kind": "folder", "path": str(tmp_path / "parts"), "fps": 4, "loop": True}
    config = make_line({"a": {"source": source, "product": "mono"}}, bundle=str(bundle), broker=None, web={"port": 0})
    picture = tmp_path / "page.png"
    with running(config) as app:
        eventually(lambda: state(app)["cameras"]["a"]["labels"])
        browse(app.operation.web.url, f"--screenshot={picture}")
    blue, green, red = cv2.split(cv2.imread(str(picture)).astype(int))
    top, bottom = np.count_nonzero(green - blue > 50), np.count_nonzero(blue - np.maximum(green, red) > 50)
    assert top > 5000 and bottom == pytest.approx(top, rel=0.25)


def test_the_page_says_of_which_part_a_picture_is_and_when_there_is_no_threshold(
    make_bundle: Callable[..., Path], make_line: Any, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    """A verdict without a picture has no threshold either: "no threshold" told people to calibrate."""
    for camera, images in (("a", ("1", "2")), ("b", ("1",)), ("c", ("1", "2"))):
        (tmp_path / camera).mkdir()
        for name in images:
            cv2.imwrite(str(tmp_path / camera / f"{name}.png"), np.full((48, 64, 3), 200, np.uint8))
    (tmp_path / "b/2.png").write_bytes(b"no image")
    cameras = {
        name: {"source": {"kind": "folder", "path": str(tmp_path / name), "fps": 9}, "product": product}
        for name, product in {"a": "mono", "b": "mono", "c": "poly"}.items()
    }
    bundle = make_bundle(tmp_path / "bundle", thresholds=None)
    sections = {"broker": None, "web": {"port": 0}, "judge": {"thresholds": {"mono": 0.5}}}
    with running(make_line(cameras, bundle=str(bundle), **sections)) as app:
        eventually(lambda: all(sum(c["labels"].values()) == 2 for c in state(app)["cameras"].values()))
        document = browse(app.operation.web.url)
    assert document.count("earlier picture, part 1<") == document.count('class="picture older') == 1, "of b alone"
    assert document.count('class="against">no threshold<') == 1, "of c alone"


def test_the_page_says_which_thresholds_are_the_configurations(bundle: Path, make_line: Any, tmp_path: Path) -> None:
    with Bundle.load(bundle) as loaded:
        own = {"value": 0.7, "model": loaded.model_id}
    sections = {"broker": None, "web": {"port": 0}, "judge": {"thresholds": {"mono": own, "poly": 0.4}}}
    with running(make_line({"a": {"source": LIVE, "product": "mono"}}, bundle=str(bundle), **sections)) as app:
        document = browse(app.operation.web.url)
    assert "thresholds by configuration <b>mono, poly (whatever model runs)</b>" in document


def test_token_that_is_named_but_missing_is_refused(bundle: Path, make_line: Any) -> None:
    web = {"host": "0.0.0.0", "port": 0, "token_env": "ANDON_NO_SUCH_VARIABLE"}
    config = make_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(bundle), broker=None, web=web)
    with pytest.raises(ConfigError, match="ANDON_NO_SUCH_VARIABLE"):
        LineApp(Options(config=config, backend="onnxruntime")).run()


@pytest.mark.parametrize(
    ("token", "found"),
    [
        ("Schlüssel", "characters outside ASCII"),
        ("schlüssel ", "characters outside ASCII and spaces at its ends"),
        ("\u20ac\u20ac", "characters outside ASCII"),
        (" sesame", "spaces at its ends"),
        ("ses\tame", "control characters"),
    ],
)
def test_a_token_that_a_header_cannot_carry_is_refused(tmp_path: Path, token: str, found: str) -> None:
    (tmp_path / "token").write_text(token + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be sent as it is in a header") as error:
        page_token(WebConfig(token_file=tmp_path / "token"))
    assert error.value.found == found and token.strip() not in str(error.value)


@pytest.mark.parametrize("token", ["a b", "a;b,c\"d\\'", "~!@#$%^&*()=+/-_.:?<>[]{}|`"])
def test_every_other_token_opens_the_page(token: str) -> None:
    with WebServer("127.0.0.1", 0, backend(), token) as server:
        assert ask(server.port, "/api/state", Authorization=f"Bearer {token}")[0] == 200
        status, _, headers = ask(server.port, "/login", f"token={quote(token, safe='')}".encode())
        assert status == 303
        assert ask(server.port, "/api/state", Cookie=headers["Set-Cookie"].partition("; HttpOnly")[0])[0] == 200


def test_nothing_listens_after_the_end(bundle: Path, make_line: Any) -> None:
    config = make_line({"cam0": {"source": LIVE, "product": "mono"}}, bundle=str(bundle), broker=None, web={"port": 0})
    with running(config) as app:
        url = app.operation.web.url
        assert state(app)["ready"]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("andon-web", "operation")]
