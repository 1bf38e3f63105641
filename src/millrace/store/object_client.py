"""The few requests that blobs make of an object store, each tried again and each error ours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import obstore

from millrace.core.errors import InputError, NotFoundError, UnavailableError
from millrace.store.blob_abilities import PresignedUrl
from millrace.store.object_store import RemoteOptions, no_bucket, open_store, store_errors
from millrace.store.range_reader import RangeReader

BUFFER_BYTES = 1 << 20
MAX_PRESIGNED_S = 7 * 24 * 3600  # of signature version 4
_PROBE = "sha256"


class ObjectClient:
    """Objects by key below a URL. Thread-safe.

    Args:
        url: See `object_store.open_store`.
        options: How to reach the store.
    """

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.url, self._options = url, options
        self._store: Any = open_store(url, options)
        self._ahead = ThreadPoolExecutor(options.parts_at_once, thread_name_prefix="blobs-ahead")
        self._has_bucket = False

    def head(self, key: str) -> Any:
        """What the store says of an object (`size`, `e_tag`, `last_modified`); None when it is not there.

        Raises:
            NotFoundError: The bucket does not exist.
        """
        with store_errors(self.url):
            try:
                meta = obstore.head(self._store, key)
            except FileNotFoundError:  # a missing bucket looks the same
                if not self._has_bucket:
                    next(iter(obstore.list(self._store, _PROBE, chunk_size=1)), None)
                meta = None
        self._has_bucket = True
        return meta

    def put(self, key: str, data: bytes, mode: str = "overwrite") -> None:
        """Write an object by one request; `mode="create"` only if there is none.

        Raises:
            obstore.exceptions.AlreadyExistsError: `create`, and there is one.
        """
        with store_errors(self.url):
            try:
                obstore.put(self._store, key, data, mode=mode, use_multipart=False)  # type: ignore[arg-type]
            except FileNotFoundError as error:
                if "NoSuchUpload" in str(error):
                    raise UnavailableError(f"{self.url}: the store does not know the upload of {key}") from None
                raise no_bucket(self.url) from None

    def put_parts(self, key: str, parts: Iterator[bytes], part_bytes: int) -> None:
        """Write an object in parts that become visible together; when `parts` raises, none of them do."""
        at_once = self._options.parts_at_once
        with store_errors(self.url):
            try:
                obstore.put(self._store, key, parts, use_multipart=True, chunk_size=part_bytes, max_concurrency=at_once)
            except FileNotFoundError as error:
                if "NoSuchUpload" in str(error):
                    raise UnavailableError(f"{self.url}: the store does not know the upload of {key}") from None
                raise no_bucket(self.url) from None

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store."""
        with store_errors(self.url):
            try:
                obstore.copy(self._store, source, target)
            except FileNotFoundError:
                raise NotFoundError(f"{self.url}: {source} is gone") from None

    def remove(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        with store_errors(self.url):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    def list(self, prefix: str) -> Iterator[Any]:
        """What the store says of every object below a prefix."""
        with store_errors(self.url):
            for batch in obstore.list(self._store, prefix):
                yield from batch

    def range(self, key: str, start: int, end: int) -> obstore.Bytes:
        """Bytes (a buffer) from start to end (exclusive).

        Raises:
            NotFoundError: There is no such object.
            UnavailableError: The store sends fewer, also after trying again.
        """
        with store_errors(self.url):
            try:
                data = obstore.get_range(self._store, key, start=start, end=end)
            except FileNotFoundError:
                raise NotFoundError(f"{self.url}: {key} is gone") from None
        if len(data) != end - start:
            raise UnavailableError(f"{self.url}: the store sent {len(data)} bytes of {end - start} of {key}")
        return data

    def reader(self, key: str, size: int, digest: str) -> RangeReader:
        """A seekable file that verifies `digest`, unless that is empty."""
        return RangeReader(
            lambda start, end: self.range(key, start, end), size, digest, self._options.part_bytes, self._ahead,
            self._options.parts_at_once,
        )  # fmt: skip

    def drain(self, key: str, size: int, digest: str) -> None:
        """Read an object for its verification alone.

        Raises:
            CorruptError: It has another digest.
        """
        buffer = memoryview(bytearray(BUFFER_BYTES))
        with self.reader(key, size, digest) as reader:
            while reader.readinto(buffer):
                pass

    @property
    def can_sign(self) -> bool:
        """Whether it is a store that others may be sent to."""
        return self.url.startswith(("s3:", "gs:", "az:"))

    def sign(self, method: str, key: str, expires_s: float) -> PresignedUrl:
        """A URL for one request by somebody without credentials.

        Raises:
            InputError: Too long a time, or a store that cannot sign.
        """
        if not 1 <= expires_s <= MAX_PRESIGNED_S:
            raise InputError(f"a presigned URL lives 1 to {MAX_PRESIGNED_S} seconds, got {expires_s}")
        if not self.can_sign:
            raise InputError(f"{self.url} cannot sign URLs: only s3://, gs:// and az:// can")
        headers = {"Content-Type": "application/octet-stream"} if method == "PUT" else {}
        if headers and self.url.startswith("az:"):
            headers["x-ms-blob-type"] = "BlockBlob"
        with store_errors(self.url):
            url = obstore.sign(self._store, method, key, timedelta(seconds=expires_s))  # type: ignore[arg-type]
        return PresignedUrl(method=method, url=url, headers=headers, expires_at=time.time() + expires_s)

    def close(self) -> None:
        """Let go of the threads."""
        self._ahead.shutdown(cancel_futures=True)
