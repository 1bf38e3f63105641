"""MLflow's answers. What is UNSET is left out; numbers of 64 bits are JSON numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from millrace.api.mlflow.limits import millis
from millrace.core.search import RunValues
from millrace.core.types import Alias, LoggedModel, MetricPoint, Model, ModelVersion, Project, Run, RunLink

ARTIFACT_TAG = "millrace.artifact_location"  # of a project whose files are kept elsewhere; never shown as a tag
RUN_NAME_TAG = "mlflow.runName"
STATUS_OF = {
    "pending": "SCHEDULED",
    "running": "RUNNING",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
VERSION_STATUS_OF = {"ready": "READY", "pending": "PENDING_REGISTRATION", "failed": "FAILED_REGISTRATION"}
MODEL_STATUS_OF = {
    "pending": "LOGGED_MODEL_PENDING",
    "ready": "LOGGED_MODEL_READY",
    "upload_failed": "LOGGED_MODEL_UPLOAD_FAILED",
    "unspecified": "LOGGED_MODEL_STATUS_UNSPECIFIED",
}


class Shape(msgspec.Struct, kw_only=True, gc=False):
    """A part of an answer."""


class KeyValue(msgspec.Struct, gc=False):
    """A tag or a parameter."""

    key: str
    value: str


class MetricShape(Shape, kw_only=True, gc=False):
    """A point."""

    key: str
    value: float | str
    timestamp: int
    step: int
    run_id: str | UnsetType = UNSET
    model_id: str | UnsetType = UNSET
    dataset_name: str | UnsetType = UNSET
    dataset_digest: str | UnsetType = UNSET


class ExperimentShape(Shape, kw_only=True):
    """An experiment."""

    experiment_id: str
    name: str
    artifact_location: str
    lifecycle_stage: str
    creation_time: int
    last_update_time: int
    tags: list[KeyValue]


class RunInfo(Shape, kw_only=True):
    """What a run is, without its values."""

    run_id: str
    run_uuid: str
    run_name: str
    experiment_id: str
    user_id: str
    status: str
    start_time: int
    artifact_uri: str
    lifecycle_stage: str
    end_time: int | UnsetType = UNSET


class RunData(Shape, kw_only=True):
    """A run's values."""

    metrics: list[MetricShape]
    params: list[KeyValue]
    tags: list[KeyValue]


class RunShape(Shape, kw_only=True):
    """A run."""

    info: RunInfo
    data: RunData
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]


class VersionShape(Shape, kw_only=True):
    """A version of a registered model."""

    name: str
    version: str
    creation_timestamp: int
    last_updated_timestamp: int
    current_stage: str
    description: str
    source: str
    status: str
    run_link: str
    tags: list[KeyValue]
    aliases: list[str]
    run_id: str | UnsetType = UNSET
    user_id: str | UnsetType = UNSET
    status_message: str | UnsetType = UNSET
    model_id: str | UnsetType = UNSET


class ModelShape(Shape, kw_only=True):
    """A registered model."""

    name: str
    creation_timestamp: int
    last_updated_timestamp: int
    tags: list[KeyValue]
    aliases: list[dict[str, str]]
    latest_versions: list[VersionShape]
    description: str | UnsetType = UNSET


def answer_pairs(values: Mapping[str, str]) -> list[KeyValue]:
    """Tags or parameters."""
    return [KeyValue(key, value) for key, value in values.items()]


def number(value: float) -> float | str:
    """A double: what JSON has no number for is a text.

    Example:
        >>> number(float("nan")), number(float("-inf")), number(0.5)
        ('NaN', '-Infinity', 0.5)
    """
    if math.isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def metric_shape(point: MetricPoint, *, with_run: bool = False) -> MetricShape:
    """A point."""
    shape = MetricShape(key=point.name, value=number(point.value), timestamp=millis(point.at), step=point.step)
    if with_run:
        shape.run_id = point.run_id
    return shape


def lifecycle(deleted_at: float | None) -> str:
    """`active` or `deleted`."""
    return "active" if deleted_at is None else "deleted"


def artifact_root(project: Project) -> str:
    """Where the files of a project's runs and models are."""
    return project.tags.get(ARTIFACT_TAG) or f"mlflow-artifacts:/{project.id}"


def below(root: str, *parts: str) -> str:
    """A URI below another; the query stays at the end.

    Example:
        >>> below("s3://bucket/a?x=1", "b")
        's3://bucket/a/b?x=1'
    """
    place, mark, query = root.partition("?")
    return "/".join([place.rstrip("/"), *parts]) + mark + query


def run_root(project: Project, run_id: str) -> str:
    """Where a run's files are."""
    return below(artifact_root(project), run_id, "artifacts")


def model_root(project: Project, model_id: str) -> str:
    """Where a logged model's files are."""
    return below(artifact_root(project), "models", model_id, "artifacts")


