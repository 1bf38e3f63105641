"""Attacks from the web: forged requests, rebound names, smuggled requests, slow clients, many headers.

Where each comes from: CWE-352 and OWASP's CSRF and login-CSRF notes; DNS rebinding of loopback servers (CVE-2018-5702
of Transmission, CVE-2024-28224 of Ollama); CWE-444 and "HTTP Desync Attacks" (CL.TE, TE.CL, TE.TE, bare LF as in
CVE-2023-30589 and CVE-2025-22871, chunk extensions as in CVE-2023-39326 and CVE-2025-66373, h2c smuggling), RFC 9112
sections 2.2, 5.1, 6.3 and 7.1; CWE-348 for headers of proxies; CWE-400 with CVE-2007-6750 (slow-loris) and
CVE-2018-12121 (header floods).
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvloop
from attacked import BASE, Client, Site, filled

from millrace.api import sessions
from millrace.api.app import build_app
from millrace.control import sign_in
from millrace.core.types import (
    User,
)
from millrace.serve.http import Connection
from millrace.serve.service import HttpLimits, Service
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.usefixtures("quick_passwords")

SAFE = ("GET", "HEAD", "OPTIONS")
FORMS = ("text/plain", sessions.FORM_TYPE, "multipart/form-data; boundary=x", "application/json", "")

# --------------------------------------------------------------------------- forged requests


def unsafe(site: Site) -> list[tuple[str, str]]:
    """Every mounted route that may change something."""
    found = [(method, filled(path, "x")) for method, path in site.routes() if method not in SAFE]
    assert len(found) > 60
    return found


@pytest.fixture(scope="module")
def cookie(site: Site) -> str:
    """A session of an owner."""
    site.home.call("user.create", {"name": "ada", "password": "blue tractor on mars"})
    site.home.call("role.grant", {"who": "ada", "role": "owner"})
    services = site.home.services
    with services.records.transaction() as transaction:
        user = transaction.get(User, "ada")
        assert user is not None
        signed = sign_in.open_session(services, transaction, user, address="10.0.0.1", old="", by="password")
    assert site.client().get("/api/v1/runs", headers={"Cookie": f"millrace={signed.secret}"}).status_code == 200
    return f"millrace={signed.secret}"


@pytest.mark.parametrize("kind", FORMS)
def test_a_cookie_alone_changes_nothing(site: Site, cookie: str, kind: str) -> None:
    """A page of somebody else can have a browser send the cookie, and any of the types that forms have."""
    before = len(site.home.services.records.events(0, limit=10_000))
    headers = {"Cookie": cookie, **({"Content-Type": kind} if kind else {})}
    passed = [
        (method, path, answer.status_code)
        for method, path in unsafe(site)
        if path != "/login"
        and (answer := site.client().request(method, path, content=b'{"name": "x"}', headers=headers)).status_code != 403
    ]  # fmt: skip
    assert passed == []
    assert len(site.home.services.records.events(0, limit=10_000)) == before


@pytest.fixture(scope="module")
def everybody(site: Site) -> Client:
    """The same home, where nobody is asked who they are: a server on loopback."""
    return Client(build_app(site.home), {}, site.runner)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1.evil.example"},
        {"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://localhost"}, {"Origin": "http://127.0.0.1@evil.example"},
        {"Sec-Fetch-Site": "cross-site"}, [("Origin", BASE), ("Origin", "https://evil.example")],
    ],
)  # fmt: skip
def test_no_page_of_another_origin_writes(site: Site, everybody: Client, headers: Any) -> None:
    """Also where nobody has a token, also from another port of this machine, also with the right token."""
    passed = [
        (method, path) for method, path in unsafe(site)
        if everybody.request(method, path, json={"name": "x"}, headers=headers).status_code != 403
    ]  # fmt: skip
    assert passed == []
    headers = [*(headers.items() if isinstance(headers, dict) else headers)]
    headers.append(("Authorization", f"Bearer {site.tokens['owner']}"))
    assert site.client().request("POST", "/api/v1/tokens", json={"name": "x"}, headers=headers).status_code == 403


def test_pages_of_this_origin_write(everybody: Client) -> None:
    for headers in ({"Origin": BASE}, {"Sec-Fetch-Site": "same-origin", "Origin": BASE}, {}):
        assert everybody.post("/api/v1/runs/track", json={"name": "mine"}, headers=headers).status_code == 200
    tunnel = {"Origin": "http://localhost:9000", "Host": "localhost:9000"}
    assert everybody.post("/api/v1/runs/track", json={"name": "mine"}, headers=tunnel).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "[::ffff:7f00:1]",
     "2130706433", "0x7f.1", "0.0.0.0", "", "localhost:80@evil.example", "evil.example#localhost", "localhost evil"],
)  # fmt: skip
def test_no_name_of_somebody_else_reaches_any_route(site: Site, everybody: Client, host: str) -> None:
    """A name that means 127.0.0.1 after its page was loaded (DNS rebinding) is not this server's."""
    for method, path in sorted(site.routes(), key=lambda route: "/stream" in route[1]):  # an open stream has no end
        answer = everybody.request(method, filled(path, "x"), headers={"Host": host})
        assert answer.status_code == 403, (method, path)


