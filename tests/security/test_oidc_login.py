"""The way to an identity provider and back, through a running server: every wrong turn is refused, once and for all."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from oidc_issuer import Issuer
from oidc_site import Site

from millrace.api.pages import oidc_login
from millrace.control import terminals
from millrace.control.dispatch import Dispatcher
from millrace.core.clock import SystemClock
from millrace.core.errors import InputError
from millrace.core.principals import token_id
from millrace.core.types import Event, Session, User

pytestmark = pytest.mark.usefixtures("quick_passwords")


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer(SystemClock()) as made:
        yield made


@pytest.fixture(scope="module")
def running(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("oidc")) as made:
        made.start(oidc_issuer=issuer.url, oidc_client_id="millrace")
        made.home.call("role.grant", {"who": "group:staff", "role": "viewer"})
        yield made


@pytest.fixture
def site(running: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr("millrace.api.sessions.FREE_FAILURES", 1000)
    return running


def leave(browser: httpx.Client, **query: str) -> str:
    """To the issuer: where a browser is sent."""
    answer = browser.get("/login/oidc", params=query, follow_redirects=False)
    assert answer.status_code == 303
    return answer.headers["location"]


def come_back(browser: httpx.Client, answer: dict[str, str] | str) -> httpx.Response:
    query = answer if isinstance(answer, str) else urlencode(answer)
    return browser.get(f"/login/callback?{query}", follow_redirects=False)


def is_refused(answer: httpx.Response, browser: httpx.Client) -> bool:
    is_led_back = (answer.status_code, answer.headers["location"]) == (303, "/login?problem=oidc")
    return is_led_back and "millrace" not in browser.cookies and browser.get("/runs").url.path == "/login"


def events(site: Site) -> list[Event]:
    site.home.services.records.seal()
    return [one for one in site.home.services.records.events(0, limit=10_000) if one.verb == "session.create"]


def test_there_and_back(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser:
        page = browser.get("/runs?q=a")
        assert page.url.path == "/login"
        link = re.search(r'href="(/login/oidc\?[^"]*)"', page.text)
        assert link
        place = browser.get(link[1].replace("&amp;", "&"), follow_redirects=False).headers["location"]
        answer = come_back(browser, issuer.approve(place))
        assert (answer.status_code, answer.headers["location"]) == (303, "/runs?q=a")
        assert answer.headers["cache-control"] == "no-store"
        assert "millrace-oidc" not in browser.cookies
        shown = browser.get("/runs")
        assert (shown.url.path, "ada" in shown.text) == ("/runs", True)
    (user,) = (one for one in site.home.services.records.find(User) if one.name == "ada")
    assert (user.external, user.email, user.groups) == (f"{issuer.url}|s-1", "ada@example.org", ("staff",))
    event = events(site)[-1]
    assert (event.actor, event.detail["outcome"], event.detail["by"]) == ("user:ada", "ok", issuer.url)


def test_an_answer_that_nobody_asked_for(site: Site, issuer: Issuer) -> None:
    """Login CSRF: a link of somebody else, who has signed in there as themselves, signs nobody in here."""
    with site.browser() as attacker, site.browser() as victim:
        answer = issuer.approve(leave(attacker))
        assert is_refused(come_back(victim, answer), victim)
        leave(victim)
        assert is_refused(come_back(victim, answer), victim), "the state is of another browser"
        assert events(site)[-1].actor == "anonymous"


@pytest.mark.parametrize("change", [{"state": ""}, {"state": "x"}, {"state": None}, {"code": None}, {"code": ""}, {"code": "x"},
                                    {"iss": "https://evil.example"}, {"iss": ""}, {"error": "access_denied", "code": None}])  # fmt: skip
def test_an_altered_answer(site: Site, issuer: Issuer, change: dict[str, Any]) -> None:
    with site.browser() as browser:
        answer: dict[str, Any] = {**issuer.approve(leave(browser)), **change}
        assert is_refused(
            come_back(browser, {name: value for name, value in answer.items() if value is not None}), browser
        )


def test_an_answer_that_says_something_twice(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser:
        answer = issuer.approve(leave(browser))
        assert is_refused(come_back(browser, urlencode([("state", "x"), *answer.items()])), browser)


def test_one_answer_is_good_once(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser, site.browser() as other:
        place = leave(browser)
        kept = browser.cookies["millrace-oidc"]
        answer = issuer.approve(place)
        assert come_back(browser, answer).headers["location"] == "/"
        other.cookies.set("millrace-oidc", kept)
        assert is_refused(come_back(other, answer), other), "everything of it was overheard"
        other.cookies.set("millrace-oidc", kept)
        again = issuer.approve(place)
        assert is_refused(come_back(other, again), other), "also with a new code for the same state"


def test_what_was_begun_ends_with_the_first_answer_also_with_a_wrong_one(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser:
        place = leave(browser)
        kept = browser.cookies["millrace-oidc"]
        assert is_refused(come_back(browser, {"code": "x", "state": "guessed"}), browser)
        browser.cookies.set("millrace-oidc", kept)
        assert is_refused(come_back(browser, issuer.approve(place)), browser)


def test_what_was_begun_long_ago(site: Site, issuer: Issuer) -> None:
    records = site.home.services.records
    with site.browser() as browser:
        answer = issuer.approve(leave(browser))
        for one in records.find(Session, {"user_name": ""}):
            records.put(Session(**{**{name: getattr(one, name) for name in one.__struct_fields__}, "expires_at": 1.0}))
        assert is_refused(come_back(browser, answer), browser)


@pytest.mark.parametrize("wanted", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/login?next=//evil.example",
                                    "/\r\nSet-Cookie: a=b", "/%0d%0aSet-Cookie:a=b", "evil"])  # fmt: skip
def test_no_redirect_leads_elsewhere(site: Site, issuer: Issuer, wanted: str) -> None:
    with site.browser() as browser:
        answer = come_back(browser, {**issuer.approve(leave(browser, next=wanted)), "next": wanted})
        assert httpx.URL(site.url).join(answer.headers["location"]).host == "127.0.0.1"
        assert answer.headers["location"] in ("/", wanted)
        assert "a" not in browser.cookies
        assert (answer.headers["location"] == wanted) == wanted.startswith("/%0d")


def test_the_cookie_of_what_was_begun_is_no_session(site: Site) -> None:
    with site.browser() as browser:
        leave(browser)
        browser.cookies.set("millrace", browser.cookies["millrace-oidc"])
        assert browser.get("/runs").url.path == "/login"


def test_an_old_session_ends_and_its_cookie_is_no_way_in(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser, site.browser() as fixed:
        come_back(browser, issuer.approve(leave(browser)))
        first = browser.cookies["millrace"]
        come_back(browser, issuer.approve(leave(browser)))
        assert browser.cookies["millrace"] != first
        fixed.cookies.set("millrace", first)
        assert fixed.get("/runs").url.path == "/login"


def test_groups_give_and_take_at_the_next_sign_in(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser:
        for groups, status in (
            (["staff"], 200),
            ([], 403),
            (["other"], 403),
            (None, 403),
            ("staff", 403),
            (["staff"], 200),
        ):
            come_back(browser, issuer.approve(leave(browser), sub="s-2", preferred_username="ben", groups=groups))
            assert browser.get("/api/v1/runs", headers={"Accept": "application/json"}).status_code == status, groups


def test_a_disabled_user_stays_out_and_what_they_have_ends(site: Site, issuer: Issuer) -> None:
    with site.browser() as browser:
        come_back(browser, issuer.approve(leave(browser), sub="s-3", preferred_username="cleo"))
        assert browser.get("/runs").url.path == "/runs"
        site.home.call("user.disable", {"name": "cleo"})
        assert browser.get("/runs").url.path == "/login"
        browser.cookies.delete("millrace")
        assert is_refused(
            come_back(browser, issuer.approve(leave(browser), sub="s-3", preferred_username="dora")), browser
        )
        site.home.call("user.enable", {"name": "cleo"})
        assert come_back(browser, issuer.approve(leave(browser), sub="s-3")).headers["location"] == "/"


def test_a_name_gives_nobody_what_belongs_to_somebody_else(site: Site, issuer: Issuer) -> None:
    """Somebody may call themselves as they like there: who they are here hangs on what never changes."""
    site.home.call("user.create", {"name": "root", "password": "blue tractor on mars"})
    site.home.call("role.grant", {"who": "root", "role": "owner"})
    names = []
    for number, name in enumerate(
        ["root", "Root", " root ", "owner", "owner-2", "user:root", "group:staff", "../x", "\u202e", ""]
    ):
        with site.browser() as browser:
            come_back(
                browser,
                issuer.approve(leave(browser), sub=f"n-{number}", preferred_username=name, email="root", groups=[]),
            )
            assert browser.get("/api/v1/runs", headers={"Accept": "application/json"}).status_code == 403
    names = [one.name for one in site.home.services.records.find(User) if one.external.startswith(f"{issuer.url}|n-")]
    assert len(set(names)) == 10
    assert not {"root", "owner", "owner-2"} & set(names)


def test_many_who_do_not_come_back_keep_nobody_out(site: Site, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc_login, "MOST_PENDING", 5)
    with site.browser() as browser:
        for _ in range(12):
            leave(browser)
        assert len(site.home.services.records.find(Session, {"user_name": ""})) <= 5
        assert come_back(browser, issuer.approve(leave(browser))).headers["location"] == "/"


def test_who_begins_again_and_again_drives_out_nobody_else(
    site: Site, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can reach the server may begin: not even somebody's code for a terminal ends by that."""
    monkeypatch.setattr(oidc_login, "MOST_PENDING", 5)
    site.home.call("user.create", {"name": "tess"})
    wanted = terminals.check_wanted("x" * 43, "laptop", "86400")
    code = terminals.give_code(site.home.services, "tess", wanted)
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with site.browser() as browser, httpx.Client(base_url=site.url, transport=elsewhere, trust_env=False) as other:
        place = leave(browser)
        for _ in range(12):
            leave(other)
        assert come_back(browser, issuer.approve(place)).headers["location"] == "/"
    assert site.home.services.records.get(Session, token_id(code)) is not None


