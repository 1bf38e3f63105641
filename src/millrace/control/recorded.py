"""Runs that other programs do and only record here: begin, change, delete, restore; values, links, models, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from millrace.control.dispatch import handles
from millrace.control.projects import get_project
from millrace.control.quotas import check_runs, check_storage
from millrace.control.services import Services
from millrace.core.errors import InputError, NotFoundError
from millrace.core.ids import digest_json, new_id
from millrace.core.operations import runs as ops
from millrace.core.ports import Transaction
from millrace.core.search import RunValues
from millrace.core.states import RunState
from millrace.core.types import UPLOADS, ArtifactFile, LoggedModel, MetricPoint, Project, Run, RunLink, Struct


class NewValues(Struct, frozen=True, kw_only=True):
    """What is logged at once. `model_metrics`, by logged model id, are metrics that are also the model's."""

    points: Sequence[MetricPoint] = ()
    params: Mapping[str, str] = {}
    tags: Mapping[str, str] = {}
    name: str | None = None
    model_metrics: Mapping[str, Sequence[dict[str, Any]]] = {}


def begin_run(
    services: Services, project_id: str, *, name: str, started_at: float, created_by: str, tags: Mapping[str, str]
) -> tuple[Run, Project]:
    """A running run of a project, with its tags, in one transaction.

    Args:
        services: The home.
        project_id: The project's id.
        name: The run's name.
        started_at: Seconds since 1970.
        created_by: Who says to have started it.
        tags: Searchable tags.

    Raises:
        NotFoundError: There is no such project.
        InputError: The project is deleted.
    """
    with services.records.transaction() as transaction:
        project = _active_project(transaction, project_id)
        check_runs(transaction, project.project)
        run = Run(
            id=new_id(), project=project.project, created_at=services.clock.now(), name=name, state="running",
            started_at=started_at, created_by=created_by, tags={"source": "mlflow"},
        )  # fmt: skip
        run = transaction.put(run, expect_version=0)
        if tags:
            transaction.log(run.id, tags=tags)
        return run, project


