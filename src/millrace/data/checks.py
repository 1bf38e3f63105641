"""Expectations, classes in every split, and leakage between splits."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np
import polars as pl

from millrace.core.errors import DataError
from millrace.core.spec import Expect
from millrace.data.naming import did_you_mean, short
from millrace.data.rules import match_columns
from millrace.data.split import NAMES, TEST, TRAIN

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "=": operator.eq,
    "": operator.eq,
}
_COMPARISON = re.compile(r"^\s*(>=|<=|==|=|>|<|)\s*(\d+(?:\.\d+)?)\s*$")


def compare(received: float, wanted: int | str, key: str) -> bool:
    """Whether a number meets `10`, `">=1000"`, `"<5"` and so on.

    Raises:
        DataError: The expectation is not such a comparison.

    Example:
        >>> compare(1797, ">=1000", "rows"), compare(9, 10, "classes")
        (True, False)
    """
    match = _COMPARISON.match(str(wanted))
    if match is None:
        raise DataError(f"data.expect.{key} wants a number or a comparison such as '>=1000', got {wanted!r}")
    return _COMPARISONS[match[1]](received, float(match[2]))


def check_expectations(
    expect: Expect, frame: pl.DataFrame, columns: list[str], classes: int | None, rows_in: int
) -> list[str]:
    """Every expectation that does not hold, as a sentence with what was received.

    Args:
        expect: The spec's section.
        frame: Kept rows.
        columns: The user's columns.
        classes: How many classes; None for regression.
        rows_in: Rows before cleaning.

    Returns:
        The broken ones when `action` is warn; none otherwise.

    Raises:
        DataError: Any is broken and `action` is stop; the message lists them all.

    Example:
        >>> check_expectations(Expect(rows=">=3", action="warn"), pl.DataFrame({"a": [1]}), ["a"], None, 1)
        ['rows: want >=3, got 1']
    """
    broken = _broken_counts(expect, frame.height, classes, rows_in) + _broken_columns(expect, frame, columns)
    if broken and expect.action == "stop":
        raise DataError(
            "the data breaks what data.expect wants: " + "; ".join(broken),
            hint="correct the data or the expectation; `action: warn` goes on",
            details={"broken": broken},
        )
    return broken


def _broken_counts(expect: Expect, rows: int, classes: int | None, rows_in: int) -> list[str]:
    broken = []
    if expect.rows is not None and not compare(rows, expect.rows, "rows"):
        broken.append(f"rows: want {expect.rows}, got {rows}")
    if expect.classes is not None:
        if classes is None:
            broken.append(f"classes: want {expect.classes}, but the label is a number to be predicted (regression)")
        elif not compare(classes, expect.classes, "classes"):
            broken.append(f"classes: want {expect.classes}, got {classes}")
    rejected = (rows_in - rows) / max(1, rows_in)
    if expect.max_rejected is not None and rejected > expect.max_rejected:
        broken.append(
            f"max_rejected: want at most {float(expect.max_rejected) * 100:g} %, "
            f"got {rejected * 100:.3g} % ({rows_in - rows} of {rows_in} rows)"
        )
    return broken


def _broken_columns(expect: Expect, frame: pl.DataFrame, columns: list[str]) -> list[str]:
    broken = [
        f"columns: {name!r} does not exist; {did_you_mean(name, columns)}"
        for name in expect.columns or []
        if name not in columns
    ]
    if expect.not_null is not None:
        for name in match_columns(expect.not_null, columns, "data.expect.not_null"):
            if missing := frame[name].null_count():
                broken.append(f"not_null: {name} has {missing} missing values")
    if expect.unique is not None:
        for name in match_columns(expect.unique, columns, "data.expect.unique"):
            if extra := frame.height - frame[name].n_unique():
                broken.append(f"unique: {name} has {extra} repeated values")
    return broken


def check_classes(places: np.ndarray, codes: np.ndarray, classes: list[str], where: Callable[[int], str]) -> list[str]:
    """Every class must be in training and test rows; one that validation lacks is a warning.

    Args:
        places: int8 [rows].
        codes: int [rows], the class of every row.
        classes: Names.
        where: From a row's index to the file and row, for the message.

    Raises:
        DataError: A class is missing in the training or the test rows.

    Example:
        >>> check_classes(np.array([0, 2, 0]), np.array([0, 0, 1]), ["a", "b"], lambda row: f"t.csv row {row + 1}")
        Traceback (most recent call last):
        millrace.core.errors.DataError: class 'b' (1 row, first t.csv row 3) is missing in the test split
    """
    warnings = []
    for code, name in enumerate(classes):
        rows = np.flatnonzero(codes == code)
        for place in (TRAIN, TEST, 1):
            if (places[rows] == place).any():
                continue
            text = (
                f"class {short(name)} ({len(rows)} row{'s' if len(rows) != 1 else ''}, first {where(int(rows[0]))}) "
                f"is missing in the {NAMES[place]} split"
            )
            if place == 1:
                warnings.append(text)
                continue
            raise DataError(
                text,
                hint="add rows of this class, or leave it out: clean: [{allowed: {columns: LABEL, values: […]}}]",
                details={"class": name, "rows": len(rows)},
            )
    return warnings


def count_leaks(hashes: np.ndarray, places: np.ndarray) -> int:
    """Test and validation rows whose features are also those of a training row.

    Args:
        hashes: uint64 [rows], equal for equal features.
        places: int8 [rows].

    Example:
        >>> count_leaks(np.array([7, 7, 8], np.uint64), np.array([0, 2, 1]))
        1
    """
    return int(np.isin(hashes[places != TRAIN], hashes[places == TRAIN]).sum())
