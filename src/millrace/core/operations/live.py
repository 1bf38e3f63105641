"""Verbs on endpoints, alerts and the system."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from millrace.core.operations import Operation, Page, Request
from millrace.core.types import Alert, Endpoint, Struct

DEFAULT_STEPS = (10.0, 50.0)  # of a rollout, in percent


class NameRequest(Request, frozen=True, kw_only=True):
    """One thing by name or id."""

    name: str


class ServeRequest(Request, frozen=True, kw_only=True):
    """Serve models in the foreground; what is absent comes from the spec, then from the defaults.

    A model is one of the registry, or a path of this machine: `service.py:Class`, a folder with `model.py` and
    `model.safetensors`, an `ensemble.yaml`. `name`: of the endpoint, for one path. `all`: every model of the
    registry, loaded when it is first asked for. `memory_budget`: of all that is loaded, such as 2GB.
    `cache`: answers kept for equal inputs; `capture`: the share of requests kept with their answers; `access_log`: a
    file, or `-` for the standard error; `trace`: the share of requests for which a trace begins.
    `tls_cert`, `tls_key`: files of the server; `tls_client_ca`: every client must bring a certificate of it;
    `token_file`: or one of these tokens, a line each; `allowed_host`: names by which clients call the server.
    `client_rate`: requests of one client per second; `queue_s`: predicted seconds of work behind which nobody is let
    in. `grpc_port`: gRPC is answered there besides. `processes`: so many share the port, each with queues and quotas
    of its own.
    """

    model: str = ""
    more: tuple[str, ...] = ()
    all: bool = False
    name: str | None = None
    memory_budget: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    grpc_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    threads: Annotated[int, Meta(ge=0, le=256)] | None = None
    variant: str | None = None
    slo_p99_ms: Annotated[float, Meta(gt=0)] | None = None
    client_rate: Annotated[float, Meta(ge=0)] | None = None
    queue_s: Annotated[float, Meta(gt=0)] | None = None
    explain: bool = False
    cache: Annotated[int, Meta(ge=0)] | None = None
    capture: Annotated[float, Meta(ge=0, le=1)] | None = None
    access_log: str | None = None
    trace: Annotated[float, Meta(ge=0, le=1)] | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    allowed_host: tuple[str, ...] = ()
    processes: Annotated[int, Meta(ge=1, le=64)] = 1


class ServeEvent(Struct, frozen=True, kw_only=True):
    """What the endpoint's supervisor saw."""

    kind: str  # "ready" | "alert" | "restart" | "window" | "stopped" | "calibration"
    text: str
    url: str = ""
    facts: dict[str, Any] = {}


class DeployRequest(Request, frozen=True, kw_only=True):
    """Keep a model served at an endpoint; with an alias the endpoint follows it.

    `variant`: the version's chosen one when absent. `threads` of one call, 0: found out by measuring; `slo_p99_ms`:
    batches take at most half of it, the spec's when absent. `isolate`: a serving process of its own.
    `min_replicas`, `max_replicas`: how few and how many processes serve it, as its load needs; with 0 there is none
    while nobody asks. The most when absent: the least, or one. Other numbers than one imply `isolate`.
    """

    model: str
    endpoint: str
    variant: str | None = None
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    slo_p99_ms: Annotated[float, Meta(gt=0)] | None = None
    isolate: bool = False
    min_replicas: Annotated[int, Meta(ge=0, le=64)] = 1
    max_replicas: Annotated[int, Meta(ge=1, le=64)] | None = None


class ManifestsRequest(Request, frozen=True, kw_only=True):
    """Files for Kubernetes that serve an endpoint's model, or a model.

    `image`: what the container file is built as, NAME:VERSION when absent; `kserve`: for KServe in the place of a
    plain Deployment.
    """

    name: str
    image: str | None = None
    namespace: str = "default"
    min_replicas: Annotated[int, Meta(ge=1)] = 2
    max_replicas: Annotated[int, Meta(ge=1)] = 4
    kserve: bool = False


class Manifests(Struct, frozen=True, kw_only=True):
    """The files by name, and what they serve."""

    model: str
    files: dict[str, str]


class RolloutRequest(Request, frozen=True, kw_only=True):
    """Try a candidate beside what an endpoint serves.

    `steps`: its shares of the requests in percent, one after another, each when the evidence lets it; 100 at the
    end says what happens anyway: it is promoted. `hold`: never by itself. `shadow`: it gets copies of requests,
    its answers are compared and nobody sees them.
    """

    name: str
    model: str
    variant: str | None = None
    steps: tuple[float, ...] = DEFAULT_STEPS
    shadow: bool = False
    hold: bool = False


class RolloutEnd(Request, frozen=True, kw_only=True):
    """How a rollout ends. `rollout`: only that one; whichever is on where absent."""

    name: str
    reason: str | None = None
    rollout: str | None = None


