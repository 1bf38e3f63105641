"""What an upload is made of: parts that are hashed once more on their way, and what the store will call them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO


class ChangedError(Exception):
    """A file changed between being hashed and being sent; raised before the upload completes."""


class Chained:
    """A stream whose first bytes were read already.

    Example:
        >>> import io
        >>> stream = Chained(b"ab", io.BytesIO(b"cd"))
        >>> stream.read(10), stream.read(10), stream.read(10)
        (b'ab', b'cd', b'')
    """

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        """What was read already, then the rest."""
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
            return piece
        return self._rest.read(size)


def parts_of(file: BinaryIO, digest: str, part_bytes: int) -> Iterator[bytes]:
    """The parts of a file; when its bytes no longer have the digest, ChangedError comes in place of the end.

    Args:
        file: At its start.
        digest: What its bytes had when they were hashed.
        part_bytes: Of every part but the last.

    Raises:
        ChangedError: The upload must not complete.

    Example:
        >>> import io
        >>> list(parts_of(io.BytesIO(b"abc"), "sha256:" + hashlib.sha256(b"abc").hexdigest(), 2))
        [b'ab', b'c']
    """
    actual = hashlib.sha256()
    while part := file.read(part_bytes):
        actual.update(part)
        yield part
    if "sha256:" + actual.hexdigest() != digest:
        raise ChangedError(f"the file no longer has the digest {digest}")


def expected_etag(file: BinaryIO, tag: str, part_bytes: int) -> str:
    """The tag that S3 gives to these bytes: their MD5, or for a multipart upload the MD5 of the parts' MD5.

    Args:
        file: The bytes.
        tag: What the store says; its form tells how they were sent.
        part_bytes: The parts in which they would have been sent.

    Returns:
        Empty when the form is another one: encrypted with KMS, or not S3.

    Source:
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html

    Example:
        >>> import io
        >>> expected_etag(io.BytesIO(b""), '"d41d8cd98f00b204e9800998ecf8427e"', 5)
        'd41d8cd98f00b204e9800998ecf8427e'
    """
    digits, _, count = tag.strip('"').partition("-")
    if len(digits) != 32:
        return ""
    file.seek(0)
    if not count:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()  # type: ignore[arg-type]
    parts = b""
    while part := file.read(part_bytes):
        parts += hashlib.md5(part, usedforsecurity=False).digest()
    return f"{hashlib.md5(parts, usedforsecurity=False).hexdigest()}-{len(parts) // 16}"
