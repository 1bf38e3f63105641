"""Making a backup: one snapshot of the records, every blob that it names, then the manifest.

Nothing waits for it. What is at the destination already is not read again: objects are there whole or not
at all, so that one with the right name and size is believed, and a few are read again each time.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import yaml

import millrace
from millrace.control.services import Services
from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError
from millrace.core.ids import digest_bytes, new_id
from millrace.core.ports import Blobs
from millrace.core.types import Lease, Struct
from millrace.security.signing import HomeSigner
from millrace.store import backup_rows, backup_versions, queries, sealing, trees
from millrace.store.backup_flow import in_order
from millrace.store.backup_index import Index, index_path, read_index, write_index
from millrace.store.backup_naming import Named
from millrace.store.backup_rows import Piece, Points
from millrace.store.backup_vault import FilePart, Manifest, Ref, TablePart, Vault
from millrace.store.backup_versions import Stretch
from millrace.store.blobs_local import CHUNK_BYTES
from millrace.store.database import Connection
from millrace.store.layout import HEAD
from millrace.store.leases import LeaseKeeper, acquire
from millrace.store.records_sql import SqlRecords

LEASE = "gc"  # collections of garbage, backups and their pruning take turns
LEASE_TTL_S = 60.0
PATIENCE_S = 60.0  # for a collection of garbage to end
AT_ONCE = 4
SAMPLE = 8  # objects that are read again each time
SAMPLE_BYTES = 1 << 20  # of them together, or this part of all blobs if that is more
SAMPLE_PART = 2000
NOT_RESTORED = ("records_url", "blobs_url", "home", "url")  # settings that name where the old home was


class Options(Struct, frozen=True, kw_only=True):
    """What else goes in."""

    include_keys: bool = False
    include_logs: bool = False
    is_full: bool = False  # read all rows, also those that an earlier backup has


class Made(Struct, frozen=True, kw_only=True):
    """A backup that was made."""

    manifest: Manifest
    signed_by: str
    digest: str  # of the records, as `transfer.records_digest` has it; "" if not all rows were read
    new_objects: int
    written_bytes: int
    read_bytes: int  # rows and blobs of the home, and what was read again of the destination
    damaged: list[str]  # blobs that the home has no whole copy of
    repaired: list[str]  # objects of the destination that were found damaged, and written again


def make_backup(services: Services, vault: Vault, options: Options, between: Callable[[str], object] = str) -> Made:
    """Make one.

    Args:
        services: The home.
        vault: Where to.
        options: What else goes in.
        between: Called with what comes next, for tests.

    Raises:
        ConflictError: Garbage is being collected, another backup is being made, or the destination is not ours.
        InputError: Keys were to be included, and the destination is not encrypted.
    """
    records = whole_records(services)
    if options.include_keys and vault.key is None:
        raise InputError("keys are not put into a backup that is not encrypted", hint="name one with --encrypt-key")
    records.seal()
    vault.prepare(home_of(records))
    backup_versions.prepare(records)
    with ExitStack() as held, ExitStack() as seen:
        connection = _begin(services, records, held, seen)
        maker = _Maker(services, records, vault, options, between)
        between("rows")
        maker.read_rows(connection)
        seen.close()
        return maker.finish()


def _begin(services: Services, records: SqlRecords, held: ExitStack, seen: ExitStack) -> Connection:
    """A snapshot, and from then on the lease that keeps collectors away, which the snapshot itself does not show."""
    deadline = services.clock.monotonic() + PATIENCE_S
    while True:
        connection = seen.enter_context(backup_rows.snapshot(records))
        before = queries.get(connection, Lease, LEASE)
        lease = acquire(records, LEASE, services.clock, LEASE_TTL_S)
        if lease is not None:
            held.enter_context(LeaseKeeper(records, lease, services.clock, LEASE_TTL_S))
            if lease.token == (before.token if before is not None else 0) + 1:
                return connection
            held.close()  # somebody collected after the snapshot was taken
        seen.close()
        _wait(services, deadline)


def whole_records(services: Services) -> SqlRecords:
    """The records of the whole home.

    Raises:
        InputError: Not all of them may be seen.
    """
    records: Any = services.records
    if not isinstance(records, SqlRecords):
        raise InputError("a backup is of the whole home, and not all of it may be seen", hint="ask an owner")
    return records


def home_of(records: SqlRecords) -> str:
    """What tells one home from another: the chain's digest at its first event; "" has none yet."""
    return records.read(lambda connection: backup_rows.chain_at(connection, 1)) or ""


@contextmanager
def quiet(services: Services) -> Iterator[LeaseKeeper]:
    """No blob is collected, and no other backup made or pruned, inside."""
    clock, records = services.clock, services.records
    deadline = clock.monotonic() + PATIENCE_S
    while (lease := acquire(records, LEASE, clock, LEASE_TTL_S)) is None:
        _wait(services, deadline)
    with LeaseKeeper(records, lease, clock, LEASE_TTL_S) as keeper:
        yield keeper