class ForecastRequest(Request, frozen=True, kw_only=True):
    """At which share of the requests, in percent."""

    name: str
    weight: float = DEFAULT_STEPS[0]


class RolloutForecast(Struct, frozen=True, kw_only=True):
    """How long it takes to find a candidate that fails in 5 % of requests where the baseline fails in 1 %.

    Minutes are of the traffic that was measured last; None where there was none.
    """

    endpoint: str
    weight: float
    requests_per_min: float
    median_requests: float
    p95_requests: float
    median_min: float | None
    p95_min: float | None
    text: str


class EndpointAddress(Struct, frozen=True, kw_only=True):
    """Where an endpoint's requests go. `wants_token`: each with a token that may do `endpoint.predict`."""

    endpoint: str
    state: str
    predict: str  # rows in, answers out
    infer: str  # tensors: the Open Inference Protocol
    wants_token: bool


class CapturedRequests(Struct, frozen=True, kw_only=True):
    """What an endpoint kept of its requests. `source`: what a spec beside the home says as `data.source`."""

    endpoint: str
    rows: int
    parts: int
    size_bytes: int
    folder: str
    source: str


class AlertList(Page, frozen=True, kw_only=True):
    """Alerts, newest first."""

    state: str | None = None


class GcRequest(Request, frozen=True, kw_only=True):
    """`apply`: do it; otherwise only say what would be done.

    `now`: spare neither what is young nor what was put aside lately. Only when nothing else writes.
    """

    apply: bool = False
    now: bool = False


class GcResponse(Struct, frozen=True, kw_only=True):
    """What was, or would be, done.

    Unreferenced blobs are put aside first, and deleted once they have lain there for `gc_min_age_s`:
    until then whoever asks for one gets it back. `runs` were deleted long ago and are now gone for good;
    `uploads` are files, or parts of them, that were sent and never became part of anything; `values` are
    points, parameters and tags of runs that are gone.
    """

    blobs: int  # put aside
    size_bytes: int
    purged: int  # deleted
    purged_bytes: int
    kept: int
    runs: int
    uploads: int = 0
    values: int = 0
    applied: bool


class MigrateRequest(Request, frozen=True, kw_only=True):
    """Where to: `postgresql://…`, `s3://…`, or `home` for the files in the home's folder."""

    records_to: str | None = None
    blobs_to: str | None = None


class MigrateResponse(Struct, frozen=True, kw_only=True):
    """What was copied; `digest` is of all rows, equal on both sides; `next` is what to do now."""

    rows: int
    blobs: int
    digest: str
    next: str


class DiskUsage(Struct, frozen=True, kw_only=True):
    """Bytes by what they are for."""

    home: str
    total_bytes: int
    parts: dict[str, int]


class Check(Struct, frozen=True, kw_only=True):
    """One check of `millrace doctor`."""

    name: str
    ok: bool
    text: str
    hint: str = ""


class SystemStatus(Struct, frozen=True, kw_only=True):
    """What there is, at a glance."""

    home: str
    runs: int
    running: list[str]
    models: int
    datasets: int
    endpoints: list[Endpoint]
    open_alerts: int


