"""Registered models, their versions, aliases and deprecated stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.api.mlflow import limits, requests, sources
from millrace.api.mlflow.calls import Call, Tracking
from millrace.api.mlflow.experiments import paged
from millrace.api.mlflow.filters import parse_filter, parse_order
from millrace.api.mlflow.languages import MODELS, VERSIONS, chosen
from millrace.api.mlflow.shapes import ModelShape, VersionShape, model_shape, version_shape, version_source
from millrace.control import recorded, registered
from millrace.core.errors import InputError, NotFoundError
from millrace.core.search import Comparison
from millrace.core.types import Alias, LoggedModel, Model, ModelVersion

MODEL_RESULTS = 1000
VERSION_RESULTS = 200_000
ALIASES_AT_ONCE = 400
PROMPT_TAG = "mlflow.prompt.is_prompt"
PROMPT_SOURCES = ("prompt-template", "dummy-source")
VERSIONS_TAG = "mlflow.modelVersions"
STAGES = {stage.lower(): stage for stage in ("None", "Staging", "Production", "Archived")}


def create(tracking: Tracking, body: requests.NewModel) -> Any:
    """A registered model without versions."""
    tags = limits.tags(requests.pairs(body.tags), limits.MODEL_TAG_CHARS)
    model = registered.create_model(tracking.services, limits.model_name(body.name), body.description or "", tags)
    return {"registered_model": model_shape(model, [], [])}


def get(tracking: Tracking, body: requests.OneModel) -> Any:
    """One registered model."""
    return {"registered_model": shaped(tracking, [_stored(tracking, body.name)])[0]}


def _stored(tracking: Tracking, given: str | None) -> Model:
    name = limits.model_name(given)
    model = tracking.services.records.get(Model, name)
    if model is None:
        tracking.models.sight()
        model = tracking.services.records.get(Model, name)
    if model is None:
        raise registered.no_model(name)
    return model


def shaped(tracking: Tracking, models: Sequence[Model]) -> list[ModelShape]:
    """Models with their aliases and the latest version of each stage."""
    names = [model.name for model in models]
    aliases: dict[str, list[Alias]] = {name: [] for name in names}
    versions: dict[str, dict[str, ModelVersion]] = {name: {} for name in names}
    for start in range(0, len(names), ALIASES_AT_ONCE):
        some = names[start : start + ALIASES_AT_ONCE]
        for alias in tracking.services.records.find(Alias, {"model": some}):
            aliases[alias.model].append(alias)
        for version in tracking.services.records.find(ModelVersion, {"name": some}, order="number"):
            versions[version.name][version.stage] = version
    newest = {name: [found[stage] for stage in sorted(found)] for name, found in versions.items()}
    return [model_shape(one, newest[one.name], aliases[one.name]) for one in models]


def update(tracking: Tracking, body: requests.OneModel) -> Any:
    """A new description; without one it becomes empty."""
    name = limits.model_name(body.name)
    model = registered.change_model(tracking.services, name, description=body.description or "")
    return {"registered_model": shaped(tracking, [model])[0]}


def rename(tracking: Tracking, body: requests.OneModel) -> Any:
    """A new name for the model and all that belongs to it."""
    new_name = limits.model_name(limits.required(body.new_name, "new_name"))
    model = registered.rename_model(tracking.services, limits.model_name(body.name), new_name)
    return {"registered_model": shaped(tracking, [model])[0]}


def delete(tracking: Tracking, body: requests.OneModel) -> None:
    """Remove the model, its versions and aliases."""
    registered.delete_model(tracking.services, limits.model_name(body.name))


def set_tag(tracking: Tracking, body: requests.OneModel) -> None:
    """Set a tag."""
    tags = limits.tags({limits.required(body.key, "key"): body.value or ""}, limits.MODEL_TAG_CHARS)
    registered.change_model(tracking.services, limits.model_name(body.name), tags=tags)


def delete_tag(tracking: Tracking, body: requests.OneModel) -> None:
    """Remove a tag; one that is not there is gone already."""
    key = limits.key(body.key, "tag")
    registered.change_model(tracking.services, limits.model_name(body.name), removed_tags=[key])


def search(tracking: Tracking, body: requests.Search) -> Any:
    """The page of registered models that fit."""
    size = limits.page_size(body.max_results, 100, MODEL_RESULTS)
    offset = limits.decode_token(body.page_token, int) or 0
    where = parse_filter(body.filter, MODELS)
    order = parse_order(body.order_by, MODELS)
    tracking.models.sight()
    prompts = _wants_prompts(where)
    found = [
        model
        for model in tracking.services.records.find(Model, order="name")
        if prompts or model.tags.get(PROMPT_TAG, "").lower() != "true"
    ]
    kept = chosen(found, _without_prompt(where), order, _read_model)
    page = paged("registered_models", kept, offset, size, lambda model: model)
    return {**page, "registered_models": shaped(tracking, page["registered_models"])}


def _wants_prompts(where: Sequence[Comparison]) -> bool:
    for one in where:
        if one.field == "tag" and one.key == PROMPT_TAG:
            value = str(one.value).lower()
            return (one.operator, value) in (("=", "true"), ("!=", "false"))
    return False


def _without_prompt(where: Sequence[Comparison]) -> list[Comparison]:
    """Models do not have the tag of prompts: asking for what is no prompt must not ask for the tag."""
    if _wants_prompts(where):
        return list(where)
    return [one for one in where if not (one.field == "tag" and one.key == PROMPT_TAG)]


def _read_model(model: Model, field: str, key: str) -> Any:
    if field == "tag":
        return model.tags.get(key)
    value = getattr(model, key)
    return limits.millis(value) if key in ("created_at", "updated_at") else value


def latest(tracking: Tracking, body: requests.OneModel) -> Any:
    """The newest version of each stage, or of some."""
    model = _stored(tracking, body.name)
    wanted = {stage_of(stage) for stage in body.stages or STAGES.values()}
    newest = {
        version.stage: version
        for version in tracking.services.records.find(ModelVersion, {"name": model.name}, order="number")
        if version.stage in wanted
    }
    return {"model_versions": with_aliases(tracking, list(newest.values()))}


def stage_of(text: str) -> str:
    """A stage in its usual spelling.

    Raises:
        InputError: There is no such stage.
    """
    stage = STAGES.get(text.lower())
    if stage is None:
        raise InputError(f"want a stage {', '.join(STAGES.values())}, got {text[:100]!r}")
    return stage


# --------------------------------------------------------------------------- aliases


def set_alias(tracking: Tracking, body: requests.OneModel) -> None:
    """Point an alias at a version."""
    alias = limits.alias_name(body.alias, is_new=True)
    number = limits.version_number(body.version)
    registered.set_alias(tracking.services, limits.model_name(body.name), alias, number, "set through MLflow's API")


def delete_alias(tracking: Tracking, body: requests.OneModel) -> None:
    """Remove an alias; one that is not there is gone already."""
    registered.drop_alias(tracking.services, limits.model_name(body.name), limits.alias_name(body.alias))


def by_alias(tracking: Tracking, body: requests.OneModel) -> Any:
    """The version that an alias points at; `latest` is the newest."""
    name, alias = limits.model_name(body.name), limits.alias_name(body.alias)
    records = tracking.services.records
    if alias.lower() == "latest":
        found = records.find(ModelVersion, {"name": name}, order="-number", limit=1)
        if not found:
            raise NotFoundError(f"model {name!r} has no versions")
        return {"model_version": with_aliases(tracking, found)[0]}
    pointer = records.get(Alias, f"{name}/{alias}")
    if pointer is None:
        _stored(tracking, name)
        raise InputError(f"model {name!r} has no alias {alias!r}")
    return {"model_version": with_aliases(tracking, [_version(tracking, name, pointer.number)])[0]}


# --------------------------------------------------------------------------- versions


def create_version(tracking: Tracking, body: requests.NewVersion) -> Any:
    """A version: its files are kept as they are and never loaded."""
    name = limits.model_name(body.name)
    tags = limits.tags(requests.pairs(body.tags), limits.MODEL_TAG_CHARS)
    uri = limits.required(body.source, "source")
    if tags.get(PROMPT_TAG, "").lower() == "true":
        if uri not in PROMPT_SOURCES:
            raise InputError(f"a prompt's source is one of {', '.join(PROMPT_SOURCES)}, got {uri[:300]!r}")
        source = sources.Source(uri=uri, bundle=registered.put_listing(tracking.services, []), download_uri=uri)
    else:
        source = sources.resolve(tracking, uri, body.run_id or "", body.model_id or "")
    facts = {"model_id": source.model_id, "run_link": body.run_link or "", "download_uri": source.download_uri}
    version = registered.create_version(
        tracking.services,
        ModelVersion(
            id="", name=name, number=0, bundle=source.bundle, run_id=source.run_id, source="mlflow", format="opaque",
            chosen_variant="", facts=facts, description=body.description or "", tags=tags, source_uri=source.uri,
        ),
    )  # fmt: skip
    if source.model_id and body.model_id:
        recorded.change_model(tracking.services, source.model_id, lambda model: _registered_as(model, version))
    return {"model_version": with_aliases(tracking, [version])[0]}


def _registered_as(model: LoggedModel, version: ModelVersion) -> LoggedModel:
    """A logged model knows where it is registered."""
    known = json.loads(model.tags.get(VERSIONS_TAG, "[]"))
    entry = {"name": version.name, "version": version.number}
    return msgspec.structs.replace(model, tags={**model.tags, VERSIONS_TAG: json.dumps([*known, entry])})


def with_aliases(tracking: Tracking, versions: Sequence[ModelVersion]) -> list[VersionShape]:
    """Versions as clients read them."""
    names = sorted({version.name for version in versions})
    aliases: dict[str, list[Alias]] = {name: [] for name in names}
    for start in range(0, len(names), ALIASES_AT_ONCE):
        for alias in tracking.services.records.find(Alias, {"model": names[start : start + ALIASES_AT_ONCE]}):
            aliases[alias.model].append(alias)
    return [version_shape(version, aliases[version.name]) for version in versions]


def _version(tracking: Tracking, name: str, number: int) -> ModelVersion:
    found = tracking.services.records.find(ModelVersion, {"name": name, "number": number}, limit=1)
    if not found:
        raise registered.no_version(name, number)
    return found[0]


def get_version(tracking: Tracking, body: requests.OneVersion) -> Any:
    """One version."""
    version = _version(tracking, limits.model_name(body.name), limits.version_number(body.version))
    return {"model_version": with_aliases(tracking, [version])[0]}


def update_version(tracking: Tracking, body: requests.OneVersion) -> Any:
    """A new description."""
    name, number = limits.model_name(body.name), limits.version_number(body.version)
    version = registered.change_version(tracking.services, name, number, description=body.description or "")
    return {"model_version": with_aliases(tracking, [version])[0]}


def move_version(tracking: Tracking, body: requests.OneVersion) -> Any:
    """Move a version to a stage, and maybe those that are there to the archive."""
    stage = stage_of(limits.required(body.stage, "stage"))
    if body.archive_existing_versions and stage not in ("Staging", "Production"):
        raise InputError(f"only Staging and Production push others to the archive, not {stage}")
    version = registered.move_to_stage(
        tracking.services, limits.model_name(body.name), limits.version_number(body.version), stage,
        "Archived" if body.archive_existing_versions else None,
    )  # fmt: skip
    return {"model_version": with_aliases(tracking, [version])[0]}


def delete_version(tracking: Tracking, body: requests.OneVersion) -> None:
    """Remove a version and the aliases at it."""
    registered.delete_version(
        tracking.services, limits.model_name(body.name), limits.version_number(body.version)
    )  # fmt: skip


def download(tracking: Tracking, body: requests.OneVersion) -> Any:
    """Where a version's files can be had."""
    version = _version(tracking, limits.model_name(body.name), limits.version_number(body.version))
    return {"artifact_uri": sources.download_uri(version)}


