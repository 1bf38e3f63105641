"""From a request to an answer: decode, do it as the operation it amounts to, encode; errors in MLflow's form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, get_args

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from millrace.api import bodies
from millrace.api.mlflow.errors import explained
from millrace.api.mlflow.requests import Nothing
from millrace.api.problems import CHALLENGE
from millrace.control.dispatch import Dispatcher
from millrace.control.projects import ProjectDirectory
from millrace.control.registered import ModelDirectory
from millrace.control.services import Services
from millrace.core.errors import InputError, MillraceError
from millrace.core.types import Struct

JSON = "application/json"
# Small fields of a request that an audit event keeps; values and texts of people do not belong there.
AUDITED = ("experiment_id", "run_id", "model_id", "name", "new_name", "version", "alias", "stage", "status", "key")
Subject = Callable[[Any], str]
_EMPTY = Response(b"{}", media_type=JSON)


class Tracking:
    """What the handlers work on.

    Args:
        dispatcher: The door to the home.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.projects = ProjectDirectory(dispatcher.services, lambda: dispatcher.services)
        self.models = ModelDirectory(dispatcher.services)

    @property
    def services(self) -> Services:
        """The home."""
        return self.dispatcher.services


Handler = Callable[[Tracking, Any], Any]


class Call(Struct, frozen=True, kw_only=True):
    """One route of the protocol.

    `operation` is what it amounts to in the operation table; `noun` and `field` say on what.
    """

    method: str
    path: str  # below /api/2.0/mlflow
    operation: str
    handler: Any
    request: type[Any] = Nothing
    noun: str = "project"
    field: str = ""

    def subject(self, body: Any) -> str:
        """What is acted on, as a reference."""
        value = getattr(body, self.field, None) if self.field else None
        return f"{self.noun}:{value or 'default'}"


def refusal(error: MillraceError) -> Response:
    """An error as MLflow clients read it."""
    status, code = explained(error)
    more = "; set MLFLOW_TRACKING_TOKEN to a token of this server" if status == 401 else ""
    content = msgspec.json.encode({"error_code": code, "message": error.message + more})
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}, 401: CHALLENGE}.get(status)
    return Response(content, status_code=status, media_type=JSON, headers=headers)


def answering(respond: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Errors of an endpoint in MLflow's form."""

    async def answered(request: Request) -> Response:
        try:
            return await respond(request)
        except MillraceError as error:
            return refusal(error)

    return answered


def routes(tracking: Tracking, calls: Iterable[Call], prefixes: Iterable[str]) -> list[Route]:
    """The routes of calls, each under every prefix."""
    chosen = list(calls)
    return [
        Route(prefix + call.path, endpoint(tracking, call), methods=[call.method])
        for prefix in prefixes
        for call in chosen
    ]


class FixedRoutes(BaseRoute):
    """Routes without parameters, found by one look-up: a list of a hundred costs more than logging a point.

    Args:
        chosen: The routes.
    """

    def __init__(self, chosen: Iterable[Route]) -> None:
        self._by_path = {(method, route.path): route for route in chosen for method in route.methods or ()}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether one of the routes is for this request."""
        route = self._by_path.get(_key(scope)) if scope["type"] == "http" else None
        return (Match.NONE, {}) if route is None else (Match.FULL, {"endpoint": route.endpoint, "path_params": {}})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as the route that was found."""
        route = self._by_path[_key(scope)]
        scope["route"] = route
        await route.app(scope, receive, send)


def _key(scope: Scope) -> tuple[str, str]:
    return scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))


def endpoint(tracking: Tracking, call: Call) -> Callable[[Request], Awaitable[Response]]:
    """The ASGI endpoint of a call."""
    decoder = msgspec.json.Decoder(call.request, strict=False)
    many = list_fields(call.request)

    def work(data: bytes, given: dict[str, Any]) -> Response:
        body = decoded(decoder, data) if data else msgspec.convert({}, call.request)
        if given:
            body = merged(call.request, body, given)
        answer = tracking.dispatcher.perform(
            call.operation, call.subject(body), lambda _: call.handler(tracking, body), audited(body)
        )
        return _EMPTY if answer is None else Response(msgspec.json.encode(answer), media_type=JSON)

    async def respond(request: Request) -> Response:
        data = await bodies.read_body(request)
        refuse_other_types(request, data)
        given = query(request, many) if request.url.query and call.method in ("GET", "DELETE") else {}
        given.update(request.path_params)
        return await run_in_threadpool(work, data, given)

    return answering(respond)


def refuse_other_types(request: Request, data: bytes) -> None:
    """A body must say that it is JSON: a form of another site cannot.

    Raises:
        InputError: It is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if data and kind != JSON:
        raise InputError(f"want a body of the type {JSON}, got {kind or 'none'!r}")


def decoded(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """The request in a body.

    Raises:
        InputError: It is not JSON, or not of the request's shape.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the body cannot be read: {error}") from None


def merged(kind: type[Any], body: Any, given: dict[str, Any]) -> Any:
    """A request with fields from the query and the path."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(body), **given}, kind, strict=False, from_attributes=True)
    except msgspec.ValidationError as error:
        raise InputError(f"the query cannot be read: {error}") from None


def query(request: Request, many: frozenset[str]) -> dict[str, Any]:
    """The query's fields; those of lists may stand several times, of others the last counts."""
    fields: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in many:
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    return fields


def list_fields(kind: type[Any]) -> frozenset[str]:
    """Fields of a request that hold lists of texts."""
    return frozenset(field.name for field in msgspec.structs.fields(kind) if list[str] in get_args(field.type))


def audited(body: Any) -> dict[str, Any]:
    """The small fields of a request."""
    found = ((name, getattr(body, name, None)) for name in AUDITED)
    return {name: value[:300] if isinstance(value, str) else value for name, value in found if value is not None}
