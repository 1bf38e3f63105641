"""A seekable file over range requests that verifies what is read from end to end."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from millrace.core.errors import InputError
from millrace.store.blobs_local import damaged

Buffer = bytes | memoryview | Any  # whatever memoryview takes: typing has no word for it before 3.12
FIRST_BYTES = 256 << 10  # of a read that may be one look at a header; doubled while reading on


class RangeReader(io.RawIOBase):
    """Reads a blob in ranges; while somebody reads on, the next ranges are fetched ahead.

    Whoever reads to the end without leaving a gap gets CorruptError there if the bytes are not what the digest
    says, before the last of them is handed out. After a jump ahead nothing can be said.

    Args:
        fetch: Bytes (any buffer) from start to end (exclusive); exactly so many, or it raises.
        size: Of the blob.
        digest: To verify; "" when somebody else does.
        largest: Most bytes of one range.
        executor: Where to fetch ahead; None: never ahead.
        depth: How many ranges ahead.

    Example:
        >>> data = b"some bytes"
        >>> digest = "sha256:" + hashlib.sha256(data).hexdigest()
        >>> reader = RangeReader(lambda start, end: data[start:end], len(data), digest)
        >>> reader.seek(5), reader.read(), reader.seek(0), reader.read()
        (5, b'bytes', 0, b'some bytes')
    """

    def __init__(
        self,
        fetch: Callable[[int, int], Buffer],
        size: int,
        digest: str,
        largest: int = 8 << 20,
        executor: Executor | None = None,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self._fetch, self._size, self._digest = fetch, size, digest
        self._executor, self._depth = executor, depth
        self._largest, self._step = largest, min(FIRST_BYTES, largest)
        self._position = self._hashed = self._start = 0
        self._window = memoryview(b"")
        self._ahead: deque[tuple[int, int, Future[Buffer]]] = deque()  # adjoining ranges (start, end)
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; nothing is fetched until the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise InputError(f"cannot seek before the start of a blob, to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; raises CorruptError at the end of a damaged blob."""
        view = memoryview(buffer).cast("B")
        piece = self._piece()[: len(view)]
        self._check(piece)
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def readall(self) -> bytes:
        """Everything from here to the end; raises CorruptError if the blob is damaged."""
        whole = io.BytesIO()  # a list of pieces to join would take the memory twice
        while piece := self._piece():
            self._check(piece)
            self._position += len(piece)
            whole.write(piece)
        self._check(memoryview(b""))
        return whole.getvalue()

    def close(self) -> None:
        """Forget what was fetched ahead."""
        self._drop_ahead()
        self._window = memoryview(b"")
        super().close()

    def _piece(self) -> memoryview:
        """What is at hand from the position on; fetched when nothing is. Empty at the end."""
        if self._position >= self._size:
            return memoryview(b"")
        if not self._start <= self._position < self._start + len(self._window):
            is_next = bool(self._window) and self._position == self._start + len(self._window)
            self._step = min(self._step * 2, self._largest) if is_next else min(FIRST_BYTES, self._largest)
            self._start, self._window = self._position, memoryview(self._take())
            if is_next:
                self._fetch_ahead()
        return self._window[self._position - self._start :]

    def _take(self) -> Buffer:
        """The range from the position on: the one fetched ahead, or a new one."""
        if self._ahead and self._ahead[0][0] == self._position:
            return self._ahead.popleft()[2].result()
        self._drop_ahead()
        return self._fetch(self._position, min(self._position + self._step, self._size))

    def _fetch_ahead(self) -> None:
        start = self._ahead[-1][1] if self._ahead else self._start + len(self._window)
        while self._executor is not None and len(self._ahead) < self._depth and start < self._size:
            self._step = min(self._step * 2, self._largest)
            end = min(start + self._step, self._size)
            self._ahead.append((start, end, self._executor.submit(self._fetch, start, end)))
            start = end

    def _drop_ahead(self) -> None:
        for _, _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _check(self, piece: memoryview) -> None:
        """Hash what is new without a gap; compare once the end is reached."""
        if not self._digest:
            return
        done = self._hashed - self._position
        if 0 <= done < len(piece):
            self._hash.update(piece[done:])
            self._hashed = self._position + len(piece)
        if self._hashed == self._size:
            actual = "sha256:" + self._hash.hexdigest()
            if actual != self._digest:
                raise damaged(self._digest, actual)
