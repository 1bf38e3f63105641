"""HTTP routes, derived from the operation table: nothing is listed by hand."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millrace.api import bodies
from millrace.api.stream import Streams
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import InputError
from millrace.core.operations import Operation

PREFIX = "/api/v1"
_WHOLE = re.compile(r"-?[0-9]{1,18}")
Endpoint = Callable[[Request], Awaitable[Response]]


def operation_routes(dispatcher: Dispatcher, operations: Iterable[Operation], streams: Streams) -> list[Route]:
    """One route per operation, fixed paths before those with parameters."""
    chosen = [operation for operation in operations if not operation.is_raw]
    ordered = sorted(chosen, key=lambda operation: (operation.path.count("{"), operation.path))
    return [
        Route(PREFIX + one.path, _endpoint(dispatcher, one, streams), methods=[one.method], name=one.name)
        for one in ordered
    ]


def path_parameters(operation: Operation) -> list[str]:
    """Names in the path.

    Example:
        >>> from millrace.core.operations.table import OPERATIONS
        >>> path_parameters(OPERATIONS["run.diff"])
        ['left', 'right']
    """
    return re.findall(r"{(\w+)}", operation.path)


def has_body(operation: Operation) -> bool:
    """Whether the fields travel in a body, else in the query."""
    return operation.method in ("POST", "PUT", "PATCH")


def _endpoint(dispatcher: Dispatcher, operation: Operation, streams: Streams) -> Endpoint:
    takes_body = has_body(operation)
    numbers = {field.name for field in msgspec.structs.fields(operation.request) if field.type is int}

    async def respond(request: Request) -> Response:
        if takes_body:
            data = await bodies.read_body(request)
            fields = bodies.decode(data, request.headers.get("content-type", ""))
        else:
            fields = query_fields(request)
        for name, text in request.path_params.items():  # a path is text, also beside a body that is read strictly
            fields[name] = int(text) if name in numbers and _WHOLE.fullmatch(text) else text
        if operation.is_stream:
            _resume(operation, request, fields)
            items = await run_in_threadpool(dispatcher.stream, operation.name, fields, strict=takes_body)
            return streams.respond(operation, items)
        value = await run_in_threadpool(dispatcher.call, operation.name, fields, strict=takes_body)
        return await run_in_threadpool(bodies.answer, request, value)

    respond.__name__ = operation.name  # what metrics call it
    return respond


def query_fields(request: Request) -> dict[str, Any]:
    """The query's fields; one that stands twice is refused."""
    fields: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise InputError(f"the query names {name!r} twice")
        fields[name] = value
    return fields


def _resume(operation: Operation, request: Request, fields: dict[str, Any]) -> None:
    """Go on after the event that the client has seen last."""
    last = request.headers.get("last-event-id", "")
    if operation.resume_field and last:
        if not (last.isascii() and last.isdigit() and len(last) < 20):
            raise InputError(f"Last-Event-ID must be a number, got {last[:40]!r}")
        fields[operation.resume_field] = int(last)
