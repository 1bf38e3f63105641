"""Signing in with real identity providers, each a program of its own: the npm package oidc-provider, and Canaille.

They are installed into a cache folder by npm and pip when a test first wants them; where that cannot be, the tests
are skipped, and say why.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from joserfc.jwk import RSAKey
from oidc_site import Site, cached, waiting_for

from millrace.core.types import User
from millrace.testing.radosgw import free_port

VERSION = "9.13.3"
SECRET = "a secret, with: %2F &="
HERE = Path(__file__).parent
pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def program() -> Path:
    """oidc_provider.mjs, beside the package that it imports."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", f"oidc-provider@{VERSION}"]
    folder = cached(f"oidc-provider-{VERSION}", lambda place: [[npm, "init", "-y"], install])
    return Path(shutil.copy(HERE / "oidc_provider.mjs", folder))


class Provider:
    """The running program."""

    def __init__(self, program: Path, callback: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rpartition(":")[2]
        self.process = subprocess.Popen(
            ["node", str(program), port, callback, SECRET], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        waiting_for(f"{self.url}/.well-known/openid-configuration", self.process)

    def control(self, **changes: object) -> None:
        httpx.post(f"{self.url}/control", json=changes, trust_env=False, timeout=20).raise_for_status()


@pytest.fixture(params=["confidential", "posting", "public", "curve"])
def started(request: pytest.FixtureRequest, program: Path, tmp_path: Path) -> Iterator[tuple[Site, Provider]]:
    with Site(tmp_path) as site:
        provider = Provider(program, site.back)
        try:
            (tmp_path / "secret").write_text(SECRET + "\n")
            settings = {"oidc_issuer": provider.url, "oidc_client_id": request.param}
            if request.param in ("confidential", "posting"):
                settings["oidc_client_secret_file"] = str(tmp_path / "secret")
            site.start(**settings)
            site.home.call("role.grant", {"who": "group:staff", "role": "viewer"})
            yield site, provider
        finally:
            provider.process.terminate()
            provider.process.wait(10)


def status(browser: httpx.Client) -> int:
    return browser.get("/api/v1/runs", headers={"Accept": "application/json"}).status_code


def test_oidc_provider(started: tuple[Site, Provider]) -> None:
    """Keys rotate; groups give and take; a disabled user stays out; a code that was used is no way in."""
    site, provider = started
    with site.browser() as browser:
        shown = browser.get("/login/oidc?next=/runs?q=a")
        assert str(shown.url) == f"{site.url}/runs?q=a"
        assert status(browser) == 200
        (answer,) = (one.url for one in shown.history if one.url.path == "/login/callback")
    with site.browser() as browser:
        assert str(browser.get(answer).url) == f"{site.url}/login?problem=oidc"
    (user,) = site.home.services.records.find(User)
    assert (user.name, user.external, user.email) == ("ada", f"{provider.url}|s-1", "ada@example.org")
    provider.control(rotate=True, groups=["other"])
    with site.browser() as browser:
        site.clock.ahead_s = 61.0
        browser.get("/login/oidc")
        assert status(browser) == 403, "the role went with the group"
    provider.control(groups=["staff", "other"])
    with site.browser() as browser:
        browser.get("/login/oidc")
        assert status(browser) == 200
        site.home.call("user.disable", {"name": "ada"})
        assert status(browser) == 401
    with site.browser() as browser:
        assert str(browser.get("/login/oidc").url) == f"{site.url}/login?problem=oidc"
        assert status(browser) == 401


# --------------------------------------------------------------------------- Canaille

CANAILLE = "0.3.6"
PLAIN = "a-plain-secret"  # Authlib, below Canaille, does not decode a secret as RFC 6749 2.3.1 wants it encoded
ENTER = "correct horse battery"
CONFIGURATION = """
SECRET_KEY = "a secret of a test"
SERVER_NAME = "{place}"
PREFERRED_URL_SCHEME = "http"
[CANAILLE]
JAVASCRIPT = false
[CANAILLE_SQL]
DATABASE_URI = "sqlite:///{folder}/canaille.db"
[CANAILLE_OIDC]
ACTIVE_JWKS = [{{ {key} }}]
"""


class Canaille:
    """An identity provider with a database, pages and forms of its own."""

    def __init__(self, folder: Path, callback: str) -> None:
        packages = [f"canaille[front,oidc,server,sqlite]=={CANAILLE}"]
        made = cached(
            f"canaille-{CANAILLE}",
            lambda place: [[sys.executable, "-m", "venv", str(place)], [str(place / "bin/python"), "-m", "pip", "install", "-q", *packages]],
        )  # fmt: skip
        self._command = [str(made / "bin/python"), "-c", "from canaille.commands import cli; cli()"]
        place = f"127.0.0.1:{free_port()}"
        self.url, self._folder = f"http://{place}", folder
        key = {**RSAKey.generate_key(2048).as_dict(private=True), "kid": "one"}
        listed = ", ".join(f'{name} = "{value}"' for name, value in key.items())
        (folder / "canaille.toml").write_text(CONFIGURATION.format(place=place, folder=folder, key=listed))
        self._environment = {"PATH": os.environ["PATH"], "CANAILLE_CONFIG": str(folder / "canaille.toml")}
        self.command("install")
        self.command("create", "user", "--user-name", "ada", "--password", ENTER, "--family-name", "L", "--display-name", "Ada L.", "--emails", "ada@example.org")  # fmt: skip
        self.command("create", "group", "--display-name", "staff", "--members", "ada")
        scopes = [part for scope in ("openid", "profile", "email", "groups") for part in ("--scope", scope)]
        self.command("create", "client", "--client-id", "millrace", "--client-secret", PLAIN, "--client-name", "Millrace",
                     "--client-uri", "http://127.0.0.1", "--redirect-uris", callback, "--grant-types", "authorization_code",
                     "--response-types", "code", "--token-endpoint-auth-method", "client_secret_basic", *scopes)  # fmt: skip
        self.command("set", "client", "millrace", "--audience", "millrace")  # its page for clients does so by itself
        self.process = subprocess.Popen(
            [*self._command, "run", "--bind", place], env=self._environment, cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        waiting_for(f"{self.url}/.well-known/openid-configuration", self.process)

    def command(self, *arguments: str) -> dict[str, str]:
        done = subprocess.run([*self._command, *arguments], env=self._environment, cwd=self._folder, capture_output=True, text=True, input="y\n")  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else {}

    def enter(self, browser: httpx.Client, page: httpx.Response) -> httpx.Response:
        """Fill in its forms: first the name, then the password."""
        for name, value in (("login", "ada"), ("password", ENTER)):
            hidden = dict(re.findall(r'<input[^>]*name="([^"]*)"[^>]*value="([^"]*)"', page.text))
            assert name in hidden, page.text
            page = browser.post(page.url, data={**hidden, name: value})
        return page


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MILLRACE_CANAILLE"), reason="MILLRACE_CANAILLE=1 installs and runs it: 40 s")
def test_canaille(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        provider = Canaille(tmp_path, site.back)
        try:
            (tmp_path / "secret").write_text(PLAIN)
            site.start(
                oidc_issuer=provider.url, oidc_client_id="millrace", oidc_client_secret_file=str(tmp_path / "secret")
            )
            site.home.call("role.grant", {"who": "group:staff", "role": "viewer"})
            with site.browser() as browser:
                shown = provider.enter(browser, browser.get("/login/oidc?next=/runs"))
                assert str(shown.url) == f"{site.url}/runs"
                assert status(browser) == 200
                (user,) = site.home.services.records.find(User)
                assert (user.name, user.groups, user.external) == ("ada-l", ("staff",), f"{provider.url}|ada")
                provider.command("delete", "group", "--display-name", "staff")
                browser.get("/login/oidc")
                assert status(browser) == 403, "the role went with the group"
        finally:
            provider.process.terminate()
            provider.process.wait(20)
