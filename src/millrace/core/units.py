"""Quantities as people write them: `2%`, `1pp`, `512MB`, `90s`."""

from __future__ import annotations

import re

from millrace.core.errors import InputError

_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_SHARE = re.compile(_NUMBER + r"(%|pp)?\s*$")
_SIZE = re.compile(_NUMBER + r"([kKMGT]i?)?[bB]?\s*$")
MOST_BYTES = 1 << 63  # what a record can hold
_DURATION = re.compile(_NUMBER + r"(ms|s|min|m|h|d)?\s*$")
_SIZE_FACTORS = {None: 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    prefix + "i": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)
}
_DURATION_FACTORS = {None: 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class Share(float):
    """A share of one: `2%` and `0.02` are the same; `1pp` is a share of one in accuracy points.

    Example:
        >>> Share.parse("1pp"), Share.parse(0.05), Share.parse("5 %")
        (Share(1%), Share(5%), Share(5%))
    """

    @classmethod
    def parse(cls, value: str | int | float) -> Share:
        """Parse `2%`, `1pp` or a number between 0 and 1.

        Raises:
            InputError: The text is not such a quantity, or lies outside 0 to 1.
        """
        match = _SHARE.match(str(value)) if not isinstance(value, bool) else None
        if match is None:
            raise InputError(f"want a share such as 2%, 1pp or 0.02, got {value!r}")
        share = float(match[1]) / (100.0 if match[2] else 1.0)
        if not 0.0 <= share <= 1.0:
            raise InputError(f"want a share between 0 and 1 (0 % to 100 %), got {value!r}")
        return cls(share)

    def __repr__(self) -> str:
        return f"Share({float(self) * 100:g}%)"


def parse_size(value: str | int | float) -> int:
    """Bytes from `512MB`, `1.5GiB` or a number of bytes.

    Raises:
        InputError: The text is not a size.

    Example:
        >>> parse_size("1.5 GiB"), parse_size("2MB")
        (1610612736, 2000000)
    """
    match = _SIZE.match(str(value)) if not isinstance(value, bool) else None
    size = float(match[1]) * _SIZE_FACTORS[match[2]] if match is not None else -1.0
    if not 0 <= size < MOST_BYTES:
        raise InputError(f"want a size such as 512MB or 2GiB, got {str(value)[:40]!r}")
    return int(size)


def parse_duration(value: str | int | float) -> float:
    """Seconds from `90s`, `5min`, `2h`, `250ms` or a number of seconds.

    Raises:
        InputError: The text is not a duration.

    Example:
        >>> parse_duration("5min"), parse_duration("250ms")
        (300.0, 0.25)
    """
    match = _DURATION.match(str(value)) if not isinstance(value, bool) else None
    if match is None or float(match[1]) < 0:
        raise InputError(f"want a duration such as 90s, 5min or 2h, got {value!r}")
    return float(match[1]) * _DURATION_FACTORS[match[2]]


def format_size(size_bytes: int) -> str:
    """A size for people, three significant digits.

    Example:
        >>> format_size(592_000), format_size(12)
        ('592KB', '12B')
    """
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if size_bytes >= factor:
            return (
                f"{size_bytes / factor:.3g}{unit}" if size_bytes < 100 * factor else f"{size_bytes / factor:.0f}{unit}"
            )
    return f"{size_bytes}B"


def format_duration(duration_s: float) -> str:
    """A duration for people.

    Example:
        >>> format_duration(0.000086), format_duration(3.21), format_duration(125)
        ('86us', '3.2 s', '2 min 5 s')
    """
    if duration_s < 1e-3:
        return f"{duration_s * 1e6:.0f}us"
    if duration_s < 1:
        return f"{duration_s * 1e3:.3g}ms"
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    return f"{int(duration_s // 60)} min {int(duration_s % 60)} s"
