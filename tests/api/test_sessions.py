"""Sessions: cookies, the token of forms, time-outs, back-off; over the application, as a browser asks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.api import sessions
from millrace.api.app import build_app
from millrace.api.pages import login
from millrace.api.sessions import Addresses, form_fields, safe_next
from millrace.control.dispatch import Dispatcher
from millrace.control.sign_in import FREE_FAILURES
from millrace.core.clock import FakeClock
from millrace.core.errors import InputError
from millrace.core.types import Session, User
from millrace.wiring import open_dispatcher

pytestmark = pytest.mark.usefixtures("quick_passwords")

PASSWORD = "blue tractor on mars"
HTTP, HTTPS = "http://127.0.0.1", "https://127.0.0.1"


class Browser:
    """Cookies, and the headers that browsers send; no socket between."""

    def __init__(self, app: Any, base: str = HTTP, address: str = "10.0.0.1") -> None:
        self._app, self._base, self._address = app, base, address
        self.cookies = httpx.Cookies()

    def send(self, method: str, url: str, **options: Any) -> httpx.Response:
        headers = {"Accept": "text/html", "Sec-Fetch-Dest": "document", **options.pop("headers", {})}

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False, client=(self._address, 1))
            async with httpx.AsyncClient(transport=transport, base_url=self._base, cookies=self.cookies) as client:
                answer = await client.request(method, url, headers=headers, **options)
                self.cookies = httpx.Cookies(client.cookies)
                return answer

        return asyncio.run(ask())

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.send("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.send("POST", url, **options)

    def enter(self, name: str = "ada", password: str = PASSWORD, **more: str) -> httpx.Response:
        form = field(self.get("/login"), "form")
        return self.post("/login", data={"form": form, "name": name, "password": password, **more})

    def csrf(self) -> str:
        return field(self.get("/runs"), "csrf")


def field(page: httpx.Response, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page.text)
    assert found, page.text[:2000]
    return found[1]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    opened.call("user.create", {"name": "ada", "password": PASSWORD})
    opened.call("role.grant", {"who": "ada", "role": "owner"})
    yield opened
    opened.close()


@pytest.fixture
def app(home: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(login, "FAILED_S", 0.0)
    return build_app(home, wants_token=True)


# --------------------------------------------------------------------------- in and out


def test_in_and_out(app: Any, home: Dispatcher) -> None:
    browser = Browser(app)
    assert browser.get("/runs?q=a").headers["location"] == "/login?next=%2Fruns%3Fq%3Da"
    answer = browser.enter(next="/runs?q=a")
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs?q=a")
    page = browser.get("/runs")
    assert page.status_code == 200
    assert "ada" in page.text
    assert browser.get("/login?next=/models").headers["location"] == "/models"
    assert browser.get("/api/v1/runs").json() == []
    token = browser.csrf()
    left = browser.post("/logout", data={"csrf": token})
    assert (left.status_code, left.headers["location"]) == (303, "/login")
    assert browser.get("/runs").status_code == 303
    assert home.services.records.find(Session) == []


def test_the_cookie_is_for_requests_alone(app: Any) -> None:
    for base, name in ((HTTP, "millrace"), (HTTPS, "__Host-millrace")):
        cookies = Browser(app, base).enter().headers.get_list("set-cookie")
        found = next(one for one in cookies if one.startswith(f"{name}="))
        parts = {part.strip().lower() for part in found.split(";")[1:]}
        assert {"httponly", "samesite=lax", "path=/"} <= parts
        assert not any(part.startswith(("domain", "max-age", "expires")) for part in parts)
        assert ("secure" in parts) == (base == HTTPS)


def test_over_tls_a_plain_cookie_is_none(app: Any) -> None:
    plain = Browser(app)
    plain.enter()
    secret = plain.cookies["millrace"]
    tls = Browser(app, HTTPS)
    tls.cookies.set("millrace", secret)
    assert tls.get("/runs").status_code == 303


def test_the_session_is_another_after_each_sign_in(app: Any, home: Dispatcher) -> None:
    browser = Browser(app)
    browser.cookies.set("millrace", "chosen-by-somebody-else", domain="127.0.0.1", path="/")
    browser.enter()
    first = browser.cookies["millrace"]
    assert first != "chosen-by-somebody-else"
    form = "x" * 32
    browser.cookies.set("millrace-form", form, domain="127.0.0.1", path="/")
    browser.post("/login", data={"form": form, "name": "ada", "password": PASSWORD})
    second = browser.cookies["millrace"]
    assert second != first
    stored = [session.id for session in home.services.records.find(Session)]
    assert len(stored) == 1
    assert second not in stored, "its digest is"
    stale = Browser(app)
    stale.cookies.set("millrace", first)
    assert stale.get("/runs").status_code == 303


def change(home: Dispatcher, **values: float) -> Session:
    (session,) = home.services.records.find(Session)
    return home.services.records.put(msgspec.structs.replace(session, **values))


def test_idle_and_absolute_time_out(app: Any, home: Dispatcher) -> None:
    browser, now = Browser(app), home.services.clock.now()
    browser.enter()
    change(home, used_at=now - 1000)
    browser.get("/api/v1/runs", headers={"Sec-Fetch-Dest": "empty"})
    assert change(home).used_at == now - 1000, "a page that asks by itself keeps nothing open"
    assert browser.get("/runs").status_code == 200
    assert change(home).used_at >= now
    change(home, used_at=now - 1801)
    assert browser.get("/runs").status_code == 303
    change(home, used_at=now, expires_at=now - 1)
    assert browser.get("/runs").status_code == 303


def test_a_bearer_token_comes_before_the_cookie(app: Any) -> None:
    browser = Browser(app)
    browser.enter()
    assert browser.get("/api/v1/runs", headers={"Authorization": "Bearer mr_wrong"}).status_code == 401


# --------------------------------------------------------------------------- forgery


def test_every_unsafe_request_with_a_cookie_wants_the_token(app: Any) -> None:
    browser = Browser(app)
    browser.enter()
    token = browser.csrf()
    body = {"name": "t", "scope": "viewer"}
    for headers in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": token[:-1]},
                    {"X-CSRF-Token": "é".encode()}):  # fmt: skip
        assert browser.post("/api/v1/tokens", json=body, headers=headers).status_code == 403
    assert browser.post("/api/v1/tokens", json=body, headers={"X-CSRF-Token": token}).status_code == 200
    for data in ({}, {"csrf": ""}, {"csrf": "x"}):
        assert browser.post("/logout", data=data).status_code == 403
    assert browser.post("/logout", data={"csrf": token}).status_code == 303


def test_every_mounted_unsafe_route_refuses_a_forged_request(app: Any) -> None:
    browser = Browser(app)
    browser.enter()
    unsafe = {
        (method, re.sub(r"{\w+(:\w+)?}", "1", route.path))
        for route in app.routes for method in getattr(route, "methods", None) or ()
        if method not in ("GET", "HEAD", "OPTIONS") and route.path != "/login"
    }  # fmt: skip
    assert len(unsafe) > 30
    passed = [
        (method, path) for method, path in sorted(unsafe)
        if browser.send(method, path, content=b"a=b", headers={"Content-Type": sessions.FORM_TYPE}).status_code != 403
    ]  # fmt: skip
    assert passed == []


def test_a_foreign_origin_is_refused_though_it_has_the_token(app: Any) -> None:
    browser = Browser(app)
    browser.enter()
    token = browser.csrf()
    answer = browser.post("/logout", data={"csrf": token}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403


def test_nobody_can_be_signed_in_by_a_form_of_somebody_else(app: Any, home: Dispatcher) -> None:
    browser = Browser(app)
    for form in ("", "guessed"):
        answer = browser.post("/login", data={"form": form, "name": "ada", "password": PASSWORD})
        assert answer.status_code == 403
    assert home.services.records.find(Session) == []


# --------------------------------------------------------------------------- guessing


def test_what_was_wrong_is_not_said(app: Any, home: Dispatcher) -> None:
    home.call("user.create", {"name": "off", "password": PASSWORD})
    home.call("user.disable", {"name": "off"})
    home.call("user.create", {"name": "bot", "service": True})

    def told(name: str, password: str) -> tuple[int, str]:
        answer = Browser(app, address=f"10.1.{len(name)}.1").enter(name, password)
        return answer.status_code, re.sub(r'value="[^"]*"| autofocus', "", answer.text)

    answers = {
        told("ada", "wrong"), told("nobody", "wrong"), told("off", PASSWORD), told("bot", ""), told("", ""),
        told("a\x00b", "x"), told("ada", "x" * 5000), told("owner", "mr_" + "x" * 43),
    }  # fmt: skip
    assert {status for status, _ in answers} == {401}
    assert len({text for _, text in answers}) == 1
    assert str(home.services.home) not in answers.pop()[1], "strangers are not told where it lies"


def test_an_account_is_not_looked_at_for_a_while(app: Any, home: Dispatcher) -> None:
    home.services.clock = FakeClock(home.services.clock.now())
    for number in range(FREE_FAILURES + 1):
        assert Browser(app, address=f"10.2.0.{number}").enter(password="wrong").status_code == 401
    assert Browser(app, address="10.2.1.1").enter().status_code == 401, "the right one neither"
    user = home.services.records.get(User, "ada")
    assert user is not None
    home.services.records.put(msgspec.structs.replace(user, not_before=0.0))
    assert Browser(app, address="10.2.1.1").enter().status_code == 303


def test_an_address_has_to_wait(home: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "FAILED_S", 0.0)
    home.services.clock = FakeClock(home.services.clock.now())
    app = build_app(home, wants_token=True)
    guesser = Browser(app, address="10.3.0.1")
    statuses = []
    for number in range(sessions.FREE_FAILURES + 1):
        statuses.append(guesser.enter(f"name-{number}", "wrong"))
    assert [one.status_code for one in statuses[:-1]] == [401] * sessions.FREE_FAILURES
    assert statuses[-1].status_code == 429
    assert int(statuses[-1].headers["retry-after"]) >= 1
    assert guesser.enter().status_code == 429
    assert Browser(app, address="10.3.0.2").enter().status_code == 303


@given(
    st.lists(
        st.tuples(st.sampled_from(["10.0.0.1", "2001:db8::1", "2001:db8::2", "?"]), st.floats(0, 100)), max_size=80
    )
)
def test_waits_grow_have_an_end_and_are_forgotten(steps: list[tuple[str, float]]) -> None:
    clock = FakeClock(1e9)
    addresses = Addresses(clock)
    for address, passed in steps:
        clock.sleep(passed)
        before = addresses.wait_s(address)
        addresses.failed(address)
        assert 0 <= addresses.wait_s(address) <= sessions.MOST_PAUSE_S
        assert addresses.wait_s(address) >= before
    assert addresses.wait_s("2001:db8::1") == addresses.wait_s("2001:db8::ffff"), "one network"
    clock.sleep(sessions.MOST_PAUSE_S + 1)
    assert all(addresses.wait_s(address) == 0 for address, _ in steps)


def test_the_table_of_addresses_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST_ADDRESSES", 50)
    addresses = Addresses(FakeClock(1e9))
    for number in range(500):
        addresses.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(addresses._failures) == 50


# --------------------------------------------------------------------------- what is parsed


@given(st.binary(max_size=300))
def test_any_body_is_a_form_or_is_refused(data: bytes) -> None:
    try:
        fields = form_fields(data)
    except InputError:
        return
    assert all(isinstance(part, str) for pair in fields.items() for part in pair)


@pytest.mark.parametrize(
    "place",
    ["//evil.example", "/\\evil.example", "\\\\evil.example", "https://evil.example", "javascript:alert(1)", "/a\\b",
     "/\t/evil.example", "/a\r\nSet-Cookie: x=y", " //evil.example", "evil.example", "", "/login?next=/", "/logout",
     "/\x00", "/é", "///evil.example", "/" + "a" * 3000],
)  # fmt: skip
def test_no_redirect_leads_elsewhere(app: Any, place: str) -> None:
    assert safe_next(place) == "/"
    assert Browser(app).enter(next=place).headers["location"] == "/"


@given(st.text(max_size=60))
def test_any_text_leads_to_this_server(text: str) -> None:
    for place in (text, "/" + text):
        found = safe_next(place)
        url = httpx.URL("https://here.example").join(found)
        assert url.host == "here.example"
        assert found.isascii()


def test_a_form_that_is_none(app: Any) -> None:
    browser = Browser(app)
    for options in ({"json": {}}, {"content": b"a=1&a=2", "headers": {"Content-Type": sessions.FORM_TYPE}},
                    {"content": b"a=b&" * 60, "headers": {"Content-Type": sessions.FORM_TYPE}}):  # fmt: skip
        assert browser.post("/login", **options).status_code == 400
    large = {"content": b"a=" + b"x" * 100_000, "headers": {"Content-Type": sessions.FORM_TYPE}}
    assert browser.post("/login", **large).status_code == 413


def test_scripts_are_told_in_json_and_browsers_are_led(app: Any) -> None:
    browser = Browser(app)
    assert browser.get("/api/v1/runs", headers={"Accept": "application/json"}).status_code == 401
    assert browser.post("/logout").headers["location"] == "/login"
    assert browser.get("/runs", headers={"Authorization": "Bearer x"}).status_code == 401


def test_where_nobody_is_asked_there_is_nothing_to_do(home: Dispatcher) -> None:
    browser = Browser(build_app(home))
    assert browser.get("/login?next=/runs").headers["location"] == "/runs"
    assert "Sign out" not in browser.get("/runs").text
