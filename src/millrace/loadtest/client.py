"""What sends load: connections of HTTP/1.1 on one event loop, an open loop of arrivals or a closed loop of clients.

In the open loop a request's latency begins when it was due, not when a connection was free for it: a server that
stalls makes everything late that was due meanwhile, and that is counted.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, cast

import httptools
import numpy as np

from millrace.stats.hdr import HdrHistogram

_SWEEP_S = 0.25
_RETRY_S = 0.2
_REST_S = 2e-4  # arrivals that are nearer to one another are sent together
_now = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the load goes. `requests`: whole HTTP requests, sent one after another and again from the first."""

    name: str
    host: str
    port: int
    requests: list[bytes]
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much. `rate`: requests a second in the open loop; else `concurrency` clients in the closed loop.

    `is_poisson`: the open loop's gaps are random rather than equal. `connections`: at most, in the open loop.
    """

    rate: float | None = None
    concurrency: int = 1
    is_poisson: bool = False
    timeout_s: float = 10.0
    connections: int = 256
    seed: int = 0


@dataclass(kw_only=True)
class Measured:
    """What came of it. `slices` of time have the latencies of what was answered with 2xx.

    `unsent` were due in the open loop and had no free connection until the end; `lag`: how long after they were due
    requests were sent; `cpu_s`: what the load itself took.
    """

    name: str
    seconds: float = 0.0
    slices: list[HdrHistogram] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    lag: HdrHistogram = field(default_factory=HdrHistogram)
    cpu_s: float = 0.0

    @property
    def histogram(self) -> HdrHistogram:
        """Of all slices."""
        merged = HdrHistogram()
        for one in self.slices:
            merged.merge(one)
        return merged

    @property
    def answered(self) -> int:
        """With 2xx."""
        return sum(count for status, count in self.statuses.items() if 200 <= status < 300)

    @property
    def failures(self) -> int:
        """Everything else: other statuses, broken connections, time-outs, and what was never sent."""
        return self.statuses.total() - self.answered + self.errors.total() + self.unsent

    def add(self, other: Measured) -> None:
        """Add a later stretch of time."""
        self.seconds += other.seconds
        self.slices += other.slices
        self.statuses += other.statuses
        self.errors += other.errors
        self.unsent += other.unsent
        self.lag.merge(other.lag)
        self.cpu_s += other.cpu_s


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self.transport: Any = None
        self.due = self.sent_at = 0.0
        self.is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._client.all.add(self)
        self._client.free(self)

    def send(self, request: bytes, due: float, now: float) -> None:
        self.due, self.sent_at, self.is_busy = due, now, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._give_up("the answer is not HTTP")

    def on_message_complete(self) -> None:
        if not self.is_busy:
            self._give_up("")  # nobody asked
            return
        self.is_busy = False
        status = self._parser.get_status_code()
        keeps = self._parser.should_keep_alive()
        self._client.phase.answered(self.due, status)
        if keeps:
            self._client.free(self)
        else:
            self.transport.close()

    def _give_up(self, why: str) -> None:
        if self.is_busy:
            self.is_busy = False
            self._client.phase.failed(why)
        self.transport.abort()

    def expire(self) -> None:
        """The answer took too long."""
        self._give_up("time-out")

    def connection_lost(self, exc: Exception | None) -> None:
        client = self._client
        client.all.discard(self)
        if self in client.idle:
            client.idle.remove(self)
        if self.is_busy:
            self.is_busy = False
            client.phase.failed("the connection broke")
        client.phase.lost()


class Client:
    """The connections to one target; they outlive the phases."""

    def __init__(self, target: Target, load: Load) -> None:
        self.target, self.load = target, load
        self.idle: list[_Connection] = []
        self.all: set[_Connection] = set()
        self.opening: set[asyncio.Task[None]] = set()
        self.requests: Iterator[bytes] = cycle(target.requests)
        self.phase: Phase

    def open(self) -> None:
        """One more connection."""
        task = asyncio.get_running_loop().create_task(self._open())
        self.opening.add(task)
        task.add_done_callback(self.opening.discard)

    async def _open(self) -> None:
        target = self.target
        try:
            async with asyncio.timeout(self.load.timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), target.host, target.port, ssl=target.tls
                )
        except (OSError, TimeoutError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            self.phase.not_connected(f"no connection: {reason}")

    def free(self, connection: _Connection) -> None:
        """A connection has nothing to do."""
        self.phase.take(connection)

    def close(self) -> None:
        """All of them."""
        for task in self.opening:
            task.cancel()
        for connection in list(self.all):
            connection.transport.abort()


class Phase:
    """A stretch of load on one target.

    Args:
        client: Its connections.
        seconds: How long requests are sent.
        slice_s: Of each slice that is measured by itself.
        on_slice: Called after each.
    """

    def __init__(self, client: Client, seconds: float, slice_s: float, on_slice: Callable[[Measured], None]) -> None:
        self._client, self._load, self._on_slice, self._slice_s = client, client.load, on_slice, slice_s
        self.measured = Measured(name=client.target.name)
        self._latencies: list[float] = []
        self._lags: list[float] = []
        self._due: deque[float] = deque()
        self._begun = _now()
        self._end = self._begun + seconds
        self._is_over = False
        self._cpu = time.process_time()
        self._arrivals = _arrivals(self._begun, self._load) if self._load.rate else iter(())
        self._next = next(self._arrivals, float("inf"))
        client.phase = self

    async def run(self, stop: asyncio.Event) -> Measured:
        """Send until the time is over, then wait for what is under way."""
        for connection in list(self._client.idle):
            self._client.idle.remove(connection)
            self.take(connection)
        pacer = threading.Thread(target=self._pace, args=(asyncio.get_running_loop(),), daemon=True)
        if self._load.rate:
            pacer.start()
        else:
            for _ in range(self._load.concurrency - len(self._client.all)):
                self._client.open()
        sliced = self._begun
        while not stop.is_set() and (left := self._end - _now()) > 0:
            await _sleep(min(_SWEEP_S, left, max(sliced + self._slice_s - _now(), 1e-3)), stop)
            self._sweep()
            if _now() - sliced >= self._slice_s and self._end - _now() > self._slice_s / 2:
                sliced = _now()
                self._fold()
        self._is_over = True
        if pacer.is_alive():
            pacer.join()
        self._end = min(self._end, _now())
        self.measured.seconds = _now() - self._begun
        deadline = _now() + self._load.timeout_s
        while any(one.is_busy for one in self._client.all) and _now() < deadline:
            await asyncio.sleep(0.002)
        for connection in [one for one in self._client.all if one.is_busy]:
            connection.expire()
        self._end_open_loop()
        self.measured.cpu_s = time.process_time() - self._cpu
        self._fold()
        return self.measured

    def _end_open_loop(self) -> None:
        """What was due before the end and was not sent."""
        while self._next < self._end:
            self._due.append(self._next)
            self._next = next(self._arrivals)
        self.measured.unsent += len(self._due)
        self._due.clear()

    def _tick(self) -> None:
        """Send what is due."""
        if self._is_over:
            return
        now = _now()
        while self._next <= now and self._next < self._end:
            self._due.append(self._next)
            self._next = next(self._arrivals)
        client = self._client
        while self._due and client.idle:
            self._send(client.idle.pop(), self._due.popleft())
        wanted = min(len(self._due), self._load.connections - len(client.all)) - len(client.opening)
        for _ in range(max(wanted, 0)):
            client.open()

    def _pace(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the loop when something is due: its own timers are a millisecond coarse. In a thread."""
        while not self._is_over:
            time.sleep(min(max(self._next - _now(), _REST_S), _SWEEP_S))
            if self._next <= _now() and not self._is_over:
                loop.call_soon_threadsafe(self._tick)

    def take(self, connection: _Connection) -> None:
        """Give a free connection something to do."""
        if self._is_over:
            self._client.idle.append(connection)
        elif not self._load.rate:
            now = _now()
            connection.send(next(self._client.requests), now, now)
        elif self._due:
            self._send(connection, self._due.popleft())
        else:
            self._client.idle.append(connection)

    def _send(self, connection: _Connection, due: float) -> None:
        now = _now()
        self._lags.append(now - due)
        connection.send(next(self._client.requests), due, now)

    def answered(self, due: float, status: int) -> None:
        """An answer is here."""
        self.measured.statuses[status] += 1
        if 200 <= status < 300:
            self._latencies.append(_now() - due)

    def failed(self, why: str) -> None:
        """A request was sent, and its answer never came."""
        self.measured.errors[why] += 1

    def not_connected(self, why: str) -> None:
        """There is no connection for a request."""
        if self._load.rate:
            if self._due:
                self._due.popleft()
                self.measured.errors[why] += 1
        elif not self._is_over:
            self.measured.errors[why] += 1
            asyncio.get_running_loop().call_later(_RETRY_S, self.lost)

    def lost(self) -> None:
        """A connection has gone; in the closed loop there is another one for it."""
        client = self._client
        missing = self._load.concurrency - len(client.all) - len(client.opening)
        if client.phase is self and not self._load.rate and not self._is_over and missing > 0:
            client.open()

    def _sweep(self) -> None:
        late = _now() - self._load.timeout_s
        for connection in [one for one in self._client.all if one.is_busy and one.sent_at < late]:
            connection.expire()

    def _fold(self) -> None:
        histogram = HdrHistogram()
        histogram.add(np.array(self._latencies))
        self.measured.slices.append(histogram)
        self.measured.lag.add(np.array(self._lags))
        self._latencies.clear()
        self._lags.clear()
        self._on_slice(self.measured)


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


def _arrivals(begin: float, load: Load) -> Iterator[float]:
    """When requests are due."""
    gap = 1.0 / cast(float, load.rate)
    if not load.is_poisson:
        number = 0
        while True:
            yield begin + number * gap
            number += 1
    random = np.random.default_rng(load.seed)
    at = begin
    while True:
        for pause in random.exponential(gap, 4096).tolist():
            at += pause
            yield at
