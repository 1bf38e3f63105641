"""Verbs on the home: garbage, disk, doctor, status; and lists of endpoints and alerts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

import msgspec

from millrace.control.dispatch import handles
from millrace.control.drivers import live_lease
from millrace.control.seen import seen
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import CorruptError, MillraceError, NotFoundError
from millrace.core.operations import Page, Request
from millrace.core.operations import live as ops
from millrace.core.types import (
    Alert,
    DatasetVersion,
    Endpoint,
    ModelVersion,
    Run,
)
from millrace.core.units import format_size


@handles(ops.LIST_ENDPOINTS)
def list_endpoints(services: Services, body: Page) -> list[Endpoint]:
    """Endpoints; one whose process is gone says so."""
    if not services.is_used:
        return []
    found = services.records.find(Endpoint, order="-created_at", limit=body.limit, offset=body.offset)
    return [seen(services, endpoint) for endpoint in found]


@handles(ops.GET_ENDPOINT)
def get_endpoint(services: Services, body: ops.NameRequest) -> Endpoint:
    """One endpoint."""
    endpoint = services.records.get(Endpoint, body.name) if services.is_used else None
    if endpoint is None:
        raise NotFoundError(f"there is no endpoint {body.name!r} in {services.home}", hint="`millrace endpoints`")
    return seen(services, endpoint)


@handles(ops.LIST_ALERTS)
def list_alerts(services: Services, body: ops.AlertList) -> list[Alert]:
    """Alerts, newest first."""
    if not services.is_used:
        return []
    where = {"state": body.state} if body.state else None
    return services.records.find(Alert, where, order="-created_at", limit=body.limit, offset=body.offset)


@handles(ops.GET_ALERT)
def get_alert(services: Services, body: ops.NameRequest) -> Alert:
    """One alert by id, prefix, or `last`."""
    for alert in list_alerts(services, ops.AlertList(limit=10_000)):
        if body.name == "last" or alert.id.startswith(body.name):
            return alert
    raise NotFoundError(f"there is no alert {body.name!r} in {services.home}", hint="`millrace alerts` lists them")


@handles(ops.RESOLVE_ALERT)
def resolve_alert(services: Services, body: ops.NameRequest) -> Alert:
    """Close an alert."""
    alert = get_alert(services, body)
    return services.records.put(msgspec.structs.replace(alert, state="resolved"), expect_version=alert.version)


@handles(ops.MEASURE_DISK)
def measure_disk(services: Services, body: Request) -> ops.DiskUsage:
    """Bytes by folder of the home."""
    parts: dict[str, int] = {}
    for child in sorted(services.home.iterdir()) if services.home.is_dir() else []:
        files = [child] if child.is_file() else child.rglob("*")
        parts[child.name] = sum(path.lstat().st_size for path in files if path.is_file())
    return ops.DiskUsage(home=str(services.home), total_bytes=sum(parts.values()), parts=parts)


# --------------------------------------------------------------------------- doctor and status


@handles(ops.CHECK_SYSTEM)
def check_system(services: Services, body: Request) -> list[ops.Check]:
    """What could stop a run, each with what to do."""
    return list(_checks(services))


def _checks(services: Services) -> Iterator[ops.Check]:
    version = sys.version.split()[0]
    yield ops.Check(name="python", ok=sys.version_info >= (3, 11), text=version, hint="install Python 3.11 or newer")
    for extra, modules in {
        "data": ("polars", "pyarrow", "scipy"),
        "torch": ("torch", "safetensors"),
        "sklearn": ("sklearn", "lightgbm"),
    }.items():
        missing = [module for module, _ in extras.missing_modules([(module, extra) for module in modules])]
        text = "installed" if not missing else f"missing: {', '.join(missing)}"
        yield ops.Check(name=f"extra {extra}", ok=not missing, text=text, hint=f"pip install 'millrace-ai[{extra}]'")
    folder = services.home if services.home.is_dir() else services.home.parent
    free = shutil.disk_usage(folder).free
    yield ops.Check(
        name="disk", ok=free > 500_000_000, text=f"{format_size(free)} free at {folder}", hint="free some space"
    )
    writable = os.access(folder, os.W_OK)
    yield ops.Check(name="home", ok=writable, text=str(services.home), hint="choose another home: MILLRACE_HOME")
    if services.is_used:
        yield _check_records(services)
        yield _check_models(services)


def _check_records(services: Services) -> ops.Check:
    try:
        runs = len(services.records.find(Run))
    except MillraceError as error:
        return ops.Check(name="records", ok=False, text=error.message, hint=error.hint)
    return ops.Check(name="records", ok=True, text=f"{runs} runs")


def _check_models(services: Services) -> ops.Check:
    for version in services.records.find(ModelVersion):
        try:
            for entry in services.blobs.tree(version.bundle.digest):
                services.blobs.read(entry.digest)
        except (CorruptError, NotFoundError) as error:
            return ops.Check(name="models", ok=False, text=f"{version.name} v{version.number}: {error.message}",
                             hint=error.hint)  # fmt: skip
    return ops.Check(name="models", ok=True, text="every bundle has its digest")


@handles(ops.READ_STATUS)
def read_status(services: Services, body: Request) -> ops.SystemStatus:
    """Counts, what runs, what is served, what is wrong."""
    if not services.is_used:
        return ops.SystemStatus(
            home=str(services.home), runs=0, running=[], models=0, datasets=0, endpoints=[], open_alerts=0
        )
    records = services.records
    running = [run.id for run in records.find(Run, {"state": "running"}) if live_lease(services, run)]
    return ops.SystemStatus(
        home=str(services.home), runs=len(records.find(Run)), running=running, models=len(records.find(ModelVersion)),
        datasets=len(records.find(DatasetVersion)), endpoints=list_endpoints(services, Page()),
        open_alerts=len(records.find(Alert, {"state": "open"})),
    )  # fmt: skip
