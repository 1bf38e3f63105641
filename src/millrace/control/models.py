"""Verbs on models and datasets."""

from __future__ import annotations

import difflib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from millrace.control.approvals import promote
from millrace.control.dispatch import handles
from millrace.control.moves import move_alias
from millrace.control.readable import check_path
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import ConflictError, InputError, NotFoundError
from millrace.core.operations import Page
from millrace.core.operations import registry as ops
from millrace.core.refs import Ref
from millrace.core.types import Alias, DatasetVersion, ModelVersion

CHAMPION = "champion"
MAX_SAMPLE = 10_000


def resolve_model(services: Services, text: str) -> ModelVersion:
    """The version that `digits`, `digits@champion` or `digits@3` means.

    Raises:
        NotFoundError: No such model, version or alias; says what there is.
    """
    ref = Ref.parse(text, kind="model")
    versions = services.records.find(ModelVersion, {"name": ref.name}) if services.is_used else []
    if not versions:
        raise _no_such(services, "model", ref.name, ModelVersion, "millrace models")
    number = ref.number
    if number is None:
        alias = services.records.get(Alias, f"{ref.name}/{ref.at or CHAMPION}")
        if alias is None and ref.at is not None:
            aliases = [one.name for one in services.records.find(Alias, {"model": ref.name})]
            known = ", ".join(aliases) or "none"
            raise NotFoundError(f"model {ref.name!r} has no alias {ref.at!r}", hint=f"aliases it has: {known}")
        number = alias.number if alias else max(version.number for version in versions)
    for version in versions:
        if version.number == number:
            return version
    known = ", ".join(f"v{version.number}" for version in versions[-8:])
    raise NotFoundError(f"model {ref.name!r} has no version {number}", hint=f"versions it has: {known}")


def _no_such(services: Services, noun: str, name: str, kind: Any, command: str) -> NotFoundError:
    names = sorted({one.name for one in services.records.find(kind)}) if services.is_used else []
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        hint = f"did you mean {close[0]!r}?"
    else:
        hint = f"`{command}` lists what there is" if names else "`millrace run` makes one"
    return NotFoundError(f"there is no {noun} {name!r} in {services.home}", hint=hint)


def view_of(services: Services, version: ModelVersion, aliases: list[Alias] | None = None) -> ops.ModelView:
    """A version as lists show it."""
    if aliases is None:
        aliases = services.records.find(Alias, {"model": version.name})
    names = [alias.name for alias in aliases if alias.model == version.name and alias.number == version.number]
    card = services.blobs.read(version.card.digest).decode() if version.card else None
    return ops.ModelView(
        name=version.name, version=version.number, aliases=names, digest=version.bundle.digest,
        variant=version.chosen_variant, source=version.source, created_at=version.created_at, card=card,
    )  # fmt: skip


@handles(ops.LIST_MODELS)
def list_models(services: Services, body: Page) -> list[ops.ModelView]:
    """Versions, newest first."""
    if not services.is_used:
        return []
    aliases = services.records.find(Alias)
    versions = services.records.find(ModelVersion, order="-created_at", limit=body.limit, offset=body.offset)
    views = [view_of(services, msgspec.structs.replace(version, card=None), aliases) for version in versions]
    return views


@handles(ops.GET_MODEL)
def get_model(services: Services, body: ops.ModelRequest) -> ops.ModelDetail:
    """A version with its aliases and their history."""
    version = resolve_model(services, body.model)
    aliases = services.records.find(Alias, {"model": version.name})
    return ops.ModelDetail(version=version, aliases=aliases, view=view_of(services, version, aliases))


@handles(ops.PROMOTE_MODEL)
def promote_model(services: Services, body: ops.PromoteRequest) -> Alias:
    """Move an alias by compare-and-set."""
    version = resolve_model(services, body.model)
    Ref.parse(f"{version.name}@{body.alias}", kind="model")
    return promote(services, version, body.alias, reason=body.reason or "promoted by hand", expect=body.expect)


