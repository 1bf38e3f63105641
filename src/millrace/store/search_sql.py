"""Searching runs in SQL: a `RunQuery` becomes a few statements that indexes answer. On SQLite and Postgres.

The first key of the order decides how the runs are walked: those that have it, through its index, then those
that lack it, by the next key. So no statement sorts runs by "has it or not", which no index could answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from millrace.core.errors import InputError
from millrace.core.search import DATASET_KEYS, RUN_ATTRIBUTES, Comparison, FoundRun, Ordering, RunQuery
from millrace.core.types import Run
from millrace.store import queries
from millrace.store.database import Connection, Dialect, within_int64
from millrace.store.tracking_sql import as_members, check_text, is_one_of, run_values

CONTEXT_TAG = "mlflow.data.context"  # of a `RunLink`: what the run read the dataset for
JOINED = 3  # Postgres takes 1 ms to plan three comparisons as joins, 10 ms for six, 6 s for fifty
MOST_CONDITIONS, MOST_VALUES, MOST_KEYS = 200, 10_000, 20
LONGEST_PATTERN = 5000  # characters; SQLite's GLOB takes 50,000 bytes
_TABLES = {"metric": "latest_metrics", "param": "run_params", "tag": "run_tags"}
_DATASETS = "run_links v WHERE v.run_id = r.id AND v.target = 'dataset'"
_TIMES = ("created_at", "started_at", "ended_at")
_ABSENT_TIMES = ("started_at", "ended_at")
_COMPARISONS = ("=", "!=", "<", "<=", ">", ">=")
_DEFAULT_ORDER = (Ordering(field="attribute", key="started_at", descending=True),)
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_GLOB = str.maketrans({"%": "*", "_": "?", "*": "[*]", "?": "[?]", "[": "[[]"})


class Sql(NamedTuple):
    """A piece of a statement with the parameters in it, in order."""

    text: str
    values: tuple[Any, ...] = ()


class _Walk(NamedTuple):
    """Runs in one order: FROM, the conditions that this order brings, ORDER BY, and the column with the id."""

    source: str
    where: tuple[Sql, ...]
    order: Sql
    id: str


def search_runs(connection: Connection, query: RunQuery) -> list[FoundRun]:
    """The page of runs that fit, with their values; see `core.search.RunSearch.search_runs`.

    Ties are broken by id in the direction of the last key. ILIKE ignores the case of A to Z alone.

    Raises:
        InputError: A comparison or key that makes no sense, such as LIKE on a metric.
    """
    ids = found_ids(connection, query)
    runs = queries.get_many(connection, Run, ids)
    values = run_values(connection, ids)
    return [FoundRun(run=runs[id], values=values[id]) for id in ids if id in runs]


def found_ids(connection: Connection, query: RunQuery) -> list[str]:
    """The ids of the page."""
    where = conditions(connection.dialect, query)
    limit, skip = within_int64(max(query.limit, 0)), within_int64(max(query.offset, 0))
    found: dict[str, None] = {}  # a run that is changed between two statements may be met twice
    for walk in _walks(connection.dialect, query.order or _DEFAULT_ORDER):
        if len(found) >= limit:
            break
        tests = [*walk.where, *where]
        text = f" FROM {walk.source}" + (f" WHERE {' AND '.join(test.text for test in tests)}" if tests else "")
        values = [value for test in tests for value in test.values]
        page = f"SELECT {walk.id}{text} ORDER BY {walk.order.text} LIMIT ? OFFSET ?"
        rows = connection.execute(page, [*values, *walk.order.values, limit - len(found), skip]).fetchall()
        if rows:
            skip = 0
        elif skip:
            skip = max(0, skip - connection.execute("SELECT count(*)" + text, values).fetchone()[0])
        found.update(dict.fromkeys(row[0] for row in rows))
    return list(found)


def conditions(dialect: Dialect, query: RunQuery) -> list[Sql]:
    """What a run, called `r`, must fulfil.

    Example:
        >>> loss = Comparison(field="metric", key="loss", operator="<", value=0.5)
        >>> for test in conditions("sqlite", RunQuery(projects=("vision",), where=(loss,))):
        ...     print(*test)
        r.project = ? ('vision',)
        r.deleted_at IS NULL ()
        EXISTS (SELECT 1 FROM latest_metrics v WHERE v.run_id = r.id AND v.key = ? AND v.value < ?) ('loss', 0.5)
    """
    if len(query.where) > MOST_CONDITIONS:
        raise InputError(f"want at most {MOST_CONDITIONS} comparisons, got {len(query.where)}")
    tests: list[Sql] = []
    if len(query.projects) == 1:
        tests.append(Sql("r.project = ?", (_text(query.projects[0]),)))
    elif query.projects:
        tests.append(Sql(is_one_of(dialect, "r.project"), (as_members(query.projects),)))
    if query.lifecycle != "all":
        tests.append(Sql("r.deleted_at IS NULL" if query.lifecycle == "active" else "r.deleted_at IS NOT NULL"))
    asked = [_condition(dialect, comparison) for comparison in query.where]
    # Postgres does not look into CASE: the first are planned together, the others are asked of each run.
    apart = [Sql(f"CASE WHEN {test.text} THEN 1 ELSE 0 END = 1", test.values) for test in asked[JOINED:]]
    return tests + asked[:JOINED] + apart


def _condition(dialect: Dialect, comparison: Comparison) -> Sql:
    field, key, operator = comparison.field, comparison.key, comparison.operator
    is_presence = operator in ("IS NULL", "IS NOT NULL")
    if field == "attribute":
        column = _column(dialect, field, key).text
        return Sql(f"{column} {operator}") if is_presence else _test(dialect, column, comparison, key in _TIMES)
    if field == "dataset":
        column, rows = _dataset_column(dialect, key), Sql(_DATASETS)
        present = Sql(f" AND {column} IS NOT NULL")
    else:
        column, rows = "v.value", _values(field, key)
        present = Sql("")  # a value that is NaN is NULL, and yet there
    if not is_presence:
        test = _test(dialect, column, comparison, field == "metric")
        if field == "metric" and operator == "!=":
            test = Sql(f"({test.text} OR {column} IS NULL)", test.values)  # NaN differs from every number
        present = Sql(f" AND {test.text}", test.values)
    exists = "NOT EXISTS" if operator == "IS NULL" else "EXISTS"
    return Sql(f"{exists} (SELECT 1 FROM {rows.text}{present.text})", rows.values + present.values)


def _test(dialect: Dialect, column: str, comparison: Comparison, is_number: bool) -> Sql:
    """Compare a column with the value; what is NULL never fits."""
    operator, value = comparison.operator, comparison.value
    if operator in _COMPARISONS and is_number and isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _float(value)  # NaN equals nothing: as NULL in SQLite, in Postgres it would equal itself
        return Sql(f"{column} {operator} ?", (None if math.isnan(number) else number,))
    if operator in _COMPARISONS and not is_number and isinstance(value, str):
        return Sql(f"{column} {operator} ?", (_text(value),))
    if operator in ("IN", "NOT IN") and not is_number and isinstance(value, tuple):
        if operator == "NOT IN" and not value:
            return Sql(f"{column} IS NOT NULL")  # NULL is not in nothing either
        if len(value) > MOST_VALUES:
            raise InputError(f"want at most {MOST_VALUES} values, got {len(value)}")
        test = is_one_of(dialect, column)
        return Sql(test if operator == "IN" else f"NOT ({test})", (as_members(value),))
    if operator in ("LIKE", "ILIKE") and not is_number and isinstance(value, str):
        return _like(dialect, column, _text(value), heeds_case=operator == "LIKE")
    kind = "a number" if is_number else "a text"
    raise InputError(
        f"{comparison.field} {comparison.key!r} is {kind}: it cannot be compared by {operator!r} with {value!r}"
    )


def _like(dialect: Dialect, column: str, pattern: str, *, heeds_case: bool) -> Sql:
    """`%` and `_` are wildcards and nothing else is: SQLite's LIKE ignores case, that of Postgres heeds `\\`."""
    if len(pattern) > LONGEST_PATTERN:
        raise InputError(f"want a pattern of at most {LONGEST_PATTERN} characters, got {len(pattern)}")
    if not heeds_case:
        column, pattern = f"lower({column})", pattern.translate(_LOWER)
    if dialect == "sqlite":
        return Sql(f"{column} GLOB ?", (pattern.translate(_GLOB),))
    return Sql(f"{column} LIKE ? ESCAPE ''", (pattern,))


