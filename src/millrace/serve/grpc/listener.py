"""The gRPC server beside HTTP's: it begins, drains and ends with it, in the same event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from millrace.serve.catalog import Catalog
from millrace.serve.grpc.service import Inferences
from millrace.serve.listen import BACKLOG, bind
from millrace.serve.tls import server_context

_HANDSHAKE_S = 10.0
_POLL_S = 0.01


class GrpcServer:
    """Made inside the running loop.

    Args:
        catalog: What is served.
        host: An address that `listen.bind` allows.
        port: 0 takes a free one.
        certificate: Files of the certificate, its key and the clients' authority; without the first: in the open.
        is_guarded: Whether every request is asked for a token, and none travels in the open.
        is_shared: Other processes listen at the same port; the system deals connections out.
        sock: Listens already; instead of `host` and `port`.

    Raises:
        InputError: The host is not loopback, or the certificate cannot be used.
        UnavailableError: The port is busy.
    """

    def __init__(
        self, catalog: Catalog, host: str, port: int, *, certificate: tuple[str, str, str] = ("", "", ""),
        is_guarded: bool = False, is_shared: bool = False, sock: socket.socket | None = None,
    ) -> None:  # fmt: skip
        tls = server_context(*certificate)
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": _HANDSHAKE_S}
        self._listener = sock or bind(host, port, is_guarded=is_guarded, is_shared=is_shared)
        self.port: int = self._listener.getsockname()[1]
        self._service = catalog.service
        self.inferences = Inferences(catalog)
        self._is_started = False
        self._server: asyncio.Server | None = None
        self._coming: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Accept calls; once is enough."""
        if self._is_started:
            return
        self._is_started = True
        loop = asyncio.get_running_loop()
        listener = self._listener.dup()  # the other one keeps the backlog alive while the server stops accepting
        self._server = await loop.create_server(
            self.inferences.connect, sock=listener, backlog=BACKLOG, **self._tls
        )  # fmt: skip

    async def stop(self, drain_s: float) -> bool:
        """No new calls; whether those in flight were answered in time."""
        if self._server is not None:
            self._server.close()
        await self._accept_rest()
        until = asyncio.get_running_loop().time() + drain_s
        while self._service.connections and asyncio.get_running_loop().time() < until:
            self._service.sweep()
            await asyncio.sleep(_POLL_S)
        return not self._service.in_flight

    async def _accept_rest(self) -> None:
        """Take who is in the backlog: closing it would reset clients that have sent already."""
        loop = asyncio.get_running_loop()
        with self._listener as listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # no more, or no descriptors
                    break
                client.setblocking(False)
                connect = loop.connect_accepted_socket(self.inferences.connect, client, **self._tls)
                task = asyncio.ensure_future(connect)
                self._coming.add(task)
        await asyncio.gather(*self._coming, return_exceptions=True)
