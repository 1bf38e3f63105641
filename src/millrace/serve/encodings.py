"""Answers that travel compressed, for clients that say so."""

from __future__ import annotations

import functools
import gzip
import zlib

SMALLEST = 1024  # bytes; less is not worth it
INLINE_BYTES = 64 << 10  # more is compressed beside the event loop


@functools.lru_cache(maxsize=64)
def accepted(header: bytes) -> str:
    """The encoding to answer in, from an Accept-Encoding header; empty: as it is.

    Example:
        >>> accepted(b"deflate, gzip"), accepted(b"gzip;q=0, deflate"), accepted(b"br")
        ('gzip', 'deflate', '')
    """
    offered = [part.strip() for part in header.decode("latin-1").lower().split(",")]
    names = {name.strip() for name, _, weight in (part.partition(";") for part in offered) if not _is_zero(weight)}
    return next((encoding for encoding in ("gzip", "deflate") if encoding in names), "")


def _is_zero(weight: str) -> bool:
    return weight.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000")


def compress(body: bytes, encoding: str) -> bytes:
    """A body in an encoding.

    Example:
        >>> zlib.decompress(compress(b"abc", "deflate"))
        b'abc'
    """
    return gzip.compress(body, 1, mtime=0) if encoding == "gzip" else zlib.compress(body, 1)
