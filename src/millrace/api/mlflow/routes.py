"""All routes of MLflow's protocol, and what the server says of itself."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from millrace.api.mlflow import artifacts, experiments, logged_models, registry, runs, values
from millrace.api.mlflow.calls import JSON, FixedRoutes, Tracking, refusal, routes
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import InputError

MLFLOW_VERSION = "3.17.2"  # the release whose protocol this is; clients compare it with their own
PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")
DATASETS = "/experiments/search-datasets"  # Python clients ask for it without the slash before `mlflow`
_INFO = {
    "store_type": "SqlStore",
    "workspaces_enabled": False,
    "trace_archival_enabled": False,
    "multipart_uploads_enabled": True,
    "multipart_downloads_enabled": False,
    "presigned_upload_run_id_supported": False,
    "presigned_upload_model_id_supported": False,
    "features_enabled": {"gateway": False},
}
CALLS = (
    *experiments.CALLS, *runs.CALLS, *values.CALLS, *artifacts.CALLS, *logged_models.CALLS, *registry.CALLS
)  # fmt: skip


def mlflow_routes(dispatcher: Dispatcher) -> list[BaseRoute]:
    """The routes, to be mounted at the root; the last ones answer for what is not spoken here.

    Args:
        dispatcher: The door to the home.
    """
    tracking = Tracking(dispatcher)
    spoken = [
        *routes(tracking, CALLS, PREFIXES),
        *routes(tracking, [call for call in CALLS if call.path == DATASETS], ["/api/2.0mlflow"]),
    ]
    found: list[BaseRoute] = [
        FixedRoutes([route for route in spoken if "{" not in route.path]),
        *[route for route in spoken if "{" in route.path],
        *artifacts.artifact_routes(tracking),
        Route("/version", _version),
        Route("/health", _health),
        Route("/api/3.0/mlflow/server-info", _server_info),
        Route("/ajax-api/3.0/mlflow/server-info", _server_info),
    ]
    for prefix in ("/api/2.0", "/api/3.0", "/ajax-api/2.0", "/ajax-api/3.0"):
        for part in ("mlflow", "mlflow-artifacts"):
            methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
            found.append(Route(f"{prefix}/{part}/{{rest:path}}", _not_spoken, methods=methods))
    return found


async def _version(_: Request) -> Response:
    return PlainTextResponse(MLFLOW_VERSION)


async def _health(_: Request) -> Response:
    return PlainTextResponse("OK")


async def _server_info(_: Request) -> Response:
    return Response(msgspec.json.encode(_INFO), media_type=JSON)


async def _not_spoken(request: Request) -> Response:
    text = f"{request.method} {request.url.path[:300]} is not a part of MLflow's protocol that this server speaks"
    return refusal(InputError(text, details={"error_code": "ENDPOINT_NOT_FOUND"}))
