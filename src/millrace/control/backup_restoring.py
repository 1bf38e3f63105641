"""Restoring: a backup into an empty home, on whatever its records and blobs are to lie.

All records in one transaction, which is compared with the backup and commits when every blob and file is there.
Until the end a marker keeps the home from being opened; a restore that was killed is begun again with the same
command and goes on with the blobs that are there.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from millrace.control.backup_checking import is_allowed
from millrace.core.clock import Clock
from millrace.core.errors import ConflictError, CorruptError, InputError, SchemaVersionError
from millrace.core.ids import digest_bytes, new_id
from millrace.core.ports import Blobs
from millrace.core.types import Struct
from millrace.security import chain
from millrace.store import backup_filling, backup_marker, backup_rows, sealing
from millrace.store.backup_blobs import BulkBlobs
from millrace.store.backup_filling import filling, forget, in_bulk
from millrace.store.backup_flow import in_order
from millrace.store.backup_marker import Restoring
from millrace.store.backup_place import FolderPlace
from millrace.store.backup_vault import FilePart, Manifest, Ref, Vault
from millrace.store.blobs_local import LocalBlobs, damaged, disk_errors, sync_folder
from millrace.store.database import Connection
from millrace.store.layout import HEAD
from millrace.store.records_sql import SqlRecords

BLOBS_AT_ONCE = 8  # most of them wait for a network
CORES_LEFT = 2  # between folders, where they work: one core in so many is for the blobs, the others for the records
PIECES_AT_ONCE = 4
KEEP_ALIVE_S = 10.0
SAMPLE_OF = 8  # pieces; `drill` reads all of them again


class Target:
    """An empty home.

    Args:
        home: The folder.
        open_records: Opens its records, as they are.
        blobs: Its blobs, as they are stored.
    """

    def __init__(self, home: Path, open_records: Callable[[], SqlRecords], blobs: Blobs) -> None:
        self.home, self.open_records, self.blobs = home, open_records, blobs


class Restored(Struct, frozen=True, kw_only=True):
    """What was restored."""

    rows: int
    blobs: int
    size_bytes: int  # of the blobs
    digest: str  # of the records, as `transfer.records_digest` has it
    chain_problem: str  # "" is whole
    blobs_s: float
    records_s: float


def restore_backup(
    vault: Vault, manifest: Manifest, target: Target, clock: Clock, between: Callable[[str], object] = str
) -> Restored:
    """Restore, and compare.

    Args:
        vault: Where from.
        manifest: Which backup; its signature has been looked at.
        target: Where to.
        clock: The time.
        between: Called with what comes next, for tests.

    Raises:
        ConflictError: The home is not empty, or another backup is being restored into it.
        CorruptError: The backup is damaged; the home stays marked, and refuses to open.
        SchemaVersionError: It is of another version's schema.
    """
    if manifest.schema != HEAD:
        raise SchemaVersionError(
            f"the backup has the schema {manifest.schema!r}, this Millrace {HEAD!r}",
            hint=f"restore it with Millrace {manifest.millrace}, then open the home with this one, which migrates it",
        )
    _claim(vault, manifest, target)
    done = _Restore(vault, manifest, target, clock, between).run()
    between("end")
    backup_marker.remove(target.home)
    return done


class _Restore:
    """Blobs and files in threads of their own, while the rows are put back in this one."""

    def __init__(
        self, vault: Vault, manifest: Manifest, target: Target, clock: Clock, between: Callable[[str], object]
    ) -> None:
        self._vault, self._manifest, self._target, self._clock = vault, manifest, target, clock
        self._between = between
        self._is_over = threading.Event()
        self._blobs_s = 0.0
        self._bulk = BulkBlobs(target.blobs.root) if isinstance(target.blobs, LocalBlobs) else None
        is_local = self._bulk is not None and isinstance(vault.place, FolderPlace)
        self._at_once = min(BLOBS_AT_ONCE, max(2, (os.cpu_count() or 2) // CORES_LEFT)) if is_local else BLOBS_AT_ONCE

    def run(self) -> Restored:
        began = self._clock.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="restore") as side:
            others = side.submit(self._restore_others)
            try:
                digest, problem = self._restore_records(others)
            finally:
                self._is_over.set()
        count, size = others.result()
        return Restored(
            rows=self._manifest.rows, blobs=count, size_bytes=size, digest=digest, chain_problem=problem,
            blobs_s=self._blobs_s, records_s=self._clock.monotonic() - began,
        )  # fmt: skip

    def _restore_others(self) -> tuple[int, int]:
        """Everything but the records: how many blobs, and their bytes."""
        began = self._clock.monotonic()
        self._between("blobs")
        have = {one.digest for one in self._target.blobs.list()}
        wanted = list(_listed(self._vault, self._manifest))
        todo = (ref for ref in wanted if not self._is_over.is_set())
        for ref in in_order(self._at_once, todo, lambda ref: self._restore_blob(ref, ref.digest in have)):
            self._between(ref.digest)
        if self._bulk is not None:
            self._bulk.sync()
        self._between("files")
        for file in self._manifest.files:
            _restore_file(self._vault, file, self._target.home)
        self._blobs_s = self._clock.monotonic() - began
        return len(wanted), sum(ref.size_bytes for ref in wanted)

    def _restore_blob(self, ref: Ref, is_there: bool) -> Ref:
        if is_there and (self._bulk is None or self._bulk.is_whole(ref.digest)):
            return ref  # of a restore that was killed; a store shows what is durable, a folder may show less
        with self._vault.open_blob(ref) as source:
            if self._bulk is not None:
                self._bulk.receive(source, ref.digest, ref.size_bytes)
                return ref
            stored = self._target.blobs.put(source)  # finds the digest anyway: it need not be found twice
        if stored.digest != ref.digest:
            self._target.blobs.delete(stored.digest)
            raise damaged(ref.digest, stored.digest)
        return ref

    def _restore_records(self, others: Future[tuple[int, int]]) -> tuple[str, str]:
        """The digest of the records that are there now, and what is wrong with their chain of events."""
        if [table.name for table in self._manifest.tables] != list(backup_rows.columns()):
            raise CorruptError("the backup has other tables than the schema that it names")
        self._between("records")
        with filling(self._target.open_records(), self._target.home) as into:
            if backup_filling.is_empty(into):
                with in_bulk(into):
                    digest = self._insert(into)
            else:  # killed between the commit and the end; whether it is all there is seen now
                digest = _compare(self._manifest, into)
            problem = _check_chain(self._manifest, into)
            while not wait([others], KEEP_ALIVE_S).done:
                into.execute("SELECT 1")  # or the server would take this transaction for forgotten
            others.result()  # no records before all that they name
            self._between("commit")
        return digest, problem

    def _insert(self, into: Connection) -> str:
        """Put the rows back; what SQLite has just taken is read again here and there, another database's all of it."""
        digest = backup_rows.RecordsDigest()
        for table in self._manifest.tables:
            self._between(f"table {table.name}")
            for payload in in_order(PIECES_AT_ONCE, table.chunks, lambda ref: self._vault.read("chunks", ref)):
                rows = backup_rows.named_rows_of(payload, table.name)
                backup_filling.insert(into, table.name, table.columns, rows)
                is_looked_at = into.dialect != "sqlite" or random.randrange(SAMPLE_OF) == 0
                if is_looked_at and backup_rows.read_again(into, table.name, rows) != payload:
                    raise _differs(table.name)
                digest.add(payload)
        backup_filling.go_on_counting(into)
        return digest.text()


