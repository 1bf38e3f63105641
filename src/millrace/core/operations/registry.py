"""Verbs on datasets and models."""

from __future__ import annotations

from typing import Any

from millrace.core.operations import Operation, Page, Request
from millrace.core.types import Alias, DatasetVersion, Model, ModelVersion, Struct


class DatasetRequest(Request, frozen=True, kw_only=True):
    """A dataset: `digits`, `digits@2`."""

    dataset: str


class DatasetSampleRequest(DatasetRequest, frozen=True, kw_only=True):
    """Rows of a dataset that were chosen by chance; the same ones for the same seed. `rows`: up to 10000."""

    rows: int = 256
    split: str = "test"
    seed: int = 0


class DatasetSample(Struct, frozen=True, kw_only=True):
    """Rows by column, features alone: what a model is asked for. An image is the list `pixels`."""

    dataset: str
    split: str
    total: int
    rows: list[dict[str, Any]]


class DatasetDiffRequest(Request, frozen=True, kw_only=True):
    """Two dataset versions."""

    left: str
    right: str


class DatasetDiff(Struct, frozen=True, kw_only=True):
    """Numbers that differ: [left, right] by name."""

    left: str
    right: str
    changes: dict[str, list[Any]]


class ModelRequest(Request, frozen=True, kw_only=True):
    """A model version: `digits`, `digits@champion`, `digits@3`; a bare name means its champion."""

    model: str


class ModelView(Struct, frozen=True, kw_only=True):
    """A model version as people and scripts see it; `digest` is the bundle's."""

    name: str
    version: int
    aliases: list[str]
    digest: str
    variant: str
    source: str
    created_at: float
    facts: dict[str, Any] = {}
    card: str | None = None


class ModelDetail(Struct, frozen=True, kw_only=True):
    """A version with its aliases' history."""

    version: ModelVersion
    aliases: list[Alias]
    view: ModelView


class RegisterRequest(Request, frozen=True, kw_only=True):
    """A foreign ONNX file; `name` defaults to the file's."""

    path: str
    name: str | None = None
    alias: str | None = "champion"
    data: str | None = None
    label: str | None = None


class PromoteRequest(ModelRequest, frozen=True, kw_only=True):
    """Move an alias to this version; `expect` refuses when the alias is not at that version now."""

    alias: str = "champion"
    expect: int | None = None
    reason: str = ""


class RollbackRequest(Request, frozen=True, kw_only=True):
    """Move an alias back to the version it had before."""

    model: str
    alias: str = "champion"
    reason: str = ""


class ExportRequest(ModelRequest, frozen=True, kw_only=True):
    """Write the bundle's files into a folder."""

    to: str


class ExportResponse(Struct, frozen=True, kw_only=True):
    """Where the files are."""

    folder: str
    files: list[str]


class OpenModelResponse(Struct, frozen=True, kw_only=True):
    """A verified local folder of the bundle, and what to run of it."""

    name: str
    number: int
    folder: str
    digest: str
    variant: str


class CompressRequest(Request, frozen=True, kw_only=True):
    """A foreign ONNX file and labelled rows."""

    path: str
    data: str
    label: str
    to: str | None = None
    max_drop: str | None = None
    max_changed: str | None = None
    threads: int = 1


class CompressResponse(Struct, frozen=True, kw_only=True):
    """CompressFacts as plain data, and the folder of the variants."""

    facts: dict[str, Any]
    folder: str


class ModelName(Request, frozen=True, kw_only=True):
    """A whole model, with all its versions."""

    name: str


class ModelUpdate(ModelName, frozen=True, kw_only=True):
    """A new name, a description, tags to set, tags to remove."""

    new_name: str | None = None
    description: str | None = None
    tags: dict[str, str] = {}
    removed_tags: list[str] = []


class VersionNumber(ModelName, frozen=True, kw_only=True):
    """One version of a model, by its number."""

    number: int


class VersionUpdate(VersionNumber, frozen=True, kw_only=True):
    """A description, tags to set, tags to remove."""

    description: str | None = None
    tags: dict[str, str] = {}
    removed_tags: list[str] = []


