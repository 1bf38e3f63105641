"""Tokens that `millrace login` has been given: one file per server, which its owner alone can read."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec

from millrace.client.http import HttpTransport, error_of, reaching
from millrace.core.addresses import is_loopback
from millrace.core.errors import InputError, NotFoundError
from millrace.core.settings import user_file
from millrace.core.types import Struct


class Login(Struct, frozen=True, kw_only=True):
    """A token of somebody at a server, and until when it is good."""

    url: str
    token: str
    name: str
    user: str
    expires_at: float


class _Answer(Struct, frozen=True, kw_only=True):
    token: str
    name: str
    user: str
    expires_at: float


def server_of(url: str) -> str:
    """A server's URL as tokens are kept for it.

    Raises:
        InputError: It is none, or what is sent there could be read on the way.

    Example:
        >>> server_of("https://Runs.Example:443/"), server_of("http://127.0.0.1:7070")
        ('https://runs.example', 'http://127.0.0.1:7070')
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError(f"{url[:200]!r} is no URL") from None
    host = (parts.hostname or "").lower()
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
        raise InputError(f"want https://…, or http:// on this machine: a token is sent there; got {url[:200]!r}")
    shown = f"[{host}]" if ":" in host else host
    is_usual = port in (None, 443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{shown}{'' if is_usual else f':{port}'}{parts.path.rstrip('/')}"


def place_of(url: str) -> Path:
    """The file of a server."""
    return user_file().parent / "logins" / f"{hashlib.sha256(server_of(url).encode()).hexdigest()[:32]}.json"


def save(login: Login) -> Path:
    """Keep it, in place of an older one of the same server."""
    place = place_of(login.url)
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = place.with_name(f"{place.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(login))
    os.replace(new, place)
    return place


def find(url: str) -> Login:
    """What is kept for a server.

    Raises:
        NotFoundError: Nothing is.
        InputError: Others can read the file, or it is none of these.
    """
    place = place_of(url)
    try:
        with place.open("rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(1 << 16)
    except FileNotFoundError:
        raise NotFoundError(f"nobody is signed in at {url}", hint=f"millrace login {url}") from None
    if mode & 0o077:
        raise InputError(f"others can read {place}: its token is no secret", hint=f"`millrace logout {url} --forget`")
    try:
        return msgspec.json.decode(data, type=Login)
    except msgspec.MsgspecError:
        raise InputError(f"{place} is damaged", hint=f"`millrace logout {url} --forget`, then log in again") from None


def token_for(url: str) -> str:
    """The token that is kept for a server; "" where none is."""
    try:
        is_kept = place_of(url).exists()
    except InputError:
        return ""  # none is ever kept for it
    return find(url).token if is_kept else ""


def forget(url: str) -> bool:
    """Whether there was something to forget."""
    place = place_of(url)
    was_there = place.exists()
    place.unlink(missing_ok=True)
    return was_there


class LoginTransport(HttpTransport):
    """A server that does not know yet who is asking."""

    def begin(self, host: str, lives_s: float) -> tuple[str, str, str]:
        """What to ask somebody for.

        Args:
            host: What this machine is called.
            lives_s: How long the token is to be good.

        Returns:
            The address to open, what the page there has to show, and what to redeem the code with.
        """
        verifier = secrets.token_urlsafe(32)
        digest = hashlib.sha256(verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        query = urlencode({"challenge": challenge, "host": host, "lives_s": int(lives_s)})
        return f"{self.url}/login/terminal?{query}", f"{challenge[:4]} {challenge[4:8]}", verifier

    def redeem(self, code: str, verifier: str) -> Login:
        """A token for a code that its page has given.

        Raises:
            UnavailableError: The server cannot be reached.
            UnauthenticatedError: The code is not good.
            NotFoundError: The server asks nobody who they are.
        """
        with reaching(self.url):
            answer = self._http.post("/login/token", json={"code": code, "verifier": verifier})
        if answer.is_error:
            raise error_of(answer)
        try:
            found = msgspec.json.decode(answer.content, type=_Answer)
        except msgspec.MsgspecError:
            raise error_of(answer) from None
        return Login(url=self.url, **msgspec.structs.asdict(found))
