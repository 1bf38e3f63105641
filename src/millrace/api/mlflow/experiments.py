"""Experiments: projects under MLflow's name."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from typing import Any

from millrace.api.mlflow import limits, requests
from millrace.api.mlflow.calls import Call, Tracking
from millrace.api.mlflow.filters import parse_filter, parse_order
from millrace.api.mlflow.languages import EXPERIMENTS, chosen
from millrace.api.mlflow.shapes import ARTIFACT_TAG, experiment_shape
from millrace.control import projects
from millrace.core.errors import InputError, NotFoundError
from millrace.core.search import Comparison, Lifecycle
from millrace.core.types import Project, RunLink

SUMMARIES = 1000
SUMMARY_EXPERIMENTS = 20
LOCATION_CHARS = 2048
_VIEWS: dict[str, Lifecycle] = {
    "1": "active",
    "2": "deleted",
    "3": "all",
    "ACTIVE_ONLY": "active",
    "DELETED_ONLY": "deleted",
    "ALL": "all",
}
CONTEXT_TAG = "mlflow.data.context"


def lifecycle_of(view: str | int | None) -> Lifecycle:
    """The part of the life cycle that a view type means.

    Raises:
        InputError: There is no such view type.
    """
    if view in (None, "", 0, "0"):
        return "active"
    found = _VIEWS.get(str(view))
    if found is None:
        raise InputError(f"want a view type {', '.join(list(_VIEWS)[3:])}, got {view!r}")
    return found


def create(tracking: Tracking, body: requests.NewExperiment) -> Any:
    """A new experiment; files may be kept elsewhere."""
    name = limits.experiment_name(body.name)
    tags = limits.tags(requests.pairs(body.tags), limits.EXPERIMENT_TAG_CHARS)
    tags.pop(ARTIFACT_TAG, None)
    if body.artifact_location:
        tags[ARTIFACT_TAG] = _location(body.artifact_location)
    return {"experiment_id": projects.create_project(tracking.services, name, tags).id}


def _location(uri: str) -> str:
    parsed = urllib.parse.urlsplit(uri)
    plain = limits.fully_unquoted(uri)
    if parsed.scheme in ("", "file"):
        raise InputError("files of this server cannot be a place for artifacts; leave the location out", hint="")
    if parsed.scheme in ("runs", "models") or parsed.fragment or ".." in plain.split("/") or "\0" in plain:
        raise InputError(f"the artifact location {uri[:300]!r} is not allowed")
    return limits.within(uri, LOCATION_CHARS, "an artifact location")


def get(tracking: Tracking, body: requests.Experiment) -> Any:
    """One experiment by id."""
    id = limits.experiment_id(limits.required(body.experiment_id, "experiment_id"))
    return {"experiment": experiment_shape(tracking.projects.of_id(id))}


def get_by_name(tracking: Tracking, body: requests.Experiment) -> Any:
    """One experiment by name."""
    name = limits.required(body.experiment_name, "experiment_name")
    project = tracking.projects.named(name)
    if project is None:
        raise NotFoundError(f"there is no experiment with the name {name!r}")
    return {"experiment": experiment_shape(project)}


def delete(tracking: Tracking, body: requests.Experiment) -> None:
    """Mark it and its runs as deleted."""
    projects.mark_project(tracking.services, _id(body), deleted=True)


def restore(tracking: Tracking, body: requests.Experiment) -> None:
    """Bring it and its runs back."""
    projects.mark_project(tracking.services, _id(body), deleted=False)


def update(tracking: Tracking, body: requests.Experiment) -> None:
    """A new name."""
    projects.change_project(tracking.services, _id(body), name=limits.experiment_name(body.new_name))


def set_tag(tracking: Tracking, body: requests.Experiment) -> None:
    """Set a tag."""
    key = limits.key(body.key, "tag")
    if key == ARTIFACT_TAG:
        raise InputError(f"the tag {key!r} is reserved")
    tags = limits.tags({key: body.value or ""}, limits.EXPERIMENT_TAG_CHARS)
    projects.change_project(tracking.services, _id(body), tags=tags)


def delete_tag(tracking: Tracking, body: requests.Experiment) -> None:
    """Remove a tag."""
    key = limits.required(body.key, "key")
    if key == ARTIFACT_TAG:
        raise NotFoundError(f"the experiment has no tag {key!r}")
    projects.change_project(tracking.services, _id(body), removed_tags=[key])


def _id(body: requests.Experiment) -> str:
    return limits.experiment_id(limits.required(body.experiment_id, "experiment_id"))


def search(tracking: Tracking, body: requests.Search) -> Any:
    """The page of experiments that fit."""
    size = limits.page_size(body.max_results, 1000, limits.RESULTS)
    offset = limits.decode_token(body.page_token, int) or 0
    view = lifecycle_of(body.view_type)
    where = [_numbered(one) for one in parse_filter(body.filter, EXPERIMENTS)]
    order = parse_order(body.order_by or ["creation_time DESC", "experiment_id ASC"], EXPERIMENTS)
    shown = [one for one in tracking.projects.all() if projects.fits(one.deleted_at, view)]
    shown.sort(key=lambda one: int(one.id), reverse=True)
    return paged("experiments", chosen(shown, where, order, _read), offset, size, experiment_shape)


def paged(name: str, found: Sequence[Any], offset: int, size: int, shape: Any) -> dict[str, Any]:
    """A page of results with the token of the next."""
    answer: dict[str, Any] = {name: [shape(one) for one in found[offset : offset + size]]}
    if offset + size < len(found):
        answer["next_page_token"] = limits.encode_token(offset + size)
    return answer


def _numbered(comparison: Comparison) -> Comparison:
    if comparison.field != "attribute" or comparison.key != "id":
        return comparison
    value = comparison.value
    if comparison.operator in ("LIKE", "ILIKE"):
        raise InputError(f"the operator {comparison.operator} is not for experiment_id")
    listed = tuple(limits.experiment_id(one) for one in value) if isinstance(value, tuple) else None
    normal = listed or limits.experiment_id(str(value))
    return Comparison(field="attribute", key="id_text", operator=comparison.operator, value=normal)


def _read(project: Project, field: str, key: str) -> Any:
    if field == "tag":
        return project.tags.get(key)
    if key == "id":
        return int(project.id)
    if key == "id_text":
        return project.id
    value = getattr(project, key)
    return limits.millis(value) if key in ("created_at", "updated_at") else value


def search_datasets(tracking: Tracking, body: requests.DatasetSearch) -> Any:
    """Datasets that the runs of some experiments read, each once."""
    ids = body.experiment_ids or []
    if not 1 <= len(ids) <= SUMMARY_EXPERIMENTS:
        raise InputError(f"want 1 to {SUMMARY_EXPERIMENTS} experiment ids, got {len(ids)}")
    keys = {project.project: project.id for project in known_projects(tracking, ids)}
    links = tracking.services.records.find(RunLink, {"target": "dataset", "project": list(keys)}) if keys else []
    seen = dict.fromkeys((keys[one.project], one.name, one.digest, one.tags.get(CONTEXT_TAG)) for one in links)
    summaries = []
    for id, name, digest, context in list(seen)[:SUMMARIES]:
        summary = {"experiment_id": id, "name": name, "digest": digest}
        summaries.append({**summary, "context": context} if context is not None else summary)
    return {"dataset_summaries": summaries}


def known_projects(tracking: Tracking, ids: Sequence[str]) -> list[Project]:
    """The projects among some ids that exist.

    Raises:
        InputError: An id is not a number.
    """
    wanted = list(dict.fromkeys(limits.experiment_id(id) for id in ids))
    found = []
    for id in wanted:
        try:
            found.append(tracking.projects.of_id(id))
        except NotFoundError:
            continue
    return found


_BY_ID: dict[str, Any] = {"request": requests.Experiment, "field": "experiment_id"}
CALLS = (
    Call(
        method="POST", path="/experiments/create", operation="project.create", handler=create,
        request=requests.NewExperiment, field="name",
    ),
    Call(method="GET", path="/experiments/get", operation="project.list", handler=get, **_BY_ID),
    Call(method="GET", path="/experiments/get-by-name", operation="project.list", handler=get_by_name, **_BY_ID),
    Call(method="POST", path="/experiments/delete", operation="project.delete", handler=delete, **_BY_ID),
    Call(method="POST", path="/experiments/restore", operation="project.restore", handler=restore, **_BY_ID),
    Call(method="POST", path="/experiments/update", operation="project.update", handler=update, **_BY_ID),
    Call(method="POST", path="/experiments/set-experiment-tag", operation="project.update", handler=set_tag, **_BY_ID),
    Call(
        method="POST", path="/experiments/delete-experiment-tag", operation="project.update", handler=delete_tag,
        **_BY_ID,
    ),
    Call(method="POST", path="/experiments/search", operation="project.list", handler=search, request=requests.Search),
    Call(method="GET", path="/experiments/search", operation="project.list", handler=search, request=requests.Search),
    Call(
        method="POST", path="/experiments/search-datasets", operation="run.list", handler=search_datasets,
        request=requests.DatasetSearch,
    ),
)  # fmt: skip
