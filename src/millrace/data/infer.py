"""What columns are: types seen in the values, identifiers, and the task that the label sets."""

from __future__ import annotations

import re
from typing import NamedTuple

import polars as pl

from millrace.core.facts import Task

MOSTLY = 0.9  # a column is of a type when this share of its values is; the others are rejected, counted
MAX_CATEGORIES = 1000
MAX_CATEGORY_CHARS = 1000
_FEW_CLASSES = 20
_ID_ROWS = 20
_TEXT_CHARS = 40
_ID_NAME = re.compile(r"(^|_)(id|uuid|guid|key|index|rowid|row)$|^unnamed", re.IGNORECASE)
_DATE_SHAPE = r"^\d{4}[-/]\d{1,2}[-/]\d{1,2}([T ]\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?Z?)?$"
DATE_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M:%SZ",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
)
_TRUE = ("true", "yes", "y", "t", "1", "1.0", "on")
_FALSE = ("false", "no", "n", "f", "0", "0.0", "off")


class Conversion(NamedTuple):
    """How a column becomes a type: where `value` is null and the column is not, the row is refused."""

    value: pl.Expr
    reason: str


def as_number(name: str, dtype: pl.DataType) -> pl.Expr:
    """The column as Float64 (null where it is no number); integers stay integers.

    Example:
        >>> pl.DataFrame({"a": ["1.5", "x"]}).select(as_number("a", pl.String()))["a"].to_list()
        [1.5, None]
    """
    column = pl.col(name)
    if dtype == pl.Int64 or dtype == pl.Float64:
        return column
    if dtype.is_temporal():
        return pl.lit(None, dtype=pl.Float64).alias(name)
    return column.cast(pl.Float64, strict=False)


def as_date(name: str, dtype: pl.DataType, formats: tuple[str, ...] | list[str] = DATE_FORMATS) -> pl.Expr:
    """The column as a naive date-time; the first format that fits wins.

    Example:
        >>> str(pl.DataFrame({"a": ["2024-02-29"]}).select(as_date("a", pl.String()))["a"][0])
        '2024-02-29 00:00:00'
    """
    if dtype.is_temporal():
        return pl.col(name)
    text = pl.col(name).cast(pl.String)
    tries = [text.str.to_datetime(form, strict=False, time_unit="us", ambiguous="null") for form in formats]
    return pl.coalesce(tries).dt.replace_time_zone(None).alias(name)


def as_text(name: str, dtype: pl.DataType) -> pl.Expr:
    """The column as text: `3.0` and `3` are both "3", booleans are true and false.

    Example:
        >>> pl.DataFrame({"a": [3.0, 0.5]}).select(as_text("a", pl.Float64()))["a"].to_list()
        ['3', '0.5']
    """
    column = pl.col(name)
    if dtype == pl.Float64:
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2**53)
        return (
            pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(column.cast(pl.String))
        )
    return column.cast(pl.String)


def as_boolean(name: str, dtype: pl.DataType) -> pl.Expr:
    """The column as a boolean: true/false, yes/no, y/n, t/f, on/off, 1/0.

    Example:
        >>> pl.DataFrame({"a": ["Yes", "0", "maybe"]}).select(as_boolean("a", pl.String()))["a"].to_list()
        [True, False, None]
    """
    if dtype == pl.Boolean:
        return pl.col(name)
    text = pl.col(name).cast(pl.String).str.to_lowercase()
    known = pl.when(text.is_in(_TRUE)).then(True).when(text.is_in(_FALSE)).then(False)
    return known.otherwise(None).alias(name)


def conversion(name: str, dtype: pl.DataType, column_type: str) -> Conversion:
    """How a column of `dtype` becomes `column_type`, and the reason when a value does not.

    Example:
        >>> conversion("a", pl.String(), "number").reason
        'type'
    """
    if column_type in ("number", "image"):
        return Conversion(as_number(name, dtype), "type")
    if column_type == "date":
        return Conversion(as_date(name, dtype), "date")
    if column_type == "boolean":
        return Conversion(as_boolean(name, dtype), "type")
    if column_type in ("category", "text"):
        return Conversion(as_text(name, dtype), "type")
    return Conversion(pl.col(name), "type")


def infer_type(values: pl.Series, is_label: bool = False) -> str:
    """The type of a column by its values: number, category, text, date, boolean, or ignore when empty.

    Args:
        values: The column; text columns are looked into.
        is_label: A label is never free text: it is a category however many classes it has.

    Example:
        >>> infer_type(pl.Series("a", ["1", "2", None])), infer_type(pl.Series("a", ["x", "y"]))
        ('number', 'category')
    """
    dtype = values.dtype
    if dtype == pl.Boolean:
        return "boolean"
    if dtype.is_temporal():
        return "date"
    if dtype.is_numeric():
        return "number" if values.null_count() < len(values) else "ignore"
    present = values.drop_nulls()
    if present.is_empty():
        return "ignore"
    want = MOSTLY * len(present)
    frame = present.to_frame("v")
    if len(present) - frame.select(as_number("v", pl.String())).to_series().null_count() >= want:
        return "number"
    if present.str.contains(_DATE_SHAPE).sum() >= want:
        dates = frame.select(as_date("v", pl.String())).to_series()
        if len(present) - dates.null_count() >= want:
            return "date"
    return "category" if is_label or not _is_text(present) else "text"


def _is_text(present: pl.Series) -> bool:
    lengths = present.str.len_chars()
    distinct = present.n_unique()
    if float(lengths.median() or 0) > _TEXT_CHARS or distinct > MAX_CATEGORIES:  # type: ignore[arg-type]
        return True
    words = float(present.str.count_matches(r"\s+").mean() or 0) + 1  # type: ignore[arg-type]
    return distinct > 50 and distinct > 0.5 * len(present) and words >= 2


def is_identifier(values: pl.Series, column_type: str) -> bool:
    """Whether a column only names its row: unique text, or unique integers that count or are called id.

    Example:
        >>> is_identifier(pl.Series("customer", [f"c{i}" for i in range(30)]), "category")
        True
        >>> is_identifier(pl.Series("height", [i * 1.5 for i in range(30)]), "number")
        False
    """
    if len(values) < _ID_ROWS or values.null_count() or column_type not in ("number", "category", "text"):
        return False
    if values.dtype == pl.String:
        spaces = float(values.str.count_matches(r"\s").mean() or 0)  # type: ignore[arg-type]
        return spaces < 1 and values.n_unique() == len(values)
    if values.dtype != pl.Int64 or values.n_unique() != len(values):
        return False
    span = int(values.max()) - int(values.min()) + 1  # type: ignore[arg-type]
    return span == len(values) or _ID_NAME.search(values.name) is not None


def decide_task(label: pl.Series) -> Task:
    """Classification for text, booleans and few whole numbers; regression otherwise.

    Example:
        >>> decide_task(pl.Series([0, 1] * 50)), decide_task(pl.Series([i / 7 for i in range(50)]))
        ('classification', 'regression')
    """
    if not label.dtype.is_numeric():
        return "classification"
    present = label.drop_nulls()
    whole = label.dtype.is_integer() or bool((present == present.floor()).all())
    distinct = present.n_unique()
    few = distinct <= 2 or distinct <= min(_FEW_CLASSES, len(present) // 5)
    return "classification" if whole and few else "regression"
