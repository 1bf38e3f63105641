"""Attacks from the web: forged requests, rebound names, smuggled requests, slow clients, headers, pages.

Where each comes from: CWE-352 and OWASP's CSRF and login-CSRF notes; DNS rebinding of loopback servers (CVE-2018-5702
of Transmission, CVE-2024-28224 of Ollama); CWE-444 and "HTTP Desync Attacks" (CL.TE, TE.CL, TE.TE, bare LF as in
CVE-2023-30589 and CVE-2025-22871, chunk extensions as in CVE-2023-39326 and CVE-2025-66373, h2c smuggling), RFC 9112
sections 2.2, 5.1, 6.3 and 7.1; CWE-348 for headers of proxies; CWE-400 with CVE-2007-6750 (slow-loris) and
CVE-2018-12121 (header floods); CWE-113 for CRLF in headers; CWE-79 for stored scripts, CVE-2023-6568 and CVE-2024-27133
of MLflow among them.
"""

from __future__ import annotations

import asyncio
import html.parser
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import uvloop
from attacked import BASE, Client, Site, filled

from millrace.api import sessions
from millrace.api.app import build_app
from millrace.api.pages.rendering import markdown
from millrace.api.pages.routes import VIEWS
from millrace.control import sign_in
from millrace.control.card import render_card
from millrace.core.types import (
    Alert,
    Alias,
    ArtifactFile,
    DatasetVersion,
    Endpoint,
    Event,
    MetricPoint,
    Model,
    ModelVersion,
    Project,
    Run,
    RunLink,
    Step,
    User,
)
from millrace.serve.http import Connection
from millrace.serve.service import HttpLimits, Service
from millrace.testing.server import RunningServer

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
    return Client(build_app(site.home), {})


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
def test_who_says_nothing_is_left(port: int, data: bytes, request: pytest.FixtureRequest) -> None:
    if "plane" in request.node.name:
        pytest.skip("its idle time has no shorter setting than the one that keep-alive needs")
    assert dribbled(port, data, data) == b""


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


# --------------------------------------------------------------------------- headers of answers

SPLIT = [
    "a\r\nSet-Cookie: millrace=evil",
    "a\nLocation: https://evil.example",
    'a"; filename="b.html',
    "a\x00b",
    "ä\u2028b",
]


@pytest.mark.parametrize("name", SPLIT)
def test_no_name_splits_a_header(site: Site, name: str) -> None:
    """In Content-Disposition, Location, ETag and whatever else holds something of a request or a record."""
    client, run = site.client(site.tokens["owner"]), site.ids["mine"]
    blob = site.home.services.blobs.put(b"<script>1</script>")
    plain = name.replace("\r", "").replace("\n", "").replace("\x00", "")
    for path in {name, plain}:
        kept = ArtifactFile(id=f"{run}/{path}", owner=run, path=path, artifact=blob, project="mine")
        if "\x00" not in path:
            site.home.services.records.put(kept)
    urls = [
        filled(path, quote(name, safe=""))
        for method, path in site.routes()
        if method == "GET" and "/stream" not in path
    ]
    urls += [f"/runs/{run}/files/{quote(name)}", f"/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts/{quote(name)}",
             f"/get-artifact?run_id={run}&path={quote(name)}", f"/login?next=/{quote(name)}",
             f"/?next={quote(name)}&q={quote(name)}"]  # fmt: skip
    for url in urls:
        for one in (client, site.client()):
            answer = one.get(url, headers={"Accept": "text/html"}, follow_redirects=False)
            for key, value in answer.headers.raw:
                assert not {10, 13, 0} & {*key, *value}, (url, key, value)
            assert "evil" not in answer.headers.get("set-cookie", ""), url
            assert not answer.headers.get("location", "/").lstrip("/").startswith(("https:", "evil")), url
            disposition = answer.headers.get("content-disposition", "attachment")
            assert disposition.startswith("attachment"), url
            assert disposition.count("filename=") <= 1, (url, disposition)


# --------------------------------------------------------------------------- stored scripts

EVIL = (
    """<script>alert("xss")</script>"><img src=x onerror=alert(1)>'><svg/onload=alert(1)></title></textarea>"""
    """<iframe srcdoc='<p>'>{{7*7}}${7*7}<!-- [x](javascript:alert(1)) ![y](z"onerror=alert(1)) `<b>` |<i>|"""
)
assert len(EVIL) < 240