@handles(ops.ROLLBACK_MODEL)
def rollback_model(services: Services, body: ops.RollbackRequest) -> Alias:
    """Move an alias to where it was before its last move that has not been rolled back."""
    ref = Ref.parse(body.model, kind="model")
    with services.records.transaction() as transaction:
        alias = transaction.get(Alias, f"{ref.name}/{body.alias}")
        if alias is None:
            raise _no_such(services, "model", ref.name, ModelVersion, "millrace models")
        target = rollback_target(alias)
        if target is None:
            raise ConflictError(
                f"{ref.name}@{body.alias} has been at version {alias.number} only",
                hint="there is nothing to go back to",
            )
        reason = body.reason or "rolled back"
        return move_alias(
            transaction, ref.name, body.alias, target, at=services.clock.now(), reason=f"rollback: {reason}"
        )


def rollback_target(alias: Alias) -> int | None:
    """The version before the present one; a roll-back undoes a move, it is not one to undo.

    Example:
        >>> history = [{"from": None, "to": 1}, {"from": 1, "to": 2}, {"from": 2, "to": 3}]
        >>> alias = Alias(id="m/champion", model="m", name="champion", number=3, history=history)
        >>> rollback_target(alias)
        2
    """
    stack: list[int] = []
    for move in alias.history:
        if str(move.get("reason", "")).startswith("rollback:") and len(stack) > 1:
            stack.pop()
        elif stack[-1:] != [move["to"]]:  # who promotes what is promoted already has moved nothing
            stack.append(move["to"])
    return stack[-2] if len(stack) > 1 else None


def open_version(services: Services, version: ModelVersion) -> Path:
    """A verified local folder of the bundle.

    Raises:
        CorruptError: A file does not have its digest.
        UntrustedError: No trusted key signed it.
    """
    open_bundle = extras.load("millrace.formats.bundle:open_bundle")
    folder = services.home / "scratch" / "trees" / version.bundle.digest.replace(":", "-")
    services.blobs.materialize(version.bundle.digest, folder)
    signature = services.blobs.read(version.signature.digest) if version.signature else None
    open_bundle(folder, signature=signature, verifier=services.signer, expected_digest=version.bundle.digest)
    return folder


@handles(ops.OPEN_MODEL)
def open_model(services: Services, body: ops.ModelRequest) -> ops.OpenModelResponse:
    """A verified folder to run the model from."""
    check_path("a folder of the server")
    version = resolve_model(services, body.model)
    folder = open_version(services, version)
    return ops.OpenModelResponse(
        name=version.name, number=version.number, folder=str(folder), digest=version.bundle.digest,
        variant=version.chosen_variant,
    )  # fmt: skip


