"""Records as pieces for a backup: read in one snapshot while others write, cut where their keys say, put back.

A piece is a MessagePack array of rows `[table, *values]`, in the order of the primary key. The rows of all
pieces, one after the other, are what `transfer.records_digest` is the digest of.

Where a table is cut depends on the keys of its rows alone (content-defined chunking): a row that is added or
changed gives new bytes to its own piece and leaves nearly all others as they were. Metric points are only ever
added, and removed with their run: they are cut at fixed numbers, so that a piece of points whose runs are all
still there need not even be read again.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgspec
from sqlalchemy import Boolean, Float, Table

from millrace.core.errors import CorruptError
from millrace.core.types import Struct
from millrace.store import backup_versions, transfer
from millrace.store.backup_versions import Stretch
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords
from millrace.store.schema import EVENTS, METRICS
from millrace.store.sqlite import SqliteDatabase, connect

SMALLEST_BYTES = 64 << 10  # no cut before
LARGEST_BYTES = 1 << 20  # a cut after, whatever the key
CUT_MASK = 0b111  # between: one key in eight is a cut
POINTS_TABLE = "metrics"
POINTS = 8192  # numbers of points in a piece
CACHE_KIB = 16 << 10  # or the ids of runs, which are asked for twice, are read twice
_HEAD_BYTES = 5  # of the array: 0xdd and how many rows
_encode = msgspec.msgpack.Encoder().encode
_DECODER = msgspec.msgpack.Decoder(list[tuple[Any, ...]])


class Points(Struct, frozen=True, kw_only=True):
    """A piece of points that nobody can add to any more."""

    digest: str
    rows: int
    size_bytes: int
    runs: tuple[str, ...]
    last: str  # digest of its last row


class Piece(Struct, frozen=True, kw_only=True):
    """Some rows of one table. `payload` is None if `digest` is known from before, and nothing was read."""

    table: str
    digest: str
    rows: int
    size_bytes: int
    payload: bytes | None
    bucket: int | None = None  # of points
    points: Points | None = None  # of points: what to know the next time
    stretch: Stretch | None = None  # the same of other tables


@contextmanager
def snapshot(records: SqlRecords) -> Iterator[Connection]:
    """A connection of its own that sees the records as they are now, for as long as it is open. Nobody waits."""
    records.flush()
    database: Any = records._database
    with database.translated():
        if isinstance(database, SqliteDatabase):
            lite = connect(database.path)
            try:
                lite.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                lite.execute("BEGIN")
                lite.execute("SELECT key FROM meta LIMIT 1").fetchall()  # the snapshot is taken by the first read
                yield lite
            finally:
                lite.close()
        else:
            postgres = database._connect()
            try:
                postgres.raw.execute(b"SET idle_in_transaction_session_timeout = 0")
                postgres.raw.execute(b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                postgres.execute("SELECT key FROM meta LIMIT 1").fetchall()
                yield postgres
            finally:
                postgres.raw.close()


def pieces(
    connection: Connection,
    see: Callable[[str, Sequence[Any]], object] | None = None,
    known: Callable[[int], Points | None] = lambda bucket: None,
    stretches: Mapping[str, Sequence[Stretch]] = MappingProxyType({}),
) -> Iterator[Piece]:
    """Every row of every table, parents before children.

    Args:
        connection: See `snapshot`.
        see: Called with the table and every row that is read, which ends as the record does.
        known: What an earlier backup knows of a bucket of points; None: read it.
        stretches: What it knows of other tables.
    """
    for table in transfer.tables():
        if table is METRICS:
            yield from _points(connection, known)
        else:
            name = str(table.name)  # SQLAlchemy's names are texts of a kind of its own
            key = tuple(place + 1 for place in _key_places(table))
            if name in backup_versions.TABLES:
                yield from _stretches(connection, table, see, stretches.get(name, ()))
                continue
            if table is EVENTS:
                yield from _events(connection, see, stretches.get(name, ()))
                continue
            for rows in cut(key, _seen(name, _batches(connection, table), see)):
                yield piece_of(name, rows)


def piece_of(table: str, rows: list[bytes], bucket: int | None = None, points: Points | None = None) -> Piece:
    """A piece from its encoded rows."""
    payload = b"\xdd" + len(rows).to_bytes(4, "big") + b"".join(rows)
    digest = "sha256:" + hashlib.sha256(payload).hexdigest()
    return Piece(
        table=table, digest=digest, rows=len(rows), size_bytes=len(payload), payload=payload, bucket=bucket,
        points=points,
    )  # fmt: skip


def cut(key: tuple[int, ...], rows: Iterable[Sequence[Any]]) -> Iterator[list[bytes]]:
    """Encoded rows, cut where a key says.

    Args:
        key: Which values of a row are its key.
        rows: `[table, *values]`, in the order of their keys.

    Example:
        >>> [len(one) for one in cut((1,), [["t", "a", 1], ["t", "b", 2]])]
        [2]
    """
    held: list[bytes] = []
    size = 0
    for row in rows:
        encoded = _encode(row)
        held.append(encoded)
        size += len(encoded)
        if size >= SMALLEST_BYTES and (size >= LARGEST_BYTES or _is_cut([row[place] for place in key])):
            yield held
            held, size = [], 0
    if held:
        yield held


def _is_cut(key: list[Any]) -> bool:
    return zlib.crc32(_encode(key)) & CUT_MASK == 0


def rows_of(payload: bytes, table: str) -> list[tuple[Any, ...]]:
    """The rows of a piece, without the table's name.

    Raises:
        CorruptError: It is not a piece of this table.

    Example:
        >>> rows_of(piece_of("t", [_encode(["t", "a", None])]).payload, "t")
        [('a', None)]
    """
    return [row[1:] for row in named_rows_of(payload, table)]


def named_rows_of(payload: bytes, table: str) -> list[tuple[Any, ...]]:
    """The rows of a piece, each with the table's name first; see `rows_of`."""
    try:
        rows = _DECODER.decode(payload)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"a piece of the table {table} is not one: {error}") from error
    if [row[:1] for row in rows].count((table,)) != len(rows):
        raise CorruptError(f"a piece of the table {table} has rows of another one")
    return rows


