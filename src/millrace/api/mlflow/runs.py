"""Runs: begin, end, delete, restore, find."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.api.mlflow import limits, requests
from millrace.api.mlflow.calls import Call, Tracking
from millrace.api.mlflow.experiments import known_projects, lifecycle_of
from millrace.api.mlflow.filters import parse_filter, parse_order
from millrace.api.mlflow.languages import RUNS, is_true
from millrace.api.mlflow.shapes import RUN_NAME_TAG, STATUS_OF, RunShape, run_info, run_shape
from millrace.control import recorded
from millrace.core.errors import InputError, NotFoundError
from millrace.core.search import Comparison, FoundRun, Ordering, RunQuery, RunValues
from millrace.core.states import RunState
from millrace.core.types import Run, RunLink

LINKS_AT_ONCE = 400
USER_CHARS = 256
RUN_NAME_CHARS = 1000
HISTORY_TAG = "mlflow.log-model.history"
_ADJECTIVES = (
    "brave",
    "calm",
    "clever",
    "eager",
    "gentle",
    "keen",
    "kind",
    "lively",
    "merry",
    "nimble",
    "quick",
    "wise",
)
_NOUNS = ("badger", "crane", "falcon", "finch", "heron", "lynx", "newt", "otter", "owl", "robin", "seal", "wren")
_STATES: dict[str, RunState] = {
    **{status: state for state, status in STATUS_OF.items()},  # type: ignore[dict-item]
    "1": "running",
    "2": "pending",
    "3": "succeeded",
    "4": "failed",
    "5": "cancelled",
}


def create(tracking: Tracking, body: requests.NewRun) -> Any:
    """A run that begins."""
    tags = _tags(body.tags)
    named = tags.pop(RUN_NAME_TAG, "")
    if body.run_name and named and body.run_name != named:
        raise InputError(f"the run's name is given twice: {body.run_name[:100]!r} and, as a tag, {named[:100]!r}")
    now = tracking.services.clock.now()
    name = limits.within(body.run_name or named or _random_name(), RUN_NAME_CHARS, "a run's name")
    run, project = recorded.begin_run(
        tracking.services,
        limits.experiment_id(body.experiment_id or "0"),
        name=name,
        started_at=limits.seconds(body.start_time, "start_time") if body.start_time else now,
        created_by=limits.within(body.user_id or "", USER_CHARS, "user_id"),
        tags={**tags, RUN_NAME_TAG: name},
    )
    return {"run": run_shape(run, RunValues(tags=tags), project, [])}


def _random_name() -> str:
    return f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}-{random.randrange(1000)}"


def _tags(given: list[requests.Pair] | None) -> dict[str, str]:
    return {limits.key(key, "tag"): value[: limits.TAG_CHARS] for key, value in requests.pairs(given).items()}


def get(tracking: Tracking, body: requests.OneRun) -> Any:
    """One run, deleted ones too."""
    run = stored_run(tracking, limits.run_id_of(body))
    values = tracking.services.records.run_values([run.id]).get(run.id, RunValues())
    return {"run": shaped(tracking, [FoundRun(run=run, values=values)])[0]}


def stored_run(tracking: Tracking, run_id: str) -> Run:
    """A run by its whole id.

    Raises:
        NotFoundError: There is none.
    """
    run = tracking.services.records.get(Run, run_id)
    if run is None:
        raise NotFoundError(f"there is no run with the id {run_id!r}")
    return run


def shaped(tracking: Tracking, found: Sequence[FoundRun]) -> list[RunShape]:
    """Runs with their inputs and outputs."""
    links: dict[str, list[RunLink]] = {}
    ids = [one.run.id for one in found]
    for start in range(0, len(ids), LINKS_AT_ONCE):
        for link in tracking.services.records.find(RunLink, {"run_id": ids[start : start + LINKS_AT_ONCE]}):
            links.setdefault(link.run_id, []).append(link)
    of_key = tracking.projects.of_key
    return [run_shape(one.run, one.values, of_key(one.run.project), links.get(one.run.id, ())) for one in found]


def update(tracking: Tracking, body: requests.RunUpdate) -> Any:
    """State, end, name."""
    state = None if body.status in (None, "") else _STATES.get(str(body.status))
    if state is None and body.status not in (None, ""):
        raise InputError(f"want a status {', '.join(STATUS_OF.values())}, got {body.status!r}")
    name = limits.within(body.run_name, RUN_NAME_CHARS, "a run's name") if body.run_name else None
    run = recorded.change_run(
        tracking.services, limits.run_id_of(body), state=state, name=name,
        ended_at=None if body.end_time is None else limits.seconds(body.end_time, "end_time"),
        tags={RUN_NAME_TAG: name} if name else None,
    )  # fmt: skip
    return {"run_info": run_info(run, tracking.projects.of_key(run.project))}


def delete(tracking: Tracking, body: requests.OneRun) -> None:
    """Mark it as deleted."""
    recorded.mark_run(tracking.services, limits.run_id_of(body), deleted=True)


def restore(tracking: Tracking, body: requests.OneRun) -> None:
    """Bring it back."""
    recorded.mark_run(tracking.services, limits.run_id_of(body), deleted=False)


# --------------------------------------------------------------------------- search


def search(tracking: Tracking, body: requests.RunSearch) -> Any:
    """The page of runs that fit."""
    size = limits.page_size(body.max_results, 1000, limits.RESULTS)
    offset = limits.decode_token(body.page_token, int) or 0
    where = tuple(_translated(one) for one in parse_filter(body.filter, RUNS))
    order = tuple(_ordered(one) for one in parse_order(body.order_by, RUNS))
    lifecycle = lifecycle_of(body.run_view_type)
    keys = tuple(project.project for project in known_projects(tracking, body.experiment_ids or ()))
    if not keys:
        return {"runs": []}
    if order and not any((one.field, one.key) == ("attribute", "started_at") for one in order):
        order = (*order, Ordering(field="attribute", key="started_at", descending=True))
    query = RunQuery(projects=keys, where=where, order=order, lifecycle=lifecycle, limit=size + 1, offset=offset)
    found = tracking.services.records.search_runs(query)
    answer: dict[str, Any] = {"runs": shaped(tracking, found[:size])}
    if len(found) > size:
        answer["next_page_token"] = limits.encode_token(offset + size)
    return answer


def _translated(comparison: Comparison) -> Comparison:
    """Statuses as our states, milliseconds as seconds, a run's place as its id."""
    if comparison.field != "attribute":
        return comparison
    if comparison.key == "state":
        fitting = tuple(state for state, status in STATUS_OF.items() if is_true(comparison, status))
        return Comparison(field="attribute", key="state", operator="IN", value=fitting or ("none",))
    if comparison.key in ("started_at", "ended_at") and isinstance(comparison.value, float):
        return msgspec.structs.replace(comparison, value=comparison.value / 1000)
    if comparison.key == "artifact_uri":
        parts = str(comparison.value).rstrip("/").split("/")
        if comparison.operator not in ("=", "!=") or len(parts) < 2:
            raise InputError("artifact_uri can be compared with = and != to a run's whole artifact URI")
        return Comparison(field="attribute", key="id", operator=comparison.operator, value=parts[-2])
    return comparison