def test_an_issuer_that_is_away(site: Site, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(issuer.replaced, "/token", (503, {}, b""))
    with site.browser() as browser:
        assert is_refused(come_back(browser, issuer.approve(leave(browser))), browser)
        assert "did not work" in browser.get("/login?problem=oidc").text


def test_a_slow_issuer_holds_up_nobody_else(tmp_path: Path) -> None:
    """More browsers wait for it than the server has threads."""
    go = threading.Event()
    with Issuer(SystemClock()) as slow, Site(tmp_path) as site, ThreadPoolExecutor(60) as pool:
        says = slow.says
        slow.says = lambda path, form: says(path, form) if go.wait(30) else (503, {}, b"")  # type: ignore[method-assign]
        site.start(oidc_issuer=slow.url, oidc_client_id="millrace")
        leaving = [pool.submit(httpx.get, f"{site.url}/login/oidc", timeout=60, trust_env=False) for _ in range(60)]
        try:
            while len(site.connections()) < 60:
                time.sleep(0.01)
            assert httpx.get(f"{site.url}/readyz", timeout=8, trust_env=False).status_code == 200
        finally:
            go.set()
        assert {one.result().headers["location"].partition("?")[0] for one in leaving} == {f"{slow.url}/authorize"}


def test_guessing_has_an_end_and_leaves_no_trail_of_events(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("millrace.api.sessions.FREE_FAILURES", 0)
    with site.browser() as browser:
        for _ in range(3):
            come_back(browser, {"code": "x", "state": "x"})
        before = len(events(site))
        answers = [come_back(browser, {"code": "x", "state": "x"}) for _ in range(20)]
        assert {one.headers["location"] for one in answers} == {"/login?problem=busy"}
        assert browser.get("/login/oidc", follow_redirects=False).headers["location"] == "/login?problem=busy"
        assert len(events(site)) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"oidc_issuer": "https://idp.example"}, "oidc_client_id is not"),
     ({"oidc_issuer": "https://idp.example", "oidc_client_id": "m", "oidc_client_secret_file": "/nowhere"}, "cannot be read")],
)  # fmt: skip
def test_half_of_the_settings(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    site = Site(tmp_path)
    try:
        with pytest.raises(InputError, match=said):
            site.start(**settings)
    finally:
        home: Dispatcher = site.home
        home.close()
