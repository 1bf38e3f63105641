"""MLflow's requests: lenient structs. Absent, null and empty mean the same; int64 may be texts."""

from __future__ import annotations

from typing import Any

import msgspec

Many = list[str] | None


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """A request: unknown fields are ignored."""


class Pair(Body, frozen=True, kw_only=True):
    """A tag or a parameter."""

    key: str | None = None
    value: str | None = None


class Nothing(Body, frozen=True, kw_only=True):
    """No fields."""


# --------------------------------------------------------------------------- experiments


class Experiment(Body, frozen=True, kw_only=True):
    """One experiment."""

    experiment_id: str | None = None
    experiment_name: str | None = None
    new_name: str | None = None
    key: str | None = None
    value: str | None = None


class NewExperiment(Body, frozen=True, kw_only=True):
    """A new experiment."""

    name: str | None = None
    artifact_location: str | None = None
    tags: list[Pair] | None = None


class Search(Body, frozen=True, kw_only=True):
    """A search of experiments, registered models or versions."""

    filter: str | None = None
    max_results: int | None = None
    order_by: Many = None
    page_token: str | None = None
    view_type: str | int | None = None


class DatasetSearch(Body, frozen=True, kw_only=True):
    """Which datasets some experiments have seen."""

    experiment_ids: Many = None


# --------------------------------------------------------------------------- runs


class NewRun(Body, frozen=True, kw_only=True):
    """A new run."""

    experiment_id: str | None = None
    user_id: str | None = None
    run_name: str | None = None
    start_time: int | None = None
    tags: list[Pair] | None = None


class OneRun(Body, frozen=True, kw_only=True):
    """One run, by either of its two names for the id."""

    run_id: str | None = None
    run_uuid: str | None = None


class RunUpdate(OneRun, frozen=True, kw_only=True):
    """State, end and name."""

    status: str | int | None = None
    end_time: int | None = None
    run_name: str | None = None


class RunPair(OneRun, frozen=True, kw_only=True):
    """A tag or a parameter of a run."""

    key: str | None = None
    value: str | None = None


class Metric(Body, frozen=True, kw_only=True):
    """One point."""

    key: str | None = None
    value: float | None = None
    timestamp: int | None = None
    step: int | None = None
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class RunMetric(Metric, frozen=True, kw_only=True):
    """One point of a run."""

    run_id: str | None = None
    run_uuid: str | None = None


class Batch(OneRun, frozen=True, kw_only=True):
    """Points, parameters and tags of a run."""

    metrics: list[Metric] | None = None
    params: list[Pair] | None = None
    tags: list[Pair] | None = None


class ModelNote(OneRun, frozen=True, kw_only=True):
    """What old clients say about a model that a run logged."""

    model_json: str | None = None


class Dataset(Body, frozen=True, kw_only=True):
    """A dataset as a run saw it."""

    name: str | None = None
    digest: str | None = None
    source_type: str | None = None
    source: str | None = None
    schema: str | None = None
    profile: str | None = None


class DatasetInput(Body, frozen=True, kw_only=True):
    """A dataset with what it was read for."""

    tags: list[Pair] | None = None
    dataset: Dataset | None = None


class ModelLink(Body, frozen=True, kw_only=True):
    """A logged model that a run read or wrote."""

    model_id: str | None = None
    step: int | None = None


class Inputs(OneRun, frozen=True, kw_only=True):
    """What a run read."""

    datasets: list[DatasetInput] | None = None
    models: list[ModelLink] | None = None


class Outputs(OneRun, frozen=True, kw_only=True):
    """What a run wrote."""

    models: list[ModelLink] | None = None


class RunSearch(Body, frozen=True, kw_only=True):
    """A search of runs."""

    experiment_ids: Many = None
    filter: str | None = None
    run_view_type: str | int | None = None
    max_results: int | None = None
    order_by: Many = None
    page_token: str | None = None


class History(OneRun, frozen=True, kw_only=True):
    """The points of one metric of a run."""

    metric_key: str | None = None
    max_results: int | None = None
    page_token: str | None = None


class Histories(Body, frozen=True, kw_only=True):
    """The points of one metric of several runs; `run_id` is the older name of `run_ids`."""

    run_ids: Many = None
    run_id: Many = None
    metric_key: str | None = None
    start_step: int | None = None
    end_step: int | None = None
    max_results: int | None = None


class Listing(OneRun, frozen=True, kw_only=True):
    """Files of a run."""

    path: str | None = None


# --------------------------------------------------------------------------- logged models


class NewLoggedModel(Body, frozen=True, kw_only=True):
    """A new logged model."""

    experiment_id: str | None = None
    name: str | None = None
    model_type: str | None = None
    source_run_id: str | None = None
    params: list[Pair] | None = None
    tags: list[Pair] | None = None


class OneLoggedModel(Body, frozen=True, kw_only=True):
    """One logged model, and what is said of it; which fields count depends on the route."""

    model_id: str | None = None
    tag_key: str | None = None
    status: str | int | None = None
    tags: list[Pair] | None = None
    params: list[Pair] | None = None
    allow_deleted: bool | None = None
    artifact_directory_path: str | None = None


class DatasetChoice(Body, frozen=True, kw_only=True):
    """A dataset that metrics were taken on."""

    dataset_name: str | None = None
    dataset_digest: str | None = None


class LoggedModelOrder(Body, frozen=True, kw_only=True):
    """One key of an order."""

    field_name: str | None = None
    ascending: bool | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class LoggedModelSearch(Body, frozen=True, kw_only=True):
    """A search of logged models."""

    experiment_ids: Many = None
    filter: str | None = None
    datasets: list[DatasetChoice] | None = None
    max_results: int | None = None
    order_by: list[LoggedModelOrder] | None = None
    page_token: str | None = None


# --------------------------------------------------------------------------- registry


class NewModel(Body, frozen=True, kw_only=True):
    """A new registered model."""

    name: str | None = None
    description: str | None = None
    tags: list[Pair] | None = None


class OneModel(Body, frozen=True, kw_only=True):
    """One registered model, and what is said of it; which fields count depends on the route."""

    name: str | None = None
    new_name: str | None = None
    description: str | None = None
    key: str | None = None
    value: str | None = None
    alias: str | None = None
    version: str | int | None = None
    stages: Many = None


class NewVersion(Body, frozen=True, kw_only=True):
    """A new version of a registered model."""

    name: str | None = None
    source: str | None = None
    run_id: str | None = None
    run_link: str | None = None
    description: str | None = None
    model_id: str | None = None
    tags: list[Pair] | None = None


class OneVersion(Body, frozen=True, kw_only=True):
    """One version, and what is said of it; which fields count depends on the route."""

    name: str | None = None
    version: str | int | None = None
    description: str | None = None
    stage: str | None = None
    archive_existing_versions: bool | None = None
    key: str | None = None
    value: str | None = None


# --------------------------------------------------------------------------- files


class Part(Body, frozen=True, kw_only=True):
    """A part that was uploaded."""

    part_number: int | None = None
    etag: str | None = None


class Upload(Body, frozen=True, kw_only=True):
    """An upload in parts."""

    path: str | None = None
    num_parts: int | None = None
    upload_id: str | None = None
    parts: list[Part] | None = None


class Presigned(OneRun, frozen=True, kw_only=True):
    """A wish for a URL of the store behind the server."""

    model_id: str | None = None
    path: str | None = None


def pairs(given: list[Pair] | None) -> dict[str, Any]:
    """Tags or parameters as a mapping; the last of a key counts, an absent value is empty."""
    return {pair.key or "": pair.value or "" for pair in given or ()}