class RecordsDigest:
    """`transfer.records_digest`, from pieces in their order.

    Example:
        >>> RecordsDigest().text() == "sha256:" + hashlib.sha256().hexdigest()
        True
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, payload: bytes) -> None:
        """The next piece."""
        self._hash.update(memoryview(payload)[_HEAD_BYTES:])

    def text(self) -> str:
        """The digest so far."""
        return f"sha256:{self._hash.hexdigest()}"


def read_back(connection: Connection, name: str, counts: Iterable[int]) -> Iterator[bytes]:
    """The payloads of a table's rows as they are now, so many rows in each; a last one has what else is there."""
    table = {str(table.name): table for table in transfer.tables()}[name]
    held: list[Sequence[Any]] = []
    batches = _batches(connection, table)
    for count in counts:
        while len(held) < count and (batch := next(batches, None)) is not None:
            held.extend(batch)
        yield _payload(held[:count])
        del held[:count]
    held.extend(next(batches, ()))
    if held:
        yield _payload(held)


def read_again(connection: Connection, name: str, rows: list[tuple[Any, ...]]) -> bytes:
    """The payload of the rows from the first to the last of these, as they are now; see `named_rows_of`."""
    table = {str(table.name): table for table in transfer.tables()}[name]
    key = ", ".join(transfer.quoted(column.name) for column in table.primary_key)
    marks = ", ".join("?" * len(table.primary_key))
    bounds = tuple(rows[end][place + 1] for end in (0, -1) for place in _key_places(table))
    where = f"({key}) >= ({marks}) AND ({key}) <= ({marks})"
    return _payload([row for batch in _batches(connection, table, where, bounds) for row in batch])


def _payload(rows: list[Sequence[Any]]) -> bytes:
    """As `piece_of` makes it, whose head has one size for any number of rows."""
    encoded = _encode(rows)
    head = 1 if len(rows) < 16 else 3 if len(rows) < 1 << 16 else _HEAD_BYTES
    return b"\xdd" + len(rows).to_bytes(4, "big") + memoryview(encoded)[head:]


def columns() -> dict[str, tuple[str, ...]]:
    """The columns of every table, in the order of the tables."""
    return {str(table.name): tuple(map(str, table.columns.keys())) for table in transfer.tables()}


def chain_at(connection: Connection, seq: int) -> str | None:
    """The chain's digest at an event; None: there is no such event."""
    row = connection.execute("SELECT chain FROM events WHERE seq = ?", (seq,)).fetchone()
    return None if row is None else row[0]


def _batches(
    connection: Connection, table: Table, where: str = "", values: tuple[Any, ...] = ()
) -> Iterator[list[Sequence[Any]]]:
    """The rows of one table, each with the table's name first, by primary key, a batch at a time."""
    key = [transfer.quoted(column.name) for column in table.primary_key]
    places = [place + 1 for place in _key_places(table)]
    shown, is_plain = _shown(connection, table)
    select = f"SELECT '{table.name}', {shown} FROM {transfer.quoted(table.name)}"
    order = f" ORDER BY {', '.join(key)} LIMIT {transfer.BATCH_ROWS}"
    after = f"({', '.join(key)}) > ({', '.join('?' * len(key))})"
    first = f" WHERE {where}" if where else ""
    again = f"{first} AND {after}" if where else f" WHERE {after}"
    found = connection.execute(select + first + order, values).fetchall()
    while found:
        yield found if is_plain else [[row[0], *transfer.plain(table, row[1:])] for row in found]
        last = [found[-1][place] for place in places]
        found = connection.execute(select + again + order, (*values, *last)).fetchall()


def _shown(connection: Connection, table: Table) -> tuple[str, bool]:
    """The columns in SQL; and whether the values come as `transfer.plain` would make them, which takes a while."""
    names = transfer.column_names(table)
    if connection.dialect != "sqlite" or any(isinstance(column.type, Boolean) for column in table.columns):
        return ", ".join(names), False
    # SQLite keeps no NaN; adding zero leaves no negative zero.
    floats = [isinstance(column.type, Float) for column in table.columns]
    return ", ".join(f"{name} + 0.0" if is_float else name for name, is_float in zip(names, floats, strict=True)), True


