"""The gRPC server beside HTTP's: it begins, drains and ends with it, in the same event loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from millrace.core.errors import InputError
from millrace.serve.catalog import Catalog
from millrace.serve.grpc.service import Inferences
from millrace.serve.listen import bind


class GrpcServer:
    """Made inside the running loop.

    Args:
        catalog: What is served.
        host: An address that `listen.bind` allows.
        port: 0 takes a free one.
        certificate: Files of the certificate, its key and the clients' authority; without the first: in the open.
        is_guarded: Whether every request is asked for a token, and none travels in the open.

    Raises:
        InputError: The host is not loopback, or the certificate cannot be used.
        UnavailableError: The port is busy.
    """

    def __init__(
        self, catalog: Catalog, host: str, port: int, *, certificate: tuple[str, str, str] = ("", "", ""),
        is_guarded: bool = False,
    ) -> None:  # fmt: skip
        with bind(host, port, is_guarded=is_guarded) as probe:  # the same rules and errors as HTTP's port
            address, port = probe.getsockname()[:2]
        limits = catalog.service.limits
        self.inferences = Inferences(catalog)
        self._server: Any = grpc.aio.server(options=[
            ("grpc.max_receive_message_length", limits.max_body_bytes), ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.max_head_bytes), ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", 256),
        ])  # fmt: skip
        self._server.add_generic_rpc_handlers((self.inferences.handler(),))
        place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            cert, key, client_ca = certificate
            if not cert:
                self.port: int = self._server.add_insecure_port(place)
            else:
                pair = (_pem(key or cert), _pem(cert))
                roots = _pem(client_ca) if client_ca else None
                credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=bool(client_ca))
                self.port = self._server.add_secure_port(place, credentials)
        except RuntimeError as error:
            raise InputError(f"cannot listen on {place}: {error}", hint="choose another port") from None

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self, drain_s: float) -> bool:
        """No new calls; whether those in flight were answered in time."""
        in_flight = self.inferences.in_flight
        await self._server.stop(drain_s)
        return not in_flight or not self.inferences.in_flight


def _pem(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"the certificate {path} cannot be used: {error}") from None
