"""Blobs of a remote store kept on this disk: verified, bounded, shared by processes."""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from millrace.core.errors import CorruptError, NotFoundError, UnavailableError
from millrace.core.types import Artifact
from millrace.store.blobs_local import LocalBlobs, disk_errors

PINS = 256  # paths handed out last that this process keeps safe from eviction, one open file each
GRACE_S = 5.0  # a file used so recently is being opened by somebody
_ATTEMPTS = 5


class Pins:
    """Files that nobody evicts: each is held under a shared lock, which the kernel drops when the process dies.

    Args:
        bound: At most so many, one open file each; the least recently pinned is let go.
    """

    def __init__(self, bound: int) -> None:
        self._bound, self._lock = bound, threading.Lock()
        self._held: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._held)

    def pin(self, digest: str, path: Path) -> bool:
        """Hold a file and mark it as used; False when it has just been evicted."""
        with self._lock:
            held = self._held.get(digest)
            if held is None or not _is_same(held, path):
                self._drop(digest)
                held = _locked(path, fcntl.LOCK_SH)
                if held is None:
                    return False
                self._held[digest] = held
            self._held.move_to_end(digest)
            with disk_errors(path):
                os.utime(held, ns=(time.time_ns(), os.fstat(held).st_mtime_ns))
            while len(self._held) > self._bound:
                self._drop(next(iter(self._held)))
        return True

    def drop(self, digest: str) -> None:
        """Let go of one, if it is held."""
        with self._lock:
            self._drop(digest)

    def close(self) -> None:
        """Let go of all."""
        with self._lock:
            _close_all(self._held)

    def _drop(self, digest: str) -> None:
        held = self._held.pop(digest, None)
        if held is not None:
            os.close(held)


class BlobCache:
    """A folder of blobs, the least recently used of which make room for others. Thread- and process-safe.

    A path that was handed out stays for as long as this process lives and it is among its last `PINS`. Files that
    are open or linked elsewhere live on anyway.

    Args:
        folder: Where; made when absent.
        limit_bytes: Bound of all files together. One larger blob may pass it, as may what is pinned or was used
            within `grace_s`; several processes may pass it by 1/16 each, for so often they count.
        grace_s: See `limit_bytes`.

    Example:
        >>> import io, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = BlobCache(Path(folder), limit_bytes=1000)
        ...     digest = cache.add(io.BytesIO(b"hello")).digest
        ...     path = cache.path(digest)
        ...     path.read_bytes(), cache.path("sha256:" + "0" * 64)
        (b'hello', None)
    """

    def __init__(self, folder: Path, limit_bytes: int, grace_s: float = GRACE_S) -> None:
        self._blobs = LocalBlobs(folder, is_durable=False)
        self._limit, self._grace_s = limit_bytes, grace_s
        self._lock, self._pins = threading.Lock(), Pins(PINS)
        self._total: int | None = None  # as counted last, by this process
        self._added = 0  # since then

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._blobs.root

    def path(self, digest: str, pins: Pins | None = None) -> Path | None:
        """The verified file of a blob, pinned and marked as used; None when it is not here or was damaged.

        Args:
            digest: Of the blob.
            pins: Who holds it; the cache itself when absent.
        """
        try:
            path = self._blobs.path(digest)
        except NotFoundError:
            return None
        except CorruptError:
            self._blobs.delete(digest)
            return None
        return path if (pins or self._pins).pin(digest, path) else None

    def fetched(self, digest: str, add: Callable[[], object], pins: Pins | None = None) -> Path:
        """The pinned file of a blob, which `add` puts here if need be.

        Raises:
            UnavailableError: Others evict it again and again.
        """
        for _ in range(_ATTEMPTS):
            path = self.path(digest, pins)
            if path is not None:
                return path
            add()
        raise UnavailableError(
            f"the cache in {self.folder} loses {digest} as soon as it is there", hint="give the cache more bytes"
        )

    def add(self, source: BinaryIO, size: int = 0) -> Artifact:
        """Keep the bytes of a stream, making room before (for `size`, if known) and after.

        Raises:
            DiskFullError: No space; nothing of it remains.
        """
        self._make_room(size, "")
        stored = self._blobs.put(source)
        with self._lock:
            self._added += stored.size_bytes
        self._make_room(0, stored.digest)
        return stored

    def forget(self, digest: str) -> None:
        """Remove a blob from here."""
        self._pins.drop(digest)
        self._blobs.delete(digest)

    def close(self) -> None:
        """Let go of every pin."""
        self._pins.close()

    def _make_room(self, size: int, spared: str) -> None:
        """Evict what was used least recently, but not the digest `spared`, until `size` more bytes fit."""
        with self._lock:
            is_counted = self._total is not None and self._added < self._limit // 16
            if is_counted and (self._total or 0) + self._added + size <= self._limit:
                return
            files = self._files()
            total = sum(bytes_ for _, bytes_, _ in files)
            young = time.time() - self._grace_s
            for used, bytes_, place in files:
                if total + size <= self._limit or used > young:
                    break
                if place.name != spared[9:] and _evict(place):
                    total -= bytes_
            self._total, self._added = total, 0

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, place) of every file, the least recently used first."""
        found = []
        for place in (self._blobs.root / "sha256").glob("*/*"):
            try:
                state = place.stat()
            except FileNotFoundError:
                continue
            found.append((state.st_atime, state.st_size, place))
        return sorted(found)


def _close_all(held: OrderedDict[str, int]) -> None:
    while held:
        os.close(held.popitem()[1])


def _evict(place: Path) -> bool:
    """Unlink a file that nobody has pinned."""
    held = _locked(place, fcntl.LOCK_EX)
    if held is None:
        return False
    place.unlink(missing_ok=True)
    os.close(held)
    return True


def _locked(place: Path, kind: int) -> int | None:
    """A descriptor of the file under a lock; None when it is gone or somebody's lock forbids it."""
    try:
        held = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, kind | fcntl.LOCK_NB)
        if _is_same(held, place):
            return held
    except BlockingIOError:
        os.close(held)
        return None
    os.close(held)
    return None


def _is_same(held: int, place: Path) -> bool:
    """Whether a place still names an open file."""
    try:
        return os.path.samestat(os.fstat(held), place.stat())
    except FileNotFoundError:
        return False
