"""What a column holds, for facts and the manifest."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from millrace.core.facts import ColumnFacts

_BINS = 20


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(float(value)) else float(value)


def profile_column(values: pl.Series, column_type: str, role: str) -> ColumnFacts:
    """Missing, distinct and, for numbers and booleans, mean, deviation, smallest and largest.

    Example:
        >>> facts = profile_column(pl.Series("a", [1.0, 3.0, None]), "number", "feature")
        >>> facts.missing, facts.distinct, facts.mean, facts.max
        (1, 2, 2.0, 3.0)
    """
    facts: dict[str, float | None] = {}
    if column_type != "category" and (values.dtype.is_numeric() or values.dtype == pl.Boolean):
        numbers = values.cast(pl.Float64)
        facts = {
            "mean": _number(numbers.mean()),
            "sd": _number(numbers.std(ddof=0)),
            "min": _number(numbers.min()),
            "max": _number(numbers.max()),
        }
    return ColumnFacts(
        name=values.name,
        type=column_type,
        role=role,
        missing=values.null_count(),
        distinct=values.drop_nulls().n_unique(),
        **facts,
    )


def profile_pixels(pixels: np.ndarray, name: str) -> ColumnFacts:
    """One line for an image column: over all its pixels.

    Args:
        pixels: [rows, values], raw.
        name: The column's name.

    Example:
        >>> profile_pixels(np.array([[0, 255]], dtype=np.uint8), "pixels").max
        255.0
    """
    return ColumnFacts(
        name=name,
        type="image",
        role="feature",
        distinct=len(pixels),
        mean=float(pixels.mean(dtype=np.float64)),
        sd=float(pixels.std(dtype=np.float64)),
        min=float(pixels.min()),
        max=float(pixels.max()),
    )


def histogram(values: pl.Series) -> dict[str, list[float] | list[int]]:
    """Twenty equal bins of a number: `edges` (21) and `counts` (20).

    Example:
        >>> histogram(pl.Series([0.0, 1.0]))["counts"][-1]
        1
    """
    counts, edges = np.histogram(values.cast(pl.Float64).drop_nulls().to_numpy(), bins=_BINS)
    return {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]}
