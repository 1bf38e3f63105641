"""What stands before every route: who may name this server, which pages may write to it."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


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
        if scope["method"] not in SAFE_METHODS and origins and not all(self._is_ours(one) for one in origins):
            return f"a page of another origin may not write here, got Origin {origins[:2]!r}"
        return ""

    def _is_ours(self, address: str) -> bool:
        try:
            return (urlsplit(address).hostname or "") in self._allowed
        except ValueError:
            return False
