"""TLS of the server: records split anywhere, several requests in one, clients' certificates, tokens."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trustme

from millrace.core.errors import InputError
from millrace.serve.listen import bind
from millrace.serve.process import ServerProcess
from millrace.serve.tls import read_tokens, server_context

BODY = json.dumps({"instances": [[1.0] * 64]}).encode()
SECRET, ADMIN = "0123456789abcdef0123", "0123456789abcdef4567"


def request(path: str = "/v1/models/digits:predict", body: bytes = BODY, token: str = "", close: bool = False) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {token}"] * bool(token) + ["Connection: close"] * close
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Site:
    """A server that wants a certificate of every client."""

    def __init__(self, folder: Path, bundle: Path, kit: ModuleType) -> None:
        self.ca, other = trustme.CA(), trustme.CA()
        self.ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        for name, authority, who in (
            ("server", self.ca, "localhost"), ("client", self.ca, "lee@example.com"), ("other", other, "eve@example.com"),
        ):  # fmt: skip
            authority.issue_cert(
                who, common_name=name, organization_name="A, B"
            ).private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
        self.folder = folder
        self.process = ServerProcess(
            kit.child_config(
                bundle, host="0.0.0.0", tls_cert=str(folder / "server.pem"), tls_client_ca=str(folder / "ca.pem"),
                access_log=str(folder / "access.jsonl"),
            )
        )  # fmt: skip
        self.port = self.process.wait_ready()

    def context(self, name: str = "client") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        if name:
            context.load_cert_chain(str(self.folder / f"{name}.pem"))
        return context

    def connect(self, name: str = "client") -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.context(name).wrap_socket(raw, server_hostname="localhost")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, digits_bundle: Path, kit: ModuleType) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("tls"), digits_bundle, kit)
    yield found
    assert found.process.stop() == 0


class Dribble:
    """A TLS client whose bytes go out as its caller cuts them."""

    def __init__(self, site: Site) -> None:
        self.raw = socket.create_connection(("127.0.0.1", site.port), timeout=10)
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = site.context().wrap_bio(self._in, self._out, server_hostname="localhost")

    def handshake(self, size: int) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.send(size)
                self._in.write(self.raw.recv(1 << 16))
            else:
                self.send(size)
                return

    def send(self, size: int, data: bytes = b"") -> None:
        if data:
            self._tls.write(data)
        records = self._out.read()
        for start in range(0, len(records), size):
            self.raw.sendall(records[start : start + size])

    def receive(self) -> bytes:
        """All that comes until the server has closed."""
        found = b""
        while True:
            try:
                data = self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                if not (more := self.raw.recv(1 << 16)):
                    return found
                self._in.write(more)
            except ssl.SSLZeroReturnError:
                return found
            else:
                if not data:
                    return found
                found += data


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_records_split_at_odd_places(site: Site, size: int) -> None:
    client = Dribble(site)
    client.handshake(size)
    client.send(size, request(close=True))
    answer = client.receive()
    client.raw.close()
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"]) == 1


def test_several_requests_in_one_record(site: Site) -> None:
    client = Dribble(site)
    client.handshake(1 << 16)
    client.send(1 << 16, request() + request("/v1/models/nobody:predict") + request(close=True))
    answer = client.receive()
    client.raw.close()
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200"]


def test_a_request_split_over_records_within_its_head(site: Site) -> None:
    client = Dribble(site)
    client.handshake(1 << 16)
    whole = request(close=True)
    for start in range(0, len(whole), 11):
        client.send(1 << 16, whole[start : start + 11])
    answer = client.receive()
    client.raw.close()
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]


def test_who_stops_amid_a_record_harms_nobody(site: Site) -> None:
    client = Dribble(site)
    client.handshake(1 << 16)
    client._tls.write(request())
    client.raw.sendall(client._out.read()[:-9])
    client.raw.shutdown(socket.SHUT_WR)
    assert client.raw.recv(1 << 16)[:1] in (b"", b"\x15", b"\x17")  # closed, an alert, or a ticket first
    client.raw.close()
    with site.connect() as other:
        other.sendall(request(close=True))
        assert other.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["", "other"])
def test_without_a_certificate_of_the_authority_nothing_is_answered(site: Site, name: str) -> None:
    answer = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError), site.connect(name) as client:
        client.sendall(request(close=True))
        answer = client.recv(1 << 16)
    assert answer == b""


def test_plain_http_is_no_tls(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as client:
        client.sendall(request(close=True))
        try:
            answer = client.recv(1 << 16)
        except ConnectionError:
            answer = b""
        assert b"200" not in answer[:20]


def test_with_tokens(tmp_path: Path, digits_bundle: Path, kit: ModuleType, site: Site) -> None:
    (tmp_path / "tokens").write_text(f"# of the shop\n{SECRET}\n{ADMIN} admin\n")
    process = ServerProcess(
        kit.child_config(
            digits_bundle, host="0.0.0.0", tls_cert=str(site.folder / "server.pem"),
            token_file=str(tmp_path / "tokens"),
        )
    )  # fmt: skip
    port = process.wait_ready()
    try:
        models = "/v2/repository/models/digits"
        for path, token, status in (
            ("", SECRET, b"200"), ("", ADMIN, b"200"), ("", "", b"401"), ("", SECRET + "1", b"401"),
            (f"{models}/load", SECRET, b"403"), (f"{models}/unload", SECRET, b"403"),
            (f"{models}/%6coad", SECRET, b"403"), (f"{models}/load", ADMIN, b"200"), (f"{models}/unload", ADMIN, b"409"),
        ):  # fmt: skip
            raw = socket.create_connection(("127.0.0.1", port), timeout=10)
            with site.context("").wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(request(*[path] * bool(path), token=token, close=True))
                assert client.recv(1 << 16).split()[1] == status
    finally:
        assert process.stop() == 0


def test_the_access_log_names_whose_certificate_it_was(site: Site) -> None:
    with site.connect() as client:
        client.sendall(request("/v1/models/digits:predict?certified", close=True))
        assert client.recv(1 << 16).split()[1] == b"200"
    deadline = time.monotonic() + 10
    while not (
        lines := [line for line in (site.folder / "access.jsonl").read_text().splitlines() if "certified" in line]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    line = json.loads(lines[0])
    assert line["client"].startswith("CN=client,OU=")
    assert line["client"].endswith("O=A\\, B")
    assert (line["address"], line["status"]) == ("127.0.0.1", 200)


@pytest.mark.parametrize("given", [{}, {"tls_cert": "x"}, {"token_file": "x"}, {"tls_client_ca": "x"}])
def test_others_reach_it_only_guarded(given: dict[str, Any], digits_bundle: Path, kit: ModuleType) -> None:
    server = kit.child_config(digits_bundle, **given).server
    with pytest.raises(InputError, match="loopback"):
        bind("0.0.0.0", 0, is_guarded=server.is_guarded)


def test_what_cannot_be_used_is_said(tmp_path: Path, site: Site) -> None:
    with pytest.raises(InputError, match="without a certificate"):
        server_context("", client_ca="ca.pem")
    with pytest.raises(InputError, match=r"none\.pem cannot be used"):
        server_context(str(tmp_path / "none.pem"))
    with pytest.raises(InputError, match=r"authority .* cannot be used"):
        server_context(str(site.folder / "server.pem"), client_ca=str(tmp_path / "none.pem"))
    for text, what in (
        ("", "holds no token"),
        ("# none\n", "holds no token"),
        ("short\n", "line 1: want"),
        ("# one\nshort admin\n", "line 2: want"),
    ):
        (tmp_path / "tokens").write_text(text)
        with pytest.raises(InputError, match=what):
            read_tokens(str(tmp_path / "tokens"))
