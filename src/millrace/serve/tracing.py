"""W3C trace context: what came with a request, or begins here, goes back with its answer."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from millrace.serve.exchange import Exchange

HEADER = b"traceparent"
_PATTERN = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


class Trace(NamedTuple):
    """A request's place in a trace: `parent_id` is of whoever called, `span_id` is its own."""

    trace_id: str
    span_id: str
    parent_id: str
    flags: int

    @property
    def header(self) -> bytes:
        """As it is written."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}".encode()


def parse_traceparent(value: bytes) -> tuple[str, str, int] | None:
    """Trace, caller and flags of a header; None where it is not valid, which restarts the trace.

    Example:
        >>> parse_traceparent(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        ('0af7651916cd43dd8448eb211c80319c', 'b7ad6b7169203331', 1)
        >>> parse_traceparent(b"00-00000000000000000000000000000000-b7ad6b7169203331-01") is None
        True
    """
    found = _PATTERN.fullmatch(value) if len(value) <= 512 else None
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5] is not None):
        return None
    if not int(found[2], 16) or not int(found[3], 16):
        return None
    return found[2].decode(), found[3].decode(), int(found[4], 16) & _SAMPLED  # other flags are of newer versions


def begin_trace(headers: Mapping[bytes, bytes], share: float) -> Trace | None:
    """The trace of a request: the one that it brings, or for `share` of the others a new one.

    Args:
        headers: By lower-case name.
        share: Of the requests without a trace.
    """
    given = headers.get(HEADER)
    found = None if given is None else parse_traceparent(given)
    if found is not None:
        trace_id, parent_id, flags = found
        return Trace(trace_id, _number(64), parent_id, flags)
    if random.random() >= share:
        return None
    return Trace(_number(128), _number(64), "", _SAMPLED)


def _number(bits: int) -> str:
    return f"{random.getrandbits(bits) or 1:0{bits // 4}x}"


class TracedExchange(Exchange):
    """An exchange whose answer says where in a trace it stands."""

    __slots__ = ("began_ns", "trace")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began_ns = time.perf_counter_ns()
        self.trace = begin_trace(self.head.headers, self.connection.service.trace_share)

    def send(self, response: bytes) -> None:
        """Answer, with the header."""
        if self.trace is not None:
            line, end, rest = response.partition(b"\r\n")
            response = b"%s%straceparent: %s\r\n%s" % (line, end, self.trace.header, rest)
        super().send(response)
