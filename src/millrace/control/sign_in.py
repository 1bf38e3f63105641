"""Signing in: passwords with back-off and a second factor, sessions that end. No HTTP here."""

from __future__ import annotations

import secrets
from concurrent.futures import Future

import msgspec

from millrace.control.authorisation import user_principal
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import UnauthenticatedError
from millrace.core.ports import Transaction
from millrace.core.principals import TOKEN_PREFIX, Principal, token_id
from millrace.core.types import Event, Session, Struct, Token, User

FREE_FAILURES = 5  # then each further one doubles the time in which no password is looked at
MOST_PAUSE_S = 60.0  # more, and a stranger could keep somebody out for long
USED_EVERY_S = 60.0
PASSWORDS = "millrace.security.passwords"


class Attempt(Struct, frozen=True, kw_only=True):
    """Somebody says that they are `name`. `stored` is what the password is checked against; "" is never right."""

    name: str
    stored: str = ""


class SignedIn(Struct, frozen=True, kw_only=True):
    """A new session; `secret` is its cookie, and kept nowhere."""

    secret: str
    session: Session


def pause_s(failures: int) -> float:
    """How long no password is looked at after so many wrong ones.

    Example:
        >>> [pause_s(failures) for failures in (1, 5, 6, 9, 100)]
        [0.0, 0.0, 2.0, 16.0, 60.0]
    """
    return 0.0 if failures <= FREE_FAILURES else min(2.0 ** min(failures - FREE_FAILURES, 10), MOST_PAUSE_S)


def begin(services: Services, name: str) -> Attempt:
    """Count the attempt before the password is looked at: many at once are no way round the back-off."""
    with services.records.transaction() as transaction:
        user, now = transaction.get(User, name), services.clock.now()  # the time after waiting for others
        if user is None or user.disabled_at is not None or now < user.not_before:
            return Attempt(name=name)
        failures = user.failures + 1
        pause = pause_s(failures)  # none is no moment either: the clock of another host may be behind
        counted = msgspec.structs.replace(user, failures=failures, not_before=now + pause if pause else 0.0)
        transaction.put(counted, user.version)
    return Attempt(name=name, stored=user.password)


def check(attempt: Attempt, password: str) -> Future[bool]:
    """Whether the password is right, found out when its turn comes; as much work for a name that nobody has.

    Raises:
        UnavailableError: Too many wait already.
    """
    return extras.load(f"{PASSWORDS}:check_password")(attempt.stored, password)


def succeed(services: Services, transaction: Transaction, attempt: Attempt, code: str | None) -> User | None:
    """The password was right: look at the second factor, and forget the failures; None where something was not.

    Args:
        services: The home.
        transaction: In which the user is changed.
        attempt: What `begin` has returned.
        code: Of the second factor; None where it is not asked for.
    """
    user, now = transaction.get(User, attempt.name), services.clock.now()
    if user is None or user.disabled_at is not None or user.password != attempt.stored:
        return None
    step: int | None = user.totp_step
    if user.totp and code is not None:
        step = extras.load("millrace.security.totp:accepted_step")(user.totp, code, now, user.totp_step)
    if step is None:
        return None
    return transaction.put(msgspec.structs.replace(user, failures=0, not_before=0.0, totp_step=step), user.version)


def sign_in(services: Services, attempt: Attempt, code: str, *, address: str, old: str = "") -> SignedIn | None:
    """A new session after the right password; None, and an event, where the second factor is wrong.

    Args:
        services: The home.
        attempt: What `begin` has returned.
        code: Of the second factor.
        address: Whence; kept with the event.
        old: The cookie of a session that this one replaces.
    """
    with services.records.transaction() as transaction:
        user = succeed(services, transaction, attempt, code)
        if user is not None:
            return open_session(services, transaction, user, address=address, old=old, by="password")
    refuse(services, attempt.name, address)
    return None


def open_session(
    services: Services, transaction: Transaction, user: User, *, address: str, old: str, by: str
) -> SignedIn:
    """A session of somebody who has proved who they are, in place of an old one; theirs that have ended go."""
    now, secret = services.clock.now(), secrets.token_urlsafe(32)
    if old:
        transaction.delete(Session, token_id(old))
    for session in transaction.find(Session, {"user_name": user.name}):
        if has_ended(services, session):
            transaction.delete(Session, session.id)
    session = Session(
        id=token_id(secret), created_at=now, user_name=user.name, csrf=secrets.token_urlsafe(32), used_at=now,
        expires_at=now + services.setting("session_max_s"),
    )  # fmt: skip
    session = transaction.put(session, expect_version=0)
    detail = {"outcome": "ok", "by": by, "address": address}
    actor = f"user:{user.name}"
    transaction.append(Event(at=now, actor=actor, verb="session.create", subject=actor, detail=detail))
    return SignedIn(secret=secret, session=session)


