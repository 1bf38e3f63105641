"""`millrace login`: a real server, a browser and a terminal; what somebody else can do with what they see."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import uvicorn
from argon2 import PasswordHasher

from millrace.api.app import build_app
from millrace.api.pages import login as login_page
from millrace.client import logins
from millrace.client.logins import LoginTransport
from millrace.control.dispatch import Dispatcher
from millrace.core.clock import SystemClock
from millrace.core.errors import InputError, NotFoundError, UnauthenticatedError
from millrace.core.types import Session, Token
from millrace.testing.radosgw import free_port
from millrace.wiring import open_dispatcher, open_transport

PASSWORD = "blue tractor on mars"


class Clock(SystemClock):
    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Site:
    """A server that wants to know who is asking, in a thread."""

    def __init__(self, home: Dispatcher, url: str) -> None:
        self.home, self.url = home, url

    def token(self, name: str) -> Token:
        (found,) = self.home.services.records.find(Token, {"name": name})
        return found

    @contextmanager
    def browser(self, name: str = "ada") -> Iterator[httpx.Client]:
        """Somebody has signed in."""
        headers = {"Accept": "text/html"}
        with httpx.Client(base_url=self.url, headers=headers, follow_redirects=True, trust_env=False) as browser:
            form = field(browser.get("/login"), "form")
            browser.post("/login", data={"form": form, "name": name, "password": PASSWORD})
            assert "millrace" in browser.cookies
            yield browser


@pytest.fixture(scope="module", autouse=True)
def quick(quick_hashing: PasswordHasher) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millrace.security.passwords._HASHER", quick_hashing)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home, port = open_dispatcher(str(tmp_path_factory.mktemp("login") / "home")), free_port()
    home.services.clock = Clock()
    for name, role in (("ada", "owner"), ("ben", "viewer")):
        home.call("user.create", {"name": name, "password": PASSWORD})
        home.call("role.grant", {"who": name, "role": role})
    app = build_app(home, wants_token=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield Site(home, f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join(10)
    home.close()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MILLRACE_TOKEN", raising=False)
    monkeypatch.setattr(login_page, "FAILED_S", 0.0)
    monkeypatch.setattr("millrace.api.sessions.FREE_FAILURES", 1000)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config/millrace/logins"


@pytest.fixture
def terminal(site: Site) -> Iterator[LoginTransport]:
    opened = LoginTransport(site.url)
    yield opened
    opened.close()


def field(page: httpx.Response, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page.text)
    assert found, page.text[:2000]
    return found[1]


def agree(browser: httpx.Client, address: str, mark: str) -> str:
    """Read the page, compare the mark, agree: the code."""
    page = browser.get(address)
    assert mark in page.text
    names = ("csrf", "challenge", "host", "lives_s")
    shown = browser.post("/login/terminal", data={name: field(page, name) for name in names})
    assert shown.headers["cache-control"] == "no-store"
    found = re.search(r"<output><code>([^<]+)</code>", shown.text)
    assert found, shown.text
    return found[1]


def run(site: Site, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millrace", *arguments]
    return subprocess.run(
        command, input=typed, capture_output=True, text=True, env={**os.environ, "MILLRACE_URL": site.url}
    )


# --------------------------------------------------------------------------- as people do it


def test_in_and_out(site: Site, place: Path) -> None:
    refused = run(site, "runs")
    assert refused.returncode == 6
    process = subprocess.Popen(
        [sys.executable, "-m", "millrace", "login", site.url, "--expires", "12h", "--json"], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stderr
    address = process.stderr.readline().split()[-1]
    mark = process.stderr.readline().split("shows")[1].strip()
    with site.browser() as browser:
        code = agree(browser, address, mark)
    printed, said = process.communicate(f" {code} \n")
    assert process.returncode == 0, said
    answer = json.loads(printed)
    assert (answer["url"], answer["user"]) == (site.url, "ada")
    (file,) = place.iterdir()
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(place.stat().st_mode)) == (0o600, 0o700)
    secret = json.loads(file.read_text())["token"]
    assert secret not in printed + said
    token = site.token(answer["name"])
    assert token.expires_at is not None
    assert 12 * 3600 - 60 < token.expires_at - site.home.services.clock.now() <= 12 * 3600
    listed = run(site, "tokens", "--json")
    assert answer["name"] in {one["name"] for one in json.loads(listed.stdout)}
    out = run(site, "logout")
    assert (out.returncode, out.stdout.strip()) == (0, f"signed out at {site.url}")
    assert site.token(answer["name"]).revoked_at is not None
    assert list(place.iterdir()) == []
    assert run(site, "runs").returncode == 6
    assert run(site, "logout").returncode == 3


def test_who_is_not_signed_in_signs_in_first_and_comes_back(site: Site, terminal: LoginTransport) -> None:
    address, mark, verifier = terminal.begin("laptop", 3600)
    with httpx.Client(
        base_url=site.url, headers={"Accept": "text/html"}, follow_redirects=True, trust_env=False
    ) as browser:
        page = browser.get(address)
        assert page.url.path == "/login"
        entered = {
            "form": field(page, "form"),
            "next": field(page, "next").replace("&amp;", "&"),
            "name": "ben",
            "password": PASSWORD,
        }
        assert str(browser.post("/login", data=entered).url) == address
        found = terminal.redeem(agree(browser, address, mark), verifier)
    logins.save(found)
    assert found.user == "ben"
    token = site.token(found.name)
    assert (token.user_name, token.scopes, found.name.startswith("login-ben-laptop-")) == ("ben", (), True)
    site.home.services.records.seal()
    event = next(
        one for one in site.home.services.records.events(0, limit=10_000) if one.subject == f"token:{found.name}"
    )
    assert (event.actor, event.verb, event.detail["by"]) == ("user:ben", "token.create", "login")
    assert found.token not in repr(event)


def test_commands_find_the_token_by_the_server(
    site: Site, terminal: LoginTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_URL", f"{site.url}/")
    address, mark, verifier = terminal.begin("laptop", 3600)
    with site.browser() as browser:
        logins.save(terminal.redeem(agree(browser, address, mark), verifier))
    opened = open_transport()
    assert opened.call("run.list", {}) == []
    opened.close()
    monkeypatch.setenv("MILLRACE_TOKEN", "mr_wrong")
    opened = open_transport()
    with pytest.raises(UnauthenticatedError):
        opened.call("run.list", {})
    opened.close()


def test_a_second_login_replaces_the_first(site: Site, place: Path) -> None:
    names = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-m", "millrace", "login", site.url, "--json"], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        assert process.stderr
        address, mark = process.stderr.readline().split()[-1], process.stderr.readline().split("shows")[1].strip()
        with site.browser() as browser:
            names.append(json.loads(process.communicate(agree(browser, address, mark))[0])["name"])
    assert len(list(place.iterdir())) == 1
    assert [site.token(name).revoked_at is None for name in names] == [False, True]


def test_another_password_ends_what_was_signed_in_with_the_one_before(
    site: Site, terminal: LoginTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had the password may have signed in a terminal with it; a token made for a purpose goes on."""
    monkeypatch.setenv("MILLRACE_URL", site.url)
    made = site.home.call("token.create", {"name": "robot", "scope": "viewer"})
    address, mark, verifier = terminal.begin("laptop", 3600)
    with site.browser() as browser:
        kept = terminal.redeem(agree(browser, address, mark), verifier)
        logins.save(kept)
        for password in ("a quite different one", PASSWORD):  # which the other tests want back
            site.home.call("user.set_password", {"name": "ada", "password": password})
        assert browser.get("/runs").url.path == "/login"
    opened = open_transport()
    with pytest.raises(UnauthenticatedError):
        opened.call("run.list", {})
    opened.close()
    assert site.token("robot").id == made.token.id
    assert site.token("robot").revoked_at is None


