"""Runs of a user's own script: points, parameters, artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from millrace.control.approvals import person
from millrace.control.dispatch import handles
from millrace.control.keys import mark_subject
from millrace.control.projects import ensure_project
from millrace.control.quotas import check_runs, check_storage
from millrace.control.runs import find_run
from millrace.control.services import Services
from millrace.control.uploads import local_path
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.operations import runs as ops
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Run, Step

TRACKED = "tracked"


@handles(ops.TRACK_START)
def start_tracking(services: Services, body: ops.TrackRequest) -> Run:
    """A running run without a spec."""
    now = services.clock.now()
    run = Run(
        id=new_id(), project=body.project, created_at=now, started_at=now, name=body.name or TRACKED, state="running",
        tags={"source": "track"}, created_by=person(),
    )  # fmt: skip
    with services.records.transaction() as transaction:
        check_runs(transaction, run.project)
        ensure_project(transaction, run.project, now)
        run = transaction.put(run, expect_version=0)
        transaction.log(run.id, params=_as_texts(body.params), tags=body.tags)
    return run


@handles(ops.TRACK_LOG)
def log_tracked(services: Services, body: ops.TrackLog) -> None:
    """Points, and parameters and tags, which replace those of the same name."""
    if body.points:
        services.records.append_metrics(body.points)
    if body.params or body.tags:
        run = find_run(services, body.run)
        with services.records.transaction() as transaction:
            transaction.log(run.id, params=_as_texts(body.params), tags=body.tags, replace_params=True)


@handles(ops.TRACK_ARTIFACT)
def keep_artifact(services: Services, body: ops.TrackArtifact) -> Step:
    """Store a file or folder; it appears as an output of the run's step `artifacts`."""
    run = find_run(services, body.run)
    path = local_path(services, body.path)
    if not path.exists():
        raise NotFoundError(f"there is no file or folder {path}")
    check_storage(services, run.project, _size(path))
    artifact = services.blobs.put_tree(path) if path.is_dir() else services.blobs.put(path)
    if body.data_subject:
        mark_subject(services, artifact, body.data_subject)
    with services.records.transaction() as transaction:
        steps = [step for step in transaction.find(Step, {"run_id": run.id}) if step.name == "artifacts"]
        if steps:
            step = msgspec.structs.replace(steps[0], outputs={**steps[0].outputs, body.name: artifact})
            return transaction.put(step, expect_version=steps[0].version)
        step = Step(
            id=new_id(), project=run.project, created_at=services.clock.now(), run_id=run.id, name="artifacts",
            stage=TRACKED, state="succeeded", outputs={body.name: artifact},
        )  # fmt: skip
        return transaction.put(step, expect_version=0)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files below a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())


@handles(ops.TRACK_END)
def end_tracking(services: Services, body: ops.TrackEnd) -> Run:
    """The end state of a tracked run."""
    if body.state not in RUN_END_STATES:
        raise InputError(f"want one of {', '.join(sorted(RUN_END_STATES))}, got {body.state!r}")
    return _change(services, body.run, lambda run: msgspec.structs.replace(
        run, state=body.state, ended_at=services.clock.now(), error=body.error
    ))  # fmt: skip


def _as_texts(params: dict[str, Any]) -> dict[str, str]:
    """Parameters as they are searched, which is how MLflow's clients write them too."""
    return {key: str(value) for key, value in params.items()}


def _change(services: Services, run_id: str, change) -> Run:  # type: ignore[no-untyped-def]
    for _ in range(20):
        run = find_run(services, run_id)
        try:
            return services.records.put(change(run), expect_version=run.version)
        except ConflictError:
            continue
    raise ConflictError(f"run {run_id} is being changed by somebody else")