@handles(ops.EXPORT_MODEL)
def export_model(services: Services, body: ops.ExportRequest) -> ops.ExportResponse:
    """Copy the verified bundle with its card, signature and measurements into a folder."""
    check_path(body.to)
    version = resolve_model(services, body.model)
    source = open_version(services, version)
    target = Path(body.to).absolute()
    if target.is_file():
        raise InputError(f"{target} is a file; want a folder to write into")
    if target.is_dir() and any(target.iterdir()) and not (target / "model.onnx").is_file():
        raise ConflictError(f"{target} is not empty and not an earlier export", hint="name an empty or a new folder")
    target.mkdir(parents=True, exist_ok=True)
    (target / "variants").mkdir(exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            shutil.copyfile(path, copy)
    beside = {
        "MODEL_CARD.md": version.card,
        "signature.json": version.signature,
        "measurements.json": version.measurements,
    }
    for name, artifact in beside.items():
        if artifact is not None:
            (target / name).write_bytes(services.blobs.read(artifact.digest))
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    return ops.ExportResponse(folder=str(target), files=files)


@handles(ops.REGISTER_MODEL)
def register_model(services: Services, body: ops.RegisterRequest) -> ops.ModelView:
    """Validate a foreign ONNX file and register it as a signed version."""
    extras.require([("onnx", "data")], "registering an ONNX file")
    return extras.load("millrace.control.foreign:register_foreign")(services, body)


@handles(ops.COMPRESS_MODEL)
def compress_model(services: Services, body: ops.CompressRequest) -> ops.CompressResponse:
    """Smaller variants of a foreign ONNX file."""
    extras.require([("onnx", "data"), ("scipy", "data"), ("polars", "data")], "compressing an ONNX file")
    return extras.load("millrace.control.foreign:compress_foreign")(services, body)


# --------------------------------------------------------------------------- datasets


def resolve_dataset(services: Services, text: str) -> DatasetVersion:
    """The version that `digits` (the newest) or `digits@2` means."""
    ref = Ref.parse(text, kind="dataset")
    versions = services.records.find(DatasetVersion, {"name": ref.name}) if services.is_used else []
    if not versions:
        raise _no_such(services, "dataset", ref.name, DatasetVersion, "millrace datasets")
    if ref.at is None:
        return max(versions, key=lambda version: version.number)
    for version in versions:
        if version.number == ref.number:
            return version
    raise NotFoundError(f"dataset {ref.name!r} has no version {ref.at!r}", hint=f"it has 1 to {len(versions)}")


@handles(ops.LIST_DATASETS)
def list_datasets(services: Services, body: Page) -> list[DatasetVersion]:
    """Dataset versions, newest first."""
    if not services.is_used:
        return []
    return services.records.find(DatasetVersion, order="-created_at", limit=body.limit, offset=body.offset)


@handles(ops.GET_DATASET)
def get_dataset(services: Services, body: ops.DatasetRequest) -> DatasetVersion:
    """A dataset version."""
    return resolve_dataset(services, body.dataset)


@handles(ops.SAMPLE_DATASET)
def sample_dataset(services: Services, body: ops.DatasetSampleRequest) -> ops.DatasetSample:
    """Rows of a split, without its label."""
    if not 1 <= body.rows <= MAX_SAMPLE:
        raise InputError(f"rows: want 1 to {MAX_SAMPLE}, got {body.rows}")
    version = resolve_dataset(services, body.dataset)
    extras.require([("pyarrow", "data")], "reading a dataset")
    scratch = services.home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        services.blobs.materialize(version.artifact.digest, Path(folder) / "dataset")
        reader = extras.load("millrace.formats.dataset:open_dataset")(Path(folder) / "dataset")
        total = reader.manifest.rows.get(body.split, 0)
        chosen = random.Random(body.seed).sample(range(total), min(body.rows, total))
        rows = reader.rows(body.split, chosen)
        label = reader.manifest.label
    return ops.DatasetSample(
        dataset=f"{version.name}@{version.number}", split=body.split, total=total,
        rows=[{name: value for name, value in row.items() if name != label} for row in rows],
    )  # fmt: skip


@handles(ops.DIFF_DATASETS)
def diff_datasets(services: Services, body: ops.DatasetDiffRequest) -> ops.DatasetDiff:
    """Every profile number that differs."""
    left, right = resolve_dataset(services, body.left), resolve_dataset(services, body.right)
    sides = [_profile(version) for version in (left, right)]
    names = sorted({*sides[0], *sides[1]})
    pairs = {name: [sides[0].get(name), sides[1].get(name)] for name in names}
    changes = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return ops.DatasetDiff(left=f"{left.name}@{left.number}", right=f"{right.name}@{right.number}", changes=changes)


def _profile(version: DatasetVersion) -> dict[str, Any]:
    facts = version.facts
    flat: dict[str, Any] = {name: facts.get(name) for name in ("rows_in", "rows_kept", "rejected", "content_digest")}
    for group in ("rejected_by_reason", "split", "classes"):
        flat.update({f"{group}.{name}": value for name, value in (facts.get(group) or {}).items()})
    for column in facts.get("columns", []):
        for key in ("type", "missing", "distinct", "mean", "sd", "min", "max"):
            flat[f"{column['name']}.{key}"] = column.get(key)
    return flat