def _wait(services: Services, deadline: float) -> None:
    if services.clock.monotonic() > deadline:
        raise ConflictError(
            "garbage is being collected, or another backup is being made or pruned", hint="wait for it to end"
        )
    services.clock.sleep(0.2)


class _Maker:
    def __init__(
        self, services: Services, records: SqlRecords, vault: Vault, options: Options, between: Callable[[str], object]
    ) -> None:
        self._services, self._records, self._vault, self._options = services, records, vault, options
        self._between = between
        self._raw: Blobs = services.open_blobs_at(services.setting("blobs_url"))
        self._named = Named()
        self._new_objects = self._read_bytes = 0
        self._damaged: list[str] = []
        self._repaired: list[str] = []
        self._counting = threading.Lock()
        self._there = {one.name: one.size_bytes for kind in ("chunks", "blobs") for one in vault.place.list(kind)}
        self._before = set(self._there)
        self._index_path = index_path(services.home, vault.place.url)
        self._points: dict[int, Points] = {}
        self._stretches: defaultdict[str, list[Stretch]] = defaultdict(list)
        self._tables: list[TablePart] = []
        self._digest = ""

    def read_rows(self, connection: Connection) -> None:
        """What needs the snapshot."""
        self._index = read_index(self._index_path, connection, is_full=self._options.is_full)
        self._head = sealing.head(connection)
        self._put_tables(connection, self._index)

    def finish(self) -> Made:
        """The rest; the backup exists when this returns."""
        index, head = self._index, self._head
        self._between("blobs")
        listed, tree_files = self._put_blobs(index)
        refs = [self._put_piece(one) for one in _listing(listed)]
        files = list(self._put_files())
        self._check_some(listed)
        signer = HomeSigner(self._services.home)
        manifest = Manifest(
            id=new_id(), created_at=self._services.clock.now(), millrace=millrace.__version__, schema=HEAD,
            home=home_of(self._records), head_seq=head[0], head_chain=head[1], tables=self._tables, blobs=refs,
            blob_count=len(listed), blob_bytes=sum(listed.values()), files=files,
            missing=sorted({*self._damaged, *self._named.absent(listed)}), signer=signer.public_key().decode(),
        )  # fmt: skip
        self._between("manifest")
        self._vault.put_manifest(manifest, self._services.signer.sign)  # refuses with a key that was revoked
        known = Index(
            seq=head[0], chain=head[1], points=self._points, stretches=self._stretches, trees=tree_files
        )  # fmt: skip
        write_index(self._index_path, known)
        return Made(
            manifest=manifest, signed_by=signer.key_id, digest=self._digest, new_objects=self._new_objects,
            written_bytes=self._vault.written_bytes, read_bytes=self._read_bytes + self._vault.read_bytes,
            damaged=sorted(self._damaged), repaired=self._repaired,
        )  # fmt: skip

    # ------------------------------------------------------------------ records

    def _put_tables(self, connection: Connection, index: Index) -> None:
        columns = backup_rows.columns()
        chunks: dict[str, list[Ref]] = {name: [] for name in columns}
        digest: backup_rows.RecordsDigest | None = backup_rows.RecordsDigest()
        stretches = {name: [*filter(self._is_there, known)] for name, known in index.stretches.items()}
        found = backup_rows.pieces(connection, self._named.see, lambda bucket: self._known(index, bucket), stretches)
        for piece, ref in in_order(AT_ONCE, found, lambda piece: (piece, self._put_piece(piece))):
            chunks[piece.table].append(ref)
            self._remember(piece)
            if piece.payload is None:
                digest = None
            elif digest is not None:
                digest.add(piece.payload)
        self._tables = [
            TablePart(name=name, columns=columns[name], rows=sum(one.rows for one in refs), chunks=refs)
            for name, refs in chunks.items()
        ]
        self._digest = digest.text() if digest is not None else ""

    def _remember(self, piece: Piece) -> None:
        """For the next time; small pieces are read again, with what is added to them."""
        if piece.points is not None and piece.bucket is not None:
            self._points[piece.bucket] = piece.points
        if piece.stretch is not None:
            if piece.payload is None:
                self._named.add(piece.table, piece.stretch.blobs)
            if piece.size_bytes >= backup_rows.SMALLEST_BYTES:
                self._stretches[piece.table].append(piece.stretch)

    def _known(self, index: Index, bucket: int) -> Points | None:
        found = index.points.get(bucket)
        return found if found is not None and self._is_there(found) else None

    def _is_there(self, known: Points | Stretch) -> bool:
        return self._vault.name("chunks", known.digest) in self._there

    def _put_piece(self, piece: Piece) -> Ref:
        ref = Ref(piece.digest, piece.size_bytes, piece.rows)
        if piece.payload is not None:
            with self._counting:
                self._read_bytes += piece.size_bytes
            if self._is_new("chunks", ref):
                self._vault.put("chunks", ref.digest, [piece.payload])
        return ref

    def _is_new(self, kind: Any, ref: Ref) -> bool:
        """Whether an object must be written; then it is about to be."""
        name = self._vault.name(kind, ref.digest)
        with self._counting:
            found = self._there.get(name)
            if found is not None and (kind == "chunks" or found == self._vault.size_of(ref.size_bytes)):
                return False
            self._there[name] = self._vault.size_of(ref.size_bytes)
            self._new_objects += 1
            return True

    # ------------------------------------------------------------------ blobs

    def _put_blobs(self, index: Index) -> tuple[dict[str, int], dict[str, list[str]]]:
        """Copy what the destination lacks: sizes by digest of all that is there now; files by tree."""
        sizes = {one.digest: one.size_bytes for one in self._raw.list()}
        tree_files = self._expand(index)
        digests = sorted(self._named.place(one) for one in self._named.blobs)
        done = in_order(AT_ONCE, dict.fromkeys(digests), lambda digest: (digest, self._put_blob(digest, sizes)))
        listed = {}
        for digest, size in done:
            self._between(digest)
            if size is not None:
                listed[digest] = size
        return listed, tree_files

    def _expand(self, index: Index) -> dict[str, list[str]]:
        """The files of every tree; listings never change, so that each is read once."""
        found: dict[str, list[str]] = {}
        for digest in self._named.trees():
            try:
                files = index.trees.get(digest) or [entry.digest for entry in self._services.blobs.tree(digest)]
            except (NotFoundError, CorruptError):
                continue  # if it is wanted, it will be missed
            found[digest] = files
            self._named.add_files(digest, files)
        return found

    def _put_blob(self, digest: str, sizes: dict[str, int]) -> int | None:
        """Its size; None: the home does not have it."""
        size = sizes.get(digest)
        try:
            if size is None:
                if not self._raw.exists(digest):  # which brings back what was put aside
                    return None
                with self._raw.open(digest) as file:
                    size = sum(len(part) for part in _parts(file))
            if self._is_new("blobs", Ref(digest, size)):
                with self._raw.open(digest) as file:
                    self._vault.put("blobs", digest, self._counted(_parts(file)))
        except NotFoundError:
            return None
        except CorruptError:
            self._damaged.append(digest)
            return None
        return size

    def _counted(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            with self._counting:
                self._read_bytes += len(part)
            yield part

    # ------------------------------------------------------------------ the rest

    def _put_files(self) -> Iterator[FilePart]:
        """Settings, without where the old home's stores are; keys and logs if wanted."""
        home = self._services.home
        settings = home / "settings.yaml"
        if settings.is_file():
            value = yaml.safe_load(settings.read_text(encoding="utf-8")) or {}
            kept = {key: item for key, item in value.items() if key not in NOT_RESTORED}
            yield self._put_file("settings.yaml", yaml.safe_dump(kept).encode())
        folders = [name for name, is_in in (("keys", self._options.include_keys), ("logs", self._options.include_logs),
                                            ("reports", self._options.include_logs)) if is_in]  # fmt: skip
        for folder in folders:
            for path in sorted((home / folder).rglob("*")):
                name = path.relative_to(home).as_posix()
                if path.is_file() and not path.is_symlink() and trees.is_portable(name):
                    yield self._put_file(name, path.read_bytes())

    def _put_file(self, name: str, data: bytes) -> FilePart:
        digest = digest_bytes(data)
        if self._is_new("blobs", Ref(digest, len(data))):
            self._vault.put("blobs", digest, self._counted([data]))
        return FilePart(path=name, digest=digest, size_bytes=len(data))

    def _check_some(self, listed: dict[str, int]) -> None:
        """Read a few of the blobs that were believed to be there; what is damaged is written again."""
        believed = [one for one in listed if self._vault.name("blobs", one) in self._before]
        budget = max(SAMPLE_BYTES, sum(listed.values()) // SAMPLE_PART)
        for digest in random.sample(believed, min(SAMPLE, len(believed))):
            if listed[digest] > budget:
                continue
            budget -= listed[digest]
            try:
                self._vault.read("blobs", Ref(digest, listed[digest]))
            except (CorruptError, NotFoundError):
                with self._raw.open(digest) as file:
                    self._vault.put("blobs", digest, self._counted(_parts(file)))
                self._repaired.append(digest)


def _listing(listed: dict[str, int]) -> Iterator[Piece]:
    """The list of blobs as pieces, cut as the tables are."""
    rows = (["blobs", digest, size] for digest, size in sorted(listed.items()))
    for piece in backup_rows.cut((1,), rows):
        yield backup_rows.piece_of("blobs", piece)


def _parts(file: Any) -> Iterator[bytes]:
    while part := file.read(CHUNK_BYTES):
        yield part
