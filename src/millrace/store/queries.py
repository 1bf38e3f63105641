"""Records ↔ rows: prepared statements per kind, and the filters that SQL cannot do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import msgspec

from millrace.core.errors import ConflictError, CorruptError, InputError
from millrace.core.types import Record, Run
from millrace.store.database import Connection, within_int64
from millrace.store.layout import SHARED, TABLES, Column
from millrace.store.tracking_sql import as_members, delete_values, is_one_of

R = TypeVar("R", bound=Record)
_IN_LIMIT = 500  # longer lists are filtered here: SQLite has a limit on parameters
_INT64 = 2**63
_EXACT_FLOAT = 2**53  # beyond, Postgres rounds an integer to compare it with a float


class Statements(NamedTuple):
    """The prepared SQL of one kind; the text is the key of the driver's statement cache."""

    table: str
    columns: dict[str, Column]
    get: str
    version: str
    insert: str
    update: str
    delete: str
    decoder: msgspec.json.Decoder[Any]


@cache
def statements(record_type: type[Record]) -> Statements:
    """The statements of a kind, made once."""
    layout = TABLES[record_type.kind]
    columns = {column.name: column for column in (*SHARED, *layout.columns)}
    names = [*columns, "body"]
    return Statements(
        table=layout.name,
        columns=columns,
        get=f"SELECT id, body FROM {layout.name} WHERE id = ?",
        version=f"SELECT version FROM {layout.name} WHERE id = ?",
        insert=f"INSERT INTO {layout.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        " ON CONFLICT (id) DO NOTHING",
        update=f"UPDATE {layout.name} SET {', '.join(f'{name} = ?' for name in names)} WHERE id = ? AND version = ?",
        delete=f"DELETE FROM {layout.name} WHERE id = ?",
        decoder=msgspec.json.Decoder(record_type),
    )


def get(connection: Connection, record_type: type[R], id: str) -> R | None:
    """The record with this id as the connection sees it."""
    prepared = statements(record_type)
    row = connection.execute(prepared.get, (id,)).fetchone()
    return None if row is None else _decode(prepared, row)


def get_many(connection: Connection, record_type: type[R], ids: Sequence[str]) -> dict[str, R]:
    """Those of the records that exist, by id, in one query."""
    prepared = statements(record_type)
    sql = f"SELECT id, body FROM {prepared.table} WHERE {is_one_of(connection.dialect, 'id')}"
    return {row[0]: _decode(prepared, row) for row in connection.execute(sql, (as_members(ids),)).fetchall()}


def put(connection: Connection, record: R, expect_version: int | None, now_s: float) -> R:
    """Insert or replace inside the connection's transaction; see `core.ports.Transaction.put`."""
    prepared = statements(type(record))
    expected = _version(connection, prepared, record.id) or 0 if expect_version is None else expect_version
    created_at = now_s if not expected and not record.created_at else record.created_at
    changed = msgspec.structs.replace(record, version=expected + 1, created_at=created_at)
    row = _encode(prepared, changed)
    if expected:
        done = connection.execute(prepared.update, (*row, record.id, expected))
    else:
        done = connection.execute(prepared.insert, row)
    if not done.rowcount:
        raise _conflict(_version(connection, prepared, record.id), record, expected)
    return changed


def delete(connection: Connection, record_type: type[Record], id: str) -> bool:
    """Remove a record; with a run go its points, parameters and tags."""
    if record_type is Run:
        delete_values(connection, id)
    return connection.execute(statements(record_type).delete, (id,)).rowcount > 0


