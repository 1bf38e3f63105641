"""Keeping a registry: models, versions with their numbers, aliases. Files of a version stay opaque bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote, urlsplit

import msgspec

from millrace.control.mlflow_import.keeping import Keeper
from millrace.control.moves import move_alias
from millrace.control.registered import put_listing
from millrace.core.ids import digest_json
from millrace.core.ports import Transaction
from millrace.core.types import Alias, ArtifactFile, LoggedModel, Model, ModelVersion, Project, Run, Struct, TreeEntry
from millrace.formats.mlflow.source import MODEL_ID, SourceVersion

PROMPT_TAG = "mlflow.prompt.is_prompt"
REASON = "imported from MLflow"
_OWNED = re.compile(r"(?:.*/)?(?P<owner>(?:m-)?[0-9a-f]{32})/artifacts(?:/(?P<path>.*?))?/?")
_RUN_SOURCE = re.compile(r"runs:/+(?P<owner>[0-9a-f]{32})/(?P<path>.+?)/?")
_VERSION_SOURCE = re.compile(r"models:/+(?P<name>[^/]+)/(?P<number>[0-9]{1,18})")


class _Place(Struct, frozen=True, kw_only=True):
    """Whose files a version has: those of a run or logged model, below a path."""

    owner: str
    path: str = ""


def keep_model(keeper: Keeper, model: Model, aliases: Mapping[str, int], found: Sequence[SourceVersion]) -> None:
    """A model with its versions and aliases, in one transaction; what is here already keeps what it has.

    Args:
        keeper: Writes, and counts.
        model: As it was; `last_number` is of all versions, deleted ones too.
        aliases: The numbers that they are at.
        found: Its versions, without those that are deleted.
    """
    alive = sorted(found, key=lambda one: one.version.number)
    here = {one.number: one for one in keeper.services.records.find(ModelVersion, {"name": model.name})}
    if keeper.dry_run:
        keeper.counts["models"] += 1
        keeper.counts["versions"] += sum(one.version.number not in here for one in alive)
        return
    versions = [_with_files(keeper, one) for one in alive]
    with keeper.services.records.transaction() as transaction:
        _put_model(keeper, transaction, model)
        for version in versions:
            _put_version(keeper, transaction, version)
        for alias, number in aliases.items():
            _put_alias(keeper, transaction, model.name, alias, number)


def is_copy(found: SourceVersion) -> bool:
    """Whether a version was copied from another one, which must be here first."""
    return _VERSION_SOURCE.fullmatch(unquote(found.version.source_uri)) is not None


def _put_model(keeper: Keeper, transaction: Transaction, model: Model) -> None:
    existing = transaction.get(Model, model.name)
    keeper.counts["models here already" if existing else "models"] += 1
    now = keeper.services.clock.now()
    if existing is None:
        own = msgspec.structs.replace(model, created_at=model.created_at or now, updated_at=model.updated_at or now)
    else:
        own = msgspec.structs.replace(
            existing, tags={**model.tags, **existing.tags}, last_number=max(existing.last_number, model.last_number)
        )
    if own != existing:
        transaction.put(own, expect_version=own.version)


def _put_version(keeper: Keeper, transaction: Transaction, version: ModelVersion) -> None:
    existing = transaction.get(ModelVersion, version.id)
    if existing is not None:  # under whatever name it has by now
        keeper.counts["versions here already"] += 1
        if existing.bundle.digest != version.bundle.digest and _lacks_files(keeper, existing, version):
            facts = {**existing.facts, "download_uri": version.facts["download_uri"]}
            completed = msgspec.structs.replace(existing, bundle=version.bundle, facts=facts)
            transaction.put(completed, expect_version=existing.version)
    elif transaction.find(ModelVersion, {"name": version.name, "number": version.number}):
        what = f"version {version.number} of model {version.name!r}"
        keeper.source.problems.add(what, "another version has this number here")
    else:
        transaction.put(version, expect_version=0)
        keeper.counts["versions"] += 1


def _lacks_files(keeper: Keeper, existing: ModelVersion, found: ModelVersion) -> bool:
    """Whether a version came before all of its files did."""
    tree = keeper.services.blobs.tree
    return {one.path for one in tree(existing.bundle.digest)} < {one.path for one in tree(found.bundle.digest)}


def _put_alias(keeper: Keeper, transaction: Transaction, model: str, alias: str, number: int) -> None:
    what = f"alias {alias!r} of model {model!r}"
    existing = transaction.get(Alias, f"{model}/{alias}")
    if existing is not None:
        if existing.number != number:
            keeper.source.problems.add(what, f"it is at version {existing.number} here, and stays there")
    elif not transaction.find(ModelVersion, {"name": model, "number": number}):
        keeper.source.problems.add(what, f"there is no version {number}")
    else:
        move_alias(transaction, model, alias, number, at=keeper.services.clock.now(), reason=REASON)
        keeper.counts["aliases"] += 1


def _with_files(keeper: Keeper, found: SourceVersion) -> ModelVersion:
    """The version as a record: its files are those that its run or logged model has here."""
    version = found.version
    created_ms = round(version.created_at * 1000)
    id = digest_json([version.name, version.number, created_ms, version.source_uri]).removeprefix("sha256:")[:32]
    place, entries = None, _copied_entries(keeper, version.source_uri)
    for place in _places_of(found):
        entries = _entries(keeper, place)
        if entries:
            break
    is_prompt = version.tags.get(PROMPT_TAG, "").lower() == "true"
    if not entries and not is_prompt:
        what = f"files of version {version.number} of model {version.name!r}"
        keeper.source.problems.add(what, f"none are here; its source is {version.source_uri or 'not known'}")
    download = f"mlflow-artifacts:/versions/{id}/artifacts" if entries else version.source_uri
    model_id = found.model_id or (place.owner if place and MODEL_ID.fullmatch(place.owner) else "")
    now = keeper.services.clock.now()
    return msgspec.structs.replace(
        version, id=id, bundle=put_listing(keeper.services, entries), project=_project_of(keeper, version, place),
        facts={**version.facts, "model_id": model_id or None, "download_uri": download},
        source_uri=_uri_here(keeper, version.source_uri, place) if entries else version.source_uri,
        created_at=version.created_at or now, updated_at=version.updated_at or now,
    )  # fmt: skip


def _places_of(found: SourceVersion) -> list[_Place]:
    """Where a version's files may be: with a run or a logged model; the likeliest first."""
    uri = found.version.source_uri
    places: list[_Place] = []
    for text in (found.storage, uri):
        match = _RUN_SOURCE.fullmatch(text) or _OWNED.fullmatch(unquote(urlsplit(text).path))
        if match:
            places.append(_Place(owner=match["owner"], path=match["path"] or ""))
    for model_id in (uri.removeprefix("models:/").strip("/"), found.model_id):
        if MODEL_ID.fullmatch(model_id):
            places.append(_Place(owner=model_id))
    return places


