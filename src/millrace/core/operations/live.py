"""Verbs on endpoints, alerts and the system."""

from __future__ import annotations

from typing import Any

from millrace.core.operations import Operation, Page, Request
from millrace.core.types import Alert, Endpoint, Struct


class NameRequest(Request, frozen=True, kw_only=True):
    """One thing by name or id."""

    name: str


class ServeRequest(Request, frozen=True, kw_only=True):
    """Serve a model in the foreground; what is absent comes from the spec, then from the defaults."""

    model: str
    host: str = "127.0.0.1"
    port: int | None = None
    threads: int | None = None
    variant: str | None = None


class ServeEvent(Struct, frozen=True, kw_only=True):
    """What the endpoint's supervisor saw."""

    kind: str  # "ready" | "alert" | "restart" | "window" | "stopped"
    text: str
    url: str = ""
    facts: dict[str, Any] = {}


class DeployRequest(Request, frozen=True, kw_only=True):
    """Keep a model served at an endpoint; with an alias the endpoint follows it.

    `variant`: the version's chosen one when absent. `isolate`: a serving process of its own.
    """

    model: str
    endpoint: str
    variant: str | None = None
    threads: int = 1
    isolate: bool = False


class EndpointAddress(Struct, frozen=True, kw_only=True):
    """Where an endpoint's requests go. `wants_token`: each with a token that may do `endpoint.predict`."""

    endpoint: str
    state: str
    predict: str  # rows in, answers out
    infer: str  # tensors: the Open Inference Protocol
    wants_token: bool


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
    LIST_ENDPOINTS, GET_ENDPOINT, SERVE_ENDPOINT, DEPLOY_ENDPOINT, DELETE_ENDPOINT, PREDICT, LIST_ALERTS,
    GET_ALERT, RESOLVE_ALERT, COLLECT_GARBAGE,
    MIGRATE_SYSTEM, MEASURE_DISK, CHECK_SYSTEM, READ_STATUS,
)  # fmt: skip
