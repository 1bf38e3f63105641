"""A 64-bit hash of every row's values, the same in every version of every library."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_NULL = np.uint64(0x5BD1E9955BD1E995)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over uint64 values (Steele, Lea, Flood, OOPSLA 2014).

    Example:
        >>> hex(int(mix(np.array([1], dtype=np.uint64))[0]))
        '0x5692161d100b05e5'
    """
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def column_hash(values: pl.Series) -> np.ndarray:
    """A uint64 for every value: numbers by their float64 bits, anything else by its bytes.

    Example:
        >>> first, second = column_hash(pl.Series([1, 2])), column_hash(pl.Series([1.0, 2.5]))
        >>> bool(first[0] == second[0]), bool(first[1] == second[1])
        (True, False)
    """
    if values.dtype == pl.Binary:
        return np.array([_digest(value or b"") for value in values], dtype=np.uint64)
    if values.dtype == pl.String:
        codes = values.rank("dense").fill_null(0).to_numpy().astype(np.int64)
        distinct = values.drop_nulls().unique().sort()
        table = np.array([int(_NULL), *(_digest(value.encode()) for value in distinct)], dtype=np.uint64)
        return table[codes]
    numbers = values.to_physical().cast(pl.Float64).fill_null(float("nan")).to_numpy() + 0.0  # -0.0 becomes 0.0
    bits = numbers.view(np.uint64).copy()
    bits[np.isnan(numbers)] = _NULL
    return bits


def row_hash(frame: pl.DataFrame, columns: list[str], seed: int = 0) -> np.ndarray:
    """A uint64 for every row by the names and values of `columns` and the seed.

    Args:
        frame: Rows.
        columns: Which values count; their order does not.
        seed: Another seed gives an independent hash.

    Example:
        >>> frame = pl.DataFrame({"a": [1, 2], "b": ["x", "y"]})
        >>> bool((row_hash(frame, ["a", "b"]) == row_hash(frame, ["b", "a"])).all())
        True
    """
    state = np.full(frame.height, _digest(f"millrace split {seed}".encode()), dtype=np.uint64)
    for column in sorted(columns):
        name = np.uint64(_digest(column.encode()))
        state = mix((state ^ mix(column_hash(frame[column]) ^ name)) + _GOLDEN)
    return mix(state)
