"""The registry's notes: names, descriptions, tags, stages, aliases; versions that were made elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import msgspec

from millrace.control.approvals import check_removal, promote
from millrace.control.dispatch import handles
from millrace.control.numbering import model_of, next_number, project_of_model
from millrace.control.services import Services
from millrace.core.errors import ConflictError, NotFoundError
from millrace.core.ids import canonical_json, new_id
from millrace.core.operations import registry as ops
from millrace.core.ports import Transaction
from millrace.core.refs import Ref
from millrace.core.types import TREE_MEDIA_TYPE, Alias, Artifact, Model, ModelVersion, TreeEntry

NEWEST = 200  # versions looked at for models that have no record yet


def ensure_model(transaction: Transaction, name: str, now_s: float) -> Model:
    """The record of a model; made from its versions when there is none.

    Raises:
        NotFoundError: It has no versions either.
    """
    model = transaction.get(Model, name)
    if model is not None:
        return model
    versions = transaction.find(ModelVersion, {"name": name})
    if not versions:
        raise no_model(name)
    return transaction.put(model_of(name, versions, now_s), expect_version=0)


def create_model(services: Services, name: str, description: str, tags: Mapping[str, str]) -> Model:
    """A model without versions.

    Raises:
        ConflictError: The name is taken; `details["taken"]` is the name.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        _refuse_taken(transaction, name)
        model = Model(
            id=name, project=services.own_project, created_at=now, updated_at=now, name=name, description=description,
            tags=dict(tags),
        )  # fmt: skip
        return transaction.put(model, expect_version=0)


def change_model(
    services: Services,
    name: str,
    *,
    description: str | None = None,
    tags: Mapping[str, str] | None = None,
    removed_tags: Sequence[str] = (),
) -> Model:
    """Describe a model, set and remove tags of it.

    Raises:
        NotFoundError: There is no such model.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        model = ensure_model(transaction, name, now)
        kept = {tag: value for tag, value in model.tags.items() if tag not in removed_tags}
        changed = msgspec.structs.replace(
            model, description=model.description if description is None else description, tags={**kept, **(tags or {})},
            updated_at=now,
        )  # fmt: skip
        return transaction.put(changed, expect_version=model.version)


def rename_model(services: Services, name: str, new_name: str) -> Model:
    """Give a model, its versions and its aliases another name.

    Raises:
        NotFoundError: There is no such model.
        ConflictError: The new name is taken.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        model = ensure_model(transaction, name, now)
        _refuse_taken(transaction, new_name)
        for version in transaction.find(ModelVersion, {"name": name}):
            renamed = msgspec.structs.replace(version, name=new_name, updated_at=now)
            transaction.put(renamed, expect_version=version.version)
        for alias in transaction.find(Alias, {"model": name}):
            transaction.delete(Alias, alias.id)
            moved = msgspec.structs.replace(alias, id=f"{new_name}/{alias.name}", model=new_name, version=0)
            transaction.put(moved, expect_version=0)
        transaction.delete(Model, model.id)
        changed = msgspec.structs.replace(model, id=new_name, name=new_name, updated_at=now, version=0)
        return transaction.put(changed, expect_version=0)


def delete_model(services: Services, name: str) -> Model:
    """Remove a model with its versions and aliases.

    Raises:
        NotFoundError: There is no such model.
    """
    with services.records.transaction() as transaction:
        model = ensure_model(transaction, name, services.clock.now())
        for version in transaction.find(ModelVersion, {"name": name}):
            transaction.delete(ModelVersion, version.id)
        for alias in transaction.find(Alias, {"model": name}):
            transaction.delete(Alias, alias.id)
        transaction.delete(Model, model.id)
        return model


# --------------------------------------------------------------------------- versions


def put_listing(services: Services, entries: Sequence[TreeEntry]) -> Artifact:
    """Store the listing of files that are blobs already: a tree.

    Args:
        services: The home.
        entries: One per path; sorted here.
    """
    ordered = sorted(entries, key=lambda entry: entry.path)
    return services.blobs.put(canonical_json(ordered), TREE_MEDIA_TYPE)


