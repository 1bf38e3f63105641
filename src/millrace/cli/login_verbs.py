"""`millrace login` and `logout`: a person at a terminal proves who they are in a browser."""

from __future__ import annotations

import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option
from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.errors import InputError, NotFoundError, UnauthenticatedError
from millrace.core.settings import find_home, resolve_settings
from millrace.core.units import parse_duration

LOGINS = "millrace.client.logins"
MOST_S = 30 * 86400.0


def _server(session: Session, url: str | None) -> tuple[str, str]:
    """The server, and the certificates to trust there.

    Raises:
        InputError: None is named, or it is no URL that a token may be sent to.
    """
    settings = resolve_settings(home=Path(session.home) if session.home else find_home(Path.cwd()))
    url = url or settings["url"].value
    if not url:
        raise InputError("which server?", hint="name it: `millrace login https://runs.example.org`")
    return extras.load(f"{LOGINS}:server_of")(url), settings["ca_file"].value


@click.command()
@click.argument("url", required=False)
@click.option("--expires", default="7d", show_default=True, help="How long the token is good: 10min to 30d.")
@click.option("--no-browser", is_flag=True, help="Only show the address.")
@json_option
@click.pass_obj
def login(session: Session, url: str | None, expires: str, no_browser: bool, as_json: bool) -> None:
    """Sign in at a server, in a browser: with a password, or with an identity provider. URL: default the setting.

    Shows an address; the page there gives a code, which is typed here. The token is kept in a file of your own, and
    commands use it whenever they talk to that server.

    \b
    Examples:
      millrace login https://runs.example.org
      millrace login --expires 12h --no-browser
    """
    session.as_json = as_json
    lives_s = parse_duration(expires)
    if not 600 <= lives_s <= MOST_S:
        raise InputError(f"a token is good for 10 minutes to 30 days, got {expires!r}")
    place, ca_file = _server(session, url)
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node())[:40] or "terminal"
    server = extras.load(f"{LOGINS}:LoginTransport")(place, "", ca_file)
    try:
        address, mark, verifier = server.begin(host, lives_s)
        click.echo(f"open    {address}\nsign in there; go on only if the page shows  {mark}", err=True)
        if sys.stdin.isatty() and not no_browser:
            click.launch(address)
        code = click.prompt("Code", err=True) if sys.stdin.isatty() else sys.stdin.readline()
        found = server.redeem(code.strip(), verifier)
    except NotFoundError:
        raise InputError(f"{place} asks nobody who they are: there is nothing to sign in to") from None
    finally:
        server.close()
    _replace(place, found, ca_file)
    _say(session, found, f"signed in at {place} as {found.user}; commands use it where MILLRACE_URL={place}")


def _replace(place: str, found: Any, ca_file: str) -> None:
    """Keep it; what was kept before is revoked, if it is still good."""
    try:
        old = extras.load(f"{LOGINS}:find")(place)
    except (NotFoundError, InputError):
        old = None
    extras.load(f"{LOGINS}:save")(found)
    if old is not None and old.user == found.user and old.name != found.name:
        _revoke(place, found.token, old.name, ca_file)


def _revoke(place: str, token: str, name: str, ca_file: str) -> bool:
    """Whether it was good until now."""
    server = extras.load("millrace.wiring:open_far")(place, token, ca_file)
    try:
        server.call("token.revoke", {"name": name})
    except (UnauthenticatedError, NotFoundError):
        return False  # expired or revoked, or the user is disabled: it is good for nothing
    finally:
        server.close()
    return True


def _say(session: Session, found: Any, text: str) -> None:
    """Never the token."""
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.expires_at))
    if session.as_json:
        session.print_json({"url": found.url, "user": found.user, "name": found.name, "expires_at": until})
    else:
        click.echo(f"{text}, until {until}")


@click.command()
@click.argument("url", required=False)
@click.option("--forget", is_flag=True, help="Only remove it here, without asking the server: it stays good there.")
@json_option
@click.pass_obj
def logout(session: Session, url: str | None, forget: bool, as_json: bool) -> None:
    """Revoke the token that `millrace login` was given, and remove it.

    \b
    Example:
      millrace logout https://runs.example.org
    """
    session.as_json = as_json
    place, ca_file = _server(session, url)
    is_revoked = False
    if not forget:
        found = extras.load(f"{LOGINS}:find")(place)
        is_revoked = _revoke(place, found.token, found.name, ca_file)
    was_there = extras.load(f"{LOGINS}:forget")(place)
    if session.as_json:
        session.print_json({"url": place, "removed": was_there, "revoked": is_revoked})
    else:
        click.echo(f"signed out at {place}" if was_there else f"nothing was kept for {place}")


COMMANDS: tuple[click.Command, ...] = (login, logout)
