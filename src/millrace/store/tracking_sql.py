"""What runs log, in SQL: points, of each metric the latest one, parameters, tags. On SQLite and Postgres."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from millrace.core.errors import ConflictError, InputError
from millrace.core.search import RunValues
from millrace.core.types import MetricPoint
from millrace.store.database import Connection, Dialect, within_int64

NAME_LIMIT = 250  # characters of a key: four columns of an index must fit into a third of a Postgres page
_INT64 = 2**63
POINT_COLUMNS = ("run_id", "name", "step", "value", "at")
_TEXTS = {"run_id": "text", "key": "text", "value": "text"}  # columns, with their types in Postgres
_LATEST = {"run_id": "text", "key": "text", "step": "bigint", "value": "float8", "at": "float8"}
_IF_LATER = """
ON CONFLICT (run_id, key) DO UPDATE SET step = excluded.step, value = excluded.value, at = excluded.at
WHERE (excluded.step, excluded.at, excluded.value IS NOT NULL, COALESCE(excluded.value, 0))
    > (latest_metrics.step, latest_metrics.at, latest_metrics.value IS NOT NULL, COALESCE(latest_metrics.value, 0))
"""
VALUE_TABLES = ("metrics", "latest_metrics", "run_params", "run_tags")
_ORPHANS = """
WITH RECURSIVE known(run_id) AS (
    SELECT min(run_id) FROM {table}
    UNION ALL
    SELECT (SELECT min(v.run_id) FROM {table} v WHERE v.run_id > known.run_id) FROM known WHERE known.run_id IS NOT NULL
)
SELECT run_id, (SELECT count(*) FROM {table} v WHERE v.run_id = known.run_id) FROM known
WHERE run_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = known.run_id)
"""
_REPLACING = "ON CONFLICT (run_id, key) DO UPDATE SET value = excluded.value"
_HISTORY = """
SELECT at, step, id, value FROM metrics
WHERE run_id = ? AND name = ? AND (at, step, id) > (?, ?, ?) ORDER BY at, step, id LIMIT ?
"""
_SAME_MOMENT = "SELECT value FROM metrics WHERE run_id = ? AND name = ? AND at = ? AND step = ? AND id <= ?"

Row = tuple[str, str, int, float | None, float]  # run_id, name, step, value (NULL is NaN), at
Position = tuple[float, int, int]  # time, step, row


def log(
    connection: Connection,
    run_id: str,
    *,
    points: Sequence[MetricPoint] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    removed_tags: Sequence[str] = (),
    replace_params: bool = False,
) -> None:
    """Record inside the connection's transaction; see `core.search.TrackingWriter.log`.

    Raises:
        ConflictError: A parameter has another value already, and `replace_params` is False.
        InputError: A key or a value that cannot be stored, or a point of another run.
    """
    for point in points:
        if point.run_id != run_id:
            raise InputError(f"a point of the run {point.run_id!r} cannot be logged with those of {run_id!r}")
    if points:
        insert_points(connection, [as_row(point) for point in points])
    if params:
        rows = _text_rows(run_id, "parameter", params)
        new = rows if replace_params else _new_params(connection, run_id, rows)
        _put_rows(connection, "run_params", _TEXTS, new, _REPLACING)
    if removed_tags:
        connection.execute(
            f"DELETE FROM run_tags WHERE run_id = ? AND {is_one_of(connection.dialect, 'key')}",
            (run_id, as_members(removed_tags)),
        )
    if tags:
        _put_rows(connection, "run_tags", _TEXTS, _text_rows(run_id, "tag", tags), _REPLACING)


def insert_points(connection: Connection, rows: Sequence[Row]) -> None:
    """Write points, and of each metric among them the latest if it is later than what stands."""
    connection.insert_rows("metrics", POINT_COLUMNS, rows)
    _put_rows(connection, "latest_metrics", _LATEST, _latest(rows), _IF_LATER)


def delete_values(connection: Connection, run_id: str) -> None:
    """Remove everything that a run logged."""
    for table in VALUE_TABLES:
        connection.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))


def orphaned_rows(connection: Connection) -> dict[str, int]:
    """How many rows there are of each run that does not exist. Looks once per run into an index, not at every row."""
    found: Counter[str] = Counter()
    for table in VALUE_TABLES:
        found.update(dict(connection.execute(_ORPHANS.format(table=table)).fetchall()))
    return found


def run_values(connection: Connection, run_ids: Sequence[str]) -> dict[str, RunValues]:
    """The values of runs, with one query per table; see `core.search.RunSearch.run_values`."""
    found = {run_id: RunValues(params={}, tags={}, metrics={}) for run_id in run_ids}
    if not found:
        return found
    wanted, these = (as_members(run_ids),), f"WHERE {is_one_of(connection.dialect, 'run_id')}"
    params = f"SELECT run_id, key, value FROM run_params {these}"
    for run_id, key, text in connection.execute(params, wanted).fetchall():
        found[run_id].params[key] = text
    tags = f"SELECT run_id, key, value FROM run_tags {these}"
    for run_id, key, text in connection.execute(tags, wanted).fetchall():
        found[run_id].tags[key] = text
    latest = f"SELECT run_id, key, step, value, at FROM latest_metrics {these}"
    for run_id, key, step, value, at in connection.execute(latest, wanted).fetchall():
        found[run_id].metrics[key] = MetricPoint(run_id, key, step, _number(value), at)
    return found


def metric_history(
    connection: Connection, run_id: str, name: str, limit: int | None = None, after: Position | None = None
) -> list[tuple[MetricPoint, Position]]:
    """Points of one metric by (time, step, row), equal ones once; see `core.search.RunSearch.metric_history`.

    Args:
        connection: Where to ask.
        run_id: The run.
        name: The metric.
        limit: At most so many.
        after: The cursor of the last point that is already known.

    Returns:
        Each point with its cursor.
    """
    found: list[tuple[MetricPoint, Position]] = []
    seen: set[float | None] = set()  # values at one time and step: equal points stand side by side
    if after is not None:
        seen = {row[0] for row in connection.execute(_SAME_MOMENT, (run_id, name, *after)).fetchall()}
    last = after or (-math.inf, 0, 0)
    wanted = within_int64(None if limit is None else max(limit, 0))
    while len(found) < wanted:
        batch = wanted - len(found)
        rows = connection.execute(_HISTORY, (run_id, name, *last, batch)).fetchall()
        for at, step, row, value in rows:
            if (at, step) != last[:2]:
                seen.clear()
            last = (at, step, row)
            if value not in seen:
                seen.add(value)
                found.append((MetricPoint(run_id, name, step, _number(value), at), last))
        if len(rows) < batch:
            break
    return found


def as_row(point: MetricPoint) -> Row:
    """The row of a point, with plain numbers.

    Raises:
        InputError: A name that is no text or too long, or a step, value or time that is no number.

    Example:
        >>> as_row(MetricPoint("r", "loss", 3, math.nan, 1.5))
        ('r', 'loss', 3, None, 1.5)
    """
    try:
        step, value, at = int(point.step), float(point.value), float(point.at)
        check_key(point.run_id)
        check_key(point.name)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"the metric point {point!r} cannot be stored: {error}") from error
    if not -_INT64 <= step < _INT64 or not math.isfinite(at):
        raise InputError(f"the metric point {point!r} needs a step of 64 bits and a finite time")
    return point.run_id, point.name, step, None if value != value else value, at


@lru_cache(maxsize=10_000)
def check_key(text: Any) -> None:
    """Refuse what cannot be a key of a column.

    Raises:
        TypeError: It is no text.
        ValueError: It is too long, or the text cannot be stored.
    """
    check_text(text)
    if len(text) > NAME_LIMIT:
        raise ValueError(f"want at most {NAME_LIMIT} characters, got {len(text)}")


def check_text(text: Any) -> None:
    """Refuse what a text column of SQLite or Postgres cannot hold.

    Raises:
        TypeError: It is no text.
        ValueError: It holds a NUL character or half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"want text, got {text!r}")
    text.encode()
    if "\0" in text:
        raise ValueError(f"want text without NUL, got {text!r}")


