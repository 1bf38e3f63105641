"""Questions of an audit, in SQL: sealed events in order and as searched, and whose details are to be erased."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from millrace.core.types import Event
from millrace.store import sealing
from millrace.store.database import Connection, within_int64
from millrace.store.records_sql import SqlRecords

BATCH = 10_000
ERASED = "audit.erased"  # the verb of the events that say which details were erased: theirs stay
_LINK = "e.seq, e.at, e.actor, e.verb, e.subject, e.commitment, e.chain"
_ROWS = (
    f"SELECT {_LINK}, d.salt, d.detail FROM events e LEFT JOIN event_details d ON d.event_id = e.id "
    "WHERE e.seq > ? AND e.seq <= ? ORDER BY e.seq LIMIT ?"
)
_LINKS = f"SELECT {_LINK}, NULL, NULL FROM events e WHERE e.seq > ? AND e.seq <= ? ORDER BY e.seq LIMIT ?"
_FOUND = (
    f"SELECT {_LINK}, d.salt, d.detail, e.id FROM events e LEFT JOIN event_details d ON d.event_id = e.id "
    "WHERE e.seq IS NOT NULL"
)
_DETAILED = (
    "SELECT e.seq, e.id, d.detail FROM events e JOIN event_details d ON d.event_id = e.id "
    f"WHERE e.seq > ? AND e.verb <> '{ERASED}'"
)
_PLACE = "SELECT at, id FROM events WHERE seq = ?"
_LAST = "SELECT seq, chain FROM events WHERE seq IS NOT NULL ORDER BY seq DESC LIMIT 1"
_UNSEALED = "SELECT COUNT(*) FROM events WHERE seq IS NULL"
_CHAIN = "SELECT chain FROM events WHERE seq = ?"
_LAST_CHARACTER = chr(0x10FFFF)


class EventFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events: all that fit everything that is given.

    `actor`, `verb` and `subject` are whole, or end with `*`; `since` and `until` are seconds since 1970, from
    and up to; `text` stands somewhere in the event, whatever its case.
    """

    actor: str = ""
    verb: str = ""
    subject: str = ""
    since: float | None = None
    until: float | None = None
    text: str = ""


Row = tuple[Any, ...]  # seq, at, actor, verb, subject, commitment, chain, salt, detail


def rows(records: SqlRecords, since: int, until: int, *, has_details: bool = True) -> Iterator[list[Row]]:
    """Sealed events with since < seq <= until in order, in batches, as `security.chain.ChainCheck` takes them."""
    sql, last = _ROWS if has_details else _LINKS, since
    while True:
        batch = records.read(lambda connection, after=last: _all(connection, sql, [after, until, BATCH]))
        if batch:
            yield batch
        if len(batch) < BATCH:
            return
        last = batch[-1][0]


def last_event(records: SqlRecords) -> tuple[Any, Any]:
    """The largest number of a sealed event and its digest, whatever stands there."""
    return records.read(lambda connection: connection.execute(_LAST).fetchone()) or (0, sealing.GENESIS)


def count_unsealed(records: SqlRecords) -> int:
    """Events that wait for the sealer."""
    return records.read(lambda connection: connection.execute(_UNSEALED).fetchone()[0])


def chain_at(records: SqlRecords, seq: int) -> str | None:
    """The stored digest of one event."""
    row = records.read(lambda connection: connection.execute(_CHAIN, (seq,)).fetchone())
    return sealing.GENESIS if seq == 0 else row and row[0]


def search(records: SqlRecords, wanted: EventFilter, before: int | None, limit: int) -> list[Row]:
    """Sealed events that fit, the newest first.

    Args:
        records: Where.
        wanted: Which.
        before: Go on after this one: a seq of the page before.
        limit: At most so many.
    """

    def ask(connection: Connection) -> list[Row]:
        where, values = _where(wanted)
        if before is not None:
            place = connection.execute(_PLACE, (before,)).fetchone()
            if place is None:
                return []
            where += " AND (e.at, e.id) < (?, ?)"
            values += place
        return _all(
            connection, f"{_FOUND}{where} ORDER BY e.at DESC, e.id DESC LIMIT ?", [*values, within_int64(limit)]
        )

    return records.read(ask)


def export(records: SqlRecords, wanted: EventFilter, since: int = 0) -> Iterator[Row]:
    """Sealed events that fit, with a number greater than `since`, in order."""
    where, values = _where(wanted)
    sql = f"{_FOUND}{where} AND e.seq > ? ORDER BY e.seq LIMIT ?"
    while True:
        batch = records.read(lambda connection, after=since: _all(connection, sql, [*values, after, BATCH]))
        yield from batch
        if len(batch) < BATCH:
            return
        since = batch[-1][0]


