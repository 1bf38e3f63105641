"""A drill: a backup restored into a scratch home, compared, a model of it opened, and all of it removed again."""

from __future__ import annotations

import shutil
from pathlib import Path

from millrace.control.backup_restoring import Restored, Target, restore_backup
from millrace.core import extras
from millrace.core.clock import Clock
from millrace.core.errors import MillraceError
from millrace.core.ports import Verifier
from millrace.core.types import DataKey, ModelVersion, Struct
from millrace.store.backup_vault import Manifest, Vault
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import SqlRecords, open_records
from millrace.store.transfer import records_digest


class Drilled(Struct, frozen=True, kw_only=True):
    """How it went."""

    restored: Restored
    model: str  # which was opened, or why none was
    problems: list[str]
    took_s: float


def drill(vault: Vault, manifest: Manifest, scratch: Path, clock: Clock, verifier: Verifier) -> Drilled:
    """Restore into a new folder, which is removed at the end.

    Args:
        vault: Where from.
        manifest: Which backup.
        scratch: A folder that does not exist.
        clock: The time.
        verifier: Knows the keys that models are signed with.

    Raises:
        CorruptError: The backup is damaged.
        DiskFullError: There is no space for it.
    """
    began = clock.monotonic()
    home = scratch / "home"
    try:
        scratch.mkdir(parents=True, mode=0o700)
        blobs = LocalBlobs(home / "blobs")
        target = Target(home, lambda: open_records(home / "records.db"), blobs)
        restored = restore_backup(vault, manifest, target, clock)
        problems = [f"the chain of events: {restored.chain_problem}"] if restored.chain_problem else []
        records = open_records(home / "records.db")
        try:
            if records_digest(records) != restored.digest:
                problems.append("the records changed their digest when they were opened again")
            model, problem = _open_model(records, blobs, scratch / "model", verifier)
            problems += [problem] if problem else []
        finally:
            records.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Drilled(restored=restored, model=model, problems=problems, took_s=clock.monotonic() - began)


def _open_model(records: SqlRecords, blobs: LocalBlobs, folder: Path, verifier: Verifier) -> tuple[str, str]:
    """The newest version that can be opened here: which, and what is wrong with it."""
    versions = records.find(ModelVersion, {"format": "bundle"}, order="-created_at")
    if not versions:
        return "there is none", ""
    version = versions[0]
    name = f"{version.name} v{version.number}"
    if records.get(DataKey, version.bundle.digest) is not None:
        return f"{name} is encrypted, and was not opened", ""
    try:
        blobs.materialize(version.bundle.digest, folder)
        signature = blobs.read(version.signature.digest) if version.signature else None
        open_bundle = extras.load("millrace.formats.bundle:open_bundle")
        open_bundle(folder, signature=signature, verifier=verifier, expected_digest=version.bundle.digest)
    except MillraceError as error:
        return name, f"the model {name} does not open: {error.message}"
    return name, ""