def _entries(keeper: Keeper, place: _Place) -> list[TreeEntry]:
    """The files below a place; a place that is a file is that file."""
    prefix = f"{place.path}/" if place.path else ""
    found = []
    for file in keeper.services.records.find(ArtifactFile, {"owner": place.owner}):
        if file.path.startswith(prefix) or file.path == place.path:
            path = file.path.removeprefix(prefix) if file.path != place.path else file.path.rpartition("/")[2]
            found.append(TreeEntry(path=path, digest=file.artifact.digest, size_bytes=file.artifact.size_bytes))
    return found


def _copied_entries(keeper: Keeper, uri: str) -> list[TreeEntry]:
    """The files of the version that a version was copied from."""
    match = _VERSION_SOURCE.fullmatch(unquote(uri))
    if not match:
        return []
    where = {"name": match["name"], "number": int(match["number"])}
    found = keeper.services.records.find(ModelVersion, where, limit=1)
    return keeper.services.blobs.tree(found[0].bundle.digest) if found else []


def _project_of(keeper: Keeper, version: ModelVersion, place: _Place | None) -> str:
    """The project of the run or logged model that a version is from."""
    records = keeper.services.records
    run = records.get(Run, version.run_id) if version.run_id else None
    if run is not None:
        return run.project
    model = records.get(LoggedModel, place.owner) if place else None
    return model.project if model else version.project


def _uri_here(keeper: Keeper, uri: str, place: _Place | None) -> str:
    """A source as clients of this server can use it: a disk's path or another server's becomes a place here."""
    if place is None or urlsplit(uri).scheme in ("models", "runs"):
        return uri
    records = keeper.services.records
    owner = records.get(Run, place.owner) or records.get(LoggedModel, place.owner)
    projects = records.find(Project, {"project": owner.project}, limit=1) if owner else []
    if not projects:
        return uri
    folder = f"models/{place.owner}" if MODEL_ID.fullmatch(place.owner) else place.owner
    return f"mlflow-artifacts:/{projects[0].id}/{folder}/artifacts/{place.path}".rstrip("/")
