"""Prometheus metrics of the API: requests and their time, summed over all API processes of a server."""

from __future__ import annotations

import os
import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEDIA_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # set before this module is imported, or each process counts alone
_own = CollectorRegistry()
REQUESTS = Counter("millrace_api_requests", "Requests answered.", ("route", "status"), registry=_own)
DURATION = Histogram(
    "millrace_api_request_seconds", "From the request's head to the answer's.", ("route",), buckets=BUCKETS_S,
    registry=_own,
)  # fmt: skip


def exposition() -> bytes:
    """The metrics of this process, or of all that share a folder."""
    registry = _own
    if os.environ.get(FOLDER_VARIABLE):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return generate_latest(registry)


class Measured:
    """ASGI middleware that counts requests by route name and status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                DURATION.labels(_route(scope)).observe(time.perf_counter() - began)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            REQUESTS.labels(_route(scope), str(status)).inc()


def _route(scope: Scope) -> str:
    """The name of what answered: never the path itself, which strangers may choose."""
    return getattr(scope.get("endpoint"), "__name__", "none")