_MODEL = {"model": "digits@champion"}
_NAME = {"name": "digits"}
_VERSION = {"name": "digits", "number": 1}
LIST_DATASETS = Operation(
    name="dataset.list", summary="Dataset versions, newest first.", request=Page, response=list[DatasetVersion],
    method="GET", path="/datasets",
)  # fmt: skip
GET_DATASET = Operation(
    name="dataset.get", summary="A dataset version with its profile.", request=DatasetRequest,
    response=DatasetVersion, method="GET", path="/datasets/{dataset}", subject_kind="dataset",
    subject_field="dataset", example={"dataset": "digits"},
)  # fmt: skip
SAMPLE_DATASET = Operation(
    name="dataset.sample", summary="Rows of a dataset version, chosen by chance.", request=DatasetSampleRequest,
    response=DatasetSample, method="GET", path="/datasets/{dataset}/sample", subject_kind="dataset",
    subject_field="dataset", example={"dataset": "digits", "rows": 5},
)  # fmt: skip
DIFF_DATASETS = Operation(
    name="dataset.diff", summary="What differs between two dataset versions.", request=DatasetDiffRequest,
    response=DatasetDiff, method="GET", path="/datasets/{left}/diff/{right}", subject_kind="dataset",
    subject_field="left", example={"left": "digits@1", "right": "digits"},
)  # fmt: skip
LIST_MODELS = Operation(
    name="model.list", summary="Model versions, newest first.", request=Page, response=list[ModelView],
    method="GET", path="/models",
)  # fmt: skip
GET_MODEL = Operation(
    name="model.get", summary="A model version with aliases and lineage.", request=ModelRequest,
    response=ModelDetail, method="GET", path="/models/{model}", subject_kind="model", subject_field="model",
    example=_MODEL,
)  # fmt: skip
REGISTER_MODEL = Operation(
    name="model.register", summary="Register an ONNX file that was made elsewhere.", request=RegisterRequest,
    response=ModelView, method="POST", path="/models", is_write=True, subject_kind="model", subject_field="name",
    example={"path": "model.onnx"},
)  # fmt: skip
PROMOTE_MODEL = Operation(
    name="model.promote", summary="Move an alias to a version.", request=PromoteRequest, response=Alias,
    method="POST", path="/models/{model}/promote", is_write=True, subject_kind="model", subject_field="model",
    example={"model": "digits@1"},
)  # fmt: skip
ROLLBACK_MODEL = Operation(
    name="model.rollback", summary="Move an alias back to the version before.", request=RollbackRequest,
    response=Alias, method="POST", path="/models/{model}/rollback", is_write=True, subject_kind="model",
    subject_field="model", example={"model": "digits"},
)  # fmt: skip
EXPORT_MODEL = Operation(
    name="model.export", summary="Write a version's files into a folder.", request=ExportRequest,
    response=ExportResponse, method="POST", path="/models/{model}/export", subject_kind="model",
    subject_field="model", example={"model": "digits@champion", "to": "out"},
)  # fmt: skip
OPEN_MODEL = Operation(
    name="model.open", summary="A verified local folder of a version.", request=ModelRequest,
    response=OpenModelResponse, method="POST", path="/models/{model}/open", subject_kind="model",
    subject_field="model", example=_MODEL,
)  # fmt: skip
COMPRESS_MODEL = Operation(
    name="model.compress", summary="Make smaller variants of an ONNX file under a guarantee.",
    request=CompressRequest, response=CompressResponse, method="POST", path="/models/compress",
    example={"path": "model.onnx", "data": "rows.parquet", "label": "y"},
)  # fmt: skip
UPDATE_MODEL = Operation(
    name="model.update", summary="Rename, describe or tag a model.", request=ModelUpdate, response=Model,
    method="PATCH", path="/models/{name}", is_write=True, subject_kind="model", subject_field="name",
    example={**_NAME, "description": "handwritten digits"},
)  # fmt: skip
DELETE_MODEL = Operation(
    name="model.delete", summary="Delete a model with all its versions.", request=ModelName, response=Model,
    method="DELETE", path="/models/{name}", is_write=True, subject_kind="model", subject_field="name", example=_NAME,
)  # fmt: skip
UPDATE_VERSION = Operation(
    name="version.update", summary="Describe or tag a model version.", request=VersionUpdate, response=ModelVersion,
    method="PATCH", path="/models/{name}/versions/{number}", is_write=True, subject_kind="model",
    subject_field="name", example={**_VERSION, "description": "trained on clean rows"},
)  # fmt: skip
DELETE_VERSION = Operation(
    name="version.delete", summary="Delete a model version; its number is never used again.",
    request=VersionNumber, response=ModelVersion, method="DELETE", path="/models/{name}/versions/{number}",
    is_write=True, subject_kind="model", subject_field="name", example=_VERSION,
)  # fmt: skip
OPERATIONS = (
    LIST_DATASETS, GET_DATASET, SAMPLE_DATASET, DIFF_DATASETS, LIST_MODELS, GET_MODEL, REGISTER_MODEL, PROMOTE_MODEL,
    ROLLBACK_MODEL, EXPORT_MODEL, OPEN_MODEL, COMPRESS_MODEL, UPDATE_MODEL, DELETE_MODEL,
    UPDATE_VERSION, DELETE_VERSION,
)  # fmt: skip