class Reading(html.parser.HTMLParser):
    """A page as a browser parses it: what in it could run, and the text of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.running: list[str] = []
        self.seen: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag in ("iframe", "object", "embed", "base", "foreignobject", "animate", "set", "textarea"):
            self.running.append(tag)
        for name, value in attrs:
            place = (value or "").strip().lower()
            if name.startswith("on") or name in ("srcdoc", "formaction"):
                self.running.append(f"{tag} {name}")
            if name == "style" and not re.fullmatch(r"[a-z-]+:\s*[-.,()%#\w\s]+(;[a-z-]+:\s*[-.,()%#\w\s]+)*;?", place):
                self.running.append(f"{tag} {name}={place[:40]}")
            scheme = re.match(r"[\s\x00-\x1f]*([a-z][a-z0-9+.\s-]*):", place)
            if (
                name in ("href", "src", "action")
                and scheme
                and not place.startswith(("data:image/", "http:", "https:"))
            ):
                self.running.append(f"{tag} {name}={place[:40]}")
            self.seen.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and "alert" in data:
            self.running.append(f"script {data[:40]}")
        self.seen.append(data)


@pytest.fixture(scope="module")
def evil(site: Site) -> dict[str, str]:
    """Everything of the site has a name that is a page of its own; names of what is there to be looked at."""
    services = site.home.services
    records, blob = services.records, services.blobs.put(EVIL.encode())
    tree = services.blobs.put_tree(_folder(services.home))
    run = Run(id="e" * 32, name=EVIL, project="evil", state="failed", created_by=EVIL, started_at=1.0, ended_at=2.0,
              created_at=time.time(), error={"code": EVIL, "message": EVIL, "hint": EVIL, "details": {EVIL: EVIL}},
              spec_text=f"project: x\n# {EVIL}\n", spec_path=f"/{EVIL}/millrace.yaml", tags={EVIL: EVIL})  # fmt: skip
    with records.transaction() as transaction:
        for record in (
            run, Project(id="77", project="evil", name=EVIL, created_at=1.0, tags={EVIL: EVIL}),
            Step(id="1", run_id=run.id, name=EVIL, stage="data", state="failed", reason=EVIL, facts={EVIL: EVIL, "warnings": [EVIL]},
                 outputs={EVIL: tree}, error=run.error, project="evil"),
            ArtifactFile(id=f"{run.id}/{EVIL}", owner=run.id, path=EVIL, artifact=blob, project="evil"),
            RunLink(id="2", run_id=run.id, direction="input", target="dataset", name=EVIL, digest=EVIL, project="evil"),
            ModelVersion(id="3", name=EVIL, number=1, bundle=tree, card=blob, description=EVIL, tags={EVIL: EVIL}, source=EVIL,
                         stage=EVIL, state_text=EVIL, created_by=EVIL, chosen_variant=EVIL, format="opaque", project="evil"),
            Model(id=EVIL, name=EVIL, description=EVIL, tags={EVIL: EVIL}, project="evil"),
            Alias(id=f"{EVIL}/{EVIL}", model=EVIL, name=EVIL, number=1, project="evil",
                  history=[{"from": None, "to": 1, "at": 1.0, "reason": EVIL}]),
            DatasetVersion(id="4", name=EVIL, number=1, artifact=tree, project="evil",
                           facts={"rows_kept": 1, "label": EVIL, "columns": [{"name": EVIL, "type": EVIL, "role": EVIL}]}),
            Endpoint(id=EVIL, name=EVIL, model=EVIL, number=1, variant=EVIL, text=EVIL, url=f"javascript:{EVIL}", project="evil"),
            Alert(id="5", endpoint=EVIL, model=EVIL, number=1, signal=EVIL, score=1.0, threshold=0.1, title=EVIL, created_at=1.0,
                  project="evil"),
        ):  # fmt: skip
            transaction.put(record)
        transaction.log(run.id, points=[MetricPoint(run.id, EVIL, 0, 0.5, 1.0)], params={EVIL: EVIL}, tags={EVIL: EVIL})
        transaction.append(Event(at=1.0, actor=EVIL, verb=EVIL, subject=EVIL, detail={EVIL: EVIL}))
    return {
        "run": run.id,
        "path": EVIL,
        "dataset": f"{EVIL}@1",
        "name": EVIL,
        "experiment": "77",
        "model": EVIL,
        "tab": "x",
    }


def _folder(home: Path) -> Path:
    folder = home / "scratch" / "evil"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVIL.replace("/", "")[:200]).write_text(EVIL)
    return folder


def pages(evil: dict[str, str]) -> list[str]:
    """Every page, of the things whose names are hostile, and with queries that are."""

    def of(path: str) -> str:
        for name, value in evil.items():
            path = path.replace(f"{{{name}:path}}", quote(value, safe="")).replace(f"{{{name}}}", quote(value, safe=""))
        return path.replace("{number:int}", "1")

    queries = [
        f"?{name}={quote(EVIL)}"
        for name in ("q", "sort", "column", "state", "project", "runs", "subject", "before", "next", "problem")
    ]
    return [of(path) for path, _ in VIEWS] + [path + query for path in ("/", "/events", "/compare", "/login") for query in queries] + [
        f"/compare?runs={evil['run']},{evil['run'][:-1]}f", f"/runs?column={quote('params.' + EVIL)}", f"/events?subject=run:{evil['run']}",
    ]  # fmt: skip


def test_no_name_runs_on_any_page(site: Site, evil: dict[str, str]) -> None:
    client, seen = site.client(site.tokens["owner"]), 0
    for url in pages(evil):
        answer = client.get(url, headers={"Accept": "text/html"}, follow_redirects=False)
        assert answer.status_code < 500, (url, answer.text[:300])
        if not answer.headers.get("content-type", "").startswith("text/html"):
            assert answer.is_redirect or "attachment" in answer.headers["content-disposition"], url
            continue
        read = Reading(answer.text)
        assert read.running == [], url
        assert "49${" not in "".join(read.seen), "no template but ours is run"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        seen += '<script>alert("xss")' in "".join(read.seen)
    assert seen >= 10, "it is there, as text"


def test_no_name_runs_in_a_report(site: Site, evil: dict[str, str]) -> None:
    """Written beside the spec to be opened as a file, where no header protects it."""
    answer = site.client(site.tokens["owner"]).get(f"/runs/{evil['run']}/report")
    if answer.status_code == 200:
        assert Reading(answer.text).running == []
        assert "sandbox" in answer.headers["content-security-policy"]
    card = render_card(
        {"data": {"label": EVIL, "files": [EVIL], "rows_kept": 1, "classes": {EVIL: 1}}, "register": {"model": EVIL}},
        EVIL,
    )
    assert "&lt;script>" in card, "it is there, as text"
    assert Reading(str(markdown(card))).running == []
    assert "<script" not in card


@pytest.mark.parametrize("name", ["page.html", "image.svg", "page.xhtml", "script.js", "feed.xml"])
def test_no_file_is_a_page_of_this_server(site: Site, name: str) -> None:
    """By every route that gives out what others have made."""
    run, text = site.ids["mine"], f"<html><script>alert('{name}')</script></html>"
    client = site.client(site.tokens["owner"])
    root = f"/api/2.0/mlflow-artifacts/artifacts/3/{run}/artifacts"
    assert client.request(
        "PUT", f"{root}/{name}", content=text.encode(), headers={"Content-Type": "text/html"}
    ).is_success
    digest = client.request("POST", "/api/v1/blobs", content=text.encode()).json()["digest"]
    for url in (
        f"{root}/{name}",
        f"/get-artifact?run_id={run}&path={name}",
        f"/runs/{run}/files/{name}",
        f"/api/v1/blobs/{digest}",
    ):
        answer = client.get(url)
        assert answer.text == text, url
        assert answer.headers["content-type"] == "application/octet-stream", url
        assert answer.headers["x-content-type-options"] == "nosniff", url
        assert answer.headers["content-security-policy"].startswith("sandbox"), url


def test_answers_in_json_are_no_pages(site: Site, evil: dict[str, str]) -> None:
    """Also errors, which repeat what was asked for."""
    client = site.client(site.tokens["owner"])
    for method, path in site.routes():
        if method != "GET" or "/stream" in path or path.startswith(("/runs/", "/static")):
            continue
        answer = client.get(
            filled(path, quote(EVIL, safe="")), headers={"Accept": "application/json"}, follow_redirects=False
        )
        kind = answer.headers.get("content-type", "")
        if not kind.startswith("text/html"):  # those are looked at above
            assert "<script" not in answer.text or kind.startswith(("application/", "text/event-stream")), (path, kind)