def _claim(vault: Vault, manifest: Manifest, target: Target) -> None:
    """Mark the home as being restored; refuse one that has something."""
    found = backup_marker.read(target.home)
    if found is not None and found.backup == manifest.id:
        forget(target.home)
        return
    if found is not None:
        raise ConflictError(
            f"another backup ({found.backup or 'not known'} of {found.source}) is being restored into {target.home}",
            hint="end that restore first, or remove the folder",
        )
    target.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    records = target.open_records()
    try:
        is_empty = records.read(backup_filling.is_empty)
    finally:
        records.close()
    what = "records" if not is_empty else "blobs" if next(iter(target.blobs.list()), None) is not None else ""
    if what:
        raise ConflictError(
            f"{target.home} is not empty: it has {what}", hint="restore into a new home: `millrace --home FOLDER …`"
        )
    backup_marker.write(target.home, Restoring(source=vault.place.url, backup=manifest.id))


# --------------------------------------------------------------------------- blobs and files


def _listed(vault: Vault, manifest: Manifest) -> Iterator[Ref]:
    pieces = in_order(PIECES_AT_ONCE, manifest.blobs, lambda ref: vault.read("chunks", ref))
    for payload in pieces:
        for digest, size in backup_rows.rows_of(payload, "blobs"):
            vault.name("blobs", digest)  # refuses what is no digest
            yield Ref(digest, size)


def _restore_file(vault: Vault, file: FilePart, home: Path) -> None:
    """Write a file that the home does not have; what it has stays."""
    if not is_allowed(file.path):
        raise CorruptError(f"the backup has a file with the path {file.path[:200]!r}, which no home has")
    target = home / file.path
    if target.exists() or target.is_symlink():
        return
    data = vault.read("blobs", Ref(file.digest, file.size_bytes))
    temp = target.with_name(f".{target.name}.{new_id()}")
    with disk_errors(home):
        for folder in reversed([one for one in target.parents if home in one.parents]):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink():
                raise InputError(f"{folder} is a symbolic link: nothing is restored through one")
        try:
            with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temp, target)
            sync_folder(target.parent)
        finally:
            temp.unlink(missing_ok=True)


# --------------------------------------------------------------------------- records


def _compare(manifest: Manifest, into: Connection) -> str:
    """Read back what is there, as many rows at a time as the pieces had: the same bytes are the same rows."""
    digest = backup_rows.RecordsDigest()
    for table in manifest.tables:
        wanted = (ref.digest for ref in table.chunks)
        for payload in backup_rows.read_back(into, table.name, [ref.rows for ref in table.chunks]):
            if next(wanted, None) != digest_bytes(payload):
                raise _differs(table.name)
            digest.add(payload)
    return digest.text()


def _differs(table: str) -> CorruptError:
    return CorruptError(
        f"the records read back differently from the backup in the table {table}: nothing was kept",
        hint="remove the home and restore again; check the disk and memory of its machine",
    )


def _check_chain(manifest: Manifest, into: Connection) -> str:
    def links() -> Iterator[sealing.SealedLink]:
        seq = 0
        while found := sealing.links(into, seq, None, 1000):
            yield from (link for _, link in found)
            seq = found[-1][1].seq

    head = (manifest.head_seq, manifest.head_chain)
    broken = chain.verify(links(), head=head).broken
    if broken is not None:
        return broken.explanation
    return "" if sealing.head(into) == head else "the stored head of the chain is not the backup's"