def details_before(records: SqlRecords, at: float) -> list[tuple[int, int]]:
    """(seq, id) of sealed events older than `at` that have a detail which may be erased."""
    sql = f"{_DETAILED.replace('d.detail', '1')} AND e.at < ? ORDER BY e.seq"
    return [(seq, id) for seq, id, _ in records.read(lambda connection: _all(connection, sql, [0, at]))]


def details_naming(records: SqlRecords, parts: list[str], fits: Callable[[str], bool]) -> list[tuple[int, int]]:
    """(seq, id) of sealed events whose detail may be erased and names somebody.

    Args:
        records: Where.
        parts: Texts, as JSON spells them, one of which a detail must hold.
        fits: Decides about those that do.
    """
    like = " OR ".join(["CAST(d.detail AS TEXT) LIKE ? ESCAPE '\\'"] * len(parts))
    sql = f"{_DETAILED} AND ({like}) ORDER BY e.seq LIMIT ?"
    patterns = [_pattern(part) for part in parts]
    found: list[tuple[int, int]] = []
    since = 0
    while True:
        batch = records.read(lambda connection, after=since: _all(connection, sql, [after, *patterns, BATCH]))
        found += [(seq, id) for seq, id, detail in batch if fits(detail)]
        if len(batch) < BATCH:
            return found
        since = batch[-1][0]


def bodies_naming(records: SqlRecords, table: str, parts: list[str]) -> list[str]:
    """The bodies of a table's records that hold one of some texts, as JSON spells them."""
    like = " OR ".join(["CAST(body AS TEXT) LIKE ? ESCAPE '\\'"] * len(parts))
    sql = f"SELECT CAST(body AS TEXT) FROM {table} WHERE {like} ORDER BY id"
    return [body for (body,) in records.read(lambda connection: _all(connection, sql, [*map(_pattern, parts)]))]


def values_naming(records: SqlRecords, table: str, parts: list[str]) -> list[tuple[str, str, str]]:
    """(run, key, value) of `run_tags` or `run_params` that hold one of some texts."""
    like = " OR ".join(["value LIKE ? ESCAPE '\\'"] * len(parts))
    sql = f"SELECT run_id, key, value FROM {table} WHERE {like} ORDER BY run_id, key"
    return records.read(lambda connection: _all(connection, sql, [*map(_pattern, parts)]))


def as_event(row: Row) -> Event:
    """A found row as readers see it."""
    link = sealing.SealedLink(
        seq=row[0], at=row[1], actor=row[2], verb=row[3], subject=row[4], commitment=row[5], chain=row[6], salt=row[7],
        detail=None if row[8] is None else str(row[8]).encode(),
    )  # fmt: skip
    return sealing.as_event(row[9], link)


def _all(connection: Connection, sql: str, values: list[Any]) -> list[Any]:
    if connection.dialect == "postgres":  # SQLite's LIKE takes no notice of the case of ASCII
        sql = sql.replace(" LIKE ", " ILIKE ")
    return connection.execute(sql, values).fetchall()


def _where(wanted: EventFilter) -> tuple[str, list[Any]]:
    sql, values = "", []
    for name in ("actor", "verb", "subject"):
        text = getattr(wanted, name)
        if text.endswith("*"):
            sql += f" AND e.{name} >= ? AND e.{name} <= ?"
            values += [text[:-1], text[:-1] + _LAST_CHARACTER]
        elif text:
            sql += f" AND e.{name} = ?"
            values.append(text)
    for bound, sign in ((wanted.since, ">="), (wanted.until, "<")):
        if bound is not None:
            sql += f" AND e.at {sign} ?"
            values.append(bound)
    if wanted.text:
        inside = msgspec.json.encode(wanted.text).decode()[1:-1]  # as it stands in a detail
        sql += (
            " AND (e.actor LIKE ? ESCAPE '\\' OR e.verb LIKE ? ESCAPE '\\'"
            " OR e.subject LIKE ? ESCAPE '\\' OR CAST(d.detail AS TEXT) LIKE ? ESCAPE '\\')"
        )
        values += [*[_pattern(wanted.text)] * 3, _pattern(inside)]
    return sql, values


def _pattern(text: str) -> str:
    """What LIKE finds a text with."""
    return "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