def create_version(services: Services, version: ModelVersion) -> ModelVersion:
    """Register a version that was made elsewhere; id, number and times are given here.

    Raises:
        NotFoundError: There is no such model: it is created first.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        if transaction.get(Model, version.name) is None:
            ensure_model(transaction, version.name, now)
        number = next_number(transaction, version.name, now)
        project = project_of_model(transaction, version.name)
        own = msgspec.structs.replace(
            version, id=new_id(), project=project, number=number, created_at=now, updated_at=now
        )
        return transaction.put(own, expect_version=0)


def get_version(transaction: Transaction, name: str, number: int) -> ModelVersion:
    """One version inside a transaction.

    Raises:
        NotFoundError: There is none.
    """
    found = transaction.find(ModelVersion, {"name": name, "number": number})
    if not found:
        raise no_version(name, number)
    return found[0]


def change_version(
    services: Services,
    name: str,
    number: int,
    *,
    description: str | None = None,
    tags: Mapping[str, str] | None = None,
    removed_tags: Sequence[str] = (),
) -> ModelVersion:
    """Describe a version, set and remove tags of it.

    Raises:
        NotFoundError: There is no such version.
    """
    with services.records.transaction() as transaction:
        version = get_version(transaction, name, number)
        kept = {tag: value for tag, value in version.tags.items() if tag not in removed_tags}
        changed = msgspec.structs.replace(
            version, description=version.description if description is None else description,
            tags={**kept, **(tags or {})}, updated_at=services.clock.now(),
        )  # fmt: skip
        return transaction.put(changed, expect_version=version.version)


def move_to_stage(
    services: Services, name: str, number: int, stage: str, archived_stage: str | None = None
) -> ModelVersion:
    """Move a version to a stage.

    Args:
        services: The home.
        name: The model.
        number: The version's number.
        stage: Where it goes.
        archived_stage: Where other versions of that stage go; None leaves them.

    Raises:
        NotFoundError: There is no such version.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        version = get_version(transaction, name, number)
        _touch(transaction, name, now)
        if archived_stage is not None:
            for other in transaction.find(ModelVersion, {"name": name}):
                if other.stage == stage and other.number != number:
                    archived = msgspec.structs.replace(other, stage=archived_stage, updated_at=now)
                    transaction.put(archived, expect_version=other.version)
        moved = msgspec.structs.replace(version, stage=stage, updated_at=now)
        return transaction.put(moved, expect_version=version.version)


def delete_version(services: Services, name: str, number: int) -> ModelVersion:
    """Remove a version and the aliases at it; its number is never used again.

    Raises:
        NotFoundError: There is no such version.
    """
    now = services.clock.now()
    with services.records.transaction() as transaction:
        version = get_version(transaction, name, number)
        _touch(transaction, name, now)
        for alias in transaction.find(Alias, {"model": name, "number": number}):
            transaction.delete(Alias, alias.id)
        transaction.delete(ModelVersion, version.id)
        return version


def set_alias(services: Services, name: str, alias: str, number: int, reason: str) -> Alias:
    """Point an alias at a version.

    Raises:
        NotFoundError: There is no such version.
    """
    with services.records.transaction() as transaction:
        version = get_version(transaction, name, number)
    return promote(services, version, alias, reason=reason)


def drop_alias(services: Services, name: str, alias: str) -> bool:
    """Remove an alias; False when there was none.

    Raises:
        NotFoundError: There is no such model.
    """
    with services.records.transaction() as transaction:
        model = ensure_model(transaction, name, services.clock.now())
        check_removal(transaction, model.project, alias)
        return transaction.delete(Alias, f"{name}/{alias}")


def no_model(name: str) -> NotFoundError:
    """The refusal of a model that does not exist."""
    return NotFoundError(f"there is no registered model {name!r}", hint="`millrace models` lists them")


def no_version(name: str, number: int) -> NotFoundError:
    """The refusal of a version that does not exist."""
    return NotFoundError(f"model {name!r} has no version {number}", hint="`millrace models` lists them")


def _touch(transaction: Transaction, name: str, now_s: float) -> None:
    model = ensure_model(transaction, name, now_s)
    transaction.put(msgspec.structs.replace(model, updated_at=now_s), expect_version=model.version)


def _refuse_taken(transaction: Transaction, name: str) -> None:
    if transaction.get(Model, name) is not None or transaction.find(ModelVersion, {"name": name}):
        raise ConflictError(
            f"the model name {name!r} is taken", hint="choose another name", details={"taken": name}
        )  # fmt: skip


class ModelDirectory:
    """Makes the records of models that have versions and no record yet. Thread-safe.

    Args:
        services: The home.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._known: set[str] = set()
        self._scanned = False
        self._lock = threading.Lock()

    def sight(self) -> None:
        """Look at every version the first time, at the newest afterwards."""
        records = self._services.records
        with self._lock:
            limit = NEWEST if self._scanned else None
            found = {version.name for version in records.find(ModelVersion, order="-created_at", limit=limit)}
            for name in found - self._known:
                if records.get(Model, name) is None:
                    with records.transaction() as transaction:
                        ensure_model(transaction, name, self._services.clock.now())
                self._known.add(name)
            self._scanned = True


# --------------------------------------------------------------------------- verbs


@handles(ops.UPDATE_MODEL)
def update_model(services: Services, body: ops.ModelUpdate) -> Model:
    """Rename, describe, tag."""
    name = body.name
    if body.new_name is not None and body.new_name != name:
        name = rename_model(services, name, Ref.parse(body.new_name, kind="model").name).name
    return change_model(
        services, name, description=body.description, tags=body.tags, removed_tags=body.removed_tags
    )  # fmt: skip


@handles(ops.DELETE_MODEL)
def remove_model(services: Services, body: ops.ModelName) -> Model:
    """Remove a model, its versions and its aliases."""
    return delete_model(services, body.name)


@handles(ops.UPDATE_VERSION)
def update_version(services: Services, body: ops.VersionUpdate) -> ModelVersion:
    """Describe and tag a version."""
    return change_version(
        services, body.name, body.number, description=body.description, tags=body.tags, removed_tags=body.removed_tags
    )


@handles(ops.DELETE_VERSION)
def remove_version(services: Services, body: ops.VersionNumber) -> ModelVersion:
    """Remove a version and its aliases."""
    return delete_version(services, body.name, body.number)