LIST_ENDPOINTS = Operation(
    name="endpoint.list", summary="Endpoints.", request=Page, response=list[Endpoint], method="GET",
    path="/endpoints",
)  # fmt: skip
GET_ENDPOINT = Operation(
    name="endpoint.get", summary="One endpoint.", request=NameRequest, response=Endpoint, method="GET",
    path="/endpoints/{name}", subject_kind="endpoint", subject_field="name", example={"name": "digits"},
)  # fmt: skip
SERVE_ENDPOINT = Operation(
    name="endpoint.serve", summary="Serve a model in the foreground and watch it.", request=ServeRequest,
    response=ServeEvent, method="POST", path="/endpoints/serve", is_write=True, is_stream=True,
    subject_kind="model", subject_field="model", example={"model": "digits@champion"},
)  # fmt: skip
DEPLOY_ENDPOINT = Operation(
    name="endpoint.deploy", summary="Keep a model served at an endpoint.", request=DeployRequest,
    response=Endpoint, method="POST", path="/endpoints", is_write=True, subject_kind="endpoint",
    subject_field="endpoint", example={"model": "digits@champion", "endpoint": "digits"},
)  # fmt: skip
DELETE_ENDPOINT = Operation(
    name="endpoint.delete", summary="Stop serving an endpoint, and forget it.", request=NameRequest,
    response=Endpoint, method="DELETE", path="/endpoints/{name}", is_write=True, subject_kind="endpoint",
    subject_field="name", example={"name": "digits"},
)  # fmt: skip
START_ROLLOUT = Operation(
    name="endpoint.rollout", summary="Try a candidate on a share of an endpoint's requests, or as its shadow.",
    request=RolloutRequest, response=Endpoint, method="POST", path="/endpoints/{name}/rollout", is_write=True,
    subject_kind="endpoint", subject_field="name", example={"name": "digits", "model": "digits@2"},
)  # fmt: skip
PROMOTE_ROLLOUT = Operation(
    name="endpoint.promote", summary="Let the candidate of the rollout take the place of what is served.",
    request=RolloutEnd, response=Endpoint, method="POST", path="/endpoints/{name}/promote", is_write=True,
    subject_kind="endpoint", subject_field="name", example={"name": "digits"},
)  # fmt: skip
ABORT_ROLLOUT = Operation(
    name="endpoint.abort", summary="End the rollout: all requests go to what was served before it.",
    request=RolloutEnd, response=Endpoint, method="POST", path="/endpoints/{name}/abort", is_write=True,
    subject_kind="endpoint", subject_field="name", example={"name": "digits"},
)  # fmt: skip
FORECAST_ROLLOUT = Operation(
    name="endpoint.forecast", summary="How long a rollout takes to find a bad candidate.", request=ForecastRequest,
    response=RolloutForecast, method="GET", path="/endpoints/{name}/forecast", subject_kind="endpoint",
    subject_field="name", example={"name": "digits", "weight": 10.0},
)  # fmt: skip
CAPTURED = Operation(
    name="endpoint.captured", summary="What an endpoint has kept of its requests.", request=NameRequest,
    response=CapturedRequests, method="GET", path="/endpoints/{name}/captured", subject_kind="endpoint",
    subject_field="name", example={"name": "digits"},
)  # fmt: skip
WRITE_MANIFESTS = Operation(
    name="endpoint.manifests", summary="Files for Kubernetes or KServe that serve a model.", request=ManifestsRequest,
    response=Manifests, method="GET", path="/endpoints/{name}/manifests", subject_kind="endpoint",
    subject_field="name", example={"name": "digits"},
)  # fmt: skip
# Whoever may do this may call the endpoint: asked by the data plane, of every request.
PREDICT = Operation(
    name="endpoint.predict", summary="Call an endpoint; here: where to.", request=NameRequest,
    response=EndpointAddress, method="POST", path="/endpoints/{name}/predict", is_write=True, is_audited=False,
    subject_kind="endpoint", subject_field="name", example={"name": "digits"},
)  # fmt: skip
LIST_ALERTS = Operation(
    name="alert.list", summary="Alerts, newest first.", request=AlertList, response=list[Alert], method="GET",
    path="/alerts",
)  # fmt: skip
GET_ALERT = Operation(
    name="alert.get", summary="One alert.", request=NameRequest, response=Alert, method="GET",
    path="/alerts/{name}", subject_kind="alert", subject_field="name", example={"name": "last"},
)  # fmt: skip
RESOLVE_ALERT = Operation(
    name="alert.resolve", summary="Close an alert.", request=NameRequest, response=Alert, method="POST",
    path="/alerts/{name}/resolve", is_write=True, subject_kind="alert", subject_field="name",
    example={"name": "last"},
)  # fmt: skip
COLLECT_GARBAGE = Operation(
    name="system.gc", summary="Free blobs that nothing refers to.", request=GcRequest, response=GcResponse,
    method="POST", path="/system/gc", is_write=True,
)  # fmt: skip
MIGRATE_SYSTEM = Operation(
    name="system.migrate", summary="Copy records or blobs to another, empty store, and compare.",
    request=MigrateRequest, response=MigrateResponse, method="POST", path="/system/migrate", is_write=True,
    is_audited=False, example={"records_to": "home"},
)  # fmt: skip
MEASURE_DISK = Operation(
    name="system.du", summary="What takes the space.", request=Request, response=DiskUsage, method="GET",
    path="/system/du",
)  # fmt: skip
CHECK_SYSTEM = Operation(
    name="system.doctor", summary="Check this machine and home.", request=Request, response=list[Check],
    method="GET", path="/system/doctor",
)  # fmt: skip
READ_STATUS = Operation(
    name="system.status", summary="What there is, at a glance.", request=Request, response=SystemStatus,
    method="GET", path="/system/status",
)  # fmt: skip
OPERATIONS = (
    LIST_ENDPOINTS, GET_ENDPOINT, SERVE_ENDPOINT, DEPLOY_ENDPOINT, DELETE_ENDPOINT, START_ROLLOUT,
    PROMOTE_ROLLOUT, ABORT_ROLLOUT, FORECAST_ROLLOUT, CAPTURED, WRITE_MANIFESTS, PREDICT, LIST_ALERTS, GET_ALERT,
    RESOLVE_ALERT, COLLECT_GARBAGE, MIGRATE_SYSTEM, MEASURE_DISK, CHECK_SYSTEM, READ_STATUS,
)  # fmt: skip