# --------------------------------------------------------------------------- what is refused


def test_a_code_is_useless_without_the_verifier_and_is_used_up_by_trying(site: Site, terminal: LoginTransport) -> None:
    other = terminal.begin("laptop", 3600)[2]
    for wrong in (other, "", "x", "é", "a" * 4000):
        address, mark, verifier = terminal.begin("laptop", 3600)
        with site.browser() as browser:
            code = agree(browser, address, mark)
        for tried in (wrong, verifier):
            with pytest.raises(UnauthenticatedError):
                terminal.redeem(code, tried)


def test_a_code_is_good_once_for_five_minutes_and_the_last_one_alone(site: Site, terminal: LoginTransport) -> None:
    with site.browser() as browser:
        address, mark, verifier = terminal.begin("laptop", 3600)
        first, second = agree(browser, address, mark), agree(browser, address, mark)
        with pytest.raises(UnauthenticatedError):
            terminal.redeem(first, verifier)
        assert terminal.redeem(second, verifier)
        with pytest.raises(UnauthenticatedError):
            terminal.redeem(second, verifier)
        late = agree(browser, address, mark)
        site.home.services.clock.ahead_s += 301
        with pytest.raises(UnauthenticatedError):
            terminal.redeem(late, verifier)


def test_a_code_of_somebody_who_was_disabled_since(site: Site, terminal: LoginTransport) -> None:
    site.home.call("user.create", {"name": "cleo", "password": PASSWORD})
    address, mark, verifier = terminal.begin("laptop", 3600)
    with site.browser("cleo") as browser:
        code = agree(browser, address, mark)
    site.home.call("user.disable", {"name": "cleo"})
    with pytest.raises(UnauthenticatedError):
        terminal.redeem(code, verifier)


def test_what_else_is_held_here_is_no_code(site: Site, terminal: LoginTransport) -> None:
    """Neither a session's cookie nor nothing; and a code is no cookie."""
    address, mark, verifier = terminal.begin("laptop", 3600)
    with site.browser() as browser:
        for wrong in (browser.cookies["millrace"], browser.cookies["millrace-form"], "", "x", "\x00"):
            with pytest.raises(UnauthenticatedError):
                terminal.redeem(wrong, verifier)
        assert browser.get("/runs").url.path == "/runs", "nobody was signed out by that"
        code = agree(browser, address, mark)
    for name in ("millrace", "millrace-oidc"):
        answer = httpx.get(f"{site.url}/api/v1/runs", cookies={name: code}, trust_env=False)
        assert answer.status_code == 401
    assert terminal.redeem(code, verifier)