def _walks(dialect: Dialect, order: Sequence[Ordering]) -> Iterator[_Walk]:
    """The runs in parts, in turn: those with the first key, then those without it but with the second, …"""
    named: dict[tuple[str, str], Ordering] = {}
    for key in order:
        named.setdefault((key.field, key.key), key)  # a later double has no say
    keys = list(named.values())
    if len(keys) > MOST_KEYS:
        raise InputError(f"want at most {MOST_KEYS} keys of an order, got {len(keys)}")
    absent: tuple[Sql, ...] = ()
    for position, key in enumerate(keys):
        yield _walk(dialect, keys[position:], absent)
        if key.field == "attribute" and key.key not in _ABSENT_TIMES:
            return
        if key.field == "metric":
            yield _nan_walk(dialect, keys[position:], absent)
            rows = _values(key.field, key.key)
            absent += (Sql(f"NOT EXISTS (SELECT 1 FROM {rows.text})", rows.values),)
        else:
            column = _column(dialect, key.field, key.key)
            absent += (Sql(f"{column.text} IS NULL", column.values),)
    yield _Walk("runs r", absent, Sql(f"r.id {_direction(keys[-1])}"), "r.id")


def _walk(dialect: Dialect, keys: Sequence[Ordering], absent: tuple[Sql, ...]) -> _Walk:
    """The runs with the first of the keys, and without those before it."""
    first, id, source, where = keys[0], "r.id", "runs r", absent
    column = _column(dialect, first.field, first.key)
    if first.field in _TABLES:  # CROSS JOIN: SQLite walks the left table, whatever it believes of their sizes
        values = f"{_TABLES[first.field]} o"
        is_indexed = first.field == "metric"
        source = f"{values} CROSS JOIN runs r" if is_indexed else f"runs r CROSS JOIN {values}"
        where = (Sql("o.key = ? AND o.value IS NOT NULL AND r.id = o.run_id", column.values), *absent)
        id, column = ("o.run_id" if is_indexed else "r.id"), Sql("o.value")
    elif first.field == "dataset" or first.key in _ABSENT_TIMES:
        where = (Sql(f"{column.text} IS NOT NULL"), *absent)
    order, values = _rest_of_order(dialect, keys[1:])
    order = [f"{column.text} {_direction(first)}", *order, f"{id} {_direction(keys[-1])}"]
    return _Walk(source, where, Sql(", ".join(order), values), id)


