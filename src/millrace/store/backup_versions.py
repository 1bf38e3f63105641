"""Which records have changed since the last backup, from their ids and versions alone, so that most are not read.

Every change of a record raises its version, and an id is never used for another run or step. What is read of a table
is an index of (id, version), a twentieth of it, which the first backup makes: who makes no backups pays nothing.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from millrace.core.types import Struct
from millrace.store.backup_naming import Named
from millrace.store.database import Connection
from millrace.store.layout import SHARED
from millrace.store.records_sql import SqlRecords

TABLES = ("runs", "steps")  # where nearly all bytes of records are, besides points
_ID, _VERSION = (1 + [column.name for column in SHARED].index(name) for name in ("id", "version"))
_encode = msgspec.msgpack.Encoder().encode


class Stretch(Struct, frozen=True, kw_only=True):
    """A piece of a table: the ids from `first` to `last`, in the versions that `versions` is the digest of, if any.

    `blobs` are those that its rows name; True is a tree.
    """

    first: str
    last: str
    rows: int
    versions: str
    digest: str
    size_bytes: int
    blobs: dict[str, bool] = {}


def prepare(records: SqlRecords) -> None:
    """Make the indexes, unless they are there."""
    for table in TABLES:
        name = f"ix_{table}_id_version"
        if not records.read(lambda connection, name=name: _exists(connection, name)):
            with records.writing() as connection:
                connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {table} (id, version)")


def _exists(connection: Connection, name: str) -> bool:
    where = "sqlite_master WHERE name" if connection.dialect == "sqlite" else "pg_indexes WHERE indexname"
    return connection.execute(f"SELECT 1 FROM {where} = ?", (name,)).fetchone() is not None


def versions_of(connection: Connection, table: str) -> list[tuple[str, int]]:
    """The id and version of every record, by id."""
    return connection.execute(f"SELECT id, version FROM {table} ORDER BY id").fetchall()


def stretches(found: Sequence[tuple[str, int]], known: Iterable[Stretch]) -> Iterator[Stretch | tuple[str, str]]:
    """The table in order: what is as it was, and the first and last id of what is to be read.

    Args:
        found: See `versions_of`.
        known: What an earlier backup has, by id.

    Example:
        >>> versions = digest_of([("b", 1), ("c", 1)])
        >>> kept = Stretch(first="b", last="c", rows=2, versions=versions, digest="", size_bytes=1)
        >>> [one if isinstance(one, tuple) else "kept" for one in stretches([(id, 1) for id in "abcde"], [kept])]
        [('a', 'a'), 'kept', ('d', 'e')]
        >>> list(stretches([("a", 1), ("b", 2), ("c", 1)], [kept]))
        [('a', 'c')]
    """
    ids = [id for id, _ in found]
    at = 0
    for one in known:
        start, end = bisect_left(ids, one.first), bisect_right(ids, one.last)
        if start < at or end - start != one.rows or digest_of(found[start:end]) != one.versions:
            continue
        if start > at:
            yield ids[at], ids[start - 1]
        yield one
        at = end
    if at < len(ids):
        yield ids[at], ids[-1]


def digest_of(found: Iterable[tuple[str, int]]) -> str:
    """Of ids and versions."""
    return hashlib.sha256(_encode([tuple(one) for one in found])).hexdigest()


def stretch_of(table: str, rows: Sequence[Sequence[Any]], digest: str, size: int) -> Stretch:
    """A piece that was read.

    Args:
        table: Its table.
        rows: Each with the table's name first.
        digest: Of the piece.
        size: Its bytes.
    """
    named = Named()
    for row in rows:
        named.see(table, row)
    return Stretch(
        first=rows[0][_ID], last=rows[-1][_ID], rows=len(rows), digest=digest, size_bytes=size, blobs=named.blobs,
        versions=digest_of((row[_ID], row[_VERSION]) for row in rows),
    )  # fmt: skip
