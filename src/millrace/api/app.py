"""The application: every route over one dispatcher."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from millrace.api import meters, openapi
from millrace.api.blobs import blob_routes
from millrace.api.bodies import encode_json
from millrace.api.guards import OPEN_PATHS, Authenticated, HostGuard, to_anybody
from millrace.api.mlflow.routes import mlflow_routes
from millrace.api.pages.routes import page_routes
from millrace.api.problems import problem
from millrace.api.proxies import BehindProxy
from millrace.api.routes import operation_routes
from millrace.api.stream import Streams
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import InputError, MillraceError, NotFoundError
from millrace.core.operations.table import OPERATIONS
from millrace.core.types import Lease

log = logging.getLogger(__name__)


def build_app(
    dispatcher: Dispatcher,
    *,
    is_stopping: Callable[[], bool] = lambda: False,
    allowed_hosts: frozenset[str] = frozenset(),
    wants_token: bool = False,
    proxies: tuple[str, ...] = (),
) -> Starlette:
    """The ASGI application over a home.

    Args:
        dispatcher: The door to every operation.
        is_stopping: True once the process is to end: open streams end then.
        allowed_hosts: Host names to answer to, besides the loopback ones.
        wants_token: Nobody may ask without one.
        proxies: Networks of the proxies that end TLS: others are not answered.
    """
    document = encode_json(openapi.document(OPERATIONS.values()))

    async def describe(_: Request) -> Response:
        return Response(document, media_type="application/json")

    async def alive(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        try:
            await run_in_threadpool(dispatcher.services.records.get, Lease, "leader")
        except MillraceError as error:
            return problem(to_anybody(error))
        return JSONResponse({"status": "ready"})

    async def measure(_: Request) -> Response:
        return PlainTextResponse(await run_in_threadpool(meters.exposition), media_type=meters.MEDIA_TYPE)

    routes = [
        Route("/healthz", alive),
        Route("/readyz", ready),
        Route("/metrics", measure),
        Route("/openapi.json", describe),
        *blob_routes(dispatcher),
        *operation_routes(dispatcher, OPERATIONS.values(), Streams(is_stopping)),
        *mlflow_routes(dispatcher),
        *page_routes(dispatcher, signs_in=wants_token),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            *([Middleware(BehindProxy, networks=proxies)] if proxies else []),
            Middleware(meters.Measured),
            Middleware(HostGuard, allowed=allowed_hosts),
            Middleware(Authenticated, services=dispatcher.services, is_required=wants_token),
        ],
        exception_handlers={MillraceError: _failed, 404: _no_route, 405: _wrong_method, Exception: _unexpected},
    )
    app.router.redirect_slashes = False
    return app


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, MillraceError)
    if error.code == "internal":
        log.error("%s %s: %s", request.method, request.url.path, error.message)
    return problem(to_anybody(error) if request.url.path in OPEN_PATHS else error)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises it again after the answer, so that the server's log has the traceback."""
    return problem(MillraceError(f"{request.method} {request.url.path} failed: {type(error).__name__}"))


async def _no_route(request: Request, _: Exception) -> Response:
    return problem(NotFoundError(f"there is no {request.url.path}", hint="see /openapi.json"))


async def _wrong_method(request: Request, _: Exception) -> Response:
    refused = InputError(f"{request.url.path} does not take {request.method}", hint="see /openapi.json")
    answer = problem(refused)
    answer.status_code = 405
    return answer