def refuse(services: Services, name: str, address: str) -> None:
    """A failure is an event. A name that nobody has is not repeated: people type passwords there."""
    subject = f"user:{name}" if services.records.get(User, name) is not None else "user:unknown"
    detail = {"outcome": "auth.denied", "address": address}
    with services.records.transaction() as transaction:
        transaction.append(
            Event(at=services.clock.now(), actor="anonymous", verb="session.create", subject=subject, detail=detail)
        )


def has_ended(services: Services, session: Session) -> bool:
    """Whether it has not been used for too long, or has been open for too long."""
    now = services.clock.now()
    return now >= session.expires_at or now - session.used_at >= services.setting("session_idle_s")


def authenticate_session(services: Services, secret: str, *, is_used: bool = True) -> tuple[Principal, Session]:
    """Who has this cookie, and the session.

    Args:
        services: The home.
        secret: The cookie.
        is_used: Whether this keeps the session open: it is not a page that asks by itself.

    Raises:
        UnauthenticatedError: There is no such session, it has ended, or its user is disabled.
    """
    session = services.records.get(Session, token_id(secret))
    if session is None or not session.user_name or has_ended(services, session):
        raise UnauthenticatedError("you are not signed in, or no more", hint="sign in again")
    principal = user_principal(services, services.records.get(User, session.user_name))
    now = services.clock.now()
    if is_used and now - session.used_at > min(USED_EVERY_S, services.setting("session_idle_s") / 4):
        with services.records.transaction() as transaction:
            stored = transaction.get(Session, session.id)
            if stored is not None:
                transaction.put(msgspec.structs.replace(stored, used_at=now), stored.version)
    return principal, session


def sign_out(services: Services, secret: str) -> None:
    """End a session."""
    with services.records.transaction() as transaction:
        session = transaction.get(Session, token_id(secret))
        if session is None:
            return
        transaction.delete(Session, session.id)
        actor, now = f"user:{session.user_name}", services.clock.now()
        transaction.append(Event(at=now, actor=actor, verb="session.delete", subject=actor, detail={"outcome": "ok"}))


def end_sessions(transaction: Transaction, user_name: str) -> None:
    """All of somebody's."""
    for session in transaction.find(Session, {"user_name": user_name}):
        transaction.delete(Session, session.id)


# --------------------------------------------------------------------------- the one-time secret


def one_time(services: Services, name: str, secret: str) -> Token | None:
    """The token behind a one-time secret of somebody; None where it is none, or is used up."""
    if not secret.startswith(TOKEN_PREFIX):
        return None
    token = services.records.get(Token, token_id(secret))
    if token is None or not token.is_once or token.user_name != name or token.revoked_at is not None:
        return None
    return None if token.expires_at is not None and token.expires_at <= services.clock.now() else token


def first_password(services: Services, name: str, secret: str, password: str, *, address: str) -> SignedIn | None:
    """Set a password with a one-time secret, and sign in; None where the secret is none, or is used up.

    Raises:
        InputError: The password is one that anybody would try.
    """
    user = services.records.get(User, name)
    if user is None or one_time(services, name, secret) is None:
        return None
    extras.load(f"{PASSWORDS}:check_new_password")(password, (user.name, user.email))
    stored = extras.load(f"{PASSWORDS}:hash_password")(password)
    with services.records.transaction() as transaction:
        token, user = transaction.get(Token, token_id(secret)), transaction.get(User, name)
        if token is None or token.revoked_at is not None or user is None or user.disabled_at is not None:
            return None
        set_password(services, transaction, user, stored)
        return open_session(services, transaction, user, address=address, old="", by="one-time secret")


def set_password(services: Services, transaction: Transaction, user: User, stored: str) -> User:
    """Another password: sessions, terminals that were signed in, and one-time secrets end."""
    end_sessions(transaction, user.name)
    for token in transaction.find(Token, {"user_name": user.name}):
        if (token.is_once or token.is_of_login) and token.revoked_at is None:
            transaction.put(msgspec.structs.replace(token, revoked_at=services.clock.now()), token.version)
    return transaction.put(msgspec.structs.replace(user, password=stored, failures=0, not_before=0.0), user.version)
