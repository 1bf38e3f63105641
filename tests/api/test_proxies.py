"""Behind a proxy that ends TLS: who is answered, and whose word counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from millrace.api.app import build_app
from millrace.api.supervisor import UpConfig, check_tls, place_of
from millrace.control.dispatch import Dispatcher
from millrace.core.addresses import check_networks
from millrace.core.errors import DeniedError, InputError
from millrace.core.types import Event
from millrace.serve.hosting import HostConfig
from millrace.serve.service import HttpLimits
from millrace.wiring import open_dispatcher

PASSWORD = "blue tractor on mars"
HTTPS = {"X-Forwarded-Proto": "https"}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    opened.call("user.create", {"name": "ada", "password": PASSWORD})
    yield opened
    opened.close()


@pytest.fixture
def app(home: Dispatcher) -> Any:
    names = frozenset({"models.example.org"})
    return build_app(home, wants_token=True, allowed_hosts=names, proxies=check_networks(["10.0.0.0/24", "fd00::7"]))


def ask(app: Any, peer: str, method: str = "GET", url: str = "/login", **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://models.example.org") as client:
            return await client.request(method, url, **options)

    return asyncio.run(send())


@pytest.mark.parametrize("peer", ["10.0.0.7", "::ffff:10.0.0.7", "fd00::7"])
def test_the_proxy_is_answered(app: Any, peer: str) -> None:
    answer = ask(app, peer, headers=HTTPS)
    assert answer.status_code == 200
    (cookie,) = answer.headers.get_list("set-cookie")
    assert cookie.startswith("__Host-"), "it came over TLS"
    assert "secure" in cookie.lower()


@pytest.mark.parametrize("peer", ["10.0.1.7", "192.0.2.1", "fd00::8", "?", ""])
def test_nobody_else_is(app: Any, peer: str) -> None:
    for headers in (HTTPS, {}, {**HTTPS, "X-Forwarded-For": "10.0.0.7"}):
        for path in ("/login", "/healthz", "/api/v1/runs"):
            assert ask(app, peer, url=path, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [[], [("X-Forwarded-Proto", "http")], [("X-Forwarded-Proto", "https"), ("X-Forwarded-Proto", "http")],
     [("X-Forwarded-Proto", "https,http")], [("X-Forwarded-For", "192.0.2.1")]],
)  # fmt: skip
def test_what_the_proxy_received_in_the_open_is_refused(app: Any, headers: list[tuple[str, str]]) -> None:
    answer = ask(app, "10.0.0.7", headers=headers)
    assert answer.status_code == 403
    assert "X-Forwarded-Proto" in answer.json()["detail"]


def test_this_machine_itself_needs_no_proxy(app: Any) -> None:
    assert ask(app, "127.0.0.1", url="/healthz").status_code == 200
    assert ask(app, "127.0.0.1", url="/api/v1/runs").status_code == 401, "but a token"
    assert ask(app, "127.0.0.1", url="/healthz", headers=HTTPS).status_code == 403, "a proxy here is not trusted"


def addresses(home: Dispatcher) -> set[str]:
    home.services.records.seal()
    events: list[Event] = home.services.records.events(0, limit=1000)
    return {event.detail["address"] for event in events if event.verb == "session.create"}


def test_the_address_is_the_one_that_the_proxy_has_seen(app: Any, home: Dispatcher) -> None:
    """And never one that the client has written itself: the last that is no proxy counts."""
    page = ask(app, "10.0.0.7", headers=HTTPS)
    form = page.cookies["__Host-millrace-form"]
    fields = {"form": form, "name": "ada", "password": "wrong"}
    headers = {
        **HTTPS,
        "X-Forwarded-For": "198.51.100.9, 203.0.113.5, 10.0.0.8",
        "Cookie": f"__Host-millrace-form={form}",
    }
    assert ask(app, "10.0.0.7", "POST", data=fields, headers=headers).status_code == 401
    assert addresses(home) == {"203.0.113.5"}


def test_what_up_refuses(tmp_path: Path) -> None:
    def config(**options: Any) -> UpConfig:
        return UpConfig(home=str(tmp_path), **options)

    for proxies in (("0.0.0.0/0",), ("::/0",), ("*",), ("proxy.example.org",), ("10.0.0.1/24",), ("",)):
        with pytest.raises(InputError):
            check_tls(config(host="10.0.0.5", proxies=proxies, names=("m",)))
    with pytest.raises(InputError, match="either"):
        check_tls(config(proxies=("10.0.0.7",), names=("m",), tls_cert="cert.pem"))
    with pytest.raises(InputError, match="which name"):
        check_tls(config(proxies=("10.0.0.7",)))
    with pytest.raises(DeniedError, match="in the open"):
        check_tls(config(host="10.0.0.5"))
    check_tls(config(host="10.0.0.5", proxies=("10.0.0.7",), names=("m",)))
    assert config(proxies=("127.0.0.1",)).wants_token, "on loopback too: others come by the proxy"
    with pytest.raises(InputError, match="without a certificate of the server"):
        check_tls(config(tls_client_ca="ca.pem"))
    trustme.CA().issue_cert("m").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "c.pem"))
    with pytest.raises(InputError, match=r"authority .*none\.pem cannot be used"):
        check_tls(config(tls_cert=str(tmp_path / "c.pem"), tls_client_ca=str(tmp_path / "none.pem")))


def test_where_endpoints_are_and_what_one_client_may_do(tmp_path: Path) -> None:
    (tmp_path / "millrace.yaml").write_text(
        "steps: [{name: one, uses: 'own.py:one'}]\nserve: {client_rate: 7, queue_s: 0.5}\n"
    )

    def place(**options: Any) -> HostConfig:
        return place_of(UpConfig(home=str(tmp_path / ".millrace"), **options))

    assert place() == HostConfig(limits=HttpLimits(client_rate=7.0))
    asked = place(client_rate=0.0, queue_s=0.25, host="10.0.0.5", tls_cert="c.pem", tls_client_ca="ca.pem")
    assert (asked.limits.client_rate, asked.queue_s, asked.wants_token) == (0.0, 0.25, True)
    for host in ("10.0.0.5", "127.0.0.1"):
        known = place(host=host, tls_cert="c.pem", tls_key="k.pem", tls_client_ca="ca.pem")
        assert (known.host, known.tls_cert, known.tls_key, known.tls_client_ca) == (host, "c.pem", "k.pem", "ca.pem")
    assert place(tls_cert="c.pem").tls_cert == "", "on loopback endpoints are open, as they were"
