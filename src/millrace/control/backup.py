"""Verbs on backups. The work is done by `backup_making`, `_checking`, `_restoring`, which are loaded when asked for."""

from __future__ import annotations

from typing import Any

from millrace.control.authorisation import acting_principal
from millrace.control.backup_schedule import destination
from millrace.control.dispatch import handles, local_principal
from millrace.control.readable import check_path
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.errors import InputError, MillraceError, NotFoundError, UntrustedError
from millrace.core.ids import new_id
from millrace.core.operations import backup as ops
from millrace.core.types import Event


@handles(ops.BACK_UP)
def back_up(services: Services, body: ops.BackupRequest) -> ops.BackupMade:
    """One backup, and if wanted the removal of old ones."""
    if not services.is_used:
        raise NotFoundError(f"there is no home at {services.home}", hint="`millrace --home FOLDER system backup TO`")
    began = services.clock.monotonic()
    with _opened(services, body.to, body.encrypt_key) as vault:
        options = extras.load("millrace.control.backup_making:Options")(
            include_keys=body.include_keys, include_logs=body.include_logs, is_full=body.full
        )
        made = extras.load("millrace.control.backup_making:make_backup")(services, vault, options)
        removed = len(_prune(services, vault, None, None).removed) if body.prune else 0
        manifest = made.manifest
        return ops.BackupMade(
            id=manifest.id, to=vault.place.url, rows=manifest.rows, blobs=manifest.blob_count,
            size_bytes=manifest.blob_bytes, new_objects=made.new_objects, written_bytes=made.written_bytes,
            read_bytes=made.read_bytes, digest=made.digest, signed_by=made.signed_by, missing=manifest.missing,
            repaired=made.repaired, removed=removed, took_s=services.clock.monotonic() - began,
        )  # fmt: skip


@handles(ops.LIST_BACKUPS)
def list_backups(services: Services, body: ops.BackupPlace) -> list[ops.BackupInfo]:
    """Every backup that has a manifest, newest first; one that cannot be read says so."""
    with _opened(services, body.to, body.encrypt_key) as vault:
        vault.describe()
        return [_info(vault, id) for id in reversed(vault.manifests())]


def _info(vault: Any, id: str) -> ops.BackupInfo:
    try:
        found = vault.manifest(id)[0]
    except MillraceError as error:
        made_at = extras.load("millrace.control.backup_keeping:made_at")(id)
        return ops.BackupInfo(
            id=id, created_at=made_at, rows=0, blobs=0, size_bytes=0, events=0, schema="", millrace="",
            problem=error.message,
        )  # fmt: skip
    return ops.BackupInfo(
        id=id, created_at=found.created_at, rows=found.rows, blobs=found.blob_count, size_bytes=found.blob_bytes,
        events=found.head_seq, schema=found.schema, millrace=found.millrace,
    )  # fmt: skip


@handles(ops.PRUNE_BACKUPS)
def prune_backups(services: Services, body: ops.PruneRequest) -> ops.BackupPruned:
    """Old backups go."""
    with _opened(services, body.to, body.encrypt_key) as vault:
        done = _prune(services, vault, body.daily, body.weekly)
        return ops.BackupPruned(kept=done.kept, removed=done.removed, objects=done.objects, size_bytes=done.size_bytes)


def _prune(services: Services, vault: Any, daily: int | None, weekly: int | None) -> Any:
    daily = services.setting("backup_keep_daily") if daily is None else daily
    weekly = services.setting("backup_keep_weekly") if weekly is None else weekly
    return extras.load("millrace.control.backup_keeping:prune_backups")(services, vault, daily, weekly)


@handles(ops.VERIFY_BACKUP)
def verify_backup(services: Services, body: ops.BackupSource) -> ops.BackupChecked:
    """Everything is read."""
    with _opened(services, body.source, body.encrypt_key) as vault:
        id = extras.load("millrace.control.backup_checking:chosen")(vault, body.backup)
        check = extras.load("millrace.control.backup_checking:check_backup")
        found = check(vault, id, _verifier(services), body.signer)
        return ops.BackupChecked(
            id=id, created_at=found.manifest.created_at, objects=found.objects, size_bytes=found.size_bytes,
            rows=found.manifest.rows, events=found.events, missing=found.manifest.missing,
            signed_by=found.signed.key_id, problems=found.problems,
        )  # fmt: skip


