"""Requests and responses as bytes: JSON for everybody, MessagePack for our own client (NaN survives it)."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millrace.core.errors import InputError, TooLargeError
from millrace.core.units import Share

MSGPACK = "application/msgpack"
JSON = "application/json"
MAX_BODY_BYTES = 32 << 20
NEVER_A_PAGE = {  # headers of what others have made: no browser shows it as a page of this server
    "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


async def read_body(request: Request, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body; nothing is kept of one that is too large.

    Raises:
        TooLargeError: It has more than `limit_bytes` bytes.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise TooLargeError(f"the body has {declared} bytes; this route takes at most {limit_bytes}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise TooLargeError(f"the body has more than {limit_bytes} bytes, the most that this route takes")
        parts.append(part)
    return b"".join(parts)


def decode(data: bytes, content_type: str) -> dict[str, Any]:
    """The request's fields; an empty body is an empty object.

    Raises:
        InputError: It is not an object of the content type.

    Example:
        >>> decode(b'{"run": "last"}', "application/json")
        {'run': 'last'}
        >>> decode(b"[1]", "application/json")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the body must be an object, got list
    """
    if not data:
        return {}
    try:
        value = msgspec.msgpack.decode(data) if content_type.startswith(MSGPACK) else msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the body cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"the body must be an object, got {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise InputError("the body's keys must be texts")
    return value


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Share) else str(value)


def encode_json(value: Any) -> bytes:
    """JSON of an answer; NaN becomes null.

    Example:
        >>> encode_json({"a": float("nan")})
        b'{"a":null}'
    """
    return msgspec.json.encode(value, enc_hook=_plain)


def answer(request: Request, value: Any) -> Response:
    """An answer in the form that the client accepts."""
    if request.headers.get("accept", "").startswith(MSGPACK):
        return Response(msgspec.msgpack.encode(value, enc_hook=_plain), media_type=MSGPACK)
    return Response(encode_json(value), media_type=JSON)
