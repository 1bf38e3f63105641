"""Records that are put back into an empty database, by whatever is quickest there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from millrace.core.errors import CorruptError
from millrace.store import transfer
from millrace.store.blobs_local import disk_errors
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords
from millrace.store.sqlite import SqliteDatabase, connect

NAME = "records.db"
INSERT_ROWS = 100  # by one statement: each costs a change of threads
BULK_CACHE_KIB = 128 << 10  # or SQLite writes pages out before they are full, and reads them again


@contextmanager
def filling(records: SqlRecords, home: Path) -> Iterator[Connection]:
    """A write transaction on records that nobody uses yet; they are closed with it.

    The home's own file is written once, without SQLite's log: an error leaves it as it was, a process that is killed
    does not. Then `forget` is to be called before it is opened again.

    Args:
        records: Just opened.
        home: The folder.
    """
    database: Any = records._database
    try:
        if not isinstance(database, SqliteDatabase) or database.path != Path(home).absolute() / NAME:
            with records.writing() as into:
                yield into
            return
    finally:
        records.close()
    with database.translated():
        lite = connect(database.path)
        try:
            lite.execute("PRAGMA journal_mode=MEMORY")
            lite.execute("BEGIN IMMEDIATE")
            yield lite
            lite.execute("COMMIT")
            lite.execute("PRAGMA journal_mode=WAL")
        finally:
            lite.close()


def forget(home: Path) -> None:
    """Remove the home's own file of records, which a killed restore may have left half written."""
    with disk_errors(home):
        for end in ("", "-journal", "-wal", "-shm"):
            (home / f"{NAME}{end}").unlink(missing_ok=True)


@contextmanager
def in_bulk(connection: Connection) -> Iterator[None]:
    """Rows are put back quicker inside: SQLite makes the indexes anew, from sorted rows, when all are there."""
    if connection.dialect != "sqlite":
        yield
        return
    found = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    (before,) = connection.execute("PRAGMA cache_size").fetchone()
    connection.execute(f"PRAGMA cache_size = -{BULK_CACHE_KIB}")
    for name, _ in found:
        connection.execute(f"DROP INDEX {transfer.quoted(name)}")
    yield
    for _, sql in found:
        connection.execute(sql)
    connection.execute(f"PRAGMA cache_size = {before}")


def insert(connection: Connection, name: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Put rows back.

    Args:
        connection: Inside a write transaction.
        name: The table.
        columns: Its columns, as the backup knows them.
        rows: See `backup_rows.named_rows_of`.

    Raises:
        CorruptError: The table is not one of ours, or a row has other columns.
    """
    table = {str(table.name): table for table in transfer.tables()}.get(name)
    if table is None or tuple(table.columns.keys()) != columns or not {*map(len, rows)} <= {len(columns) + 1}:
        raise CorruptError(f"the backup's table {name[:60]!r} does not fit the schema that it names")
    names = transfer.column_names(table)
    if connection.dialect == "sqlite":
        into = f"INSERT INTO {transfer.quoted(name)} ({', '.join(names)}) VALUES "
        for group in (rows[first : first + INSERT_ROWS] for first in range(0, len(rows), INSERT_ROWS)):
            connection.execute(into + _marks(len(group), len(names)), list(chain.from_iterable(group)))
    else:
        connection.insert_rows(transfer.quoted(name), names, (row[1:] for row in rows))


@lru_cache
def _marks(rows: int, columns: int) -> str:
    """Parameters of several rows whose first value, the table's name, is left out."""
    numbers = ((row * (columns + 1) + 2, (row + 1) * (columns + 1) + 1) for row in range(rows))
    return ", ".join(f"({', '.join(f'?{number}' for number in range(first, end))})" for first, end in numbers)


def is_empty(connection: Connection) -> bool:
    """Whether no table has a row."""
    return all(
        connection.execute(f"SELECT 1 FROM {transfer.quoted(table.name)} LIMIT 1").fetchone() is None
        for table in transfer.tables()
    )


def go_on_counting(connection: Connection) -> None:
    """After all rows are back: new ones get numbers after theirs."""
    transfer.go_on_counting(connection)
