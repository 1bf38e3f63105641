"""Garbage: blobs that nothing refers to are put aside, then deleted; no live blob ever is.

Writers take no lock. Who stores bytes and then writes a record that names them has `gc_min_age_s` for it:
what is younger is spared. A blob that was there already when it was stored again counts as new. And what is
put aside comes back to whoever asks for it; it is deleted only after lying there for `gc_min_age_s` without
a reference, which is longer than any writer may take between its look and its record.

Records go as well: runs that were deleted too long ago to be restored, files that were sent and never became
part of anything, and what was logged to runs that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

from millrace.control.dispatch import handles
from millrace.control.drivers import live_lease
from millrace.control.services import Services
from millrace.core.errors import ConflictError, DeniedError, NotFoundError
from millrace.core.operations import live as ops
from millrace.core.types import (
    TREE_MEDIA_TYPE,
    UPLOADS,
    Artifact,
    ArtifactFile,
    DatasetVersion,
    LoggedModel,
    ModelVersion,
    Run,
    RunLink,
    Step,
)
from millrace.store.leases import LeaseKeeper, acquire
from millrace.store.records_sql import SqlRecords
from millrace.store.tracking_sql import orphaned_rows

DAY_S = 86_400.0
LEASE_TTL_S = 60.0


@handles(ops.COLLECT_GARBAGE)
def collect_garbage(services: Services, body: ops.GcRequest) -> ops.GcResponse:
    """Put aside and delete what nothing refers to; a dry run unless told to apply.

    Raises:
        DeniedError: Who asks may see some projects only: what the others refer to would look like garbage.
    """
    if services.where is not None:
        raise DeniedError("garbage is of all projects, and you may work in some", hint="ask an owner")
    if not services.is_used:
        return ops.GcResponse(blobs=0, size_bytes=0, purged=0, purged_bytes=0, kept=0, runs=0, applied=body.apply)
    lease = acquire(services.records, "gc", services.clock, LEASE_TTL_S)
    if lease is None:
        raise ConflictError("garbage is being collected already", hint="wait for it to end")
    with LeaseKeeper(services.records, lease, services.clock, LEASE_TTL_S):
        return collect(services, apply=body.apply, now=body.now)


def collect(
    services: Services, *, apply: bool, now: bool = False, between: Callable[[], None] = lambda: None
) -> ops.GcResponse:
    """One collection.

    Args:
        services: The home.
        apply: Do it, or only count.
        now: Spare nothing for its age.
        between: Called before every step, for tests that let others write meanwhile.
    """
    blobs = services.blobs
    spared_s = 0.0 if now else float(services.setting("gc_min_age_s"))
    began = services.clock.now()
    runs = _remove_deleted_runs(services, began, apply)
    values = _remove_orphaned_values(services, apply)
    between()
    unfinished = _remove_unfinished_uploads(services, began - spared_s, apply)
    between()
    live = referenced(services, began, unfinished)
    purged, aside = [], []
    for artifact, since in list(blobs.discarded()):
        between()
        if artifact.digest in live:
            if apply:
                blobs.exists(artifact.digest)  # brings it back
        elif since <= began - spared_s and (not apply or blobs.purge(artifact.digest)):
            purged.append(artifact)
    cutoff = began if now else min(began - spared_s, _oldest_running(services, began))
    stored = list(blobs.list())
    for artifact in stored:
        between()
        if artifact.digest in live or not _is_older(services, artifact, cutoff):
            continue
        between()
        if not apply or blobs.discard(artifact.digest):
            aside.append(artifact)
    if now and apply:
        purged += [artifact for artifact in aside if blobs.purge(artifact.digest)]
    return ops.GcResponse(
        blobs=len(aside), size_bytes=sum(one.size_bytes for one in aside), purged=len(purged),
        purged_bytes=sum(one.size_bytes for one in purged), kept=len(stored) - len(aside), runs=runs,
        uploads=len(unfinished), values=values, applied=apply,
    )  # fmt: skip


def _is_older(services: Services, artifact: Artifact, cutoff: float) -> bool:
    try:
        return services.blobs.modified_at(artifact.digest) <= cutoff
    except NotFoundError:  # somebody deleted it meanwhile
        return False


def _oldest_running(services: Services, now: float) -> float:
    """When the oldest run began that is still driven: what its steps store is named when they end."""
    running = services.records.find(Run, {"state": "running"})
    driven = [run for run in running if run.started_at is not None and (not run.spec_path or live_lease(services, run))]
    return min((run.started_at or now for run in driven), default=now)


def referenced(services: Services, now: float, without: Set[str] = frozenset()) -> set[str]:
    """Digests that must stay, the files of trees included; `without` are ids of files that go."""
    digests: set[str] = set()
    for root in _roots(services, now, without):
        if root.digest in digests:
            continue
        digests.add(root.digest)
        if root.media_type == TREE_MEDIA_TYPE and services.blobs.exists(root.digest):
            digests.update(entry.digest for entry in services.blobs.tree(root.digest))
    return digests


def _roots(services: Services, now: float, without: Set[str]) -> Iterator[Artifact]:
    """What versions, files of runs and logged models, and the outputs of kept runs name."""
    records = services.records
    for version in records.find(ModelVersion):
        found = (version.bundle, version.signature, version.measurements, version.card)
        yield from (artifact for artifact in found if artifact is not None)
    for dataset in records.find(DatasetVersion):
        yield dataset.artifact
    for file in records.find(ArtifactFile):
        if file.id not in without:
            yield file.artifact
    steps = records.find(Step)
    runs = _kept_runs(services, now)
    kept = {step.id for step in steps if step.run_id in runs}
    kept |= {step.cached_from for step in steps if step.run_id in runs and step.cached_from}
    for step in steps:
        if step.id in kept:
            yield from step.outputs.values()
            if step.environment is not None:
                yield step.environment


def _kept_runs(services: Services, now: float) -> set[str]:
    """The newest, the young, those that go on, and scripts' runs, whose files nothing can make again."""
    runs = services.records.find(Run, order="-created_at")
    newest = {run.id for run in runs[: int(services.setting("gc_keep_runs"))]}
    young = now - float(services.setting("gc_keep_days")) * DAY_S
    return newest | {
        run.id for run in runs if run.created_at >= young or run.state in ("pending", "running") or not run.spec_path
    }