# --------------------------------------------------------------------------- smuggled requests

POST, GET = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED, HIDDEN = b"Transfer-Encoding: chunked\r\n", b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
MALFORMED = {
    "CL.TE": POST + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\nG",
    "TE.CL": POST + CHUNKED + b"Content-Length: 4\r\n\r\n5c\r\n" + HIDDEN + b"0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "the same length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\nab",
    "a signed length": POST + b"Content-Length: +2\r\n\r\nab",
    "a negative length": POST + b"Content-Length: -2\r\n\r\nab",
    "a hexadecimal length": POST + b"Content-Length: 0x2\r\n\r\nab",
    "an overflowing length": POST + b"Content-Length: 18446744073709551618\r\n\r\nab",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "two codings": POST + CHUNKED + b"Transfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "space before colon": POST + b"Content-Length : 2\r\n\r\nab",
    "space before colon of the coding": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "bare LF after a header": GET + b"X: y\n\r\n",
    "bare CR": GET + b"X: a\rContent-Length: 5\r\n\r\n",
    "folded": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "NUL": GET + b"X: a\0b\r\n\r\n",
    "no name": GET + b": x\r\n\r\n",
    "LF in chunks": POST + CHUNKED + b"\r\n1\na\n0\n\n",
    "negative chunk": POST + CHUNKED + b"\r\n-1\r\na\r\n0\r\n\r\n",
    "overflowing chunk": POST + CHUNKED + b"\r\n10000000000000001\r\na\r\n0\r\n\r\n",
    "0x chunk": POST + CHUNKED + b"\r\n0x1\r\na\r\n0\r\n\r\n",
    "LF in a chunk's extension": POST + CHUNKED + b"\r\n1;a\nb\r\na\r\n0\r\n\r\n",
    "chunk longer than it says": POST + CHUNKED + b"\r\n1\r\naXX0\r\n\r\n",
    "length as a trailer": POST + CHUNKED + b"\r\n0\r\nContent-Length: 50\r\n\r\n",
    "no such version": b"GET /healthz HTTP/1.9\r\nHost: localhost\r\n\r\n",
    "HTTP/2 out of nowhere": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
WELL_FORMED = {  # one answer, and nothing of what is hidden behind
    "in a body": GET + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "after the last request": GET + b"Connection: close\r\n\r\n" + HIDDEN,
    "after an upgrade to h2c": GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n" + HIDDEN,
    "after an upgrade to WebSocket": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" + HIDDEN,
    "behind CONNECT": b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN,
    "of HTTP/1.0": b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n" + HIDDEN,
    "a trailer": POST + b"Connection: close\r\n" + CHUNKED + b"\r\n0\r\nHost: evil.example\r\nAuthorization: Bearer x\r\n\r\n",
}  # fmt: skip


class Plane:
    """The HTTP of the data plane over a loop of its own; it answers every request with its target."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits, self._started = limits, threading.Event()
        self.failures: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        service = Service(lambda exchange: exchange.reply_json(200, exchange.head.target.decode()), self._limits)
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda _, context: self.failures.append(context))
        server = await self._loop.create_server(lambda: Connection(service), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        while not self._ended.is_set():
            await asyncio.sleep(0.05)
            service.sweep()
        service.abort()
        server.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    made = Plane(HttpLimits(head_timeout_s=0.5, body_timeout_s=0.5))
    yield made
    made.close()
    assert made.failures == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """`millrace up` that waits half a second for heads and bodies."""
    short = {"MILLRACE_REQUEST_HEAD_S": "0.5", "MILLRACE_REQUEST_STALL_S": "0.5"}
    with RunningServer(tmp_path_factory.mktemp("web") / "home", environment=short) as running:
        yield running


@pytest.fixture(params=["api", "plane"])
def port(request: pytest.FixtureRequest) -> int:
    if request.param == "plane":
        return request.getfixturevalue("plane").port
    return int(request.getfixturevalue("server").url.rpartition(":")[2])


def exchanged(port: int, data: bytes, *, ends: bool = True) -> bytes:
    """All that is answered to raw bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        try:
            client.sendall(data)
        except ConnectionError:
            assert ends  # it was refused before all was sent
        answer = b""
        while chunk := _received(client):
            answer += chunk
    return answer


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(1 << 16)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("name", MALFORMED)
def test_a_request_that_can_be_read_in_two_ways_is_read_in_none(port: int, name: str) -> None:
    """One 400, and the connection is closed: what follows is no request."""
    answer = exchanged(port, MALFORMED[name] + HIDDEN)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"/hidden" not in answer


@pytest.mark.parametrize("name", WELL_FORMED)
def test_what_is_hidden_in_or_behind_a_request_is_not_answered(port: int, name: str) -> None:
    answer = exchanged(port, WELL_FORMED[name])
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert b"/hidden" not in answer


def test_a_refusal_never_stands_inside_another_answer(port: int) -> None:
    """A whole request and then rubbish: the first answer is whole, the refusal comes after it or not at all."""
    answer = exchanged(port, GET + b"\r\n" + b"rubbish\r\n\r\n")
    head, _, rest = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert head.startswith(b"HTTP/1.1 200 ")
    assert rest[length:] == b"" or rest[length:].startswith(b"HTTP/1.1 400 ")


def test_two_hosts_are_none(port: int) -> None:
    answer = exchanged(port, GET + b"Host: evil.example\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"403")


def test_headers_of_a_proxy_that_is_none_change_nothing(server: RunningServer) -> None:
    """Whoever connects to the server is no proxy: neither scheme nor address nor host is what they say."""
    run = httpx.post(f"{server.url}/api/v1/runs/track", json={"name": "r"}).json()["id"]
    answer = httpx.post(
        f"{server.url}/api/2.0/mlflow-artifacts/mpu/create/1/{run}/artifacts", json={"path": "a", "num_parts": 1},
        headers={"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-For": "10.0.0.1",
                 "Forwarded": "host=evil.example;proto=https", "X-Original-URL": "/logout", "X-Rewrite-URL": "/logout",
                 "X-HTTP-Method-Override": "DELETE"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.json()["credentials"][0]["url"].startswith(server.url)


# --------------------------------------------------------------------------- slow clients, and many headers


def dribbled(port: int, begin: bytes, more: bytes, *, every_s: float = 0.05) -> bytes:
    """What is answered to who sends a beginning and then a little again and again."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(begin)
        client.settimeout(every_s)
        deadline, answer = time.monotonic() + 10, b""
        while time.monotonic() < deadline:
            try:
                if not (chunk := client.recv(1 << 16)):
                    return answer
                answer += chunk
            except TimeoutError:
                client.sendall(more)
            except ConnectionError:
                return answer
    raise AssertionError(f"still open after 10 s; answered {answer!r}")


@pytest.mark.parametrize(
    ("begin", "more"),
    [(GET + b"X-a: ", b"b"), (GET, b"X-a: b\r\n"), (b"G", b""), (b"GET /", b"a"),
     (POST.replace(b"healthz", b"api/v1/tokens") + b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{", b" "),
     (POST.replace(b"healthz", b"api/v1/blobs") + CHUNKED + b"\r\n", b"1\r\na\r\n")],
    ids=["a header", "many headers", "nothing more", "a target", "a body", "chunks"],
)  # fmt: skip
def test_who_sends_too_slowly_is_told_and_left(port: int, begin: bytes, more: bytes) -> None:
    answer = dribbled(port, begin, more)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert (b"head" in answer) == (not begin.startswith(b"POST")), "each has a time of its own"


@pytest.mark.parametrize("data", [b"", b"\r\n"])
def test_who_says_nothing_is_left(server: RunningServer, data: bytes) -> None:
    assert dribbled(int(server.url.rpartition(":")[2]), data, data) == b""


def test_others_are_served_while_hundreds_dribble(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
    try:
        for client in slow:
            client.sendall(GET + b"X-a: ")
        answers = {exchanged(port, GET + b"Connection: close\r\n\r\n")[:15] for _ in range(20)}
        assert answers == {b"HTTP/1.1 200 OK"}
        assert {_received(client)[:12] for client in slow} == {b"HTTP/1.1 408"}  # every one of them
    finally:
        for client in slow:
            client.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [(GET + b"X-a: b\r\n" * 20_000 + b"\r\n", 431), (GET + b"X-a: " + b"b" * 2_000_000 + b"\r\n\r\n", 431),
     (GET + b"b" * 2_000_000 + b": a\r\n\r\n", 431), (b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
     (GET + b"".join(b"X-%d: b\r\n" % number for number in range(20_000)) + b"\r\n", 431),
     (GET + b"X-a: " + b"b" * 200_000, 431)],
    ids=["the same", "a long one", "a long name", "a long target", "many", "one that does not end"],
)  # fmt: skip
def test_heads_have_an_end(port: int, data: bytes, status: int) -> None:
    answer = exchanged(port, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert exchanged(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("behind", [b"X-a: b\r\n" * 50_000, b""], ids=["trailers", "an extension of a chunk"])
def test_what_stands_around_chunks_is_not_kept(port: int, behind: bytes) -> None:
    extension = b"" if behind else b";" + b"a" * 1_000_000
    data = POST + b"Connection: close\r\n" + CHUNKED + b"\r\n1" + extension + b"\r\na\r\n0\r\n" + behind + b"\r\n"
    answer = exchanged(port, data)
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert exchanged(port, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")
