"""Tokens for people at a terminal: a page gives them a code, and what the terminal alone knows makes it a token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

import msgspec

from millrace.control.authorisation import user_principal
from millrace.control.services import Services
from millrace.control.tokens import add_token
from millrace.core.errors import InputError, UnauthenticatedError
from millrace.core.operations.works import CreatedToken
from millrace.core.principals import token_id
from millrace.core.types import Event, Session, Struct, User

CODE_S = 300.0  # a code is typed at once
LEAST_S, MOST_S = 600, 30 * 86400
_CHALLENGE, _HOST = re.compile(r"[A-Za-z0-9_-]{43}"), re.compile(r"[A-Za-z0-9._-]{1,40}")


class Wanted(Struct, frozen=True, kw_only=True):
    """What a terminal asks for. `challenge` is the SHA-256 of what it keeps to itself, as in RFC 7636."""

    challenge: str
    host: str
    lives_s: int

    @property
    def mark(self) -> str:
        """What people compare, here and there."""
        return f"{self.challenge[:4]} {self.challenge[4:8]}"


def check_wanted(challenge: str, host: str, lives_s: str) -> Wanted:
    """What the address says that a terminal has shown.

    Raises:
        InputError: It is none.

    Example:
        >>> check_wanted("x" * 43, "laptop", "86400").mark
        'xxxx xxxx'
    """
    is_whole = _CHALLENGE.fullmatch(challenge) and _HOST.fullmatch(host) and re.fullmatch(r"[0-9]{1,9}", lives_s)
    if not is_whole or not LEAST_S <= int(lives_s) <= MOST_S:
        raise InputError(
            f"this address is not whole: a token lives {LEAST_S} to {MOST_S} s, for a challenge and a host",
            hint="copy it from the terminal again, or run `millrace login` anew",
        )
    return Wanted(challenge=challenge, host=host, lives_s=int(lives_s))


def challenge_of(verifier: str) -> str:
    """The SHA-256 of a verifier, as URLs have it.

    Example:
        >>> challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
        'E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM'
    """
    digest = hashlib.sha256(verifier.encode("utf-8", "replace")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def give_code(services: Services, user_name: str, wanted: Wanted) -> str:
    """A code for somebody who is signed in and has agreed; one that they were given before ends."""
    now, code = services.clock.now(), secrets.token_urlsafe(24)
    pending = {
        "terminal": user_name,
        "challenge": wanted.challenge,
        "host": wanted.host,
        "lives_s": str(wanted.lives_s),
    }
    with services.records.transaction() as transaction:
        for one in transaction.find(Session, {"user_name": ""}):
            if one.pending.get("terminal") == user_name:
                transaction.delete(Session, one.id)
        begun = Session(id=token_id(code), created_at=now, user_name="", csrf="", used_at=now, expires_at=now + CODE_S,
                        pending=pending)  # fmt: skip
        transaction.put(begun, expect_version=0)
    return code


def redeem(services: Services, code: str, verifier: str, *, address: str) -> CreatedToken:
    """A token for a code. It is used up, whatever comes of it.

    Args:
        services: The home.
        code: That the page has given.
        verifier: What the terminal alone knows.
        address: Whence; kept with the event.

    Raises:
        UnauthenticatedError: There is no such code, it is used up or too old, it was given for another terminal, or
            whoever it was given to is disabled.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        begun = transaction.get(Session, token_id(code))
        if begun is not None and begun.pending.get("terminal"):
            transaction.delete(Session, begun.id)
    asked = begun.pending if begun is not None else {}
    is_right = hmac.compare_digest(asked.get("challenge", ""), challenge_of(verifier))
    if begun is None or not asked.get("terminal") or begun.expires_at <= now or not is_right:
        raise UnauthenticatedError(
            "this code is not known here, is used up or too old, or was given for another terminal",
            hint="run `millrace login` again",
        )
    name = f"login-{asked['terminal'][:40]}-{asked['host']}-{secrets.token_hex(4)}"
    with services.records.transaction() as transaction:
        user = transaction.get(User, asked["terminal"])
        user_principal(services, user)  # still known, and not disabled
        made = add_token(services, transaction, name, (), user_name=asked["terminal"], lives_s=float(asked["lives_s"]))
        token = transaction.put(msgspec.structs.replace(made.token, is_of_login=True), made.token.version)
        actor, detail = f"user:{asked['terminal']}", {"outcome": "ok", "by": "login", "address": address}
        transaction.append(Event(at=now, actor=actor, verb="token.create", subject=f"token:{name}", detail=detail))
    return CreatedToken(secret=made.secret, token=token)