def experiment_shape(project: Project) -> ExperimentShape:
    """A project as an experiment."""
    return ExperimentShape(
        experiment_id=project.id, name=project.name, artifact_location=artifact_root(project),
        lifecycle_stage=lifecycle(project.deleted_at), creation_time=millis(project.created_at),
        last_update_time=millis(project.updated_at or project.created_at),
        tags=answer_pairs({key: value for key, value in project.tags.items() if key != ARTIFACT_TAG}),
    )  # fmt: skip


def run_info(run: Run, project: Project) -> RunInfo:
    """A run without its values."""
    info = RunInfo(
        run_id=run.id, run_uuid=run.id, run_name=run.name, experiment_id=project.id, user_id=run.created_by,
        status=STATUS_OF[run.state], start_time=millis(run.created_at if run.started_at is None else run.started_at),
        artifact_uri=run_root(project, run.id), lifecycle_stage=lifecycle(run.deleted_at),
    )  # fmt: skip
    if run.ended_at is not None:
        info.end_time = millis(run.ended_at)
    return info


def run_shape(run: Run, values: RunValues, project: Project, links: Sequence[RunLink]) -> RunShape:
    """A run with its values, inputs and outputs. Every run has its name as a tag too."""
    tags = {RUN_NAME_TAG: run.name, **values.tags}
    own = {} if run.tags.get("source") == "mlflow" else run.tags
    for key, value in own.items():
        tags.setdefault(f"millrace.{key}", str(value))
    params = {key: str(value) for key, value in run.facts.get("params", {}).items()}
    return RunShape(
        info=run_info(run, project),
        data=RunData(
            metrics=[metric_shape(point) for point in values.metrics.values()],
            params=answer_pairs({**params, **values.params}),
            tags=answer_pairs(tags),
        ),
        inputs=_inputs(links),
        outputs=_outputs(links),
    )


def _inputs(links: Sequence[RunLink]) -> dict[str, list[Any]]:
    read = [link for link in links if link.direction == "input"]
    found: dict[str, list[Any]] = {}
    datasets = [
        {
            "tags": answer_pairs(link.tags),
            "dataset": {"name": link.name, "digest": link.digest, **link.facts},
        }
        for link in read
        if link.target == "dataset"
    ]
    models = [{"model_id": link.name} for link in read if link.target == "model"]
    if datasets:
        found["dataset_inputs"] = datasets
    if models:
        found["model_inputs"] = models
    return found


def _outputs(links: Sequence[RunLink]) -> dict[str, list[Any]]:
    made = [{"model_id": link.name, "step": link.facts.get("step", 0)} for link in links if link.direction == "output"]
    return {"model_outputs": made} if made else {}


def version_source(version: ModelVersion) -> str:
    """Where a version's files can be had; those that Millrace made are offered under their own id."""
    return version.source_uri or f"mlflow-artifacts:/versions/{version.id}/artifacts"


def version_shape(version: ModelVersion, aliases: Sequence[Alias]) -> VersionShape:
    """A version of a registered model."""
    shape = VersionShape(
        name=version.name, version=str(version.number), creation_timestamp=millis(version.created_at),
        last_updated_timestamp=millis(version.updated_at or version.created_at), current_stage=version.stage,
        description=version.description, source=version_source(version), status=VERSION_STATUS_OF[version.state],
        run_link=str(version.facts.get("run_link", "")), tags=answer_pairs(version.tags),
        aliases=sorted(alias.name for alias in aliases if alias.number == version.number),
    )  # fmt: skip
    shape.run_id = version.run_id or ""
    if version.created_by:
        shape.user_id = version.created_by
    if version.state_text:
        shape.status_message = version.state_text
    if version.facts.get("model_id"):
        shape.model_id = version.facts["model_id"]
    return shape


def model_shape(model: Model, latest: Sequence[ModelVersion], aliases: Sequence[Alias]) -> ModelShape:
    """A registered model with the latest version of each stage."""
    shape = ModelShape(
        name=model.name, creation_timestamp=millis(model.created_at),
        last_updated_timestamp=millis(model.updated_at or model.created_at), tags=answer_pairs(model.tags),
        aliases=[{"alias": alias.name, "version": str(alias.number)} for alias in aliases],
        latest_versions=[version_shape(version, aliases) for version in latest],
    )  # fmt: skip
    if model.description:
        shape.description = model.description
    return shape


def logged_model_shape(model: LoggedModel, project: Project) -> dict[str, Any]:
    """A logged model."""
    info: dict[str, Any] = {
        "model_id": model.id,
        "experiment_id": project.id,
        "name": model.name,
        "creation_timestamp_ms": millis(model.created_at),
        "last_updated_timestamp_ms": millis(model.updated_at),
        "artifact_uri": model_root(project, model.id),
        "status": MODEL_STATUS_OF[model.state],
        "model_type": model.model_type,
        "source_run_id": model.run_id or "",
        "tags": answer_pairs(model.tags),
    }
    metrics = [{**metric, "value": number(_read_number(metric["value"]))} for metric in model.metrics]
    return {"info": info, "data": {"params": answer_pairs(model.params), "metrics": metrics}}


def _read_number(value: Any) -> float:
    return float(value)
