"""Many blobs put back into a folder: copied inside the kernel, hashed as they arrived, made durable all at once."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import BinaryIO

from millrace.core.errors import CorruptError, NotFoundError
from millrace.core.ids import new_id
from millrace.store.blobs_local import LocalBlobs, damaged, disk_errors

CHUNK_BYTES = 256 << 10  # as much as an envelope opens at once: it stays in the processor's cache
PIECE_BYTES = 4 << 20  # copied, then hashed, by few calls: each of them waits for the thread that puts rows back
_NO_FILE_TO_FILE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_SYNCFS = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)


class BulkBlobs(LocalBlobs):
    """The blobs of a home that is being restored. What was put is durable when `sync` returns, and not before.

    Args:
        root: The folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     blobs = BulkBlobs(Path(folder))
        ...     digest = "sha256:" + hashlib.sha256(b"hello").hexdigest()
        ...     blobs.receive(io.BytesIO(b"hello"), digest, 5)
        ...     blobs.sync()
        ...     blobs.read(digest), blobs.is_whole(digest)
        (b'hello', True)
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, is_durable=False)

    def receive(self, source: BinaryIO, digest: str, size: int) -> None:
        """Store a stream.

        Args:
            source: At its beginning; a file is copied without passing through this process.
            digest: What is wanted; that of what lies on the disk in the end is compared.
            size: So many bytes.

        Raises:
            CorruptError: It is something else; nothing is kept.
            DiskFullError: No space; nothing remains.
        """
        place, temp = self._place(digest), self._temp / new_id()
        try:
            with disk_errors(self.root):
                with temp.open("x+b", buffering=0) as file:
                    actual = _copy(source, file, size)
                    os.fchmod(file.fileno(), 0o444)
                if actual != digest:
                    raise damaged(digest, actual)
                place.parent.mkdir(exist_ok=True)
                os.replace(temp, place)
        finally:
            temp.unlink(missing_ok=True)

    def is_whole(self, digest: str) -> bool:
        """Whether it is there, every byte of it: what a power cut has left may not be."""
        try:
            self.path(digest)
        except (CorruptError, NotFoundError):
            return False
        return True

    def sync(self) -> None:
        """Have everything on the disk.

        Raises:
            UnavailableError: The disk says that something could not be written.
        """
        if _SYNCFS is None:  # no Linux
            os.sync()
            return
        with disk_errors(self.root):
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _SYNCFS(descriptor) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(self.root))
            finally:
                os.close(descriptor)


def _copy(source: BinaryIO, target: io.FileIO, size: int) -> str:
    """Copy so many bytes, and one more if there are more; the digest of what came."""
    hasher, buffer, done = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES)), 0
    while done <= size and (count := _splice(source, target, size + 1 - done)):
        while count and (part := os.preadv(target.fileno(), [buffer[:count]], done)):
            hasher.update(buffer[:part])
            done += part
            count -= part
    while done <= size and (count := source.readinto(buffer[:CHUNK_BYTES])):  # type: ignore[attr-defined]
        hasher.update(buffer[:count])
        rest = buffer[:count]
        while rest:
            rest = rest[target.write(rest) :]
        done += count
    return "sha256:" + hasher.hexdigest()


def _splice(source: BinaryIO, target: io.FileIO, most: int) -> int:
    """Have the kernel copy some bytes of a file; 0 at its end, or where it cannot."""
    if not isinstance(source, io.FileIO) or sys.platform != "linux":
        return 0
    try:
        return os.sendfile(target.fileno(), source.fileno(), None, min(most, PIECE_BYTES))
    except OSError as error:
        if error.errno in _NO_FILE_TO_FILE:
            return 0
        raise
