"""What the connections of a server share: limits, allowed hosts, known request heads, time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol

from millrace.core.types import Struct
from millrace.serve.access import Guard
from millrace.serve.admission import Pacer, Refusal
from millrace.serve.clients import Client, Clients

if TYPE_CHECKING:
    from millrace.serve.access_log import AccessLog
    from millrace.serve.exchange import Exchange

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
_MAX_HEADS, _MAX_HEAD_BYTES = 1024, 2048
_HEAD_END = b"\r\n\r\n"
_NEVER_KNOWN = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"connection", b"traceparent"})


class HttpLimits(Struct, frozen=True, kw_only=True):
    """What one connection and one client may cost.

    A message must be complete `body_timeout_s` after it began, its head after `head_timeout_s`. Beyond
    `max_connections` those that have been idle longest are closed; where none is idle, the new one is refused.
    `client_rate`: requests of one client per second, `client_burst` of them at once after a pause (0: as many as
    in a second); 0: any number. `client_share`: the part of a model's queue that one client may hold.
    """

    max_head_bytes: int = 16 << 10
    max_body_bytes: int = 64 << 20
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    max_pipelined: int = 64
    max_connections: int = 4096
    client_rate: float = 0.0
    client_burst: float = 0.0
    client_share: float = 0.5


class Head:
    """A parsed request head, kept because clients repeat it byte for byte.

    `raw` are its bytes and `size_bytes` those of head and body together; both are unset (-1) until it
    turns out that it may be kept. `route` answers its requests: at first the service's handler, which may
    put what it has learned in its own place.
    """

    __slots__ = ("client", "headers", "method", "raw", "route", "size_bytes", "target")

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes], route: Callable[[Any], None]) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.route = route
        self.raw = b""
        self.size_bytes = -1
        self.client: Client | None = None  # whose token it brings, once that was asked


class Member(Protocol):
    """A connection as the service sees it."""

    @property
    def idle_since_s(self) -> float:
        """When its last answer was written."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and is not answered."""
        ...

    @property
    def head(self) -> Head:
        """The head of its last request."""
        ...

    def check_time(self, now_s: float) -> None:
        """Close or refuse what has taken too long."""
        ...

    def abort(self) -> None:
        """Cut it."""
        ...

    def close(self) -> None:
        """Close it; nothing of it waits."""
        ...


class Early(Protocol):
    """Decides by a request's head alone."""

    def __call__(
        self, target: bytes, size_bytes: int, held_by_connection: int, client: Client | None, /
    ) -> Refusal | None:
        """Why its body need not be read; None: to be read."""
        ...


