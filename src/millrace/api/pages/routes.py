"""Which page is where. Every page is an operation of the table, read through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millrace.api.pages import compare, curves, dossiers, files, live, login, mlflow_links, registry, run, runs_table
from millrace.api.pages.assets import PREFIX, Assets
from millrace.api.pages.rendering import Page, Renderer
from millrace.api.problems import problem
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import MillraceError

View = Callable[[Dispatcher, Request], Page | Response]

# Fixed paths before those with names, which may hold slashes.
VIEWS: tuple[tuple[str, View], ...] = (
    ("/", runs_table.show),
    ("/runs", runs_table.show),
    ("/runs/{run}", run.show),
    ("/runs/{run}/report", files.report),
    ("/runs/{run}/files/{path:path}", files.show),
    ("/compare", compare.show),
    ("/datasets", registry.datasets),
    ("/datasets/{dataset:path}", registry.dataset),
    ("/models", registry.models),
    ("/models/{name:path}/versions/{number:int}/dossier", dossiers.show),
    ("/models/{name:path}/versions/{number:int}", registry.version),
    ("/models/{name:path}", registry.model),
    ("/endpoints", live.endpoints),
    ("/endpoints/{name:path}", live.endpoint),
    ("/events", live.events),
    ("/experiments/{experiment}/runs/{run}", mlflow_links.run),
    ("/experiments/{experiment}/runs/{run}/{tab:path}", mlflow_links.run),
    ("/experiments/{experiment}/models/{model}", mlflow_links.logged_model),
    ("/experiments/{experiment}/models/{model}/{tab:path}", mlflow_links.logged_model),
    ("/experiments/{experiment}", mlflow_links.experiment),
    ("/experiments/{experiment}/{tab:path}", mlflow_links.experiment),
)
DATA: tuple[tuple[str, View], ...] = (("/pages/data/curves", curves.show),)


def page_routes(dispatcher: Dispatcher, *, signs_in: bool = False) -> list[BaseRoute]:
    """The pages, the data that their scripts ask for, and the scripts themselves.

    Args:
        dispatcher: The door to every operation.
        signs_in: Whether people have to say who they are.
    """
    assets = Assets()
    renderer = Renderer(assets, dispatcher.services.clock, str(dispatcher.services.home))
    packed = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=6)]
    routes: list[BaseRoute] = [Route(PREFIX + "{path:path}", assets.respond, name="page.static")]
    routes += login.login_routes(dispatcher, renderer, signs_in=signs_in)
    for path, view in VIEWS:
        endpoint = _endpoint(dispatcher, view, renderer.page, renderer.problem)
        routes.append(Route(path, endpoint, middleware=() if view is files.show else packed))  # files: any size
    for path, view in DATA:
        routes.append(Route(path, _endpoint(dispatcher, view, renderer.page, problem), middleware=packed))
    return routes


def _endpoint(
    dispatcher: Dispatcher,
    view: View,
    render: Callable[[Page], Response],
    fail: Callable[[MillraceError], Response],
) -> Callable[[Request], object]:
    """An endpoint that does everything outside the event loop; its errors have the form of what was asked for."""

    def make(request: Request) -> Response:
        try:
            made = view(dispatcher, request)
        except MillraceError as error:
            return fail(error)
        return render(made) if isinstance(made, Page) else made

    async def respond(request: Request) -> Response:
        return await run_in_threadpool(make, request)

    respond.__name__ = f"page.{view.__module__.rpartition('.')[2]}.{view.__name__}"  # what metrics call it
    return respond
