"""Runs conversions and rules over a table: rows in = kept + rejected, each rejection with its reason."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import polars as pl

from millrace.core.facts import RejectedSample
from millrace.core.spec import Data
from millrace.data.infer import MAX_CATEGORY_CHARS, conversion, infer_type
from millrace.data.rules import TEXT_RULES, Compiled, Fill, Reject, Scope, compile_rule, match_columns
from millrace.data.sources import FILE, HIDDEN, ROW, Table

FLOAT32_MAX = 3.4028234663852886e38
_WHICH = "__millrace_which"
_SHOWN_CHARS = 200
_CUT_CHARS = 30
_SAMPLES_PER_REASON = 3
_MAX_SAMPLES = 12


class Cleaner:
    """A frame on its way from raw to clean, and what was rejected.

    Args:
        table: What the source gave.
        data: The spec's section.
        given: Types that are not to be inferred.
    """

    def __init__(self, table: Table, data: Data, given: dict[str, str]) -> None:
        self.table = table
        self.data = data
        self.given = given
        self.frame = _with_nulls(table.frame, list(data.null_values))
        self.types: dict[str, str] = {}
        self.fills: dict[str, Fill] = {}
        self.rejected: list[pl.DataFrame] = []

    @property
    def columns(self) -> list[str]:
        """The user's columns."""
        return [column for column in self.frame.columns if column not in HIDDEN]

    def run(self, ignored: set[str], required: Iterable[str]) -> None:
        """Convert, apply the rules in order, convert what the rules made, reject what has no label.

        Args:
            ignored: Columns that are not looked into.
            required: Columns that the split needs: rows without a value are rejected as missing.
        """
        data, required = self.data, list(required)
        by_hand = self._text_rule_columns()
        self._convert([c for c in self.columns if c not in by_hand and c not in ignored])
        before = self.frame.schema
        for rule in data.clean:
            name, compiled = compile_rule(rule, Scope(self.frame, data.label, frozenset(self.fills)))
            self._apply(name, compiled)
        changed = {c for c in self.columns if self.frame.schema[c] != before[c]}  # a clipped text is a number now
        self._convert([c for c in self.columns if c in by_hand | changed and c not in ignored])
        self._check_values("values")
        rejects = [Reject("unlabelled", data.label, pl.col(data.label).is_null())]
        rejects += [Reject("missing", column, pl.col(column).is_null()) for column in required]
        self._reject("label", rejects)
        self._narrow()

    def _text_rule_columns(self) -> set[str]:
        found: set[str] = set()
        for rule in self.data.clean:
            name, arguments = rule.chosen()
            if name in TEXT_RULES:
                found |= set(match_columns(arguments.columns, self.columns, f"data.clean: {name}"))  # type: ignore[attr-defined]
        return found

    def _convert(self, columns: list[str]) -> None:
        rejects, transforms = [], []
        for column in columns:
            dtype = self.frame.schema[column]
            if dtype == pl.Binary:
                self.types[column] = "image"
                continue
            is_label = column == self.data.label
            wanted = self.given.get(column) or infer_type(self.frame[column], is_label)
            self.types[column] = wanted
            value, reason = conversion(column, dtype, wanted)
            rejects.append(Reject(reason, column, pl.col(column).is_not_null() & value.is_null()))
            transforms.append(value.alias(column))
        self._apply("types", Compiled(rejects, transforms))
        self._check_values("types")
        self._narrow()

    def _check_values(self, rule: str) -> None:
        """NaN is missing; what float32 cannot hold and categories of absurd length are rejected."""
        floats = [c for c, t in self.frame.schema.items() if t == pl.Float64]
        self.frame = self.frame.with_columns(pl.col(floats).fill_nan(None)) if floats else self.frame
        rejects = [Reject("range", c, ~(pl.col(c).abs() <= FLOAT32_MAX)) for c in floats]
        rejects += [
            Reject("too long", column, pl.col(column).str.len_chars() > MAX_CATEGORY_CHARS)
            for column, kind in self.types.items()
            if kind == "category" and self.frame.schema[column] == pl.String
        ]
        self._reject(rule, rejects)

    def _apply(self, rule: str, compiled: Compiled) -> None:
        self._reject(rule, compiled.rejects)
        if compiled.transforms:
            self.frame = self.frame.with_columns(compiled.transforms)
        self.fills |= {fill.column: fill for fill in compiled.fills}

    def _reject(self, rule: str, rejects: list[Reject]) -> None:
        """Take out the rows where a mask holds; the first mask that holds is the reason."""
        if not rejects or self.frame.height == 0:
            return
        which = pl.coalesce(
            [pl.when(reject.mask).then(pl.lit(index, dtype=pl.Int32)) for index, reject in enumerate(rejects)]
        )
        found = self.frame.select(which.alias(_WHICH)).to_series()
        if found.null_count() == len(found):
            return
        bad = self.frame.filter(found.is_not_null())
        self.frame = self.frame.filter(found.is_null())
        self.rejected.append(_describe(bad, found.drop_nulls().to_list(), rejects, rule))

    def _narrow(self) -> None:
        """Whole numbers become integers, so that records read 63 and not 63.0."""
        narrowed = []
        for column, kind in self.types.items():
            if kind not in ("number", "image") or self.frame.schema[column] != pl.Float64:
                continue
            values = self.frame[column]
            if bool(((values == values.floor()) & (values.abs() < 2**53)).all()) and values.count():
                narrowed.append(pl.col(column).cast(pl.Int64))
        self.frame = self.frame.with_columns(narrowed) if narrowed else self.frame

    def rejected_frame(self) -> pl.DataFrame:
        """Every rejected row: rule, reason, column, value, file, row, record (JSON); in source order by rule."""
        if not self.rejected:
            return pl.DataFrame(schema=_REJECTED_SCHEMA)
        files = pl.col("file").replace_strict(
            list(range(len(self.table.files))), self.table.files, return_dtype=pl.String
        )
        return pl.concat(self.rejected).with_columns(files)

    def counts(self) -> dict[str, int]:
        """Rejected rows by reason, in the order in which the reasons first appeared."""
        counts: dict[str, int] = {}
        for frame in self.rejected:
            for reason in frame["reason"]:
                counts[reason] = counts.get(reason, 0) + 1
        return counts


