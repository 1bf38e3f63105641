"""Blobs that are encrypted where they lie: people see digests of plain bytes, the store below those of ciphertext.

A record `DataKey` leads from one to the other and holds the blob's own key, wrapped. Blobs from before encryption was
switched on have none, and are read as they are. Losing a `DataKey` is losing the blob: that is what erasing is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from millrace.core.errors import ConflictError, CorruptError, NotFoundError
from millrace.core.ports import Blobs, Records
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, DataKey, TreeEntry
from millrace.store import trees
from millrace.store.blobs_cache import BlobCache, Pins
from millrace.store.blobs_local import CHUNK_BYTES, damaged, disk_errors

CACHE_BYTES = 4 << 30  # of plain copies on this disk
ATTEMPTS = 5


class Encrypting(Protocol):
    """A stream of ciphertext; at its end, what is known of the plain bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...

    @property
    def digest(self) -> str:
        """Of the plain bytes."""
        ...

    @property
    def size(self) -> int:
        """Of the plain bytes."""
        ...


class Ciphers(Protocol):
    """Keys and what is done with them; see `security.keyring.Keyring`."""

    def new_key(self) -> bytes:
        """A key for one blob."""
        ...

    def wrap(self, key: bytes, context: str) -> tuple[str, str]:
        """The id of the key of keys, and the key, wrapped by it."""
        ...

    def unwrap(self, kek: str, wrapped: str, context: str) -> bytes:
        """The key again."""
        ...

    def encrypting(self, source: BinaryIO, key: bytes) -> Encrypting:
        """The ciphertext of a stream."""
        ...

    def decrypting(self, source: BinaryIO, key: bytes, size: int, name: str) -> io.RawIOBase:
        """The plain bytes of ciphertext; whatever comes out was put in."""
        ...


