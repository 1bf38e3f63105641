"""Cleaning rules: a table from a rule's name to the function that compiles it to Polars expressions."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import polars as pl

from millrace.core import spec as language
from millrace.core.errors import DataError
from millrace.data.infer import as_boolean, as_date, as_number, as_text
from millrace.data.naming import did_you_mean
from millrace.data.sources import HIDDEN

_UNIT_NUMBER = r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*[^\d.,]*$"


class Reject(NamedTuple):
    """Rows where `mask` is true are rejected; `column` is shown with its value (None: the whole row)."""

    reason: str
    column: str | None
    mask: pl.Expr


class Fill(NamedTuple):
    """Missing values of a column that are filled after the split, from the training rows."""

    column: str
    strategy: str
    value: float | str | None


class Compiled(NamedTuple):
    """A rule as expressions: rows are rejected by the values before, the rest is transformed."""

    rejects: list[Reject] = []
    transforms: list[pl.Expr] = []
    fills: list[Fill] = []


class Scope(NamedTuple):
    """What a rule may know: the frame's columns and types, the label, fills that are promised."""

    frame: pl.DataFrame
    label: str
    filled: frozenset[str] = frozenset()

    def dtype(self, column: str) -> pl.DataType:
        """The column's type."""
        return self.frame.schema[column]


