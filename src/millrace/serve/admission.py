"""Who may wait: a bounded queue, and how a refusal is worded and paced."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import Callable

from millrace.core.types import Struct
from millrace.serve.clients import Client

RETRY_AFTER_MAX_S = 30
QUEUE_S = 1.0
LEARN_S = 0.1  # for so long there must have been something to do before a measured speed counts
MARGIN = 1.15  # of a measured cost: a shorter queue costs no answers, a longer one keeps people waiting
QUICKER_SHARE = 0.25  # of the way to a lower cost that one measurement is believed
REFUSALS_PER_S = 1000.0  # of all clients together: answering a refusal costs about 30 us
REFUSED_BYTES_PER_S = 32e6  # of their bodies: receiving a megabyte costs a millisecond or more of both sides
LONGEST_S = 5.0  # for the sake of a body no refusal is held longer
MAX_HELD = 2048


class Refusal(Struct, frozen=True, kw_only=True):
    """Why a request may not wait: an HTTP status, a sentence, and when to come back."""

    status: int
    message: str
    retry_after_s: int = 0

    @property
    def headers(self) -> bytes:
        """Lines for HTTP."""
        return b"Retry-After: %d\r\n" % self.retry_after_s if self.retry_after_s else b""


class Admission:
    """Counts what waits or runs. For one thread: the event loop's.

    The queue is bounded by the time that it is predicted to take, besides requests and bytes. The prediction
    begins with the calibration and is corrected by how fast answers leave while there is work.

    Args:
        limit: Requests that may wait or run at once.
        max_bytes: Bytes of their bodies at once.
        share: The part of `limit` that one connection may hold.
        hold_s: For how long the transport keeps a refusal back at least (see `Pacer`).
        queue_s: Nobody is let in behind more predicted seconds of work than that.
        client_share: The part of the queue that one client may hold.

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

    def __init__(
        self, limit: int = 1024, max_bytes: int = 256 << 20, share: float = 0.5, hold_s: float = 0.05,
        queue_s: float = QUEUE_S, client_share: float = 0.5,
    ) -> None:  # fmt: skip
        self.limit = limit
        self.max_bytes = max_bytes
        self.queue_s = queue_s
        self.per_connection = max(1, int(limit * share))
        self.client_share = client_share
        self.hold_s = hold_s
        self.waiting = 0
        self.waiting_bytes = 0
        self.rows = 0  # of what waits or runs
        self.held: dict[Client, tuple[int, int]] = {}  # requests and rows by client
        self.is_draining = False
        self.busy_since_ns = 0  # 0: when the last answer left, nothing waited
        self._busy_rows = 0
        self._seconds_per_row = 0.0
        self.calibrated_s = 0.0
        self.max_rows = sys.maxsize

    @property
    def seconds_per_row(self) -> float:
        """What one row costs: as calibrated when it is set, as measured later."""
        return self._seconds_per_row

    @seconds_per_row.setter
    def seconds_per_row(self, cost_s: float) -> None:
        self.calibrated_s = cost_s
        self._believe(cost_s)

    def _believe(self, cost_s: float) -> None:
        self._seconds_per_row = cost_s
        self.max_rows = max(1, int(self.queue_s / cost_s)) if cost_s > 0 else sys.maxsize

    @property
    def is_slow(self) -> bool:
        """Whether rows take longer than calibrated."""
        return self._seconds_per_row > self.calibrated_s

    @property
    def wait_s(self) -> float:
        """The predicted seconds until what waits or runs now is answered."""
        return self.rows * self._seconds_per_row

    def refusal(self, size_bytes: int, held_by_connection: int = 0, client: Client | None = None) -> Refusal | None:
        """Why a request would not be let in; nothing is counted. To be asked before its body is looked at.

        Args:
            size_bytes: Of its body.
            held_by_connection: How many requests of the same connection wait already.
            client: Whose quota it is; None: nobody's.

        Returns:
            None when it would be admitted. Otherwise the refusal: 429 when this connection or this client alone
            holds its share, 503 when the server is full.
        """
        waiting = self.waiting
        if waiting:
            if held_by_connection >= self.per_connection and waiting >= self.per_connection:
                return self._refused(429, f"this connection already has {held_by_connection} requests waiting")
            if waiting >= self.limit:
                return self._refused(503, f"the queue is full: {waiting} requests wait")
            if self.rows >= self.max_rows:
                return self._refused(
                    503, f"the queue is full: {self.rows} rows wait, predicted to take {self.wait_s:.2g} s;"
                    f" want at most {self.queue_s:g} s",
                )  # fmt: skip
            if self.waiting_bytes + size_bytes > self.max_bytes:
                return self._refused(503, f"the queue is full: {self.waiting_bytes} bytes wait")
        return None if client is None else self._over_quota(client)

    def admit(
        self, size_bytes: int, held_by_connection: int = 0, rows: int = 1, client: Client | None = None
    ) -> Refusal | None:
        """Count a request in, or say why not.

        Args:
            size_bytes: Of its body.
            held_by_connection: How many requests of the same connection wait already.
            rows: That it brings.
            client: Whose quota it uses; None: nobody's.

        Returns:
            None when admitted: `release` must follow. Otherwise as `refusal`.
        """
        waiting = self.waiting
        if client is not None or (
            waiting
            and (
                waiting >= self.limit
                or self.rows >= self.max_rows
                or held_by_connection >= self.per_connection
                or self.waiting_bytes + size_bytes > self.max_bytes
            )
        ):
            refusal = self.refusal(size_bytes, held_by_connection, client)
            if refusal is not None:
                return refusal
            if client is not None:
                client.take(time.monotonic())
                requests, held_rows = self.held.get(client, (0, 0))
                self.held[client] = (requests + 1, held_rows + rows)
        self.waiting = waiting + 1
        self.waiting_bytes += size_bytes
        self.rows += rows
        return None

    def count(self, size_bytes: int, rows: int) -> None:
        """Count in what may not be refused."""
        self.waiting += 1
        self.waiting_bytes += size_bytes
        self.rows += rows

    def release(self, size_bytes: int, count: int = 1, rows: int = 1) -> None:
        """Count answered requests out; `size_bytes` and `rows` are the sums of theirs."""
        self.waiting -= count
        self.waiting_bytes -= size_bytes
        self.rows -= rows

    def release_client(self, client: Client | None, rows: int) -> None:
        """Count a request out of its client's share."""
        if client is not None:
            requests, held_rows = self.held.get(client, (1, rows))
            if requests > 1:
                self.held[client] = (requests - 1, held_rows - rows)
            else:
                self.held.pop(client, None)

    def learn(self, rows: int, enqueued_ns: int, now_ns: int) -> None:
        """Correct the prediction by what left just now; to be called after `release`.

        While there was always work for `LEARN_S`, rows per time is the speed. That the model has become slower is
        believed at once, up to twice as slow (one call that hung is no speed); that it is quicker little by little: a
        queue that is shorter than it may be costs nothing, a longer one keeps people waiting. A shorter time can only
        show that a row costs less than was believed: a few rows at once do not reach full speed. What was measured is
        taken for a little more, since the next rows may take longer.

        Args:
            rows: That were answered.
            enqueued_ns: When the first of them had come.
            now_ns: On the same clock.
        """
        self.busy_since_ns = self.busy_since_ns or enqueued_ns
        self._busy_rows += rows
        took_s = (now_ns - self.busy_since_ns) / 1e9
        cost_s, believed_s = took_s / max(1, self._busy_rows), self._seconds_per_row
        if took_s >= LEARN_S:
            cost_s *= MARGIN
            quicker_s = believed_s + QUICKER_SHARE * (cost_s - believed_s)
            self._believe(min(cost_s, 2 * believed_s) if cost_s > believed_s else quicker_s)
            self.busy_since_ns, self._busy_rows = now_ns, 0
        elif not self.waiting and cost_s < believed_s:
            self._believe(max(believed_s + QUICKER_SHARE * (cost_s - believed_s), self.calibrated_s))
        if not self.waiting:
            self.busy_since_ns = self._busy_rows = 0

    def _over_quota(self, client: Client) -> Refusal | None:
        wait_s = client.wait_s(time.monotonic())
        if wait_s > 0:
            return Refusal(
                status=429, retry_after_s=max(1, math.ceil(wait_s)),
                message=f"{client.name} sends more than its {client.rate:g} requests a second",
            )  # fmt: skip
        requests, rows = self.held.get(client, (0, 0))
        share = self.client_share
        if requests and client.has_share and (requests >= self.limit * share or rows >= self.max_rows * share):
            what = f"has {requests} requests of {rows} rows waiting"
            return self._refused(429, f"{client.name} alone {what}: want at most {share:.0%} of the queue")
        return None

    def _refused(self, status: int, message: str) -> Refusal:
        wait_s = min(RETRY_AFTER_MAX_S, max(1, math.ceil(self.wait_s)))
        return Refusal(status=status, message=message, retry_after_s=wait_s)


