"""Time-ordered 32-hex ids and canonical digests."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import Any

import msgspec

_lock = threading.Lock()
_last_us = 0


def new_id(now_s: float | None = None) -> str:
    """A new 32-hex id whose order is the order of creation in one process.

    Args:
        now_s: Seconds since 1970; the machine's clock when absent.

    Returns:
        32 lower-case hexadecimal characters: 14 of microseconds since 1970, 18 random.

    Example:
        >>> first, second = new_id(), new_id()
        >>> len(first), first < second
        (32, True)
    """
    global _last_us
    micros = int((time.time() if now_s is None else now_s) * 1_000_000)
    with _lock:
        if now_s is None:
            micros = max(micros, _last_us + 1)
            _last_us = micros
    return f"{micros:014x}{os.urandom(9).hex()}"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes.

    Example:
        >>> canonical_json({"b": 1, "a": [True, None]})
        b'{"a":[true,null],"b":1}'
    """
    return msgspec.json.encode(value, order="deterministic")


def digest_bytes(data: bytes) -> str:
    """`sha256:` and the hexadecimal SHA-256 of the bytes.

    Example:
        >>> digest_bytes(b"")[:14]
        'sha256:e3b0c44'
    """
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """The digest of a value's canonical JSON.

    Example:
        >>> digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
        True
    """
    return digest_bytes(canonical_json(value))
