"""`millrace login`: the page that gives a code to who is signed in, and where a terminal redeems it."""

from __future__ import annotations

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from millrace.api import sessions
from millrace.api.bodies import read_body
from millrace.api.pages.rendering import Page, Renderer
from millrace.control import sign_in, terminals
from millrace.control.services import Services
from millrace.core.errors import DeniedError, MillraceError, UnauthenticatedError, UnavailableError
from millrace.core.types import Struct

PAGE, TOKEN = "/login/terminal", "/login/token"
MAX_BYTES = 4096
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # what any page can send


class Redeemed(Struct, frozen=True, kw_only=True):
    """What a terminal sends."""

    code: str
    verifier: str


class TerminalLogin:
    """The routes. The page stands behind the guard: who asks has a session, and its token in forms.

    Args:
        services: The home whose users these are.
        renderer: Makes the pages.
        addresses: Who has to wait.
    """

    def __init__(self, services: Services, renderer: Renderer, addresses: sessions.Addresses) -> None:
        self._services, self._renderer, self._addresses = services, renderer, addresses

    def routes(self) -> list[BaseRoute]:
        """The page, its form, and what answers with a token."""
        return [
            Route(PAGE, self.show, name="page.login.terminal"),
            Route(PAGE, self.agree, methods=["POST"], name="page.login.terminal.agree"),
            Route(TOKEN, self.redeem, methods=["POST"], name="page.login.token"),
        ]

    async def show(self, request: Request) -> Response:
        """Asks whether a terminal may act for who is signed in."""
        return await self._page(request, dict(request.query_params), agrees=False)

    async def agree(self, request: Request) -> Response:
        """It may: here is a code."""
        return await self._page(request, await sessions.read_form(request), agrees=True)

    async def _page(self, request: Request, fields: dict[str, str], *, agrees: bool) -> Response:
        session, code = sessions.current_session(), ""
        try:
            if session is None:
                raise DeniedError("a token does not make another one here", hint="sign in with a browser")
            wanted = terminals.check_wanted(*(fields.get(name, "") for name in ("challenge", "host", "lives_s")))
            if agrees:
                code = await run_in_threadpool(terminals.give_code, self._services, session.user_name, wanted)
        except MillraceError as error:
            return self._renderer.problem(error)
        context = {"wanted": wanted, "code": code, "user": session.user_name, "csrf": session.csrf}
        response = self._renderer.page(
            Page(template="terminal.html", section="", title="Sign in a terminal", context=context)
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    async def redeem(self, request: Request) -> Response:
        """A token for a code and its verifier.

        Raises:
            DeniedError: A page of anybody could have sent it.
            UnauthenticatedError: The code is not good.
            UnavailableError: There were too many wrong ones from this address.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in FORMS or "cookie" in request.headers:
            raise DeniedError("a browser redeems no code", hint="`millrace login` sends JSON, and no cookie")
        address = sessions.address_of(request)
        if self._addresses.wait_s(address):
            raise UnavailableError("too many attempts from your address")
        data = await read_body(request, MAX_BYTES)
        try:
            given = msgspec.json.decode(data, type=Redeemed)
            made = await run_in_threadpool(
                terminals.redeem, self._services, given.code, given.verifier, address=address
            )
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise UnauthenticatedError("want a code and its verifier, as JSON") from None
        except UnauthenticatedError:
            self._addresses.failed(address)
            await run_in_threadpool(sign_in.refuse, self._services, "", address)
            raise
        token = made.token
        answer = {"token": made.secret, "name": token.name, "user": token.user_name, "expires_at": token.expires_at}
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})
