"""Logged models: what every `log_model` of MLflow 3 makes before anything is registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.api.mlflow import files, limits, requests
from millrace.api.mlflow.calls import Call, Tracking
from millrace.api.mlflow.experiments import known_projects, paged
from millrace.api.mlflow.filters import parse_filter, parse_order
from millrace.api.mlflow.languages import LOGGED_MODELS, chosen, is_true
from millrace.api.mlflow.shapes import MODEL_STATUS_OF, logged_model_shape, model_root
from millrace.control import recorded
from millrace.core.errors import InputError, NotFoundError
from millrace.core.search import Comparison
from millrace.core.types import LoggedModel

NAME_CHARS = 250
_BAD_CHARS = "/:.%\"'"
_STATES = {
    **{status: state for state, status in MODEL_STATUS_OF.items()},
    "0": "unspecified",
    "1": "pending",
    "2": "ready",
    "3": "upload_failed",
}


def create(tracking: Tracking, body: requests.NewLoggedModel) -> Any:
    """A logged model whose files come next."""
    name = body.name or f"model-{tracking.services.clock.now():.0f}"
    if any(char in name for char in _BAD_CHARS):
        raise InputError(f"a logged model's name must not have any of {' '.join(_BAD_CHARS)}, got {name[:300]!r}")
    model = LoggedModel(
        id="", name=limits.within(name, NAME_CHARS, "a logged model's name"), run_id=body.source_run_id or None,
        model_type=limits.within(body.model_type or "", 500, "model_type"), params=_params(body.params),
        tags=limits.tags(requests.pairs(body.tags), limits.TAG_CHARS),
    )  # fmt: skip
    project_id = limits.experiment_id(limits.required(body.experiment_id, "experiment_id"))
    stored, project = recorded.begin_model(tracking.services, project_id, model)
    return {"model": logged_model_shape(stored, project)}


def _params(given: list[requests.Pair] | None) -> dict[str, str]:
    return {
        limits.key(key, "parameter"): limits.within(value, limits.PARAM_CHARS, f"the parameter {key!r}")
        for key, value in requests.pairs(given).items()
    }


def get(tracking: Tracking, body: requests.OneLoggedModel) -> Any:
    """One logged model; a deleted one only when asked for."""
    model = stored_model(tracking, body.model_id, allow_deleted=bool(body.allow_deleted))
    return {"model": shaped(tracking, model)}


def stored_model(tracking: Tracking, id: str | None, *, allow_deleted: bool = False) -> LoggedModel:
    """A logged model by id.

    Raises:
        NotFoundError: There is none, or it is deleted.
    """
    id = limits.required(id, "model_id")
    model = tracking.services.records.get(LoggedModel, id)
    if model is None or (model.deleted_at is not None and not allow_deleted):
        raise NotFoundError(f"there is no logged model {id!r}")
    return model


def shaped(tracking: Tracking, model: LoggedModel) -> dict[str, Any]:
    """A logged model as clients read it."""
    return logged_model_shape(model, tracking.projects.of_key(model.project))


def finalize(tracking: Tracking, body: requests.OneLoggedModel) -> Any:
    """Its files are there, or could not be sent."""
    state = _STATES.get(str(limits.required(body.status, "status")))
    if state is None:
        raise InputError(f"want a status {', '.join(MODEL_STATUS_OF.values())}, got {body.status!r}")
    model = _changed(tracking, body, state=state)
    return {"model": shaped(tracking, model)}


def delete(tracking: Tracking, body: requests.OneLoggedModel) -> None:
    """Mark it as deleted."""
    _changed(tracking, body, deleted_at=tracking.services.clock.now())


def set_tags(tracking: Tracking, body: requests.OneLoggedModel) -> None:
    """Set tags."""
    new = limits.tags(requests.pairs(body.tags), limits.TAG_CHARS)
    recorded.change_model(
        tracking.services, limits.required(body.model_id, "model_id"),
        lambda model: msgspec.structs.replace(model, tags={**model.tags, **new}),
    )  # fmt: skip


def delete_tag(tracking: Tracking, body: requests.OneLoggedModel) -> None:
    """Remove a tag."""
    key = limits.required(body.tag_key, "tag_key")

    def without(model: LoggedModel) -> LoggedModel:
        if key not in model.tags:
            raise NotFoundError(f"the logged model {model.id!r} has no tag {key[:300]!r}")
        return msgspec.structs.replace(model, tags={tag: value for tag, value in model.tags.items() if tag != key})

    recorded.change_model(tracking.services, limits.required(body.model_id, "model_id"), without)


def log_params(tracking: Tracking, body: requests.OneLoggedModel) -> None:
    """Add parameters; they never change."""
    new = _params(body.params)

    def with_params(model: LoggedModel) -> LoggedModel:
        changed = [key for key, value in new.items() if model.params.get(key, value) != value]
        if changed:
            raise InputError(f"the parameter {changed[0]!r} has another value already; parameters never change")
        return msgspec.structs.replace(model, params={**model.params, **new})

    recorded.change_model(tracking.services, limits.required(body.model_id, "model_id"), with_params)


def _changed(tracking: Tracking, body: requests.OneLoggedModel, **fields: Any) -> LoggedModel:
    id = limits.required(body.model_id, "model_id")
    return recorded.change_model(tracking.services, id, lambda model: msgspec.structs.replace(model, **fields))


def list_files(tracking: Tracking, body: requests.OneLoggedModel) -> Any:
    """What is in a folder of its files."""
    model = stored_model(tracking, body.model_id)
    path = (body.artifact_directory_path or "").rstrip("/")
    folder = limits.safe_path(path) if path else ""
    found = files.all_files(tracking.services, model.id)
    root = model_root(tracking.projects.of_key(model.project), model.id)
    return {"root_uri": root, "files": files.listing(found, folder, folder)}


# --------------------------------------------------------------------------- search


def search(tracking: Tracking, body: requests.LoggedModelSearch) -> Any:
    """The page of logged models that fit."""
    size = limits.page_size(body.max_results or None, 50, limits.RESULTS)
    question = [body.experiment_ids or [], body.filter or "", msgspec.to_builtins(body.order_by or [])]
    said = limits.decode_token(body.page_token, tuple[int, list[Any]])
    if said is not None and said[1] != question:
        raise InputError("the page token belongs to another search: experiments, filter and order must be the same")
    where = parse_filter(body.filter, LOGGED_MODELS)
    datasets = _datasets(body.datasets)
    projects = known_projects(tracking, limits.required(body.experiment_ids, "experiment_ids"))
    keys = [project.project for project in projects]
    found = tracking.services.records.find(LoggedModel, {"project": keys}, order="-created_at") if keys else []
    kept = [model for model in found if model.deleted_at is None and _fits(tracking, model, where, datasets)]
    kept.sort(key=lambda model: model.id)
    kept.sort(key=lambda model: model.created_at, reverse=True)
    for order in reversed(body.order_by or ()):
        kept = _sorted(tracking, kept, order)
    offset = said[0] if said else 0
    answer = paged("models", kept, offset, size, lambda model: shaped(tracking, model))
    if "next_page_token" in answer:
        answer["next_page_token"] = limits.encode_token([offset + size, question])
    return answer


def _datasets(given: Sequence[requests.DatasetChoice] | None) -> list[tuple[str, str | None]]:
    return [(limits.required(one.dataset_name, "dataset_name"), one.dataset_digest or None) for one in given or ()]


def _fits(
    tracking: Tracking,
    model: LoggedModel,
    where: Sequence[Comparison],
    datasets: Sequence[tuple[str, str | None]],
) -> bool:
    """Metrics fit when any point does; with datasets, any point on one of those."""
    points = [metric for metric in model.metrics if not datasets or _is_on(metric, datasets)]
    of_metrics = [one for one in where if one.field == "metric"]
    if datasets and not of_metrics and not points:
        return False
    for comparison in of_metrics:
        values = [float(point["value"]) for point in points if point["key"] == comparison.key]
        if not any(is_true(comparison, value) for value in values):
            return False
    rest = [one for one in where if one.field != "metric"]
    return all(is_true(one, _read(tracking, model, one.field, one.key)) for one in rest)


def _is_on(metric: dict[str, Any], datasets: Sequence[tuple[str, str | None]]) -> bool:
    return any(
        metric.get("dataset_name") == name and digest in (None, metric.get("dataset_digest"))
        for name, digest in datasets
    )


def _read(tracking: Tracking, model: LoggedModel, field: str, key: str) -> Any:
    if field == "tag":
        return model.tags.get(key)
    if field == "param":
        return model.params.get(key)
    if key == "status":
        return MODEL_STATUS_OF[model.state].removeprefix("LOGGED_MODEL_")
    if key == "experiment_id":
        return tracking.projects.of_key(model.project).id
    value = getattr(model, key)
    return limits.millis(value) if key in ("created_at", "updated_at") else value


def _sorted(tracking: Tracking, models: list[LoggedModel], order: requests.LoggedModelOrder) -> list[LoggedModel]:
    """By an attribute, or by the latest point of a metric, maybe on one dataset; absent values last."""
    way = "ASC" if order.ascending is not False else "DESC"
    parsed = parse_order([f"{limits.required(order.field_name, 'field_name')} {way}"], LOGGED_MODELS)

    def read(model: LoggedModel, field: str, key: str) -> Any:
        if field != "metric":
            return _read(tracking, model, field, key)
        points = [
            point
            for point in model.metrics
            if point["key"] == key
            and order.dataset_name in (None, "", point.get("dataset_name"))
            and order.dataset_digest in (None, "", point.get("dataset_digest"))
        ]
        return float(max(points, key=lambda point: (point["timestamp"], point["step"]))["value"]) if points else None

    return chosen(models, (), parsed, read)


_MODEL: dict[str, Any] = {"noun": "model", "field": "model_id", "request": requests.OneLoggedModel}
_ONE = "/logged-models/{model_id}"
CALLS = (
    Call(method="POST", path="/logged-models", operation="run.artifact", handler=create,
         request=requests.NewLoggedModel, field="experiment_id"),
    Call(method="POST", path="/logged-models/search", operation="run.list", handler=search,
         request=requests.LoggedModelSearch),
    Call(method="GET", path=_ONE, operation="run.get", handler=get, **_MODEL),
    Call(method="PATCH", path=_ONE, operation="run.artifact", handler=finalize, **_MODEL),
    Call(method="DELETE", path=_ONE, operation="run.artifact", handler=delete, **_MODEL),
    Call(method="PATCH", path=_ONE + "/tags", operation="run.log", handler=set_tags, **_MODEL),
    Call(method="DELETE", path=_ONE + "/tags/{tag_key}", operation="run.log", handler=delete_tag, **_MODEL),
    Call(method="POST", path=_ONE + "/params", operation="run.log", handler=log_params, **_MODEL),
    Call(method="GET", path=_ONE + "/artifacts/directories", operation="run.get", handler=list_files, **_MODEL),
)  # fmt: skip