class Pacer:
    """Holds refusals back. For the event loop's thread.

    A refused client that retries at once can take the cores that the model needs (measured: goodput
    fell from 83 to 46 answers a second). So each is held for a while, and longer while there are many:
    no more than `per_s` leave in a second, and fewer where the client would then send a large body in vain again.

    Args:
        per_s: Refusals that leave in a second.
        limit: That are held at once.
        bytes_per_s: Of the bodies of those that leave in a second, while none is held for longer than `LONGEST_S`.
    """

    def __init__(
        self, per_s: float = REFUSALS_PER_S, limit: int = MAX_HELD, bytes_per_s: float = REFUSED_BYTES_PER_S
    ) -> None:  # fmt: skip
        self.limit = limit
        self._gap_s, self._byte_s = 1 / per_s, 1 / bytes_per_s
        self._held: deque[tuple[float, Callable[[], None]]] = deque()
        self._last_due_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, send: Callable[[], None], hold_s: float, size_bytes: int = 0) -> bool:
        """Call `send` later; False when too many are held: then it is never called.

        Args:
            send: Sends the refusal.
            hold_s: From now at least.
            size_bytes: Of the body that is refused.
        """
        if len(self._held) >= self.limit:
            return False
        loop = asyncio.get_running_loop()
        now_s, gap_s = loop.time(), max(self._gap_s, size_bytes * self._byte_s)
        soonest_s = self._last_due_s + (gap_s if self._last_due_s + gap_s < now_s + LONGEST_S else self._gap_s)
        self._last_due_s = max(now_s + hold_s, soonest_s)
        self._held.append((self._last_due_s, send))
        if len(self._held) == 1:
            loop.call_at(self._last_due_s, self._fire)
        return True

    def _fire(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time() + self._gap_s / 2  # a timer may be early by its resolution
        while self._held and self._held[0][0] <= now_s:
            self._held.popleft()[1]()
        if self._held:
            loop.call_at(self._held[0][0], self._fire)
