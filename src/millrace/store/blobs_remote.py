"""Blobs in an object store (S3 and what speaks like it, Google, Azure), with a verified cache on this disk."""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from obstore.exceptions import AlreadyExistsError

from millrace.core.errors import CorruptError, InputError, NotFoundError, UnavailableError
from millrace.core.ids import digest_bytes
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, TreeEntry
from millrace.store import trees
from millrace.store.blob_abilities import MAX_PRESIGNED_BYTES, PresignedUrl
from millrace.store.blobs_cache import BlobCache, Pins
from millrace.store.blobs_local import damaged, disk_errors
from millrace.store.object_client import BUFFER_BYTES, ObjectClient
from millrace.store.object_store import RemoteOptions
from millrace.store.upload import Chained, ChangedError, expected_etag, parts_of

_HEX = re.compile(r"sha256:([0-9a-f]{2})([0-9a-f]{62})")
_KEY = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{62})")


class RemoteBlobs:
    """Implements `core.ports.Blobs`, `SupportsPresign` and `SupportsAge` over an object store.

    Keys below the URL: `sha256/ab/…` the blobs; `touched/…` empty marks of their last use; `incoming/…` what was
    sent to a presigned URL and is not confirmed. A process killed while uploading leaves nothing visible, but its
    parts are paid for until a lifecycle rule of the bucket aborts them: set one for incomplete multipart uploads,
    and one that expires `incoming/`.

    Args:
        url: `s3://bucket/prefix`, `gs://…`, `az://container/prefix`, `memory:///` or `file:///folder`.
        cache_dir: Folder of the local cache, which several processes may share.
        options: How to reach the store; credentials come from it or from the standard environment variables.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     blobs = RemoteBlobs("memory:///", Path(folder))
        ...     artifact = blobs.put(b"hello", "text/plain")
        ...     blobs.read(artifact.digest), artifact.size_bytes
        (b'hello', 5)
    """

    def __init__(self, url: str, cache_dir: Path, options: RemoteOptions | None = None) -> None:
        self.url, self._options = url, options or RemoteOptions()
        self._objects = ObjectClient(url, self._options)
        self._cache = BlobCache(cache_dir, self._options.cache_bytes)
        self._verified: dict[str, str] = {}  # digest → the store's tag of the bytes that had it

    def __repr__(self) -> str:
        """Without credentials."""
        return f"RemoteBlobs({self.url!r})"

    # ------------------------------------------------------------------ the port

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes, a stream or a file; equal bytes are stored once, a damaged copy is replaced.

        A file is read twice, never copied. A stream larger than a part is spooled to the cache first, because
        its digest is its key.

        Raises:
            DiskFullError: No space for spooling; nothing remains.
            UnavailableError: The store cannot be reached, or fails.
        """
        if isinstance(source, Path):
            with disk_errors(source), source.open("rb") as file:
                digest, size = self._put_file(file)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            digest, size = self._put_bytes(bytes(source))
        else:
            digest, size = self._put_stream(source)
        return Artifact(digest=digest, size_bytes=size, media_type=media_type)

    def open(self, digest: str) -> BinaryIO:
        """A seekable reader; read from start to end, a wrong digest raises CorruptError before the last bytes.

        Raises:
            NotFoundError: There is no such blob.
        """
        _check_digest(digest)
        cached = self._cache.path(digest)
        if cached is not None:
            return cached.open("rb")
        size = self._present(digest)["size"]
        return io.BufferedReader(self._objects.reader(_key(digest), size, digest), BUFFER_BYTES)

    def read(self, digest: str) -> bytes:
        """All bytes, verified.

        Raises:
            CorruptError: The bytes have another digest; the message names the blob.
        """
        with self.open(digest) as file:
            return file.read()

    def path(self, digest: str) -> Path:
        """A verified read-only file in the cache; it stays while this process lives, or uses 256 others.

        Raises:
            DiskFullError: No space; nothing half-written remains.
        """
        return self._path(_check_digest(digest))

    def exists(self, digest: str) -> bool:
        """Whether it is stored; what is only in the cache does not count."""
        _check_digest(digest)
        return self._head(digest) is not None

    def delete(self, digest: str) -> bool:
        """Remove it; False when it was not there."""
        if not self.exists(digest):
            return False
        self._cache.forget(digest)
        self._verified.pop(digest, None)
        for key in (_key(digest), _mark(digest)):
            self._objects.remove(key)
        return True

    def list(self) -> Iterator[Artifact]:
        """Every stored blob; the order is the store's."""
        for meta in self._objects.list("sha256"):
            found = _KEY.fullmatch(meta["path"])
            if found:
                yield Artifact(digest=f"sha256:{found[1]}{found[2]}", size_bytes=meta["size"])

    def put_tree(self, folder: Path) -> Artifact:
        """Store every regular file below `folder` and the listing; the artifact of the listing.

        Raises:
            InputError: There is a symbolic link, a device or a name that is not portable.
        """
        return self.put(trees.encode(trees.put_files(folder, self.put)), TREE_MEDIA_TYPE)

    def tree(self, digest: str) -> list[TreeEntry]:
        """The listing of a tree, verified.

        Raises:
            CorruptError: The blob is not a listing, or one that would write outside its folder.
        """
        return trees.decode(self.read(digest), digest)

    def materialize(self, digest: str, folder: Path) -> Path:
        """Write a tree's files read-only into a new `folder`; a folder that already holds the tree is kept.

        Raises:
            ConflictError: `folder` exists and holds something else.
        """
        entries, pins = self.tree(digest), Pins(1)  # each until it is linked, or a large tree would fill the disk
        with disk_errors(folder), closing(pins):
            return trees.materialize(
                entries, folder, lambda one: self._path(one, pins), lambda one: self._cache.path(one, pins)
            )

    # ------------------------------------------------------------------ put aside

    def discard(self, digest: str) -> bool:
        """Put it aside: copied, then removed. Whoever asks for it brings it back."""
        if self._objects.head(_key(digest)) is None:
            return False
        self._objects.copy(_key(digest), _aside(digest))
        for key in (_key(digest), _mark(digest)):
            self._objects.remove(key)
        self._verified.pop(digest, None)
        return True

    def discarded(self) -> Iterator[tuple[Artifact, float]]:
        """What was put aside, and when, by the store's clock."""
        for meta in self._objects.list("discarded"):
            found = _KEY.fullmatch(meta["path"].replace("discarded/", "sha256/", 1))
            if found:
                artifact = Artifact(digest=f"sha256:{found[1]}{found[2]}", size_bytes=meta["size"])
                yield artifact, meta["last_modified"].timestamp()

    def purge(self, digest: str) -> bool:
        """Delete what was put aside; False when it was brought back, or purged, meanwhile."""
        if self._objects.head(_aside(digest)) is None:
            return False
        self._objects.remove(_aside(digest))
        self._cache.forget(digest)
        return True

    def _head(self, digest: str) -> Any:
        """What the store says of a blob, brought back if it was put aside; None: it has none."""
        found = self._objects.head(_key(digest))
        if found is None and self._objects.head(_aside(digest)) is not None:
            try:
                self._objects.copy(_aside(digest), _key(digest))
            except NotFoundError:  # another one has just brought it back
                return self._objects.head(_key(digest))
            self._objects.remove(_aside(digest))
            found = self._objects.head(_key(digest))
        return found

    # ------------------------------------------------------------------ age

    def modified_at(self, digest: str) -> float:
        """When it was last put or touched, by the store's clock, in seconds since 1970.

        Raises:
            NotFoundError: There is no such blob.
        """
        stored, mark = self._present(digest), self._objects.head(_mark(digest))
        return max(meta["last_modified"].timestamp() for meta in (stored, mark) if meta is not None)

    def touch(self, digest: str) -> None:
        """Make it count as new, so that garbage collection spares it for a while.

        Raises:
            NotFoundError: There is no such blob.
        """
        self._present(digest)
        self._objects.put(_mark(digest), b"")

    # ------------------------------------------------------------------ presigned

    @property
    def can_presign(self) -> bool:
        """Whether this store signs URLs."""
        return self._objects.can_sign

    def presign_put(self, digest: str, size: int, expires_s: float) -> PresignedUrl:
        """Where anybody may PUT the bytes of a blob; they count only after `confirm(digest, size)`.

        Raises:
            InputError: Too large for one request, too long a time, or a store that cannot sign.
        """
        if not 0 <= size <= MAX_PRESIGNED_BYTES:
            raise InputError(f"one request sends at most {MAX_PRESIGNED_BYTES} bytes, got {size}")
        return self._objects.sign("PUT", _incoming(digest), expires_s)

    def presign_get(self, digest: str, expires_s: float) -> PresignedUrl:
        """Where anybody may GET the bytes of a blob; whether it exists is not asked.

        Raises:
            InputError: Too long a time, or a store that cannot sign.
        """
        _check_digest(digest)
        return self._objects.sign("GET", _key(digest), expires_s)

    def confirm(self, digest: str, size: int) -> Artifact:
        """Read back what was sent to a presigned URL; only the right bytes become a blob. May be repeated.

        Raises:
            NotFoundError: Nothing was sent.
            CorruptError: Something else was sent; it is removed.
        """
        sent = self._objects.head(_incoming(digest))
        if sent is None:
            if self._present(digest)["size"] != size:
                raise CorruptError(f"the blob {digest} does not have {size} bytes")
            self.touch(digest)
        else:
            self._accept(digest, size, sent)
        return Artifact(digest=digest, size_bytes=size)

    def close(self) -> None:
        """Let go of pinned files and threads."""
        self._cache.close()
        self._objects.close()

    # ------------------------------------------------------------------ writing

    def _put_bytes(self, data: bytes) -> tuple[str, int]:
        digest, started = digest_bytes(data), time.monotonic()
        try:
            self._objects.put(_key(digest), data, mode="create")
        except UnavailableError:  # a conditional write that timed out is not tried again by the client
            if time.monotonic() - started > self._options.deadline_s:
                raise
            self._objects.put(_key(digest), data)
        except AlreadyExistsError:
            if self._has_intact(digest, len(data), io.BytesIO(data)):
                self.touch(digest)
            else:
                self._objects.put(_key(digest), data)
        return digest, len(data)

    def _put_file(self, file: BinaryIO) -> tuple[str, int]:
        if os.fstat(file.fileno()).st_size <= self._options.part_bytes:
            return self._put_stream(file)
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        try:
            return digest, self._upload(digest, file)
        except ChangedError:  # between the two readings: the bytes of a third count
            file.seek(0)
            return self._put_stream(file)

    def _put_stream(self, source: BinaryIO) -> tuple[str, int]:
        """By one request if it is small, else through a file in the cache."""
        head = b""
        while len(head) <= self._options.part_bytes:
            more = source.read(self._options.part_bytes + 1 - len(head))
            if not more:
                return self._put_bytes(head)
            head += more
        spooled = self._cache.add(Chained(head, source))  # type: ignore[arg-type]
        path = self._cache.path(spooled.digest)
        if path is None:
            raise UnavailableError("the cache lost what was spooled to it", hint="give the cache more bytes")
        try:
            with path.open("rb") as file:
                self._upload(spooled.digest, file)
        except BaseException:
            self._cache.forget(spooled.digest)  # or this process alone would believe that it is stored
            raise
        return spooled.digest, spooled.size_bytes

    def _upload(self, digest: str, file: BinaryIO) -> int:
        """Send a file whose digest is known, in parts that become visible together. Returns its size."""
        size = os.fstat(file.fileno()).st_size
        if self._has_intact(digest, size, file):
            self.touch(digest)
            return size
        file.seek(0)
        part = self._part_bytes(size)
        try:
            self._objects.put_parts(_key(digest), parts_of(file, digest, part), part)
        except UnavailableError:  # unless only the answer to the last request was lost
            if not self._has_intact(digest, size, file):
                raise
        return size

    def _has_intact(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Whether the store has these bytes: by its own hash of them if that can be foretold, else by reading."""
        meta = self._head(digest)
        if meta is None or meta["size"] != size:
            return False
        tag = meta["e_tag"] or ""
        if tag and tag == self._verified.get(digest):
            return True
        if tag.strip('"') != expected_etag(source, tag, self._part_bytes(size)):
            try:
                self._objects.drain(_key(digest), size, digest)
            except CorruptError:
                return False
        self._verified[digest] = tag
        return True

    def _part_bytes(self, size: int) -> int:
        """S3 takes 10,000 parts."""
        return max(self._options.part_bytes, -(-size // 9000))

    def _accept(self, digest: str, size: int, sent: Any) -> None:
        """Verify what was sent, copy it to its place, and see that the copy is of what was verified."""
        incoming = _incoming(digest)
        try:
            if sent["size"] != size:
                raise CorruptError(f"want {size} bytes for {digest}, {sent['size']} were sent")
            self._objects.drain(incoming, size, digest)
        except CorruptError:
            self._objects.remove(incoming)
            raise
        self._objects.copy(incoming, _key(digest))
        copy = self._present(digest)
        if not sent["e_tag"] or copy["e_tag"] != sent["e_tag"]:
            try:
                self._objects.drain(
                    _key(digest), size, digest
                )  # the URL was used again meanwhile, or tags are not hashes
            except CorruptError:
                self.delete(digest)
                raise
        self._objects.remove(incoming)

    # ------------------------------------------------------------------ reading

    def _path(self, digest: str, pins: Pins | None = None) -> Path:
        return self._cache.fetched(digest, lambda: self._download(digest), pins)

    def _download(self, digest: str) -> None:
        size = self._present(digest)["size"]
        with io.BufferedReader(self._objects.reader(_key(digest), size, ""), BUFFER_BYTES) as reader:
            stored = self._cache.add(reader, size)
        if stored.digest != digest:
            self._cache.forget(stored.digest)
            raise damaged(digest, stored.digest)

    def _present(self, digest: str) -> Any:
        meta = self._head(digest)
        if meta is None:
            raise NotFoundError(f"there is no blob {digest} in {self.url}", hint="run the step that makes it again")
        return meta


def _check_digest(digest: str) -> str:
    if not _HEX.fullmatch(digest):
        raise InputError(f"want a digest sha256: and 64 hexadecimal digits, got {digest!r}")
    return digest


def _key(digest: str) -> str:
    return f"sha256/{_check_digest(digest)[7:9]}/{digest[9:]}"


def _mark(digest: str) -> str:
    return f"touched/{_check_digest(digest)[7:9]}/{digest[9:]}"


def _aside(digest: str) -> str:
    return f"discarded/{_check_digest(digest)[7:9]}/{digest[9:]}"


def _incoming(digest: str) -> str:
    return f"incoming/{_check_digest(digest)[7:9]}/{digest[9:]}"
