"""Whether a backup is whole: every object, the signature, the chain of events, every blob that a record names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from millrace.core.errors import CorruptError, InputError, MillraceError, NotFoundError, UntrustedError
from millrace.core.ports import Verifier
from millrace.core.types import Struct
from millrace.security import chain
from millrace.security.signing import HomeSigner
from millrace.store import backup_rows, trees
from millrace.store.backup_flow import in_order
from millrace.store.backup_naming import Named
from millrace.store.backup_vault import Manifest, Ref, TablePart, Vault
from millrace.store.sealing import SealedLink

Row = tuple[Any, ...]

AT_ONCE = 4
MOST_PROBLEMS = 1000  # that are told; a destination that is gone would have as many as it had objects
LARGEST_TREE_BYTES = 64 << 20


class Signed(Struct, frozen=True, kw_only=True):
    """Who signed a manifest, and why that is not enough, if so."""

    key_id: str
    problem: str = ""


class Checked(Struct, frozen=True, kw_only=True):
    """What was found."""

    manifest: Manifest
    signed: Signed
    objects: int
    size_bytes: int
    events: int
    problems: list[str]


def chosen(vault: Vault, id: str | None) -> str:
    """The id of a backup: the newest one, or the only one that begins so.

    Raises:
        NotFoundError: There is none.
        InputError: Several begin so.
    """
    vault.describe()
    ids = vault.manifests()
    found = ids[-1:] if id is None else [one for one in ids if one.startswith(id)]
    if not found:
        raise NotFoundError(
            f"{vault.place.url} has no backup{'' if id is None else ' ' + repr(id[:40])}",
            hint="`millrace system backups FROM` lists them",
        )
    if len(found) > 1:
        raise InputError(f"{len(found)} backups begin with {id!r}", hint="`millrace system backups FROM` lists them")
    return found[0]


def read_signed(vault: Vault, id: str, verifier: Verifier, signer: str | None) -> tuple[Manifest, Signed]:
    """A manifest, and by whom it is signed.

    Args:
        vault: Where.
        id: Which.
        verifier: Knows the keys that are trusted here.
        signer: The id of a key that is trusted too: that of a home which is lost.

    Raises:
        UntrustedError: The signature is not one of these bytes by any key.
    """
    manifest, digest, signature = vault.manifest(id)
    try:
        return manifest, Signed(key_id=verifier.verify(digest, signature))
    except UntrustedError as error:
        trusted_here = error
    # By the key that the manifest itself brings: which proves no more than that nothing was damaged.
    own = HomeSigner(Path("/nonexistent"), lambda key_id: manifest.signer.encode() or None)
    try:
        key_id = own.verify(digest, signature)
    except UntrustedError:
        raise trusted_here from None
    if key_id == signer or (vault.key is not None and signer is None):
        return manifest, Signed(key_id=key_id)  # who has the backups' key has made it
    problem = f"the backup is signed by the key {key_id}, which is not trusted here"
    return manifest, Signed(key_id=key_id, problem=problem)


def check_backup(vault: Vault, id: str, verifier: Verifier, signer: str | None = None) -> Checked:
    """Read all of a backup.

    Args:
        vault: Where.
        id: Which; see `chosen`.
        verifier: Knows the keys that are trusted here.
        signer: The id of a further one.

    Raises:
        CorruptError: The manifest cannot be read.
        UntrustedError: It is not signed by anybody.
    """
    manifest, signed = read_signed(vault, id, verifier, signer)
    return _Check(vault, manifest, signed).run()


class _Check:
    def __init__(self, vault: Vault, manifest: Manifest, signed: Signed) -> None:
        self._vault, self._manifest, self._signed = vault, manifest, signed
        self._problems = [signed.problem] if signed.problem else []
        self._named = Named()
        self._objects = self._size = 0

    def run(self) -> Checked:
        tables = {table.name: table for table in self._manifest.tables}
        checked = chain.verify(self._links(tables), head=(self._manifest.head_seq, self._manifest.head_chain))
        if checked.broken is not None:
            self._tell(f"the chain of events is broken: {checked.broken.explanation}")
        for table in self._manifest.tables:
            if table.name not in ("events", "event_details"):
                for row in self._rows(table):
                    self._named.see(table.name, row)
        self._check_blobs()
        return Checked(
            manifest=self._manifest, signed=self._signed, objects=self._objects, size_bytes=self._size,
            events=checked.seq, problems=self._problems,
        )  # fmt: skip

    def _tell(self, problem: str) -> None:
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(problem)

    def _rows(self, table: TablePart) -> Iterator[Row]:
        for ref, rows in in_order(AT_ONCE, table.chunks, lambda ref: (ref, self._read_rows(table.name, ref))):
            self._objects += 1
            self._size += ref.size_bytes
            if isinstance(rows, MillraceError):
                self._tell(f"table {table.name}: {rows.message}")
            else:
                yield from rows

    def _read_rows(self, table: str, ref: Ref) -> list[Row] | MillraceError:
        try:
            return backup_rows.rows_of(self._vault.read("chunks", ref), table)
        except (CorruptError, NotFoundError) as error:
            return error

    def _links(self, tables: dict[str, TablePart]) -> Iterator[SealedLink]:
        """Sealed events with their details; both are in the order of the events' ids, which is that of the chain."""
        if "events" not in tables or "event_details" not in tables:
            raise CorruptError("the backup has no events")
        details = self._rows(tables["event_details"])
        detail = next(details, None)
        for id, seq, at, actor, verb, subject, commitment, digest in self._rows(tables["events"]):
            while detail is not None and detail[0] < id:
                detail = next(details, None)
            salt, text = (detail[1], detail[2]) if detail is not None and detail[0] == id else (None, None)
            if seq is not None:
                yield SealedLink(
                    seq=seq, at=at, actor=actor, verb=verb, subject=subject, commitment=commitment, chain=digest,
                    salt=salt, detail=None if text is None else text.encode(),
                )  # fmt: skip
        for _ in details:  # the others are to be read too
            pass

    # ------------------------------------------------------------------ blobs

    def _check_blobs(self) -> None:
        part = TablePart(name="blobs", columns=(), rows=0, chunks=self._manifest.blobs)
        listed = {str(digest): int(size) for digest, size in self._rows(part)}
        plain_trees = {one for one in self._named.trees() if one not in self._named.stored}
        refs = [Ref(digest, size) for digest, size in listed.items()]
        refs += [Ref(file.digest, file.size_bytes) for file in self._manifest.files]
        for ref, found in in_order(AT_ONCE, refs, lambda ref: (ref, self._read_blob(ref, ref.digest in plain_trees))):
            self._objects += 1
            self._size += ref.size_bytes
            if isinstance(found, MillraceError):
                self._tell(f"blob {ref.digest}: {found.message}")
            else:
                self._named.add_files(ref.digest, found)
        known = set(self._manifest.missing)
        for digest in sorted(self._named.absent(listed) - known):
            self._tell(f"blob {digest}: a record names it, and the backup does not have it")
        for file in self._manifest.files:
            if not is_allowed(file.path):
                self._tell(f"file {file.path!r}: no file of a home has such a path")

    def _read_blob(self, ref: Ref, is_tree: bool) -> list[str] | MillraceError:
        """The files of a tree."""
        try:
            if is_tree and ref.size_bytes <= LARGEST_TREE_BYTES:
                return [entry.digest for entry in trees.decode(self._vault.read("blobs", ref), ref.digest)]
            for _ in self._vault.stream("blobs", ref):
                pass
        except (CorruptError, NotFoundError) as error:
            return error
        return []


def is_allowed(path: str) -> bool:
    """Whether a backup may bring a file with this path into a home.

    Example:
        >>> [is_allowed(path) for path in ("keys/signing.key", "settings.yaml", "../x", "keys/../../x", "/keys/x")]
        [True, True, False, False, False]
    """
    first, _, rest = path.partition("/")
    is_below = first in ("keys", "logs", "reports") and rest != ""
    return trees.is_portable(path) and (path == "settings.yaml" or is_below)
