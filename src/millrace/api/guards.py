"""What stands before every route: who may name this server, which pages may write to it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from urllib.parse import urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from millrace.api import sessions
from millrace.api.mlflow.calls import refusal
from millrace.api.problems import problem
from millrace.control.authorisation import acting_as, acting_principal, authenticate, bearer
from millrace.control.services import Services
from millrace.control.sign_in import authenticate_session
from millrace.core.errors import MillraceError, UnauthenticatedError, UnavailableError
from millrace.core.principals import Principal
from millrace.core.types import Session

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login", "/login/oidc", "/login/callback", "/login/token"})
OPEN_PREFIX = "/static/"  # the same bytes for everybody
MLFLOW_PREFIXES = ("/api/2.0", "/api/3.0", "/ajax-api/")
Asked = tuple[Principal | None, Session | None]
log = logging.getLogger(__name__)
_AGAIN: ContextVar[Callable[[], Awaitable[Asked]] | None] = ContextVar("millrace_again", default=None)


async def is_still_let() -> bool:
    """Whether who asked may go on listening: not revoked, expired, disabled, or given other roles meanwhile."""
    again = _AGAIN.get()
    try:
        return again is None or (await again())[0] == acting_principal()
    except MillraceError:
        return False


def to_anybody(error: MillraceError) -> MillraceError:
    """As it may be told to whom nobody knows: of records that cannot be reached, not where they are, and as whom."""
    if "postgresql://" not in error.message:
        return error
    log.warning("%s", error.message)
    return UnavailableError("the records cannot be reached at this moment", hint="the server's log says why")


class HostGuard:
    """Refuses foreign Host and Origin headers: no web page reaches a loopback server by a name of its own.

    Args:
        app: What comes next.
        allowed: Further host names, lower case.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._allowed = LOOPBACK_HOSTS | allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            reason = self._refusal(scope)
            if reason:
                body = {"title": "auth.denied", "status": 403, "detail": reason, "code": "auth.denied"}
                await JSONResponse(body, 403, media_type="application/problem+json")(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str:
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_ours(f"//{hosts[0]}"):
            return f"the Host header must name this server, got {hosts[:2]!r}"
        origins = [value for name, value in headers if name == b"origin"]
        if scope["method"] in SAFE_METHODS:
            return ""
        if not all(self._is_same(one, hosts[0]) for one in origins):
            return f"a page of another origin may not write here, got Origin {origins[:2]!r}"
        if (b"sec-fetch-site", "cross-site") in headers:  # a browser that was told to send no Origin
            return "a page of another site may not write here"
        return ""

    def _is_same(self, origin: str, host: str) -> bool:
        """Whether a page is of this server. On this machine, another port is somebody else's."""
        if not self._is_ours(origin):
            return False
        page = urlsplit(origin)
        return page.hostname not in LOOPBACK_HOSTS or page.netloc.lower() == host.lower()

    def _is_ours(self, address: str) -> bool:
        try:
            return (urlsplit(address).hostname or "") in self._allowed
        except ValueError:
            return False


class Authenticated:
    """Finds out who is asking, by a bearer token or a session's cookie. What they may do is decided in dispatch.

    Args:
        app: What comes next.
        services: Where tokens are.
        is_required: Whether nobody may ask without one; else who brings none is whoever runs this server.
    """

    def __init__(self, app: ASGIApp, services: Services, is_required: bool) -> None:
        self._app, self._services, self._is_required = app, services, is_required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            await self._app(scope, receive, send)
            return
        try:
            principal, session = await self._principal(scope)
            if session is not None and scope["method"] not in SAFE_METHODS:
                receive = await sessions.with_csrf_checked(scope, receive, session)
        except UnauthenticatedError as error:
            await _refused(Request(scope), error)(scope, receive, send)
            return
        except MillraceError as error:
            await problem(to_anybody(error))(scope, receive, send)
            return
        before = _AGAIN.set(partial(self._principal, scope))
        try:
            with acting_as(principal), sessions.using(session):
                await self._app(scope, receive, send)
        finally:
            _AGAIN.reset(before)

    async def _principal(self, scope: Scope) -> Asked:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1 and (self._is_required or given[0][:7].lower() == "bearer "):
            return await run_in_threadpool(authenticate, self._services, bearer(given[0])), None
        if not self._is_required:
            return None, None
        request = Request(scope)
        secret = sessions.cookie(request, sessions.SESSION)
        if given or not secret:
            got = f"{len(given)} Authorization headers" if given else "none"
            raise UnauthenticatedError(f"this server asks who you are: want a token, got {got}")
        # What a page asks for by itself does not keep its session open.
        is_used = request.headers.get("sec-fetch-dest") != "empty" or scope["method"] not in SAFE_METHODS
        return await run_in_threadpool(authenticate_session, self._services, secret, is_used=is_used)


def _refused(request: Request, error: UnauthenticatedError) -> Response:
    """A browser that asks for a page is led to where people sign in."""
    if request.url.path.startswith(MLFLOW_PREFIXES):
        return refusal(error)
    if "text/html" not in request.headers.get("accept", "") or "authorization" in request.headers:
        return problem(error)
    place = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    wanted = sessions.safe_next(place) if request.method == "GET" else "/"
    target = "/login" if wanted == "/" else f"/login?{urlencode({'next': wanted})}"
    return RedirectResponse(target, 303, headers={"Cache-Control": "no-store"})