def set_version_tag(tracking: Tracking, body: requests.OneVersion) -> None:
    """Set a tag."""
    tags = limits.tags({limits.required(body.key, "key"): body.value or ""}, limits.MODEL_TAG_CHARS)
    name, number = limits.model_name(body.name), limits.version_number(body.version)
    registered.change_version(tracking.services, name, number, tags=tags)


def delete_version_tag(tracking: Tracking, body: requests.OneVersion) -> None:
    """Remove a tag; one that is not there is gone already."""
    key = limits.key(body.key, "tag")
    name, number = limits.model_name(body.name), limits.version_number(body.version)
    registered.change_version(tracking.services, name, number, removed_tags=[key])


def search_versions(tracking: Tracking, body: requests.Search) -> Any:
    """The page of versions that fit; the last changed first, unless another order is given."""
    size = limits.page_size(body.max_results, VERSION_RESULTS, VERSION_RESULTS)
    offset = limits.decode_token(body.page_token, int) or 0
    where = parse_filter(body.filter, VERSIONS)
    for one in where:
        if one.key == "number" and one.field == "attribute" and not float(str(one.value)).is_integer():
            raise InputError(f"version_number is compared with a whole number, got {one.value}")
    order = parse_order(body.order_by or ["last_updated_timestamp DESC"], VERSIONS)
    prompts = _wants_prompts(where)
    found = [
        version
        for version in tracking.services.records.find(ModelVersion, _narrowed(where))
        if prompts or version.tags.get(PROMPT_TAG, "").lower() != "true"
    ]
    found.sort(key=lambda version: (version.name, -version.number))
    kept = chosen(found, _without_prompt(where), order, _read_version)
    page = paged("model_versions", kept, offset, size, lambda version: version)
    return {**page, "model_versions": with_aliases(tracking, page["model_versions"])}


