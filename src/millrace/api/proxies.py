"""Behind a proxy that ends TLS: only trusted peers are answered, and only they say whence a request came."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from millrace.api.problems import problem
from millrace.core.addresses import is_loopback, is_within, plain_address
from millrace.core.errors import DeniedError

FORWARDED_PROTO = b"x-forwarded-proto"
FORWARDED = frozenset({FORWARDED_PROTO, b"x-forwarded-for", b"x-forwarded-host", b"forwarded"})


class BehindProxy:
    """Refuses whoever is no trusted proxy, and what a proxy has received in the open.

    A request of this machine itself without a proxy's headers is let through: it has crossed no network.

    Args:
        app: What comes next; it sees the scheme and the address that the proxy has seen.
        networks: Of the proxies, as `core.addresses.check_networks` returns them.
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self._app = app
        self._networks = networks
        self._forwarded = ProxyHeadersMiddleware(app, list(networks))  # pyright: ignore[reportArgumentType]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        peer = scope["client"][0] if scope.get("client") else ""
        here = scope["server"][0] if scope.get("server") else ""
        is_forwarded = any(name in FORWARDED for name, _ in scope["headers"])
        if not is_forwarded and (is_loopback(peer) or peer == here != ""):
            await self._app(scope, receive, send)
            return
        peer = plain_address(peer)
        reason = self._refusal(scope, peer)
        if reason:
            await problem(DeniedError(reason))(scope, receive, send)
            return
        scope["client"] = (peer, 0)
        await self._forwarded(scope, receive, send)  # pyright: ignore[reportArgumentType]

    def _refusal(self, scope: Scope, peer: str) -> str:
        if not is_within(peer, self._networks):
            return f"this server answers its proxy alone, not {peer}"
        said = [value for name, value in scope["headers"] if name == FORWARDED_PROTO]
        if said != [b"https"]:
            return "the proxy has to say that the request came over TLS: X-Forwarded-Proto: https, once"
        return ""
