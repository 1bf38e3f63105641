"""What the headers of a gRPC call say, and how calls fail."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from millrace.core.errors import (
    ConflictError,
    DeadlineError,
    InputError,
    MillraceError,
    NotFoundError,
    UnavailableError,
)
from millrace.serve.access_log import GONE
from millrace.serve.grpc.frames import Code, StreamEnds, literal
from millrace.serve.service import Head, Service
from millrace.serve.tracing import HEADER as TRACE_HEADER

GRPC_CODES = {
    200: 0,
    400: 3,
    401: 16,
    403: 7,
    404: 5,
    409: 9,
    413: 8,
    429: 8,
    GONE: 1,
    500: 13,
    501: 12,
    503: 14,
    504: 4,
}
_UNITS_NS = {"H": 3_600_000_000_000, "M": 60_000_000_000, "S": 10**9, "m": 10**6, "u": 1000, "n": 1}
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_LONGEST_NS = 86_400 * 10**9
_MAX_MESSAGE = 1000  # characters of a sentence
_KEPT = "".join(chr(code) for code in range(0x20, 0x7F) if code != 0x25)
_NEVER_TWICE = frozenset({b"authorization", b"grpc-timeout", b"grpc-encoding", b"content-type", b":path", b":method"})
_NEEDED = frozenset({b":path", b":method", b":scheme"})
_FORBIDDEN = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


class Failed(Exception):
    """A call ends with this: HTTP's status and a sentence."""

    def __init__(self, status: int, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s

    @property
    def trailers(self) -> bytes:
        """The header block that tells."""
        block = literal(b"grpc-status", b"%d" % GRPC_CODES.get(self.status, 13))
        block += literal(b"grpc-message", quote(self.message[:_MAX_MESSAGE], safe=_KEPT).encode())
        if self.retry_after_s:
            block += literal(b"retry-after", b"%d" % self.retry_after_s)
        return block


def failed_with(error: Exception) -> Failed:
    """How a call ends with an error: as over HTTP.

    Example:
        >>> failed_with(InputError("want a row")).status, failed_with(KeyError("x")).status
        (400, 500)
    """
    if not isinstance(error, MillraceError):
        return Failed(500, f"the model failed on this request: {type(error).__name__}: {error}"[:500])
    kinds = (
        (InputError, 400),
        (NotFoundError, 404),
        (ConflictError, 409),
        (DeadlineError, 504),
        (UnavailableError, 503),
    )
    return Failed(next((status for kind, status in kinds if isinstance(error, kind)), 500), error.message)


class CallHead(Head):
    """What the headers of a call say.

    `failed`: how it ends whatever it carries; `refusal`: the status of HTTP for what is not gRPC, else 0.
    """

    __slots__ = ("encoding", "failed", "is_traced", "refusal", "timeout_ns")

    def __init__(self, target: bytes, headers: dict[bytes, bytes], service: Service) -> None:
        super().__init__(b"POST", target, headers, service.handler)
        self.failed: Failed | None = None
        self.refusal = 0
        self.encoding = headers.get(b"grpc-encoding", b"identity").decode("latin-1")
        self.timeout_ns = 0
        self.is_traced = service.trace_share > 0 or TRACE_HEADER in headers


def read_head(fields: list[tuple[bytes, bytes]], service: Service, methods: Mapping[bytes, object]) -> CallHead:
    """The head of a header list.

    Args:
        fields: As they were sent.
        service: What all connections share.
        methods: By path.

    Raises:
        StreamEnds: It is no request of HTTP/2.
    """
    headers = dict(fields)
    if _is_malformed(headers, fields):
        raise StreamEnds(Code.PROTOCOL_ERROR)
    target = headers[b":path"]
    head = CallHead(target, headers, service)
    kind = headers.get(b"content-type", b"")
    if headers[b":method"] != b"POST":
        head.refusal = 405
    elif kind != b"application/grpc" and not kind.startswith((b"application/grpc+proto", b"application/grpc;")):
        head.refusal = 415
    elif target not in methods:
        head.failed = Failed(501, f"there is no method {target[:200].decode('utf-8', 'replace')}")
    elif head.encoding not in ("identity", "gzip", "deflate"):
        head.failed = Failed(501, f"grpc-encoding: want identity, gzip or deflate, got {head.encoding[:40]!r}")
    else:
        _read_timeout(head, headers.get(b"grpc-timeout"))
    return head


def _is_malformed(headers: dict[bytes, bytes], fields: list[tuple[bytes, bytes]]) -> bool:
    if not _NEEDED.issubset(headers) or not headers[b":path"] or not _FORBIDDEN.isdisjoint(headers):
        return True
    joined = b"".join(headers)
    if joined != joined.lower():
        return True
    names = [name for name, _ in fields]
    return len(headers) < len(fields) and any(names.count(name) > 1 for name in _NEVER_TWICE)


def _read_timeout(head: CallHead, given: bytes | None) -> None:
    if given is None:
        return
    found = _TIMEOUT.fullmatch(given)
    if found is None:
        head.failed = Failed(400, f"grpc-timeout: want digits and a unit, got {given[:40].decode('latin-1')!r}")
        return
    timeout_ns = int(found[1]) * _UNITS_NS[found[2].decode()]
    head.timeout_ns = max(1, timeout_ns) if timeout_ns < _LONGEST_NS else 0
