"""Verbs on backups. Without a destination they mean the setting `backup_to`, without a key `backup_key`."""

from __future__ import annotations

from millrace.core.operations import Operation, Request
from millrace.core.types import Struct


class BackupPlace(Request, frozen=True, kw_only=True):
    """Where backups are: an absolute folder or a URL (s3://…); and the key, as file:PATH or env:NAME."""

    to: str | None = None
    encrypt_key: str | None = None


class BackupRequest(BackupPlace, frozen=True, kw_only=True):
    """`full`: read all rows of the records, also those of an earlier backup. `prune`: then remove old backups."""

    include_keys: bool = False
    include_logs: bool = False
    full: bool = False
    prune: bool = False


class PruneRequest(BackupPlace, frozen=True, kw_only=True):
    """What is kept; the settings' numbers when absent."""

    daily: int | None = None
    weekly: int | None = None


class BackupSource(Request, frozen=True, kw_only=True):
    """Which backup: the newest when `backup` (an id or its beginning) is absent.

    `signer`: the id of a key that is trusted to have signed it, of a home that is lost.
    """

    source: str | None = None
    backup: str | None = None
    encrypt_key: str | None = None
    signer: str | None = None


class BackupMade(Struct, frozen=True, kw_only=True):
    """A backup that was made.

    `digest` is of all records, "" where unchanged rows were not read again. `missing`: blobs that records
    name and the home does not have whole. `repaired`: objects of the destination that were damaged. `signed_by` is
    what a restore into another home wants to know: keep it with the key.
    """

    id: str
    to: str
    rows: int
    blobs: int
    size_bytes: int
    new_objects: int
    written_bytes: int
    read_bytes: int
    digest: str
    signed_by: str
    missing: list[str]
    repaired: list[str]
    removed: int  # old backups
    took_s: float


class BackupInfo(Struct, frozen=True, kw_only=True):
    """A backup that there is."""

    id: str
    created_at: float
    rows: int
    blobs: int
    size_bytes: int
    events: int
    schema: str
    millrace: str
    problem: str = ""


class BackupPruned(Struct, frozen=True, kw_only=True):
    """What was removed."""

    kept: list[str]
    removed: list[str]
    objects: int
    size_bytes: int


class BackupChecked(Struct, frozen=True, kw_only=True):
    """What was found; it is whole if `problems` is empty."""

    id: str
    created_at: float
    objects: int
    size_bytes: int
    rows: int
    events: int
    missing: list[str]
    signed_by: str
    problems: list[str]


class BackupRestored(Struct, frozen=True, kw_only=True):
    """What was restored. `digest` is of all records, equal on both sides."""

    id: str
    home: str
    rows: int
    blobs: int
    size_bytes: int
    digest: str
    signed_by: str
    problems: list[str]
    took_s: float


class BackupDrilled(Struct, frozen=True, kw_only=True):
    """How a restore went that was removed again."""

    id: str
    rows: int
    blobs: int
    size_bytes: int
    digest: str
    model: str
    problems: list[str]
    blobs_s: float
    records_s: float
    took_s: float


BACK_UP = Operation(
    name="system.backup", summary="Back up the home, while it is used; only what changed is written.",
    request=BackupRequest, response=BackupMade, method="POST", path="/system/backups", is_write=True,
    subject_kind="backup", subject_field="to", example={"to": "/srv/backups"},
)  # fmt: skip
LIST_BACKUPS = Operation(
    name="system.backups", summary="Backups, newest first.", request=BackupPlace, response=list[BackupInfo],
    method="GET", path="/system/backups", example={"to": "/srv/backups"},
)  # fmt: skip
PRUNE_BACKUPS = Operation(
    name="system.prune", summary="Remove old backups, and what only they need.", request=PruneRequest,
    response=BackupPruned, method="POST", path="/system/backups/prune", is_write=True, subject_kind="backup",
    subject_field="to", example={"to": "/srv/backups"},
)  # fmt: skip
VERIFY_BACKUP = Operation(
    name="system.verify", summary="Read all of a backup, and say what is not whole.", request=BackupSource,
    response=BackupChecked, method="POST", path="/system/backups/verify", example={"source": "/srv/backups"},
)  # fmt: skip
RESTORE_BACKUP = Operation(
    name="system.restore", summary="Restore a backup into this home, which must be empty.", request=BackupSource,
    response=BackupRestored, method="POST", path="/system/backups/restore", is_write=True, is_audited=False,
    subject_kind="backup", subject_field="source", example={"source": "/srv/backups"},
)  # fmt: skip
DRILL_BACKUP = Operation(
    name="system.drill", summary="Restore a backup into a scratch home, compare, and remove it again.",
    request=BackupSource, response=BackupDrilled, method="POST", path="/system/backups/drill",
    subject_kind="backup", subject_field="source", example={"source": "/srv/backups"},
)  # fmt: skip
OPERATIONS = (BACK_UP, LIST_BACKUPS, PRUNE_BACKUPS, VERIFY_BACKUP, RESTORE_BACKUP, DRILL_BACKUP)