def _remove_deleted_runs(services: Services, now: float, apply: bool) -> int:
    """Runs that were deleted too long ago to be restored; how many."""
    before = now - float(services.setting("gc_deleted_days")) * DAY_S
    gone = [
        run for run in services.records.find(Run) if run.deleted_at is not None and run.deleted_at <= before
    ]  # fmt: skip
    for run in gone if apply else []:
        with services.records.transaction() as transaction:
            for kind, field in ((Step, "run_id"), (RunLink, "run_id"), (ArtifactFile, "owner")):
                for record in transaction.find(kind, {field: run.id}):
                    transaction.delete(kind, record.id)
            for model in transaction.find(LoggedModel, {"run_id": run.id}):
                if model.deleted_at is not None:
                    for file in transaction.find(ArtifactFile, {"owner": model.id}):
                        transaction.delete(ArtifactFile, file.id)
                    transaction.delete(LoggedModel, model.id)
            transaction.delete(Run, run.id)
    return len(gone)


def _remove_unfinished_uploads(services: Services, before: float, apply: bool) -> set[str]:
    """Parts of uploads that were never completed, and files that were sent for nothing; their ids.

    An upload goes on as long as parts of it arrive.
    """
    found = [file for file in services.records.find(ArtifactFile) if file.owner.startswith(UPLOADS)]
    gone = {file.id for file in _unfinished(found, before)}
    for owner in {file.owner for file in found if file.id in gone} if apply else ():
        with services.records.transaction() as transaction:
            for file in _unfinished(transaction.find(ArtifactFile, {"owner": owner}), before):
                transaction.delete(ArtifactFile, file.id)
    return gone


def _unfinished(files: Sequence[ArtifactFile], before: float) -> list[ArtifactFile]:
    newest: dict[str, float] = {}
    for file in files:
        newest[_upload_of(file)] = max(newest.get(_upload_of(file), 0.0), file.created_at)
    return [file for file in files if newest[_upload_of(file)] <= before]


def _upload_of(file: ArtifactFile) -> str:
    """Parts, which have numbers, are one; what somebody sent whole is for itself."""
    return file.owner if file.path.isdecimal() else file.id


def _remove_orphaned_values(services: Services, apply: bool) -> int:
    """Points, parameters and tags of runs that are gone, such as those that a script logged on; how many."""
    records = services.records
    found = records.read(orphaned_rows) if isinstance(records, SqlRecords) else {}
    for run_id in found if apply else ():
        with records.transaction() as transaction:
            if transaction.get(Run, run_id) is None:
                transaction.delete(Run, run_id)  # takes what was logged along
    return sum(found.values())