def _ordered(ordering: Ordering) -> Ordering:
    if ordering.field == "attribute" and ordering.key == "artifact_uri":
        return msgspec.structs.replace(ordering, key="id")
    return ordering


# --------------------------------------------------------------------------- inputs, outputs


def log_inputs(tracking: Tracking, body: requests.Inputs) -> None:
    """Datasets and logged models that a run read."""
    links = [_dataset_link(one) for one in body.datasets or ()]
    links += [_model_link(one, "input") for one in body.models or ()]
    recorded.record_links(tracking.services, limits.run_id_of(body), links)


def log_outputs(tracking: Tracking, body: requests.Outputs) -> None:
    """Logged models that a run wrote."""
    models = limits.required(body.models, "models")
    recorded.record_links(tracking.services, limits.run_id_of(body), [_model_link(one, "output") for one in models])


def _model_link(model: requests.ModelLink, direction: Any) -> RunLink:
    id = limits.required(model.model_id, "model_id")
    facts = {"step": limits.int64(model.step or 0, "step")} if direction == "output" else {}
    return RunLink(id="", run_id="", direction=direction, target="model", name=id, facts=facts)


def _dataset_link(given: requests.DatasetInput) -> RunLink:
    dataset = limits.required(given.dataset, "dataset")
    lengths = {"name": 500, "digest": 36, "source": 65_535, "schema": 1_048_575, "profile": 16_777_215}
    for field, most in lengths.items():
        limits.within(getattr(dataset, field) or "", most, f"a dataset's {field}")
    tags = requests.pairs(given.tags)
    for key, value in tags.items():
        limits.within(limits.required(key, "key of a tag"), 255, "a tag's name")
        limits.within(value, 500, f"the tag {key!r}")
    optional = {"schema": dataset.schema, "profile": dataset.profile}
    return RunLink(
        id="", run_id="", direction="input", target="dataset", name=limits.required(dataset.name, "name"),
        digest=dataset.digest or "", tags=tags,
        facts={
            "source_type": dataset.source_type or "",
            "source": dataset.source or "",
            **{name: value for name, value in optional.items() if value},
        },
    )  # fmt: skip