def _narrowed(where: Sequence[Comparison]) -> dict[str, Any]:
    """What an index can answer of a filter."""
    exact = {one.key: one.value for one in where if one.field == "attribute" and one.operator == "="}
    return {key: exact[key] for key in ("name", "run_id") if key in exact}


def _read_version(version: ModelVersion, field: str, key: str) -> Any:
    if field == "tag":
        return version.tags.get(key)
    if key == "source":
        return version_source(version)
    value = getattr(version, key)
    return limits.millis(value or version.created_at) if key in ("created_at", "updated_at") else value


_MODEL: dict[str, Any] = {"noun": "model", "field": "name", "request": requests.OneModel}
_VERSION: dict[str, Any] = {"noun": "model", "field": "name", "request": requests.OneVersion}
_NAMES, _NUMBERS = "/registered-models", "/model-versions"
CALLS = (
    Call(method="POST", path=f"{_NAMES}/create", operation="model.register", handler=create, noun="model", field="name",
         request=requests.NewModel),
    Call(method="GET", path=f"{_NAMES}/get", operation="model.get", handler=get, **_MODEL),
    Call(method="PATCH", path=f"{_NAMES}/update", operation="model.update", handler=update, **_MODEL),
    Call(method="POST", path=f"{_NAMES}/rename", operation="model.update", handler=rename, **_MODEL),
    Call(method="DELETE", path=f"{_NAMES}/delete", operation="model.delete", handler=delete, **_MODEL),
    Call(method="GET", path=f"{_NAMES}/search", operation="model.list", handler=search, request=requests.Search),
    Call(method="POST", path=f"{_NAMES}/get-latest-versions", operation="model.get", handler=latest, **_MODEL),
    Call(method="GET", path=f"{_NAMES}/get-latest-versions", operation="model.get", handler=latest, **_MODEL),
    Call(method="POST", path=f"{_NAMES}/set-tag", operation="model.update", handler=set_tag, **_MODEL),
    Call(method="DELETE", path=f"{_NAMES}/delete-tag", operation="model.update", handler=delete_tag, **_MODEL),
    Call(method="POST", path=f"{_NAMES}/alias", operation="model.promote", handler=set_alias, **_MODEL),
    Call(method="DELETE", path=f"{_NAMES}/alias", operation="model.promote", handler=delete_alias, **_MODEL),
    Call(method="GET", path=f"{_NAMES}/alias", operation="model.get", handler=by_alias, **_MODEL),
    Call(method="POST", path=f"{_NUMBERS}/create", operation="model.register", handler=create_version, noun="model",
         field="name", request=requests.NewVersion),
    Call(method="GET", path=f"{_NUMBERS}/get", operation="model.get", handler=get_version, **_VERSION),
    Call(method="PATCH", path=f"{_NUMBERS}/update", operation="version.update", handler=update_version, **_VERSION),
    Call(method="POST", path=f"{_NUMBERS}/transition-stage", operation="version.update", handler=move_version,
         **_VERSION),
    Call(method="DELETE", path=f"{_NUMBERS}/delete", operation="version.delete", handler=delete_version, **_VERSION),
    Call(method="GET", path=f"{_NUMBERS}/get-download-uri", operation="model.get", handler=download, **_VERSION),
    Call(method="POST", path=f"{_NUMBERS}/set-tag", operation="version.update", handler=set_version_tag, **_VERSION),
    Call(method="DELETE", path=f"{_NUMBERS}/delete-tag", operation="version.update", handler=delete_version_tag,
         **_VERSION),
    Call(method="GET", path=f"{_NUMBERS}/search", operation="model.list", handler=search_versions,
         request=requests.Search),
)  # fmt: skip
