"""Backups in an object store."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from millrace.core.errors import NotFoundError
from millrace.store.backup_place import Stored, checked_name, regular
from millrace.store.blobs_local import CHUNK_BYTES
from millrace.store.object_client import ObjectClient
from millrace.store.object_store import RemoteOptions


class ObjectPlace:
    """Implements `backup_place.Place` below a URL.

    Args:
        url: `s3://bucket/prefix`, `gs://…`, `az://…`, `memory:///`.
        options: How to reach the store; credentials come from the environment.

    Example:
        >>> place = ObjectPlace("memory:///")
        >>> place.put("blobs/ab/cd", [b"some ", b"bytes"]), place.open("blobs/ab/cd").read(), [*place.list("blobs")]
        (10, b'some bytes', [Stored(name='blobs/ab/cd', size_bytes=10)])
    """

    def __init__(self, url: str, options: RemoteOptions | None = None) -> None:
        self._options = options or RemoteOptions()
        self._objects = ObjectClient(url, self._options)

    @property
    def url(self) -> str:
        """The URL; it holds no credentials."""
        return self._objects.url

    @property
    def is_foreign(self) -> bool:
        """No: what else is below a prefix does no harm."""
        return False

    def put(self, name: str, parts: Iterable[bytes]) -> int:
        """By one request, or in parts that become visible together; a store acknowledges what is durable."""
        checked_name(name)
        counted = _Counted(parts)
        pieces = regular(counted, self._options.part_bytes)
        first = next(pieces, b"")
        second = next(pieces, None)
        if second is None:
            self._objects.put(name, first)
        else:
            self._objects.put_parts(name, chain((first, second), pieces), self._options.part_bytes)
        return counted.size

    def open(self, name: str) -> BinaryIO:
        """The bytes of an object, the next ones fetched ahead."""
        meta = self._objects.head(checked_name(name))
        if meta is None:
            raise NotFoundError(f"{self.url} has no {name}", hint="`millrace system verify` says what is whole")
        if meta["size"] <= CHUNK_BYTES:
            return io.BytesIO(bytes(self._objects.range(name, 0, meta["size"])) if meta["size"] else b"")
        return io.BufferedReader(self._objects.reader(name, meta["size"], ""), CHUNK_BYTES)

    def list(self, prefix: str) -> Iterator[Stored]:
        """Every object below a prefix."""
        for meta in self._objects.list(checked_name(prefix)):
            yield Stored(meta["path"], meta["size"])

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._objects.remove(checked_name(name))

    def close(self) -> None:
        """Let go of the threads."""
        self._objects.close()


class _Counted:
    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self.size = parts, 0

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            self.size += len(part)
            yield part