def log_model(tracking: Tracking, body: requests.ModelNote) -> None:
    """What clients before MLflow 3 say of a model: kept as a tag, as MLflow does."""
    run_id = limits.run_id_of(body)
    try:
        note = json.loads(limits.required(body.model_json, "model_json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"model_json is not JSON: {error}") from None
    wanted = {"artifact_path", "flavors", "utc_time_created", "run_id"}
    if not isinstance(note, dict) or wanted - set(note):
        raise InputError(f"model_json must have {', '.join(sorted(wanted))}")
    stored_run(tracking, run_id)
    before = tracking.services.records.run_values([run_id]).get(run_id, RunValues()).tags.get(HISTORY_TAG, "[]")
    value = json.dumps([*json.loads(before), note])
    news = recorded.NewValues(tags={HISTORY_TAG: value[: limits.TAG_CHARS]})
    recorded.record_values(tracking.services, run_id, news)


_RUN: dict[str, Any] = {"noun": "run", "field": "run_id"}
CALLS = (
    Call(
        method="POST", path="/runs/create", operation="run.track", handler=create, request=requests.NewRun,
        field="experiment_id",
    ),
    Call(method="GET", path="/runs/get", operation="run.get", handler=get, request=requests.OneRun, **_RUN),
    Call(method="POST", path="/runs/update", operation="run.end", handler=update, request=requests.RunUpdate, **_RUN),
    Call(method="POST", path="/runs/delete", operation="run.delete", handler=delete, request=requests.OneRun, **_RUN),
    Call(method="POST", path="/runs/restore", operation="run.restore", handler=restore, request=requests.OneRun,
         **_RUN),
    Call(method="POST", path="/runs/search", operation="run.list", handler=search, request=requests.RunSearch),
    Call(method="POST", path="/runs/log-inputs", operation="run.log", handler=log_inputs, request=requests.Inputs,
         **_RUN),
    Call(method="POST", path="/runs/outputs", operation="run.log", handler=log_outputs, request=requests.Outputs,
         **_RUN),
    Call(method="POST", path="/runs/log-model", operation="run.log", handler=log_model, request=requests.ModelNote,
         **_RUN),
)  # fmt: skip
