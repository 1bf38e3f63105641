"""Images and maps of images as PNG inside the page: a few hundred bytes each, whatever their size."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

MOST = 96  # pixels of a side; larger images are thinned
INK, PAPER, HEAT, COLD = (28, 38, 48), (255, 255, 255), (200, 85, 61), (246, 240, 237)


def image(pixels: Sequence[float], shape: Sequence[int], alt: str, *, size: int = 64, is_heat: bool = False) -> str:
    """An image of raw values, scaled between its smallest and largest; or a map of values from 0 up.

    Args:
        pixels: Height × width × channels values, row by row.
        shape: Height, width and, for colour, channels.
        alt: What it shows, for those who cannot see it.
        size: Width on the page in pixels.
        is_heat: Colour by value instead of ink on paper.

    Example:
        >>> image([0.0, 1.0, 2.0, 3.0], [2, 2], "two by two")[:31]
        '<img src="data:image/png;base64'
    """
    height, width = int(shape[0]), int(shape[1])
    channels = int(shape[2]) if len(shape) > 2 else 1
    finite = [value for value in pixels if math.isfinite(value)]
    low, high = (0.0 if is_heat else min(finite, default=0.0)), max(finite, default=1.0)
    span = (high - low) or 1.0
    step = max(1, math.ceil(max(height, width) / MOST))
    rows = []
    for y in range(0, height, step):
        row = bytearray(b"\0")
        for x in range(0, width, step):
            at = (y * width + x) * channels
            shares = [_share(value, low, span) for value in pixels[at : at + channels]] or [0.0]
            row += bytes(_colour(shares, is_heat))
        rows.append(bytes(row))
    across = len(range(0, width, step))
    data = base64.b64encode(_png(across, rows)).decode()
    tall = max(round(size * height / max(width, 1)), 1)
    return f'<img src="data:image/png;base64,{data}" width="{size}" height="{tall}" alt="{escape(alt, quote=True)}">'


def _share(value: float, low: float, span: float) -> float:
    return min(max((value - low) / span, 0.0), 1.0) if math.isfinite(value) else 0.0


def _colour(shares: list[float], is_heat: bool) -> list[int]:
    if len(shares) == 3 and not is_heat:
        return [round(255 * share) for share in shares]
    share = sum(shares) / len(shares)
    start, end = (COLD, HEAT) if is_heat else (PAPER, INK)
    return [round(a + (b - a) * share) for a, b in zip(start, end, strict=True)]


def _png(width: int, rows: list[bytes]) -> bytes:
    """Eight bits per channel, RGB; every row begins with its filter, 0 (PNG specification, section 9)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
