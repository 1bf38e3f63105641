"""Records that are put back into an empty database, by whatever is quickest there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from millrace.store import transfer
from millrace.store.blobs_local import disk_errors
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords
from millrace.store.sqlite import SqliteDatabase, connect

NAME = "records.db"
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
        connection.execute(f"DROP INDEX {transfer._quoted(name)}")
    yield
    for _, sql in found:
        connection.execute(sql)
    connection.execute(f"PRAGMA cache_size = {before}")
