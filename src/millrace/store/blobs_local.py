"""Blobs as files: `sha256/ab/cdef…`, read-only, never half-written, verified when read."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from millrace.core.errors import CorruptError, DiskFullError, InputError, NotFoundError, UnavailableError
from millrace.core.ids import new_id
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, TreeEntry
from millrace.store import trees

CHUNK_BYTES = 1 << 20
STALE_TEMP_S = 3600.0  # a temporary file that nobody has written to for so long belongs to a dead process
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalBlobs:
    """Implements `core.ports.Blobs` in a folder.

    Args:
        root: The folder, `blobs` in the home; made when absent.
        is_durable: Whether a put survives a power cut; a cache of what is stored elsewhere needs no fsync.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     blobs = LocalBlobs(Path(folder))
        ...     artifact = blobs.put(b"hello", "text/plain")
        ...     blobs.read(artifact.digest), artifact.size_bytes
        (b'hello', 5)
    """

    def __init__(self, root: Path, is_durable: bool = True) -> None:
        self.root, self._is_durable = Path(root).absolute(), is_durable
        self._files, self._temp, self._aside = self.root / "sha256", self.root / "temp", self.root / "discarded"
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        with disk_errors(self.root):
            self._files.mkdir(parents=True, exist_ok=True)
            self._temp.mkdir(exist_ok=True)
            self._aside.mkdir(exist_ok=True)
        self._remove_stale()

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes, a stream or a file; equal bytes are stored once, a damaged copy is replaced.

        Raises:
            DiskFullError: No space; nothing remains.
        """
        if isinstance(source, Path):
            with disk_errors(source), source.open("rb") as file:
                digest, size = _hash(file)
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
        """A forward-only reader; at the end of the stream a wrong digest raises CorruptError.

        Raises:
            NotFoundError: There is no such blob.
        """
        return io.BufferedReader(VerifyingReader(self._open(digest), digest), CHUNK_BYTES)

    def read(self, digest: str) -> bytes:
        """All bytes, verified.

        Raises:
            CorruptError: The bytes have another digest; the message names the blob.
        """
        with self.open(digest) as file:
            return file.read()

    def path(self, digest: str) -> Path:
        """A read-only local file with these bytes, verified unless this process has done so already."""
        place = self._place(digest)
        with self._open(digest) as file:
            known = _identity(os.fstat(file.fileno()))
            if self._verified.get(digest) != known:
                actual, _ = _hash(file)
                if actual != digest:
                    raise damaged(digest, actual)
                self._verified[digest] = known
        return place

    def exists(self, digest: str) -> bool:
        """Whether it is stored."""
        return self._place(digest).is_file() or self._bring_back(digest)

    def delete(self, digest: str) -> bool:
        """Remove it; False when it was not there."""
        place = self._place(digest)
        self._verified.pop(digest, None)
        self._bring_back(digest)
        try:
            place.unlink()
        except FileNotFoundError:
            return False
        self._sync(place.parent)
        return True

    def discard(self, digest: str) -> bool:
        """Put it aside: one rename, so nobody ever sees half of it. Whoever asks for it brings it back."""
        place = self._place(digest)
        try:
            os.utime(place)  # its age in the other folder counts from here
            os.rename(place, self._aside / digest[7:])
        except FileNotFoundError:
            return False
        self._verified.pop(digest, None)
        return True

    def discarded(self) -> Iterator[tuple[Artifact, float]]:
        """What was put aside, and when, in seconds since 1970."""
        for place in sorted(self._aside.iterdir()):
            try:
                state = place.stat()
            except FileNotFoundError:
                continue
            yield Artifact(digest=f"sha256:{place.name}", size_bytes=state.st_size), state.st_mtime

    def purge(self, digest: str) -> bool:
        """Delete what was put aside; False when it was brought back, or purged, meanwhile."""
        self._place(digest)
        try:
            os.unlink(self._aside / digest[7:])
        except FileNotFoundError:
            return False
        return True

    def _bring_back(self, digest: str) -> bool:
        """Undo `discard`; False when there is nothing to undo. A purge at the same moment is either first or late."""
        place, aside = self._place(digest), self._aside / digest[7:]
        if not aside.exists():
            return False
        try:
            if not place.parent.is_dir():
                place.parent.mkdir(exist_ok=True)
                self._sync(self._files)
            os.rename(aside, place)
        except FileNotFoundError:
            return False
        self._sync(place.parent)
        return True

    def modified_at(self, digest: str) -> float:
        """When it was last put or touched, in seconds since 1970: what is young may be about to be referred to.

        Raises:
            NotFoundError: There is no such blob.
        """
        with self._open(digest) as file:
            return os.fstat(file.fileno()).st_mtime

    def touch(self, digest: str) -> None:
        """Make it count as new, so that garbage collection spares it for a while.

        Raises:
            NotFoundError: There is no such blob.
        """
        with self._open(digest) as file:
            is_known = self._verified.get(digest) == _identity(os.fstat(file.fileno()))
            with disk_errors(self.root):
                os.utime(file.fileno())
            if is_known:
                self._verified[digest] = _identity(os.fstat(file.fileno()))

    def list(self) -> Iterator[Artifact]:
        """Every stored blob, in the order of the digests."""
        for folder in sorted(self._files.iterdir()):
            for place in sorted(folder.iterdir()):
                digest = f"sha256:{folder.name}{place.name}"
                if _DIGEST.fullmatch(digest):
                    yield Artifact(digest=digest, size_bytes=place.stat().st_size)

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
        entries = self.tree(digest)
        with disk_errors(folder):
            return trees.materialize(entries, folder, self.path)

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InputError(f"want a digest sha256: and 64 hexadecimal digits, got {digest!r}")
        return self._files / digest[7:9] / digest[9:]

    def _open(self, digest: str) -> BinaryIO:
        place = self._place(digest)
        for _ in range(3):  # a collector may put it aside again at once, but not for ever
            try:
                with disk_errors(place):
                    return place.open("rb", buffering=0)  # type: ignore[return-value]
            except InputError:
                if not self._bring_back(digest):
                    break
        raise NotFoundError(f"there is no blob {digest} in {self.root}", hint="run the step that makes it again")

    def _has_intact(self, digest: str) -> bool:
        """Whether it is stored, intact and durable; if so it counts as new from now on."""
        try:
            place = self.path(digest)
            self.touch(digest)
        except (NotFoundError, CorruptError):
            return False
        self._sync(place.parent)  # another process may have renamed it and not yet come to this
        return True

    def _store(self, source: BinaryIO) -> tuple[str, int]:
        """Copy to a temporary file while hashing, fsync, rename, fsync the folder."""
        temp = self._temp / new_id()
        try:
            with disk_errors(self.root):
                with temp.open("xb") as file:
                    digest, size = _hash(source, file)
                    file.flush()
                    os.fchmod(file.fileno(), 0o444)
                    if self._is_durable:
                        os.fsync(file.fileno())
                    known = _identity(os.fstat(file.fileno()))
                place = self._place(digest)
                if not place.parent.is_dir():
                    place.parent.mkdir(exist_ok=True)
                    self._sync(self._files)
                os.replace(temp, place)
                self._sync(place.parent)
                self._verified[digest] = known
        finally:
            temp.unlink(missing_ok=True)
        return digest, size

    def _sync(self, folder: Path) -> None:
        if self._is_durable:
            sync_folder(folder)

    def _remove_stale(self) -> None:
        """What processes that were killed while writing have left behind."""
        with os.scandir(self._temp) as entries:
            for entry in entries:
                try:
                    if time.time() - entry.stat().st_mtime > STALE_TEMP_S:
                        os.unlink(entry.path)
                except FileNotFoundError:
                    continue