def test_nobody_agrees_for_somebody_else(site: Site, terminal: LoginTransport) -> None:
    """Not without a session, not by a page of somebody else, not with a token instead of a session."""
    address, mark, verifier = terminal.begin("laptop", 3600)
    data = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
    before = len(site.home.services.records.find(Session, {"user_name": ""}))
    assert httpx.post(f"{site.url}/login/terminal", data=data, trust_env=False).status_code == 401
    with site.browser() as browser:
        assert browser.post("/login/terminal", data=data).status_code == 403
        assert browser.post("/login/terminal", data={**data, "csrf": "x"}).status_code == 403
        code = agree(browser, address, mark)
    token = terminal.redeem(code, verifier).token
    answer = httpx.post(
        f"{site.url}/login/terminal", data=data, headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    assert answer.status_code == 403
    assert len(site.home.services.records.find(Session, {"user_name": ""})) == before


NOT_WHOLE = (
    {"challenge": "short"}, {"challenge": "<b>" * 15}, {"host": ""}, {"host": "<script>"}, {"host": "a" * 41}, {"lives_s": "599"},
    {"lives_s": "2592001"}, {"lives_s": "-1"}, {"lives_s": "inf"}, {"lives_s": "٣٦٠٠"},
)  # fmt: skip


def test_an_address_that_is_not_whole(site: Site, terminal: LoginTransport) -> None:
    address, _, _ = terminal.begin("laptop", 3600)
    whole = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
    with site.browser() as browser:
        assert browser.get("/login/terminal", params=whole).status_code == 200
        csrf = field(browser.get("/runs"), "csrf")
        for change in NOT_WHOLE:
            page = browser.get("/login/terminal", params={**whole, **change})
            assert page.status_code == 400, change
            assert "<script>" not in page.text
            assert browser.post("/login/terminal", data={**whole, **change, "csrf": csrf}).status_code == 400


def test_a_page_of_anybody_redeems_nothing(site: Site) -> None:
    place = f"{site.url}/login/token"
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        answer = httpx.post(place, content=b'{"code": "x"}', headers={"Content-Type": kind}, trust_env=False)
        assert answer.status_code == 403
    answer = httpx.post(place, json={"code": "x", "verifier": "x"}, headers={"Cookie": "millrace=x"}, trust_env=False)
    assert answer.status_code == 403
    for body in (b"", b"[]", b'{"code": 1}', b"\xff", b"[" * 4000):
        assert httpx.post(place, content=body, trust_env=False).status_code == 401
    assert httpx.post(place, content=b"x" * 5000, trust_env=False).status_code == 413
    assert httpx.get(place, trust_env=False).status_code == 405


def test_guessing_has_an_end(site: Site, terminal: LoginTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.api.sessions.FREE_FAILURES", 0)
    site.home.services.clock.ahead_s += 1000
    statuses = [
        httpx.post(f"{site.url}/login/token", json={"code": "x", "verifier": "x"}, trust_env=False).status_code
        for _ in range(4)
    ]
    assert statuses[-1] == 503
    site.home.services.clock.ahead_s += 1000


# --------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "url",
    [
        "http://runs.example.org",
        "ftp://127.0.0.1",
        "runs.example.org",
        "",
        "https://",
        "http://[::1",
        "https://a:x",
        "http://127.0.0.1.evil.example",
    ],
)
def test_no_token_is_sent_where_it_can_be_read(site: Site, url: str) -> None:
    with pytest.raises(InputError):
        logins.server_of(url)
    assert logins.token_for(url) == ""
    if url:
        assert run(site, "login", url).returncode == 2


def test_a_token_is_kept_for_its_server_alone(place: Path) -> None:
    kept = logins.Login(url="https://a.example", token="mr_a", name="n", user="ada", expires_at=1.0)
    file = logins.save(kept)
    assert logins.token_for("https://A.example:443/") == "mr_a"
    for other in ("https://b.example", "https://a.example:8443", "https://a.example/b", "http://127.0.0.1"):
        assert logins.token_for(other) == ""
        with pytest.raises(NotFoundError):
            logins.find(other)
    file.chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        logins.token_for("https://a.example")
    file.chmod(0o600)
    file.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        logins.token_for("https://a.example")
    assert logins.forget("https://a.example")
    assert not logins.forget("https://a.example")


def test_a_server_that_is_away_keeps_what_is_kept(site: Site, place: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    logins.save(logins.Login(url=url, token="mr_a", name="n", user="ada", expires_at=1.0))
    assert run(site, "logout", url).returncode == 10
    assert logins.token_for(url) == "mr_a"
    assert run(site, "logout", url, "--forget").returncode == 0
    assert logins.token_for(url) == ""
    done = run(site, "login", url, typed="code\n")
    assert done.returncode == 10
    assert "Traceback" not in done.stderr
    assert run(site, "login", site.url, "--expires", "31d").returncode == 2
    assert run(site, "login", site.url, typed="wrong\n").returncode == 6