class Service:
    """What all connections of a server share. For the event loop's thread.

    Args:
        handler: Called with the `Exchange` of every well-formed request.
        limits: See `HttpLimits`.
        allowed_hosts: Host names that the server answers to, besides the loopback ones. Foreign names
            are refused: a web page must not reach a loopback server by a name of its own.
    """

    def __init__(
        self,
        handler: Callable[[Any], None],
        limits: HttpLimits | None = None,
        allowed_hosts: frozenset[str] = frozenset(),
    ) -> None:
        self.handler = handler
        self.limits = limits or HttpLimits()
        self.allowed_hosts = LOOPBACK_HOSTS | {host.lower() for host in allowed_hosts}
        self.connections: set[Member] = set()
        self.is_draining = False
        self.guard: Guard | None = None  # None: nobody is asked who they are
        self.proxies: tuple[str, ...] = ()  # networks whose machines alone are answered, besides this one; () all are
        self.refused: Callable[[int], None] = _ignore  # told of answers that no handler gave
        self.early: Early = _never  # asked of large bodies before they are read
        self.exchange_type: type[Exchange] | None = None  # None: a plain one
        self.access_log: AccessLog | None = None
        self.trace_share = 0.0  # of the requests without a trace, those for which one begins here
        self.pacer = Pacer()
        limits = self.limits
        self.clients = Clients(limits.client_rate, limits.client_burst) if limits.client_rate > 0 else None
        self.heads: dict[bytes, Head] = {}  # request heads that were parsed and allowed before
        self._known_hosts: dict[bytes, bool] = {}
        self.date_line = b""
        self.now_s = 0.0
        self.tick()

    def tick(self) -> None:
        """Renew what is read often: the time, and the Date header."""
        self.now_s = time.monotonic()
        self.date_line = b"Date: %s\r\n" % formatdate(usegmt=True).encode()

    def allows(self, host: bytes) -> bool:
        """Whether a Host header (or the host of an Origin) names this server.

        Example:
            >>> service = Service(lambda exchange: None)
            >>> service.allows(b"localhost:8080"), service.allows(b"[::1]:80"), service.allows(b"evil.example")
            (True, True, False)
        """
        known = self._known_hosts.get(host)
        if known is None:
            known = host_name(host.decode("latin-1")) in self.allowed_hosts
            if len(self._known_hosts) < 256:
                self._known_hosts[host] = known
        return known

    def known(self, data: bytes) -> Head | None:
        """The head of exactly one whole request whose head was parsed and allowed before, byte for byte."""
        head = self.heads.get(data[: data.find(_HEAD_END) + len(_HEAD_END)])
        return head if head is not None and head.size_bytes == len(data) else None

    def remember(self, data: bytes, head: Head) -> None:
        """Keep the head of `data`, one whole request, so that the same bytes need not be parsed again."""
        raw = data[: data.find(_HEAD_END) + len(_HEAD_END)]
        length = int(head.headers.get(b"content-length", b"0"))
        if len(raw) > _MAX_HEAD_BYTES or len(data) != len(raw) + length or not _NEVER_KNOWN.isdisjoint(head.headers):
            return
        if len(self.heads) >= _MAX_HEADS:
            self.heads.clear()
        head.raw, head.size_bytes = raw, len(data)
        self.heads[raw] = head

    def forget_heads(self) -> None:
        """Route every request anew: what served a known head may be served by another model now."""
        for head in (*self.heads.values(), *(connection.head for connection in self.connections)):
            head.route = self.handler
        self.heads.clear()

    def make_room(self) -> bool:
        """Whether one more connection may come: where there are too many, close those that have been idle longest."""
        if len(self.connections) < self.limits.max_connections:
            return True
        idle = [one for one in self.connections if not one.is_busy]
        for one in heapq.nsmallest(max(1, len(idle) // 16), idle, key=lambda one: one.idle_since_s):
            self.connections.discard(one)
            one.close()
        return len(self.connections) < self.limits.max_connections

    def ask_guard(self, guard: Guard) -> None:
        """Ask everybody who they are, from now on."""
        self.guard = guard
        self.clients = Clients(self.limits.client_rate, self.limits.client_burst)

    def sweep(self) -> None:
        """Close what takes too long; to be called several times per time-out."""
        self.tick()
        for connection in list(self.connections):
            connection.check_time(self.now_s)

    def sweep_interval_s(self) -> float:
        """How often `sweep` is due."""
        shortest = min(self.limits.head_timeout_s, self.limits.body_timeout_s, self.limits.idle_timeout_s)
        return min(0.5, shortest / 4)

    @property
    def in_flight(self) -> int:
        """Requests begun and not yet answered, over all connections."""
        return sum(connection.is_busy for connection in self.connections)

    def abort(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.abort()


def host_name(host: str) -> str:
    """The name in `name:port`, lower case.

    Example:
        >>> host_name("LocalHost:80"), host_name("[::1]:8080"), host_name("a:b:c")
        ('localhost', '[::1]', 'a:b:c')
    """
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and (":" not in name or name.endswith("]")):
        return name.lower()
    return host.lower()


def _ignore(_: int) -> None:
    """Nobody counts."""


def _never(target: bytes, size_bytes: int, held_by_connection: int, client: Client | None) -> None:
    """Every body is read."""