def match_columns(columns: language.Columns, names: list[str], where: str) -> list[str]:
    """The columns that a name, a glob or a list of them means, in the order of the table.

    Raises:
        DataError: A name or glob fits none; with did-you-mean.

    Example:
        >>> match_columns("p*", ["p0", "q", "p1"], "clean.range")
        ['p0', 'p1']
    """
    wanted: set[str] = set()
    for pattern in [columns] if isinstance(columns, str) else columns:
        found = {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise DataError(
                f"{where} names column {pattern!r}, which does not exist",
                hint=did_you_mean(pattern, names),
                details={"column": pattern},
            )
        wanted |= found
    return [name for name in names if name in wanted]


def compile_rule(rule: language.CleanRule, scope: Scope) -> tuple[str, Compiled]:
    """A rule's name and its expressions.

    Raises:
        DataError: It names a column that does not exist, or cannot work on the column's type.

    Example:
        >>> rule = language.CleanRule(drop_missing=language.DropMissing(columns="y"))
        >>> name, compiled = compile_rule(rule, Scope(pl.DataFrame({"y": [1, None]}), "y"))
        >>> name, compiled.rejects[0].reason
        ('drop_missing', 'unlabelled')
    """
    name, arguments = rule.chosen()
    names = [column for column in scope.frame.columns if column not in HIDDEN]
    columns = match_columns(arguments.columns, names, f"data.clean: {name}")  # type: ignore[attr-defined]
    return name, RULES[name](arguments, columns, scope)


def _drop_duplicates(arguments: language.DropDuplicates, columns: list[str], scope: Scope) -> Compiled:
    return Compiled([Reject("duplicate", None, ~pl.struct(columns).is_first_distinct())])


def _drop_missing(arguments: language.DropMissing, columns: list[str], scope: Scope) -> Compiled:
    return Compiled(
        [
            Reject("unlabelled" if column == scope.label else "missing", column, pl.col(column).is_null())
            for column in columns
            if column not in scope.filled
        ]
    )


def _fill_missing(arguments: language.FillMissing, columns: list[str], scope: Scope) -> Compiled:
    if scope.label in columns:
        raise DataError(
            f"data.clean: fill_missing may not fill the label {scope.label!r}",
            hint="use drop_missing for the label, and name the feature columns here",
        )
    strategy = "value" if arguments.value is not None else arguments.strategy
    if strategy == "value" and arguments.value is None:
        raise DataError("data.clean: fill_missing with strategy value wants a value, got none")
    return Compiled(fills=[Fill(column, strategy, arguments.value) for column in columns])


def _numbers(columns: list[str], scope: Scope, rule: str) -> dict[str, pl.Expr]:
    bad = [column for column in columns if scope.dtype(column) == pl.Binary or scope.dtype(column).is_temporal()]
    if bad:
        raise DataError(f"data.clean: {rule} wants number columns, got {bad[0]!r} of type {scope.dtype(bad[0])}")
    return {column: as_number(column, scope.dtype(column)) for column in columns}


def _not_converted(column: str, value: pl.Expr, reason: str) -> Reject:
    return Reject(reason, column, pl.col(column).is_not_null() & value.is_null())


def _range(arguments: language.Range, columns: list[str], scope: Scope) -> Compiled:
    numbers = _numbers(columns, scope, "range")
    if arguments.action == "clip":
        rejects = [_not_converted(column, value, "type") for column, value in numbers.items()]
        clipped = [value.clip(arguments.min, arguments.max).alias(column) for column, value in numbers.items()]
        return Compiled(rejects, clipped)
    rejects = []
    for column, value in numbers.items():
        rejects.append(_not_converted(column, value, "type"))
        outside = [value < arguments.min] if arguments.min is not None else []
        outside += [value > arguments.max] if arguments.max is not None else []
        rejects += [Reject("range", column, mask) for mask in outside]
    return Compiled(rejects)


def _allowed(arguments: language.Allowed, columns: list[str], scope: Scope) -> Compiled:
    values = [_plain(value) for value in arguments.values]
    return Compiled(
        [Reject("category", column, ~as_text(column, scope.dtype(column)).is_in(values)) for column in columns]
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _cast(arguments: language.Cast, columns: list[str], scope: Scope) -> Compiled:
    rejects, transforms = [], []
    for column in columns:
        dtype = scope.dtype(column)
        value = _CASTS[arguments.type](column, dtype)
        rejects.append(_not_converted(column, value, "type"))
        transforms.append(value.alias(column))
    return Compiled(rejects, transforms)


def _as_integer(name: str, dtype: pl.DataType) -> pl.Expr:
    number = as_number(name, dtype)
    whole = number.is_finite() & (number == number.floor()) & (number.abs() < 2**53)
    return pl.when(whole).then(number.cast(pl.Int64, strict=False)).otherwise(None)


_CASTS: dict[str, Callable[[str, pl.DataType], pl.Expr]] = {
    "number": as_number,
    "integer": _as_integer,
    "boolean": as_boolean,
    "text": as_text,
    "date": as_date,
}


def _unit(arguments: language.Unit, columns: list[str], scope: Scope) -> Compiled:
    rejects, transforms = [], []
    for column in columns:
        dtype = scope.dtype(column)
        raw = pl.col(column).str.extract(_UNIT_NUMBER) if dtype == pl.String else pl.col(column)
        value = raw.cast(pl.Float64, strict=False)
        rejects.append(_not_converted(column, value, "type"))
        transforms.append((value * arguments.factor + arguments.offset).alias(column))
    return Compiled(rejects, transforms)


def _date(arguments: language.DateFormat, columns: list[str], scope: Scope) -> Compiled:
    rejects, transforms = [], []
    for column in columns:
        value = as_date(column, scope.dtype(column), arguments.formats)
        rejects.append(_not_converted(column, value, "date"))
        transforms.append(value.alias(column))
    return Compiled(rejects, transforms)


def _outliers(arguments: language.Outliers, columns: list[str], scope: Scope) -> Compiled:
    rejects = []
    for column, value in _numbers(columns, scope, "outliers").items():
        rejects.append(_not_converted(column, value, "type"))
        known = value.filter(value.is_finite())
        if arguments.method == "iqr":
            low, high = known.quantile(0.25, "linear"), known.quantile(0.75, "linear")
            reach = (high - low) * arguments.k
        else:
            low = high = known.mean()
            reach = known.std() * arguments.k
        rejects.append(Reject("outlier", column, (value < low - reach) | (value > high + reach)))
    return Compiled(rejects)


def _normalize_text(arguments: language.NormalizeText, columns: list[str], scope: Scope) -> Compiled:
    transforms = []
    for column in columns:
        if scope.dtype(column) != pl.String:
            continue
        text = pl.col(column).str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
        transforms.append(text.str.to_lowercase() if arguments.lower else text)
    return Compiled(transforms=transforms)


def _pattern(arguments: language.Pattern, columns: list[str], scope: Scope) -> Compiled:
    try:
        pl.Series(["a"]).str.contains(arguments.regex)
    except pl.exceptions.ComputeError as error:
        raise DataError(f"data.clean: pattern has a regular expression that is not one: {arguments.regex!r}") from error
    return Compiled(
        [
            Reject("pattern", column, ~as_text(column, scope.dtype(column)).str.contains(arguments.regex))
            for column in columns
        ]
    )


RULES: dict[str, Callable[[Any, list[str], Scope], Compiled]] = {
    "drop_duplicates": _drop_duplicates,
    "drop_missing": _drop_missing,
    "fill_missing": _fill_missing,
    "range": _range,
    "allowed": _allowed,
    "cast": _cast,
    "unit": _unit,
    "date": _date,
    "outliers": _outliers,
    "normalize_text": _normalize_text,
    "pattern": _pattern,
}
TEXT_RULES = ("cast", "unit", "date", "normalize_text", "pattern", "allowed")
assert set(RULES) == set(language.CleanRule.__struct_fields__)