class VerifyingReader(io.RawIOBase):
    """Passes bytes through and compares their digest at the end."""

    def __init__(self, file: BinaryIO, digest: str) -> None:
        super().__init__()
        self._file, self._digest, self._hash = file, digest, hashlib.sha256()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; raises CorruptError at the end of a damaged blob."""
        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._hash.update(buffer[:count])
        if not count and len(buffer):
            actual = "sha256:" + self._hash.hexdigest()
            if actual != self._digest:
                raise damaged(self._digest, actual)
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def damaged(digest: str, actual: str) -> CorruptError:
    """The refusal of a blob whose bytes are not what its name says."""
    return CorruptError(f"the blob {digest} is damaged: its bytes have the digest {actual}", details={"digest": digest})


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """A full disk as DiskFullError, a forbidden or failing one as UnavailableError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"cannot read or write {error.filename or place}: {error.strerror}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"{place}: the disk is full, nothing of this was written") from error
        raise UnavailableError(f"cannot read or write {error.filename or place}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    """What changes when somebody writes into a file."""
    return state.st_ino, state.st_mtime_ns, state.st_size


def _hash(source: BinaryIO, target: BinaryIO | None = None) -> tuple[str, int]:
    """Digest and size of a stream, copied to `target` on the way."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return "sha256:" + digest.hexdigest(), size