def _nan_walk(dialect: Dialect, keys: Sequence[Ordering], absent: tuple[Sql, ...]) -> _Walk:
    """The runs whose first key, a metric, is NaN."""
    where = (Sql("o.key = ? AND o.value IS NULL AND r.id = o.run_id", (keys[0].key,)), *absent)
    order, values = _rest_of_order(dialect, keys[1:])
    order = [*order, f"o.run_id {_direction(keys[-1])}"]
    return _Walk(f"{_TABLES['metric']} o CROSS JOIN runs r", where, Sql(", ".join(order), values), "o.run_id")


def _rest_of_order(dialect: Dialect, keys: Sequence[Ordering]) -> tuple[list[str], tuple[Any, ...]]:
    order, values = [], ()
    for key in keys:
        column = _column(dialect, key.field, key.key)
        order.append(f"{column.text} {_direction(key)} NULLS LAST")
        values += column.values
        if key.field == "metric":  # NaN before absent, both of which have no number
            rows = _values(key.field, key.key)
            order.append(f"(SELECT 1 FROM {rows.text}) NULLS LAST")
            values += rows.values
    return order, values


def _column(dialect: Dialect, field: str, key: str) -> Sql:
    """What is ordered by: an attribute, a value, the first of the run's datasets; NULL if absent."""
    if field == "attribute":
        if key not in RUN_ATTRIBUTES:
            raise InputError(f"a run has no attribute {key!r}; it has {', '.join(RUN_ATTRIBUTES)}")
        return Sql(f"r.{key}")
    if field == "dataset":
        return Sql(f"(SELECT min({_dataset_column(dialect, key)}) FROM {_DATASETS})")
    rows = _values(field, key)
    return Sql(f"(SELECT v.value FROM {rows.text})", rows.values)


def _values(field: str, key: str) -> Sql:
    """The value of one name, as what stands after FROM."""
    if field not in _TABLES:
        raise InputError(f"want one of attribute, metric, param, tag, dataset, got {field!r}")
    return Sql(f"{_TABLES[field]} v WHERE v.run_id = r.id AND v.key = ?", (_text(key),))


def _dataset_column(dialect: Dialect, key: str) -> str:
    if key not in DATASET_KEYS:
        raise InputError(f"a dataset has no {key!r}; it has {', '.join(DATASET_KEYS)}")
    if key != "context":
        return f"v.{key}"
    if dialect == "sqlite":
        return f"json_extract(v.body, '$.tags.\"{CONTEXT_TAG}\"')"
    return f"(v.body -> 'tags' ->> '{CONTEXT_TAG}') COLLATE \"C\""


def _direction(key: Ordering) -> str:
    return "DESC" if key.descending else "ASC"


def _text(text: str) -> str:
    try:
        check_text(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"a search cannot be for {text!r}: {error}") from error
    return text


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError as error:
        raise InputError(f"want a number of 64 bits, got {number}") from error