def _key_places(table: Table) -> tuple[int, ...]:
    return tuple(table.columns.keys().index(column.name) for column in table.primary_key)


def _seen(
    name: str, batches: Iterable[list[Sequence[Any]]], see: Callable[[str, Sequence[Any]], object] | None
) -> Iterator[Sequence[Any]]:
    for rows in batches:
        if see is None:
            yield from rows
            continue
        for row in rows:
            see(name, row)
            yield row


def _stretches(
    connection: Connection,
    table: Table,
    see: Callable[[str, Sequence[Any]], object] | None,
    known: Sequence[Stretch],
) -> Iterator[Piece]:
    """Records; those that have the versions that are known are not read."""
    name = str(table.name)
    for one in backup_versions.stretches(backup_versions.versions_of(connection, name), known):
        if isinstance(one, Stretch):
            yield Piece(
                table=name, digest=one.digest, rows=one.rows, size_bytes=one.size_bytes, payload=None, stretch=one
            )
            continue
        for rows in cut((1,), _seen(name, _batches(connection, table, "id >= ? AND id <= ?", one), see)):
            piece = piece_of(name, rows)
            read = named_rows_of(piece.payload or b"", name)
            found = backup_versions.stretch_of(name, read, piece.digest, piece.size_bytes)
            yield msgspec.structs.replace(piece, stretch=found)


def _events(
    connection: Connection, see: Callable[[str, Sequence[Any]], object] | None, known: Sequence[Stretch]
) -> Iterator[Piece]:
    """Sealed events stay as they are: those that are known are not read, if nothing is before or between them."""
    name, after = str(EVENTS.name), -1
    for one in known:
        row = connection.execute("SELECT min(id) FROM events WHERE id > ?", (after,)).fetchone()
        if row is None or row[0] != int(one.first):
            break
        yield Piece(table=name, digest=one.digest, rows=one.rows, size_bytes=one.size_bytes, payload=None, stretch=one)
        after = int(one.last)
    for rows in cut((1,), _seen(name, _batches(connection, EVENTS, "id > ?", (after,)), see)):
        piece = piece_of(name, rows)
        read = named_rows_of(piece.payload or b"", name)
        if all(row[2] is not None for row in read):
            found = Stretch(
                first=str(read[0][1]), last=str(read[-1][1]), rows=len(rows), versions="", digest=piece.digest,
                size_bytes=piece.size_bytes,
            )  # fmt: skip
            piece = msgspec.structs.replace(piece, stretch=found)
        yield piece


# --------------------------------------------------------------------------- points


def _points(connection: Connection, known: Callable[[int], Points | None]) -> Iterator[Piece]:
    """Points by fixed numbers; those that are known and cannot have changed are not read."""
    (newest,) = connection.execute("SELECT max(id) FROM metrics").fetchone()
    runs: set[str] | None = None
    start = None
    while True:
        row = connection.execute("SELECT min(id) FROM metrics WHERE id >= ?", (-(2**63) if start is None else start,))
        (first,) = row.fetchone()
        if first is None:
            return
        bucket = first // POINTS
        start = (bucket + 1) * POINTS
        before = known(bucket) if start <= newest else None
        if before is not None:
            if runs is None:
                runs = {id for (id,) in connection.execute("SELECT id FROM runs").fetchall()}
            if runs.issuperset(before.runs) and _last_row(connection, start) == before.last:
                yield Piece(
                    table=POINTS_TABLE, digest=before.digest, rows=before.rows, size_bytes=before.size_bytes,
                    payload=None, bucket=bucket, points=before,
                )  # fmt: skip
                continue
        yield _read_points(connection, bucket, is_full=start <= newest)


def _last_row(connection: Connection, end: int) -> str:
    """The digest of the last point before a number."""
    names = ", ".join(transfer.column_names(METRICS))
    row = connection.execute(f"SELECT {names} FROM metrics WHERE id < ? ORDER BY id DESC LIMIT 1", (end,)).fetchone()
    return "" if row is None else hashlib.sha256(_encode(transfer.plain(METRICS, row))).hexdigest()


def _read_points(connection: Connection, bucket: int, is_full: bool) -> Piece:
    rows: list[bytes] = []
    runs: set[str] = set()
    last: list[Any] = []
    bounds = (bucket * POINTS, (bucket + 1) * POINTS)
    for batch in _batches(connection, METRICS, "id >= ? AND id < ?", bounds):
        runs.update(row[2] for row in batch)
        rows.extend(map(_encode, batch))
        last = list(batch[-1][1:])
    piece = piece_of(POINTS_TABLE, rows, bucket)
    if not is_full:
        return piece
    points = Points(
        digest=piece.digest, rows=piece.rows, size_bytes=piece.size_bytes, runs=tuple(sorted(runs)),
        last=hashlib.sha256(_encode(last)).hexdigest(),
    )  # fmt: skip
    return msgspec.structs.replace(piece, points=points)