_REJECTED_SCHEMA: dict[str, type[pl.DataType]] = {
    "rule": pl.String,
    "reason": pl.String,
    "column": pl.String,
    "value": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "record": pl.String,
}


def _with_nulls(frame: pl.DataFrame, null_values: list[str]) -> pl.DataFrame:
    texts = [c for c, t in frame.schema.items() if t == pl.String and c not in HIDDEN]
    if not texts:
        return frame
    return frame.with_columns(
        [pl.when(pl.col(c).is_in([*null_values, ""])).then(None).otherwise(pl.col(c)).alias(c) for c in texts]
    )


def _shown(frame: pl.DataFrame) -> list[pl.Expr]:
    return [
        _cut(pl.col(column).cast(pl.String)).alias(column)
        for column, dtype in frame.schema.items()
        if column not in HIDDEN and dtype != pl.Binary
    ]


def _cut(text: pl.Expr) -> pl.Expr:
    """A long cell's beginning, and how long it is."""
    length = text.str.len_chars()
    beginning = text.str.slice(0, _SHOWN_CHARS - _CUT_CHARS)
    return pl.when(length > _SHOWN_CHARS).then(pl.format("{}… ({} characters)", beginning, length)).otherwise(text)


def _describe(bad: pl.DataFrame, which: list[int], rejects: list[Reject], rule: str) -> pl.DataFrame:
    shown = bad.select(_shown(bad))
    columns = [rejects[index].column for index in which]
    values = [
        shown[column][row] if column is not None and column in shown.columns else None
        for row, column in enumerate(columns)
    ]
    records = shown.select(pl.struct(pl.all()).struct.json_encode()).to_series()
    return pl.DataFrame(
        {
            "rule": [rule] * bad.height,
            "reason": [rejects[index].reason for index in which],
            "column": columns,
            "value": values,
            "file": bad[FILE].cast(pl.Int64),
            "row": bad[ROW].cast(pl.Int64),
            "record": records,
        },
        schema_overrides={"column": pl.String, "value": pl.String},
    )


def samples(rejected: pl.DataFrame) -> list[RejectedSample]:
    """A few rejected rows of every reason, for the report.

    Example:
        >>> samples(pl.DataFrame(schema=_REJECTED_SCHEMA))
        []
    """
    few = rejected.group_by("reason", maintain_order=True).head(_SAMPLES_PER_REASON).head(_MAX_SAMPLES)
    return [
        RejectedSample(**{key: value for key, value in row.items() if key != "record"}, record=_decode(row["record"]))
        for row in few.iter_rows(named=True)
    ]


def _decode(record: str) -> dict[str, str | None]:
    return msgspec.json.decode(record)