@handles(ops.RESTORE_BACKUP)
def restore_backup(services: Services, body: ops.BackupSource) -> ops.BackupRestored:
    """Into the empty home; the event of it is the first that is not of the backup."""
    began = services.clock.monotonic()
    home_signer = extras.load("millrace.security.signing:HomeSigner")(services.home)
    with _opened(services, body.source, body.encrypt_key) as vault:
        manifest, signed = _trusted(vault, body, home_signer)
        target = extras.load("millrace.control.backup_restoring:Target")(
            services.home,
            lambda: services.open_records_at(services.setting("records_url")),
            services.open_blobs_at(services.setting("blobs_url")),
        )
        restore = extras.load("millrace.control.backup_restoring:restore_backup")
        done = restore(vault, manifest, target, services.clock)
        url = vault.place.url
    principal = acting_principal()
    event = Event(
        at=services.clock.now(), actor=principal.id if principal else local_principal(), verb="system.restore",
        subject=f"backup:{url}", detail={"outcome": "ok", "backup": manifest.id, "digest": done.digest},
    )  # fmt: skip
    with services.records.transaction() as transaction:
        transaction.append(event)
    problems = [f"the chain of events: {done.chain_problem}"] if done.chain_problem else []
    return ops.BackupRestored(
        id=manifest.id, home=str(services.home), rows=done.rows, blobs=done.blobs, size_bytes=done.size_bytes,
        digest=done.digest, signed_by=signed.key_id, problems=problems, took_s=services.clock.monotonic() - began,
    )  # fmt: skip


@handles(ops.DRILL_BACKUP)
def drill_backup(services: Services, body: ops.BackupSource) -> ops.BackupDrilled:
    """Whether it could be restored, and how long that takes."""
    verifier = _verifier(services)
    with _opened(services, body.source, body.encrypt_key) as vault:
        manifest, _ = _trusted(vault, body, verifier)
        scratch = services.home / "scratch" / f"drill-{new_id()}"
        done = extras.load("millrace.control.backup_drill:drill")(
            vault, manifest, scratch, services.clock, verifier
        )  # fmt: skip
    restored = done.restored
    return ops.BackupDrilled(
        id=manifest.id, rows=restored.rows, blobs=restored.blobs, size_bytes=restored.size_bytes,
        digest=restored.digest, model=done.model, problems=done.problems, blobs_s=restored.blobs_s,
        records_s=restored.records_s, took_s=done.took_s,
    )  # fmt: skip


def _trusted(vault: Any, body: ops.BackupSource, verifier: Any) -> tuple[Any, Any]:
    """The manifest to restore from; refuses one that somebody unknown has signed."""
    id = extras.load("millrace.control.backup_checking:chosen")(vault, body.backup)
    manifest, signed = extras.load("millrace.control.backup_checking:read_signed")(vault, id, verifier, body.signer)
    if signed.problem:
        raise UntrustedError(
            signed.problem,
            hint=f"only if that is the key of the home that made it (every backup says so): --signer {signed.key_id}",
        )
    return manifest, signed


def _verifier(services: Services) -> Any:
    """The keys that this home trusts; a folder that is none yet trusts its own only."""
    if services.is_used:
        return services.signer
    return extras.load("millrace.security.signing:HomeSigner")(services.home)


class _opened:
    """A destination, closed at the end."""

    def __init__(self, services: Services, named: str | None, key: str | None) -> None:
        if services.where is not None or named is not None or key is not None:
            check_path(named or "the destination of the backups")
        to = destination(services) if named is None else named
        if not to:
            raise InputError("want a destination for the backups", hint="name one, or set backup_to")
        text = key or services.setting("backup_key")
        secret = extras.load("millrace.control.backup_seal:read_key")(text) if text else None
        place = extras.load("millrace.store.backup_place:open_place")(to)
        self._vault = extras.load("millrace.store.backup_vault:Vault")(place, secret)

    def __enter__(self) -> Any:
        return self._vault

    def __exit__(self, *raised: object) -> None:
        self._vault.close()
