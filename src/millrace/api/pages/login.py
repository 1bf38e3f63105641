"""Where people sign in and out. Every refusal about a name, a password or a code is the same, and takes as long."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from millrace.api import sessions
from millrace.api.pages.oidc_login import OidcLogin
from millrace.api.pages.rendering import Page, Renderer
from millrace.api.pages.terminal import TerminalLogin
from millrace.control import sign_in
from millrace.control.dispatch import Dispatcher
from millrace.control.sign_in import SignedIn
from millrace.control.users import NAME
from millrace.core.errors import InputError, UnauthenticatedError, UnavailableError

FAILED_S = 0.6  # a refusal takes at least so long, whatever was wrong: longer than a password takes
REFUSED = "That did not work. Name, password or code is not right, or this name had too many attempts: wait a minute."
SAID = {
    "oidc": "Signing in elsewhere did not work. Try again.",
    "busy": "Too many people sign in at this moment. Try again in some seconds.",
}
Endpoint = Callable[[Request], Awaitable[Response]]


def login_routes(dispatcher: Dispatcher, renderer: Renderer, *, signs_in: bool) -> list[BaseRoute]:
    """The routes.

    Args:
        dispatcher: Over the home whose users these are.
        renderer: Makes the pages.
        signs_in: Whether people have to; else there is nothing to do here.
    """
    if not signs_in:
        return [Route("/login", _nothing_to_do, methods=["GET", "POST"], name="page.login")]
    login = Login(dispatcher, renderer)
    return [
        Route("/login", login.show, name="page.login"),
        Route("/login", login.enter, methods=["POST"], name="page.login.enter"),
        Route("/logout", login.leave, methods=["POST"], name="page.logout"),
        *login.oidc.routes(),
        *login.terminal.routes(),
    ]


async def _nothing_to_do(request: Request) -> Response:
    """This server asks nobody who they are."""
    return RedirectResponse(sessions.safe_next(request.query_params.get("next", "")), 303)


class Login:
    """The page, and what its forms do.

    Args:
        dispatcher: Over the home whose users these are.
        renderer: Makes the pages.
    """

    def __init__(self, dispatcher: Dispatcher, renderer: Renderer) -> None:
        self._services, self._renderer = dispatcher.services, renderer
        self._addresses = sessions.Addresses(self._services.clock)
        self.oidc = OidcLogin(self._services, self._addresses)
        self.terminal = TerminalLogin(self._services, renderer, self._addresses)

    async def show(self, request: Request) -> Response:
        """The form; who is signed in already goes on."""
        wanted = sessions.safe_next(request.query_params.get("next", ""))
        secret = sessions.cookie(request, sessions.SESSION)
        if secret and await run_in_threadpool(self._is_signed_in, secret):
            return RedirectResponse(wanted, 303)
        said = SAID.get(request.query_params.get("problem", ""), "")
        return self._page(request, wanted, said=said)

    def _is_signed_in(self, secret: str) -> bool:
        try:
            sign_in.authenticate_session(self._services, secret, is_used=False)
        except UnauthenticatedError:
            return False
        return True

    async def enter(self, request: Request) -> Response:
        """A name with a password, or with a one-time secret and then a first password."""
        fields = await sessions.read_form(request)
        wanted = sessions.safe_next(fields.get("next", ""))
        if not sessions.is_same(fields.get("form", ""), sessions.cookie(request, sessions.FORM)):
            return self._page(request, wanted, said="This form was too old. Try again.", status=403)
        address = sessions.address_of(request)
        wait_s = self._addresses.wait_s(address)
        if wait_s:
            said = f"Too many attempts from your address. Try again in {wait_s} s."
            return self._page(request, wanted, said=said, status=429, wait_s=wait_s)
        name = fields.get("name", "").strip().lower()
        name = name if NAME.fullmatch(name) else ""  # nobody has this one
        try:
            if "secret" in fields:
                return await self._first(request, wanted, name, fields)
            return await self._enter(request, wanted, name, fields)
        except UnavailableError:
            return self._page(request, wanted, said=SAID["busy"], name=name, status=503, wait_s=5)

    async def _enter(self, request: Request, wanted: str, name: str, fields: dict[str, str]) -> Response:
        password, address, began = fields.get("password", ""), sessions.address_of(request), _now()
        if await run_in_threadpool(sign_in.one_time, self._services, name, password) is not None:
            return self._page(request, wanted, name=name, secret=password)
        attempt = await run_in_threadpool(sign_in.begin, self._services, name)
        # Not in the pool that answers everybody else: many who wait here hold up nobody there.
        is_right = await asyncio.wrap_future(sign_in.check(attempt, password))
        if is_right:
            signed = await run_in_threadpool(
                sign_in.sign_in, self._services, attempt, fields.get("code", ""), address=address,
                old=sessions.cookie(request, sessions.SESSION),
            )  # fmt: skip
            if signed is not None:
                return entered(request, signed, wanted)
        else:
            await run_in_threadpool(sign_in.refuse, self._services, name, address)
        return await self._refused(request, wanted, name, began)

    async def _first(self, request: Request, wanted: str, name: str, fields: dict[str, str]) -> Response:
        secret, password, began = fields["secret"], fields.get("password", ""), _now()
        address = sessions.address_of(request)
        try:
            if password != fields.get("again", ""):
                raise InputError("the two are not the same")
            signed = await run_in_threadpool(
                sign_in.first_password, self._services, name, secret, password, address=address
            )
        except InputError as error:
            said = f"{error.message[:1].upper()}{error.message[1:]}."
            return self._page(request, wanted, said=said, name=name, secret=secret, status=422)
        if signed is not None:
            return entered(request, signed, wanted)
        return await self._refused(request, wanted, name, began)

    async def _refused(self, request: Request, wanted: str, name: str, began: float) -> Response:
        self._addresses.failed(sessions.address_of(request))
        await asyncio.sleep(max(0.0, began + FAILED_S - _now()))
        return self._page(request, wanted, said=REFUSED, name=name, status=401)

    async def leave(self, request: Request) -> Response:
        """The session ends, here and in the browser."""
        await run_in_threadpool(sign_in.sign_out, self._services, sessions.cookie(request, sessions.SESSION))
        response = RedirectResponse("/login", 303)
        sessions.drop_cookie(request, response, sessions.SESSION)
        return response

    def _page(self, request: Request, wanted: str, status: int = 200, wait_s: int = 0, **shown: str) -> Response:
        form = sessions.cookie(request, sessions.FORM) or secrets.token_urlsafe(24)
        context = {"said": "", "name": "", "secret": "", **shown, "next": wanted, "form": form}
        page = Page(
            template="login.html", section="", title="Sign in", context={**context, "provider": self.oidc.shown}
        )
        response = self._renderer.page(page)
        response.status_code = status
        response.headers["Cache-Control"] = "no-store"
        if wait_s:
            response.headers["Retry-After"] = str(wait_s)
        sessions.set_cookie(request, response, sessions.FORM, form, strict=True)
        return response


def entered(request: Request, signed: SignedIn, wanted: str) -> Response:
    """On to the page that was asked for, with the new session's cookie."""
    response = RedirectResponse(wanted, 303, headers={"Cache-Control": "no-store"})
    sessions.set_cookie(request, response, sessions.SESSION, signed.secret)
    return response


def _now() -> float:
    return asyncio.get_running_loop().time()