def is_one_of(dialect: Dialect, column: str) -> str:
    """A test for the texts in one parameter, made by `as_members`: however many, one statement.

    In Postgres an array, because from a subquery it would make a join, and read whole tables for it.

    Example:
        >>> is_one_of("sqlite", "id"), as_members(["a", "b"])
        ('id IN (SELECT value FROM json_each(?))', '["a","b"]')
    """
    if dialect == "sqlite":
        return f"{column} IN (SELECT value FROM json_each(?))"
    return f"{column} = ANY (ARRAY(SELECT json_array_elements_text(CAST(? AS json))))"


def as_members(texts: Iterable[str]) -> str:
    """The parameter of `is_one_of`; a text that cannot be stored is left out, as nothing equals it."""
    return msgspec.json.encode([text for text in texts if _is_storable(text)]).decode()


def _is_storable(text: Any) -> bool:
    try:
        check_text(text)
    except (TypeError, ValueError):
        return False
    return True


def _put_rows(
    connection: Connection, table: str, types: Mapping[str, str], rows: Sequence[Sequence[Any]], conflict: str
) -> None:
    """Insert rows, each with a key of its own, or do to those that are there what `conflict` says."""
    if not rows:
        return
    into = f"INSERT INTO {table} ({', '.join(types)})"
    if connection.dialect == "sqlite":
        connection.executemany(f"{into} VALUES ({', '.join('?' * len(types))}) {conflict}", rows)
        return
    # One statement: 1,000 rows take this process 4 ms; as messages of their own (`executemany`) 11.
    fields = ", ".join(f"{name} {type}" for name, type in types.items())
    given = [dict(zip(types, map(_as_json, row), strict=True)) for row in rows]
    connection.execute(
        f"{into} SELECT * FROM json_to_recordset(CAST(? AS json)) AS given ({fields}) {conflict}",
        (msgspec.json.encode(given).decode(),),
    )


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Of each metric the point with the greatest (step, time, value), NaN below every number."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        old = best.get(row[:2])
        if old is None or row[2] > old[2] or (row[2] == old[2] and _rank(row) > _rank(old)):
            best[row[:2]] = row
    return list(best.values())


def _rank(row: Row) -> tuple[float, bool, float]:
    return row[4], row[3] is not None, row[3] or 0.0


def _text_rows(run_id: str, what: str, texts: Mapping[str, str]) -> list[tuple[str, str, str]]:
    for key, value in texts.items():
        try:
            check_key(key)
            check_text(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"the {what} {key!r} of run {run_id} cannot be stored: {error}") from error
    return [(run_id, key, value) for key, value in texts.items()]


def _new_params(connection: Connection, run_id: str, rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Those that are not there yet. Nobody else writes meanwhile: the transaction is the only one."""
    sql = f"SELECT key, value FROM run_params WHERE run_id = ? AND {is_one_of(connection.dialect, 'key')}"
    there = dict(connection.execute(sql, (run_id, as_members(row[1] for row in rows))).fetchall())
    for _, key, value in rows:
        if there.get(key, value) != value:
            raise ConflictError(
                f"the parameter {key!r} of run {run_id} is {there[key]!r} already, it cannot become {value!r}",
                hint="a parameter keeps its value; use a tag for what changes, or another run",
                details={"key": key, "old": there[key], "new": value},
            )
    return [row for row in rows if row[1] not in there]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