class EncryptedBlobs:
    """Implements `core.ports.Blobs` over another store. Thread- and process-safe, as that is.

    Args:
        inner: Where the ciphertext goes.
        records: Where the data keys are.
        ciphers: The keyring.
        cache_dir: For plain copies that `path` hands out: a folder for its owner only, and bounded.
        cache_bytes: Bound of all of them.
    """

    def __init__(
        self, inner: Blobs, records: Records, ciphers: Ciphers, cache_dir: Path, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.inner, self._records, self._ciphers = inner, records, ciphers
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache_dir.chmod(0o700)
        self._cache = BlobCache(cache_dir, cache_bytes)
        self._has_looked = False  # at whether other hosts on these records have the same keys

    # ------------------------------------------------------------------ the port

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes, a stream or a file; equal bytes are stored once, a damaged copy is replaced.

        A file is read twice; a stream once, and it is encrypted before it is known whether it is here already.

        Raises:
            DiskFullError: No space; nothing remains.
        """
        if isinstance(source, Path):
            with disk_errors(source), source.open("rb") as file:
                digest, size = _digest_of(file)
                if not self._has_intact(digest):
                    file.seek(0)
                    digest, size = self._store(file)  # the file may have changed since: its bytes count
        elif isinstance(source, (bytes, bytearray, memoryview)):
            digest, size = "sha256:" + hashlib.sha256(source).hexdigest(), len(source)
            if not self._has_intact(digest):
                self._store(io.BytesIO(source))
        else:
            digest, size = self._store(source)
        return Artifact(digest=digest, size_bytes=size, media_type=media_type)

    def open(self, digest: str) -> BinaryIO:
        """A reader that gives nothing but what was put in; seekable where the store below is.

        Raises:
            NotFoundError: There is no such blob, or it was erased.
        """
        key = self._key_of(digest)
        if key is None:
            return self.inner.open(digest)
        secret = self._ciphers.unwrap(key.kek, key.wrapped, digest)
        with self._named(key):
            source = self.inner.open(key.stored)
        reader = self._ciphers.decrypting(source, secret, key.size_bytes, f"the blob {digest}")
        return io.BufferedReader(reader, CHUNK_BYTES)

    def read(self, digest: str) -> bytes:
        """All bytes, verified.

        Raises:
            CorruptError: They are not what was put in; the message names the blob.
        """
        with self.open(digest) as file:
            return file.read()

    def path(self, digest: str) -> Path:
        """A verified read-only plain copy in the cache; it stays while this process lives, or uses 256 others."""
        return self._path(digest, None)

    def exists(self, digest: str) -> bool:
        """Whether it is stored; what was erased is not."""
        key = self._found(digest)
        if key is None:
            return self.inner.exists(digest)
        return bool(key.wrapped) and self.inner.exists(key.stored)

    def delete(self, digest: str) -> bool:
        """Remove it with its key; False when it was not there."""
        key = self._found(digest)
        self._cache.forget(digest)
        if key is None:
            return self._is_free(digest) and self.inner.delete(digest)
        has_gone = self.inner.delete(key.stored)
        self._forget(key)
        return has_gone

    def list(self) -> Iterator[Artifact]:
        """Every stored blob; ciphertext that no key belongs to is listed as what it is, so that it can be collected."""
        keys = self._by_stored()
        seen: set[str] = set()
        for artifact in self.inner.list():
            shown = _shown(artifact, keys)
            if shown.digest not in seen:
                seen.add(shown.digest)
                yield shown

    def modified_at(self, digest: str) -> float:
        """When it was last put or touched, in seconds since 1970.

        Raises:
            NotFoundError: There is no such blob.
        """
        with self._below(digest) as stored:
            return self.inner.modified_at(stored)

    def touch(self, digest: str) -> None:
        """Make it count as new.

        Raises:
            NotFoundError: There is no such blob.
        """
        with self._below(digest) as stored:
            self.inner.touch(stored)

    def discard(self, digest: str) -> bool:
        """Put it aside; its key stays, for whoever asks for it brings it back."""
        key = self._found(digest)
        self._cache.forget(digest)
        if key is None:
            return self._is_free(digest) and self.inner.discard(digest)
        return self.inner.discard(key.stored)

    def discarded(self) -> Iterator[tuple[Artifact, float]]:
        """What was put aside, and when."""
        keys = self._by_stored()
        for artifact, since in self.inner.discarded():
            yield _shown(artifact, keys), since

    def purge(self, digest: str) -> bool:
        """Delete what was put aside, and its key; False when it was brought back, or purged, meanwhile."""
        key = self._found(digest)
        if key is None:
            return self._is_free(digest) and self.inner.purge(digest)
        if not self.inner.purge(key.stored):
            return False
        self._cache.forget(digest)
        self._forget(key)
        return True

    def put_tree(self, folder: Path) -> Artifact:
        """Store every regular file below `folder` and the listing; the artifact of the listing."""
        return self.put(trees.encode(trees.put_files(folder, self.put)), TREE_MEDIA_TYPE)

    def tree(self, digest: str) -> list[TreeEntry]:
        """The listing of a tree, verified."""
        return trees.decode(self.read(digest), digest)

    def materialize(self, digest: str, folder: Path) -> Path:
        """Write a tree's files, plain and read-only, into a new `folder`; one that holds the tree is kept."""
        entries, pins = self.tree(digest), Pins(1)
        with disk_errors(folder), closing(pins):
            return trees.materialize(
                entries, folder, lambda one: self._path(one, pins), lambda one: self._cache.path(one, pins)
            )

    # ------------------------------------------------------------------ whose data, and erasing

    def mark(self, digests: Iterable[str], data_subject: str) -> int:
        """Say whose data blobs are; how many were marked.

        Raises:
            ConflictError: One is somebody else's already: erasing one of them would erase the other's.
        """
        count = 0
        with self._records.transaction() as transaction:
            for digest in dict.fromkeys(digests):
                key = transaction.get(DataKey, digest)
                if key is None or not key.size_bytes or key.data_subject == data_subject:
                    continue
                if key.data_subject:
                    raise ConflictError(f"the blob {digest} is kept as data of somebody else, too")
                transaction.put(msgspec.structs.replace(key, data_subject=data_subject), key.version)
                count += 1
        return count

    def erase(self, digests: Iterable[str]) -> tuple[int, int]:
        """Throw the keys of blobs away, their ciphertext and plain copies with them: how many, and their plain bytes.

        The records go on to say that there was such a blob.
        """
        count = size = 0
        for digest in dict.fromkeys(digests):
            self._cache.forget(digest)  # also what a process on another host has erased
            with self._records.transaction() as transaction:
                key = transaction.get(DataKey, digest)
                if key is None or not key.wrapped:
                    continue
                transaction.put(msgspec.structs.replace(key, wrapped="", kek=""), key.version)
            self._cache.forget(digest)  # somebody may have asked for it until then
            self.inner.delete(key.stored)
            count, size = count + 1, size + key.size_bytes
        return count, size

    # ------------------------------------------------------------------ writing

    def _has_intact(self, digest: str) -> bool:
        """Whether it is stored, encrypted and whole; if so it counts as new from now on."""
        key = self._found(digest)
        if key is None or not key.wrapped:
            return False
        try:
            self.inner.path(key.stored)
            self.inner.touch(key.stored)
        except (NotFoundError, CorruptError):
            return False
        return True

    def _store(self, source: BinaryIO) -> tuple[str, int]:
        """Encrypt a stream with a key of its own, and keep that, unless the same bytes are here."""
        secret = self._ciphers.new_key()
        sealed = self._ciphers.encrypting(source, secret)
        stored = self.inner.put(sealed).digest  # type: ignore[arg-type]
        digest, size = sealed.digest, sealed.size
        for _ in range(ATTEMPTS):
            old = self._found(digest)
            if old is not None and self._has_intact(digest):
                self.inner.delete(stored)  # another one was quicker: one blob, one key
                return digest, size
            if self._keep(digest, size, stored, secret, old):
                if old is not None and old.stored != stored:
                    self.inner.delete(old.stored)
                if self._is_free(digest):
                    self.inner.delete(digest)  # a plain one, from before
                return digest, size
        raise ConflictError(f"others store and remove {digest} again and again")

    def _keep(self, digest: str, size: int, stored: str, secret: bytes, old: DataKey | None) -> bool:
        """Write the data key, in place of `old`; False when somebody else has changed it meanwhile."""
        with self._records.transaction() as transaction:
            present = transaction.get(DataKey, digest)
            if (present.version if present else 0) != (old.version if old else 0):
                return False
            self._check_keys()
            # Wrapped in here: whoever drops a key of keys does it in a transaction, when no record needs it.
            kek, wrapped = self._ciphers.wrap(secret, digest)
            subject = old.data_subject if old is not None and old.wrapped else ""
            key = DataKey(
                id=digest, stored=stored, wrapped=wrapped, kek=kek, size_bytes=size, data_subject=subject,
                created_at=old.created_at if old is not None else 0.0,
            )  # fmt: skip
            transaction.put(key, present.version if present else 0)
        return True

    def _check_keys(self) -> None:
        """Once, before something is stored: two hosts may have begun at the same time, with a key of its own each.

        Raises:
            NotFoundError: What is newest here was stored by another key.
        """
        for key in () if self._has_looked else self._records.find(DataKey, order="-created_at", limit=1):
            if key.wrapped:
                self._ciphers.unwrap(key.kek, key.wrapped, key.id)
        self._has_looked = True

    # ------------------------------------------------------------------ reading

    def _found(self, digest: str) -> DataKey | None:
        return self._records.get(DataKey, digest)

    def _key_of(self, digest: str) -> DataKey | None:
        """The data key; None: it is plain, or not here.

        Raises:
            NotFoundError: It was erased.
        """
        key = self._found(digest)
        if key is not None and not key.wrapped:
            raise NotFoundError(f"the blob {digest} was erased", hint="its key was thrown away: nothing brings it back")
        return key

    def _is_free(self, digest: str) -> bool:
        """Whether the store below may lose this: the bytes somebody stores may be the ciphertext of another blob."""
        return not self._records.find(DataKey, {"stored": digest}, limit=1)

    def _by_stored(self) -> dict[str, DataKey]:
        return {key.stored: key for key in self._records.find(DataKey) if key.wrapped}

    def _forget(self, key: DataKey) -> None:
        """Remove a data key, unless the blob was put again meanwhile."""
        with self._records.transaction() as transaction:
            present = transaction.get(DataKey, key.id)
            if present is not None and present.stored == key.stored and present.wrapped:
                transaction.delete(DataKey, key.id)

    @contextmanager
    def _below(self, digest: str) -> Iterator[str]:
        """The digest below, in errors the one above."""
        key = self._key_of(digest)
        if key is None:
            yield digest
            return
        with self._named(key):
            yield key.stored

    @contextmanager
    def _named(self, key: DataKey) -> Iterator[None]:
        """People know the plain digest."""
        try:
            yield
        except NotFoundError as error:
            raise NotFoundError(f"there is no blob {key.id}: its ciphertext is gone", hint=error.hint) from error
        except CorruptError as error:
            raise CorruptError(f"the blob {key.id} is damaged", details={"digest": key.id}) from error

    def _path(self, digest: str, pins: Pins | None) -> Path:
        key = self._key_of(digest)
        if key is None:
            return self.inner.path(digest)
        return self._cache.fetched(digest, lambda: self._fill(key), pins)

    def _fill(self, key: DataKey) -> None:
        with self.open(key.id) as file:
            copied = self._cache.add(file, key.size_bytes)
        if copied.digest != key.id:
            self._cache.forget(copied.digest)
            raise damaged(key.id, copied.digest)

    def close(self) -> None:
        """Let go of pinned copies."""
        self._cache.close()


def _digest_of(file: BinaryIO) -> tuple[str, int]:
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return f"sha256:{digest}", file.tell()


def _shown(artifact: Artifact, keys: dict[str, DataKey]) -> Artifact:
    key = keys.get(artifact.digest)
    return artifact if key is None else msgspec.structs.replace(artifact, digest=key.id, size_bytes=key.size_bytes)
