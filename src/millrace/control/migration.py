"""Moving a home's records and blobs to another store, and back."""

from __future__ import annotations

import logging

from millrace.control.dispatch import handles
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import ConflictError, InputError
from millrace.core.operations import live as ops
from millrace.core.ports import Blobs
from millrace.core.types import Run

HOME = "home"
log = logging.getLogger(__name__)


@handles(ops.MIGRATE_SYSTEM)
def migrate_system(services: Services, body: ops.MigrateRequest) -> ops.MigrateResponse:
    """Copy to an empty store and compare; the old one stays as it is until the settings name the new one."""
    if body.records_to is None and body.blobs_to is None:
        raise InputError("want --records-to or --blobs-to", hint="`home` means the files in the home's folder")
    running = services.records.find(Run, {"state": "running"}, limit=1)
    if running:
        raise ConflictError(f"run {running[0].id[:12]} is running", hint="migrate when nothing writes")
    blobs = _copy_blobs(services, _target(body.blobs_to)) if body.blobs_to is not None else 0
    rows, digest = _copy_records(services, _target(body.records_to)) if body.records_to is not None else (0, "")
    settings = [f"MILLRACE_RECORDS_URL={body.records_to}"] if body.records_to not in (None, HOME) else []
    settings += [f"MILLRACE_BLOBS_URL={body.blobs_to}"] if body.blobs_to not in (None, HOME) else []
    where = " and ".join(name.partition("=")[0] for name in settings)
    hint = f"set {where}, or the same names in settings.yaml" if settings else "unset the URL settings"
    return ops.MigrateResponse(rows=rows, blobs=blobs, digest=digest, next=hint)


def _target(text: str) -> str:
    return "" if text == HOME else text


def _copy_records(services: Services, url: str) -> tuple[int, str]:
    copy = extras.load("millrace.store.transfer:copy_records")
    services.records.seal()
    target = services.open_records_at(url)
    try:
        copied = copy(services.records, target, lambda table, rows: log.info("%s: %d rows", table, rows))
    finally:
        target.close()
    return sum(copied.rows.values()), copied.digest


def _copy_blobs(services: Services, url: str) -> int:
    """Every blob as it is stored, encrypted or not, verified by its digest; what is there already is not sent again."""
    source: Blobs = services.open_blobs_at(services.setting("blobs_url"))
    target: Blobs = services.open_blobs_at(url)
    count = 0
    for artifact in source.list():
        if not target.exists(artifact.digest):
            target.put(source.path(artifact.digest), artifact.media_type)
        count += 1
    return count