def change_run(
    services: Services,
    run_id: str,
    *,
    state: RunState | None = None,
    ended_at: float | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Run:
    """Set the state, the end or the name of a recorded run; tags come in the same transaction.

    Raises:
        NotFoundError: There is no such run.
        InputError: It is deleted, or a spec drives it and the state is not for others to set.
    """
    with services.records.transaction() as transaction:
        run = active_run(transaction, run_id)
        if run.spec_path and (state not in (None, run.state) or ended_at is not None):
            raise InputError(
                f"run {run.id} is driven by {run.spec_path}: its state is not for others to set",
                hint="cancel it with `millrace runs cancel`",
            )
        changed = msgspec.structs.replace(
            run, state=state or run.state, ended_at=run.ended_at if ended_at is None else ended_at,
            name=run.name if name is None else name,
        )  # fmt: skip
        if tags:
            transaction.log(run.id, tags=tags)
        return run if changed == run else transaction.put(changed, expect_version=run.version)


def mark_run(services: Services, run_id: str, *, deleted: bool) -> Run:
    """Delete a run so that it can be restored, or restore it; either is idempotent.

    Raises:
        NotFoundError: There is no such run.
    """
    with services.records.transaction() as transaction:
        run = _existing_run(transaction, run_id)
        if (run.deleted_at is not None) == deleted:
            return run
        at = services.clock.now() if deleted else None
        return transaction.put(msgspec.structs.replace(run, deleted_at=at), expect_version=run.version)


def record_values(services: Services, run_id: str, news: NewValues) -> None:
    """Points, parameters and tags of a run: all of them or nothing.

    Raises:
        NotFoundError: There is no such run or logged model.
        InputError: The run is deleted.
        ConflictError: A parameter has another value already.
    """
    with services.records.transaction() as transaction:
        run = active_run(transaction, run_id)
        transaction.log(run.id, points=news.points, params=news.params, tags=news.tags)
        if news.name and news.name != run.name:
            transaction.put(msgspec.structs.replace(run, name=news.name), expect_version=run.version)
        for model_id, metrics in news.model_metrics.items():
            model = existing_model(transaction, model_id)
            new = [metric for metric in metrics if metric not in model.metrics]
            transaction.put(msgspec.structs.replace(model, metrics=[*model.metrics, *new]), model.version)


def remove_tag(services: Services, run_id: str, tag: str) -> None:
    """Remove a tag of a run.

    Raises:
        NotFoundError: There is no such run, or it has no such tag.
        InputError: The run is deleted.
    """
    with services.records.transaction() as transaction:
        run = active_run(transaction, run_id)
        if tag not in services.records.run_values([run.id]).get(run.id, RunValues()).tags:
            raise NotFoundError(f"run {run.id} has no tag {tag!r}", hint="tags are spelled exactly")
        transaction.log(run.id, removed_tags=[tag])


def record_links(services: Services, run_id: str, links: Sequence[RunLink]) -> None:
    """Datasets and models that a run read or wrote; one that is there already stays as it is.

    Args:
        services: The home.
        run_id: The run.
        links: Without ids, run and project: they are given here.

    Raises:
        NotFoundError: There is no such run.
        InputError: It is deleted.
    """
    with services.records.transaction() as transaction:
        run = active_run(transaction, run_id)
        for link in links:
            what = [run.id, link.direction, link.target, link.name, link.digest]
            id = digest_json(what).removeprefix("sha256:")[:32]
            if transaction.get(RunLink, id) is None:
                own = msgspec.structs.replace(
                    link, id=id, run_id=run.id, project=run.project, created_at=services.clock.now()
                )
                transaction.put(own, expect_version=0)


# --------------------------------------------------------------------------- logged models


def begin_model(services: Services, project_id: str, model: LoggedModel) -> tuple[LoggedModel, Project]:
    """A logged model of a project; id, project and times are given here.

    Raises:
        NotFoundError: There is no such project.
        InputError: It is deleted.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        project = _active_project(transaction, project_id)
        own = msgspec.structs.replace(
            model, id=f"m-{new_id()}", project=project.project, created_at=now, updated_at=now
        )
        return transaction.put(own, expect_version=0), project


def change_model(services: Services, model_id: str, change: Callable[[LoggedModel], LoggedModel]) -> LoggedModel:
    """Apply a change to a logged model and note the time.

    Raises:
        NotFoundError: There is none.
    """
    with services.records.transaction() as transaction:
        model = existing_model(transaction, model_id)
        changed = msgspec.structs.replace(change(model), updated_at=services.clock.now())
        return transaction.put(changed, expect_version=model.version)


def existing_model(transaction: Transaction, model_id: str) -> LoggedModel:
    """A logged model inside a transaction.

    Raises:
        NotFoundError: There is none.
    """
    model = transaction.get(LoggedModel, model_id)
    if model is None:
        raise NotFoundError(f"there is no logged model {model_id!r}", hint="its id is m- and 32 hexadecimal digits")
    return model


# --------------------------------------------------------------------------- files


def keep_file(services: Services, file: ArtifactFile) -> ArtifactFile:
    """Record a stored blob as a file of a run or logged model; one of that path is replaced.

    Raises:
        NotFoundError: Who asks may see some projects only, and no such run or model in them.
        InputError: A folder has that path, or a file stands where a folder must be.
    """
    owner = services.records.get(Run, file.owner) or services.records.get(LoggedModel, file.owner)
    if owner is None and services.where is not None and not file.owner.startswith(UPLOADS):
        raise NotFoundError(f"there is no run {file.owner!r}")
    project = services.own_project if owner is None else owner.project
    check_storage(services, project, file.artifact.size_bytes)
    with services.records.transaction() as transaction:
        parts = file.path.split("/")
        for end in range(1, len(parts)):
            above = "/".join(parts[:end])
            if transaction.get(ArtifactFile, f"{file.owner}/{above}") is not None:
                raise InputError(f"{above!r} is a file, it cannot hold {file.path!r}")
        return transaction.put(msgspec.structs.replace(file, project=project))


def drop_files(services: Services, owner: str, path: str) -> int:
    """Forget a file, or a folder of files; the bytes go with `system gc`. Returns how many.

    Args:
        services: The home.
        owner: A run's or logged model's id.
        path: A file or a folder; "" is everything.
    """
    with services.records.transaction() as transaction:
        inside = [
            one
            for one in transaction.find(ArtifactFile, {"owner": owner})
            if not path or one.path == path or one.path.startswith(path + "/")
        ]
        for one in inside:
            transaction.delete(ArtifactFile, one.id)
        return len(inside)


def active_run(transaction: Transaction, run_id: str) -> Run:
    """A run that may be written to.

    Raises:
        NotFoundError: There is none.
        InputError: It is deleted.
    """
    run = _existing_run(transaction, run_id)
    if run.deleted_at is not None:
        raise InputError(f"run {run.id} is deleted: it can only be read", hint="restore it first")
    return run


def _existing_run(transaction: Transaction, run_id: str) -> Run:
    run = transaction.get(Run, run_id)
    if run is None:
        raise NotFoundError(f"there is no run with the id {run_id!r}", hint="`millrace runs` lists them")
    return run


def _active_project(transaction: Transaction, project_id: str) -> Project:
    project = get_project(transaction, project_id)
    if project.deleted_at is not None:
        raise InputError(f"project {project.name!r} is deleted: nothing can be added", hint="restore it first")
    return project


@handles(ops.RESTORE_RUN)
def restore_run(services: Services, body: ops.RunRequest) -> Run:
    """Bring a deleted run back."""
    return mark_run(services, body.run, deleted=False)