def find(
    connection: Connection,
    record_type: type[R],
    where: Mapping[str, Any] | None = None,
    order: str = "created_at",
    limit: int | None = None,
    offset: int = 0,
) -> list[R]:
    """Records whose fields equal `where`; see `core.ports.Records.find`.

    Columns are compared in SQL, other fields here after decoding; so is the order.
    """
    prepared = statements(record_type)
    key, descending = order.removeprefix("-"), order.startswith("-")
    _check_fields(record_type, [*(where or {}), key])
    conditions, values, rest = _conditions(prepared, where or {})
    sql = f"SELECT id, body FROM {prepared.table}"
    if conditions:
        sql += " WHERE " + " AND ".join(conditions)
    whole_in_sql = not rest and key in prepared.columns
    if whole_in_sql:
        direction = "DESC" if descending else "ASC"
        if prepared.columns[key].nullable:  # None first, as SQLite and `_sortable` have it
            nulls = "LAST" if descending else "FIRST"
            sql += f" ORDER BY {key} {direction} NULLS {nulls}, id {direction} LIMIT ? OFFSET ?"
        else:
            sql += f" ORDER BY {key} {direction}, id {direction} LIMIT ? OFFSET ?"
        values += [within_int64(None if limit is None else max(limit, 0)), within_int64(offset)]
    found = [_decode(prepared, row) for row in connection.execute(sql, values).fetchall()]
    if whole_in_sql:
        return found
    kept = [record for record in found if all(_matches(getattr(record, name), want) for name, want in rest.items())]
    kept.sort(key=lambda record: (*_sortable(getattr(record, key)), record.id), reverse=descending)
    return kept[offset : None if limit is None else offset + max(limit, 0)]


def _encode(prepared: Statements, record: Record) -> list[Any]:
    """Column values and the JSON body; refuses what would not come back."""
    try:
        body = msgspec.json.encode(record)
        prepared.decoder.decode(body)  # NaN in a number field becomes null and could never be read again
    except (TypeError, OverflowError, UnicodeError, msgspec.ValidationError) as error:
        raise InputError(f"the {record.kind} {record.id!r} cannot be stored: {error}") from error
    row = [*(getattr(record, name) for name in prepared.columns), body.decode()]
    if any(type(value) is str and "\0" in value for value in row):  # a body has it escaped
        raise InputError(f"the {record.kind} {record.id!r} cannot be stored: a name or key of it holds a NUL character")
    return row


def _decode(prepared: Statements, row: tuple[str, str]) -> Any:
    try:
        return prepared.decoder.decode(row[1])
    except msgspec.MsgspecError as error:
        raise CorruptError(
            f"the record {row[0]!r} in table {prepared.table} is damaged: {error}",
            hint="restore the records from a backup, or delete this record",
        ) from error


def _version(connection: Connection, prepared: Statements, id: str) -> int | None:
    row = connection.execute(prepared.version, (id,)).fetchone()
    return None if row is None else row[0]


def _conflict(version: int | None, record: Record, expected: int) -> ConflictError:
    stored = "does not exist" if version is None else f"is at version {version}"
    wanted = f"version {expected} was expected" if expected else "it was to be created"
    return ConflictError(f"{record.kind} {record.id!r} {stored}, but {wanted}")


def _check_fields(record_type: type[Record], names: Iterable[str]) -> None:
    known = record_type.__struct_fields__
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"a {record_type.kind} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")


def _conditions(prepared: Statements, where: Mapping[str, Any]) -> tuple[list[str], list[Any], dict[str, Any]]:
    """What SQL can compare exactly as Python would, and the rest."""
    conditions: list[str] = []
    values: list[Any] = []
    rest: dict[str, Any] = {}
    for name, want in where.items():
        options = list(want) if isinstance(want, (list, tuple, set, frozenset)) else [want]
        column = prepared.columns.get(name)
        if column is None or len(options) > _IN_LIMIT or not all(_is_exact(column, one) for one in options):
            rest[name] = want
            continue
        given = [one for one in options if one is not None]
        tests = [f"{name} IN ({', '.join('?' * len(given))})"] if len(given) > 1 else [f"{name} = ?"] * len(given)
        if None in options:
            tests.append(f"{name} IS NULL")
        conditions.append(f"({' OR '.join(tests)})" if tests else "1 = 0")
        values += given
    return conditions, values, rest


def _is_exact(column: Column, value: Any) -> bool:
    """Whether SQL compares this value with the column as Python does (no conversion of types)."""
    if value is None:
        return True
    if column.type == "text":
        return type(value) is str and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)
    if column.type == "integer" and type(value) is int:
        return -_INT64 <= value < _INT64
    return type(value) in (int, float) and abs(value) < _EXACT_FLOAT


def _matches(value: Any, want: Any) -> bool:
    return value in want if isinstance(want, (list, tuple, set, frozenset)) else value == want


def _sortable(value: Any) -> tuple[bool, Any]:
    """None first; what has no order of its own by its JSON."""
    if value is None or isinstance(value, (str, int, float)):
        return (value is not None, value if value is not None else 0)
    return (True, msgspec.json.encode(value, order="deterministic"))
