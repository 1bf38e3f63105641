"""Signing in with an identity provider: to there, and back."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from millrace.api import sessions
from millrace.control import sign_in
from millrace.control.external import known_user
from millrace.control.services import Services
from millrace.control.sign_in import SignedIn
from millrace.core import extras
from millrace.core.errors import InputError, MillraceError, UnauthenticatedError
from millrace.core.ports import Transaction
from millrace.core.principals import token_id
from millrace.core.types import Session

CALLBACK = "/login/callback"
PENDING_S = 600.0
MOST_PENDING = 1000
AT_ONCE = 4  # wait for the issuer: if it is slow, that holds up nobody else here
log = logging.getLogger(__name__)


class OidcLogin:
    """The routes, where the settings name an issuer.

    Args:
        services: The home whose users these are.
        addresses: Who has to wait.

    Raises:
        InputError: The settings are incomplete, or the file of the secret cannot be read.
    """

    def __init__(self, services: Services, addresses: sessions.Addresses) -> None:
        self._services, self._addresses = services, addresses
        self._issuer: str = services.setting("oidc_issuer")
        self._provider: Any = None
        self._limiter = anyio.CapacityLimiter(AT_ONCE)
        if self._issuer:
            extras.require([("joserfc", "oidc")], "signing in with an identity provider")
            self._provider = self._open()

    @property
    def shown(self) -> str:
        """What the page calls it; "" where there is none."""
        return urlsplit(self._issuer).hostname or ""

    def routes(self) -> list[BaseRoute]:
        """To there and back; none where the settings name no issuer."""
        if self._provider is None:
            return []
        return [
            Route("/login/oidc", self.leave, name="page.login.oidc"),
            Route(CALLBACK, self.come_back, name="page.login.callback"),
        ]

    def _open(self) -> Any:
        services = self._services
        name = services.setting("oidc_client_secret_file")
        try:
            secret = Path(name).read_text(encoding="utf-8").strip() if name else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"oidc_client_secret_file: {name} cannot be read: {error}") from None
        if not services.setting("oidc_client_id"):
            raise InputError("oidc_issuer is set, oidc_client_id is not")
        config = extras.load("millrace.security.oidc:Config")(
            issuer=self._issuer, client_id=services.setting("oidc_client_id"), client_secret=secret,
            groups_claim=services.setting("oidc_groups_claim"),
        )  # fmt: skip
        return extras.load("millrace.security.oidc:Provider")(config, services.clock)

    async def leave(self, request: Request) -> Response:
        """To the issuer; what has to be remembered is kept here, and found by a cookie."""
        wanted = sessions.safe_next(request.query_params.get("next", ""))
        if self._addresses.wait_s(sessions.address_of(request)):
            return _back("busy")
        try:
            address = sessions.network(sessions.address_of(request))
            begin = partial(self._begin, _callback(request), wanted, address)
            place, secret = await anyio.to_thread.run_sync(begin, limiter=self._limiter)
        except MillraceError as error:
            log.warning("sign-in with %s: %s", self.shown, error.message)
            return _back("oidc")
        response = RedirectResponse(place, 303, headers={"Cache-Control": "no-store"})
        sessions.set_cookie(request, response, sessions.PENDING, secret)
        return response

    def _begin(self, redirect_uri: str, wanted: str, address: str) -> tuple[str, str]:
        place, pending = self._provider.begin(redirect_uri)
        secret, now = secrets.token_urlsafe(32), self._services.clock.now()
        with self._services.records.transaction() as transaction:
            _make_room(transaction, now)
            transaction.put(
                Session(
                    id=token_id(secret), created_at=now, user_name="", csrf="", used_at=now,
                    expires_at=now + PENDING_S, pending={**pending, "next": wanted, "address": address},
                ),
                expect_version=0,
            )  # fmt: skip
        return place, secret

    async def come_back(self, request: Request) -> Response:
        """From the issuer, with a code; what was remembered is good once, whatever comes of it."""
        answer = dict(request.query_params)
        secret, old = (sessions.cookie(request, name) for name in (sessions.PENDING, sessions.SESSION))
        address = sessions.address_of(request)
        if self._addresses.wait_s(address):
            return _back("busy")  # nothing is used up, and nothing written
        try:
            if len(answer) != len(request.query_params.multi_items()):
                raise UnauthenticatedError("the answer says something twice")
            finish = partial(self._finish, secret, answer, _callback(request), address=address, old=old)
            signed, wanted = await anyio.to_thread.run_sync(finish, limiter=self._limiter)
        except MillraceError as error:
            log.warning("sign-in with %s: %s", self.shown, error.message)
            self._addresses.failed(address)
            await run_in_threadpool(sign_in.refuse, self._services, "", address)
            response = _back("oidc")
        else:
            response = RedirectResponse(wanted, 303, headers={"Cache-Control": "no-store"})
            sessions.set_cookie(request, response, sessions.SESSION, signed.secret)
        sessions.drop_cookie(request, response, sessions.PENDING)
        return response

    def _finish(
        self, secret: str, answer: Mapping[str, str], redirect_uri: str, *, address: str, old: str
    ) -> tuple[SignedIn, str]:
        services = self._services
        with services.records.transaction() as transaction:
            begun = transaction.get(Session, token_id(secret))
            if begun is not None and not begun.user_name:
                transaction.delete(Session, begun.id)
        if begun is None or not begun.pending or begun.expires_at <= services.clock.now():
            raise UnauthenticatedError("no sign-in was begun in this browser, or too long ago")
        who = self._provider.finish(begun.pending, answer, redirect_uri)
        with services.records.transaction() as transaction:
            external = f"{self._issuer}|{who.subject}"
            user = known_user(services, transaction, external, who.name, who.email, who.groups)
            signed = sign_in.open_session(services, transaction, user, address=address, old=old, by=self._issuer)
        return signed, begun.pending["next"]


def _make_room(transaction: Transaction, now: float) -> None:
    """Forget what was begun too long ago, or, where many have begun and not come back, what was begun first.

    Of the address that has begun most: who begins again and again drives nobody else out.
    """
    begun = sorted(transaction.find(Session, {"user_name": ""}), key=lambda one: one.expires_at)
    for one in begun:
        if one.expires_at <= now:
            transaction.delete(Session, one.id)
    waiting = [one for one in begun if one.expires_at > now and "state" in one.pending]  # not codes of terminals
    if len(waiting) < MOST_PENDING:
        return
    ((most, _),) = Counter(one.pending.get("address", "") for one in waiting).most_common(1)
    of_most = [one for one in waiting if one.pending.get("address", "") == most]
    for one in of_most[: len(waiting) - MOST_PENDING + 1]:
        transaction.delete(Session, one.id)


def _callback(request: Request) -> str:
    """Where the issuer sends the browser back to: this server, by a name that it answers to."""
    return f"{request.url.scheme}://{request.url.netloc}{CALLBACK}"


def _back(problem: str) -> Response:
    return RedirectResponse(f"/login?problem={problem}", 303, headers={"Cache-Control": "no-store"})
