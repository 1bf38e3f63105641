"""What a project may use: bytes, runs at once, requests a second."""

from __future__ import annotations

import threading
import time

from millrace.control.dispatch import handles
from millrace.control.services import Services
from millrace.core.errors import InputError, QuotaError
from millrace.core.operations import Page
from millrace.core.operations import governance as ops
from millrace.core.ports import Transaction
from millrace.core.types import ArtifactFile, DatasetVersion, ModelVersion, Quota, Run, Step
from millrace.core.units import format_size, parse_size

KNOWN_S = 30.0  # how long the bytes of a project are believed
_used: dict[tuple[str, str], tuple[float, int]] = {}
_lock = threading.Lock()


@handles(ops.LIST_QUOTAS)
def list_quotas(services: Services, body: Page) -> list[Quota]:
    """By project."""
    return services.records.find(Quota, order="id", limit=body.limit, offset=body.offset) if services.is_used else []


@handles(ops.SET_QUOTA)
def set_quota(services: Services, body: ops.QuotaSet) -> Quota:
    """Replaces the one that was."""
    bounds = {"runs": body.runs, "requests_per_s": body.requests_per_s}
    for name, value in bounds.items():
        if value is not None and value <= 0:
            raise InputError(f"{name} must be greater than 0, got {value}")
    storage = None if body.storage is None else parse_size(body.storage)
    with services.records.transaction() as transaction:
        old = transaction.get(Quota, body.in_project)
        quota = Quota(
            id=body.in_project, project=body.in_project, created_at=old.created_at if old else services.clock.now(),
            storage_bytes=storage, runs=body.runs, requests_per_s=body.requests_per_s,
        )  # fmt: skip
        return transaction.put(quota)


def check_runs(transaction: Transaction, project: str) -> None:
    """Refuse one more run at once than the project may have.

    Raises:
        QuotaError: It has as many.
    """
    quota = transaction.get(Quota, project)
    if quota is None or quota.runs is None:
        return
    open_runs = sum(
        len(transaction.find(Run, {"project": project, "state": state})) for state in ("running", "pending")
    )
    if open_runs >= quota.runs:
        raise QuotaError(
            f"the project {project!r} may have {quota.runs} runs at once, and has {open_runs}",
            hint="wait for one to end, or cancel one: `millrace runs`",
        )


def check_storage(services: Services, project: str, size_bytes: int = 0) -> None:
    """Refuse what would make a project's bytes more than it may have.

    Args:
        services: The home.
        project: Whose they are.
        size_bytes: What is to be added.

    Raises:
        QuotaError: They would be more.
    """
    quota = services.records.get(Quota, project) if services.is_used else None
    if quota is None or quota.storage_bytes is None:
        return
    used = storage_of(services, project)
    with _lock:  # what is added within the next seconds counts before the records are counted again
        at, used = _used.get((str(services.home), project), (time.monotonic(), used))
        fits = used + size_bytes <= quota.storage_bytes
        if fits:
            _used[str(services.home), project] = (at, used + size_bytes)
    if not fits:
        raise QuotaError(
            f"the project {project!r} may store {format_size(quota.storage_bytes)} and has {format_size(used)}; "
            f"{format_size(size_bytes)} more do not fit",
            hint="delete runs or versions, then `millrace system gc --apply`",
        )


def storage_of(services: Services, project: str) -> int:
    """The bytes that a project's records name, equal ones once; counted at most twice a minute."""
    key, now = (str(services.home), project), time.monotonic()
    with _lock:
        at, known = _used.get(key, (-KNOWN_S, 0))
        if now - at < KNOWN_S:
            return known
    records, where = services.records, {"project": project}
    sizes: dict[str, int] = {}
    for step in records.find(Step, where):
        sizes.update((one.digest, one.size_bytes) for one in step.outputs.values())
    for file in records.find(ArtifactFile, where):
        sizes[file.artifact.digest] = file.artifact.size_bytes
    for dataset in records.find(DatasetVersion, where):
        sizes[dataset.artifact.digest] = dataset.artifact.size_bytes
    for version in records.find(ModelVersion, where):
        sizes[version.bundle.digest] = version.bundle.size_bytes
    found = sum(sizes.values())
    with _lock:
        at, known = _used.get(key, (-KNOWN_S, 0))
        if now - at >= KNOWN_S:  # else another one has counted meanwhile, and others have added to that
            _used[key] = at, known = now, found
    return known
