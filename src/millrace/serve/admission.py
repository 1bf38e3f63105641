"""Who may wait: a bounded queue, and how a refusal is worded and paced."""

from __future__ import annotations

import math

from millrace.core.types import Struct

RETRY_AFTER_MAX_S = 30


class Refusal(Struct, frozen=True, kw_only=True):
    """Why a request may not wait: an HTTP status, a sentence, and when to come back."""

    status: int
    message: str
    retry_after_s: int


class Admission:
    """Counts what waits or runs. For one thread: the event loop's.

    A refused client that retries at once can take the cores that the model needs (measured: goodput
    fell from 83 to 46 answers a second), so the transport holds each refusal for `hold_s`.

    Args:
        limit: Requests that may wait or run at once.
        max_bytes: Bytes of their bodies at once.
        share: The part of `limit` that one connection may hold.
        hold_s: For how long the transport keeps a refusal back.

    Example:
        >>> admission = Admission(limit=1)
        >>> admission.admit(size_bytes=256) is None
        True
        >>> admission.admit(size_bytes=256).status
        503
        >>> admission.release(size_bytes=256)
        >>> admission.admit(size_bytes=256) is None
        True
    """

    def __init__(self, limit: int = 1024, max_bytes: int = 256 << 20, share: float = 0.5, hold_s: float = 0.05) -> None:
        self.limit = limit
        self.max_bytes = max_bytes
        self.per_connection = max(1, int(limit * share))
        self.hold_s = hold_s
        self.waiting = 0
        self.waiting_bytes = 0
        self.is_draining = False
        self.seconds_per_request = 0.0  # what one request costs, from the calibration

    def admit(self, size_bytes: int, held_by_connection: int = 0) -> Refusal | None:
        """Count a request in, or say why not.

        Args:
            size_bytes: Of its body.
            held_by_connection: How many requests of the same connection wait already.

        Returns:
            None when admitted: `release` must follow. Otherwise the refusal: 429 when this connection
            alone holds its share, 503 when the server is full.
        """
        if held_by_connection >= self.per_connection and self.waiting >= self.per_connection:
            return self._refusal(429, f"this connection already has {held_by_connection} requests waiting")
        if self.waiting >= self.limit:
            return self._refusal(503, f"the queue is full: {self.waiting} requests wait")
        if self.waiting and self.waiting_bytes + size_bytes > self.max_bytes:
            return self._refusal(503, f"the queue is full: {self.waiting_bytes} bytes wait")
        self.waiting += 1
        self.waiting_bytes += size_bytes
        return None

    def release(self, size_bytes: int, count: int = 1) -> None:
        """Count answered requests out; `size_bytes` is the sum of their bodies."""
        self.waiting -= count
        self.waiting_bytes -= size_bytes

    def _refusal(self, status: int, message: str) -> Refusal:
        wait_s = min(RETRY_AFTER_MAX_S, max(1, math.ceil(self.waiting * self.seconds_per_request)))
        return Refusal(status=status, message=message, retry_after_s=wait_s)
