"""Copy all records from one database into another: SQLite to Postgres and back.

It goes by the schema and knows no table by name, so a new table is copied from the day it exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from sqlalchemy import Boolean, Float, Table

from millrace.core.errors import CorruptError, InputError
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords
from millrace.store.schema import METADATA

BATCH_ROWS = 500  # in memory at once
Row = list[Any]


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied."""

    rows: dict[str, int]  # by table
    digest: str  # of all rows: `records_digest` of either side


def copy_records(source: SqlRecords, target: SqlRecords, progress: Callable[[str, int], None] | None = None) -> Copied:
    """Copy every row, then read the target again and compare; nothing is left there on failure.

    The writers of both sides wait meanwhile. Points that another process still buffers for the source are
    not seen: stop what writes there first.

    Args:
        source: Any records.
        target: Records without a row.
        progress: Called after each batch with the table and how many of its rows are copied.

    Returns:
        Rows per table, and the digest that both sides have.

    Raises:
        InputError: The target is not empty, or a row cannot be stored there.
        CorruptError: The target does not give back what was put in.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from millrace.core.types import Run
        >>> from millrace.store.records_sql import open_records
        >>> with tempfile.TemporaryDirectory() as home:
        ...     one, two = (open_records(Path(home) / name / "records.db") for name in ("one", "two"))
        ...     run = one.put(Run(id="r"))
        ...     copied = copy_records(one, two)
        ...     copied.rows["runs"], two.get(Run, "r") == run, records_digest(two) == copied.digest
        ...     one.close(), two.close()
        (1, True, True)
        (None, None)
    """
    if source is target:
        raise InputError("the records cannot be copied into themselves")
    source.flush()
    counts: dict[str, int] = {}
    with target.writing() as into:
        _refuse_rows(into)
        hasher = hashlib.sha256()
        with source.writing() as origin:
            for table, rows in batches(origin):
                into.insert_rows(quoted(table.name), column_names(table), rows)
                _add(hasher, table, rows)
                counts[table.name] = counts.get(table.name, 0) + len(rows)
                if progress is not None:
                    progress(table.name, counts[table.name])
        go_on_counting(into)
        copied = Copied(rows=counts, digest=f"sha256:{hasher.hexdigest()}")
        if _digest(into) != copied.digest:
            raise CorruptError(
                "the copied records read back differently: nothing was kept of the copy",
                hint="check the disk and memory of the target's machine, then copy again",
            )
    return copied


def records_digest(records: SqlRecords) -> str:
    """The digest of every row of every table, the same for equal records on any database. Writers wait.

    It is SHA-256 over the tables by name, each with its rows in the order of the primary key, as MessagePack.
    """
    records.flush()
    with records.writing() as connection:
        return _digest(connection)


def _digest(connection: Connection) -> str:
    hasher = hashlib.sha256()
    for table, rows in batches(connection):
        _add(hasher, table, rows)
    return f"sha256:{hasher.hexdigest()}"


def _add(hasher: Any, table: Table, rows: list[Row]) -> None:
    for row in rows:
        hasher.update(msgspec.msgpack.encode([str(table.name), *row]))


def tables() -> list[Table]:
    """Parents before children."""
    return list(METADATA.sorted_tables)


def batches(connection: Connection) -> Iterator[tuple[Table, list[Row]]]:
    """Every row of every table, a batch at a time, by primary key."""
    for table in tables():
        names, key = column_names(table), [quoted(column.name) for column in table.primary_key]
        places = [table.columns.keys().index(column.name) for column in table.primary_key]
        select = f"SELECT {', '.join(names)} FROM {quoted(table.name)}"
        order = f" ORDER BY {', '.join(key)} LIMIT {BATCH_ROWS}"
        after = f" WHERE ({', '.join(key)}) > ({', '.join('?' * len(key))})"
        found = connection.execute(select + order).fetchall()
        while found:
            yield table, [plain(table, row) for row in found]
            found = connection.execute(select + after + order, [found[-1][place] for place in places]).fetchall()


def plain(table: Table, row: tuple[Any, ...]) -> Row:
    """Values as both databases keep them: SQLite has no booleans, no NaN and no negative zero."""
    values: Row = []
    for column, value in zip(table.columns, row, strict=True):
        if value is not None and isinstance(column.type, Boolean):
            value = bool(value)
        elif value is not None and isinstance(column.type, Float):
            value = float(value) + 0.0 if value == value else None
        values.append(value)
    return values


def _refuse_rows(connection: Connection) -> None:
    for table in tables():
        if connection.execute(f"SELECT 1 FROM {quoted(table.name)} LIMIT 1").fetchone() is not None:
            raise InputError(
                f"the target is not empty: it has rows in the table {table.name}",
                hint="copy into a new database or home",
            )


def go_on_counting(connection: Connection) -> None:
    """New rows must get ids after the copied ones; SQLite sees to it by itself."""
    if connection.dialect != "postgres":
        return
    for table in tables():
        column = table.autoincrement_column
        if column is not None:
            newest = f"(SELECT max({quoted(column.name)}) FROM {quoted(table.name)})"  # NULL changes nothing
            connection.execute(
                f"SELECT setval(pg_get_serial_sequence(?, ?), {newest})", (quoted(table.name), column.name)
            )


def column_names(table: Table) -> list[str]:
    """Its columns, in order, as SQL names them."""
    return [quoted(column.name) for column in table.columns]


def quoted(name: str) -> str:
    """A name of ours as SQL takes it, whatever word it is.

    Example:
        >>> quoted("key")
        '"key"'
    """
    return f'"{name}"'
