"""Events: appended unsealed with the change that they tell of, sealed into a hash chain afterwards.

No writer waits for another one's hash: `append` inserts a row without a place; `seal` gives every such
row the next `seq` and the digest that chains it to the one before, in one transaction. The chain covers
HMAC(salt, detail), not the detail: erasing salt and detail leaves a chain that still verifies.

The formulas are written down in docs/notes/events-and-sealing.md; `security.chain` checks them with code
of its own, so that a mistake here does not excuse itself.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from typing import Any

import msgspec

from millrace.core.errors import ConflictError, CorruptError, InputError
from millrace.core.ids import canonical_json
from millrace.core.types import Event
from millrace.store.database import Connection, within_int64

GENESIS = "0" * 64
SALT_BYTES = 32
SEAL_BATCH = 5000
_INSERT = "INSERT INTO events (at, actor, verb, subject, commitment) VALUES (?, ?, ?, ?, ?) RETURNING id"
_INSERT_DETAIL = "INSERT INTO event_details (event_id, salt, detail) VALUES (?, ?, ?)"
_READ = (
    "SELECT e.id, e.seq, e.at, e.actor, e.verb, e.subject, e.commitment, e.chain, d.salt, d.detail "
    "FROM events e LEFT JOIN event_details d ON d.event_id = e.id WHERE e.seq > ?"
)
_UNSEALED = "SELECT id, at, actor, verb, subject, commitment FROM events WHERE seq IS NULL ORDER BY id LIMIT ?"
_IS_BEYOND = "SELECT 1 FROM events WHERE seq > ? LIMIT 1"
_SET_META = "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class SealedLink(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed event with everything that a verifier needs; salt and detail are None once erased."""

    seq: int
    at: float
    actor: str
    verb: str
    subject: str
    commitment: str
    chain: str
    salt: bytes | None
    detail: bytes | None


def append(connection: Connection, event: Event) -> None:
    """Insert an event without a place in the chain, inside the connection's transaction.

    Raises:
        InputError: The detail is not JSON, the time is not finite, or a text holds a NUL character.
    """
    try:
        detail, at = canonical_json(event.detail), float(event.at)
        if not math.isfinite(at) or "\0" in event.actor + event.verb + event.subject:
            raise TypeError("want a finite time, and texts without NUL")
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the detail of event {event.verb!r} cannot be stored: {error}") from error
    salt = os.urandom(SALT_BYTES)
    commitment = hmac.digest(salt, detail, "sha256").hex()
    (id,) = connection.execute(_INSERT, (at, event.actor, event.verb, event.subject, commitment)).fetchone()
    connection.execute(_INSERT_DETAIL, (id, salt, detail.decode()))


def has_unsealed(connection: Connection) -> bool:
    """Whether there is anything to seal."""
    return connection.execute("SELECT 1 FROM events WHERE seq IS NULL LIMIT 1").fetchone() is not None


def seal_batch(connection: Connection, fence: int) -> int:
    """Seal up to `SEAL_BATCH` events, inside the connection's transaction; how many.

    Raises:
        ConflictError: A sealer with a newer fence has been here.
        CorruptError: The stored head is not that of the events.
    """
    if fence:
        newest = int(_meta(connection, "seal_fence") or 0)
        if fence < newest:
            raise ConflictError(f"a sealer with fence {newest} has taken over, this one has {fence}")
        connection.execute(_SET_META, ("seal_fence", str(fence)))
    seq, chain = head(connection)
    if connection.execute(_IS_BEYOND, (seq,)).fetchone() is not None:
        raise CorruptError(
            f"nothing is sealed: there are events after {seq}, which was the last one: somebody has altered one or "
            "the other",
            hint="`millrace system audit verify` shows where; restore the records from a backup",
        )
    rows = []
    for id, at, actor, verb, subject, commitment in connection.execute(_UNSEALED, (SEAL_BATCH,)).fetchall():
        seq += 1
        link = canonical_json([seq, at, actor, verb, subject, commitment])
        chain = hashlib.sha256(bytes.fromhex(chain) + link).hexdigest()
        rows.append((seq, chain, id))
    if rows:
        connection.executemany("UPDATE events SET seq = ?, chain = ? WHERE id = ?", rows)
        connection.execute(_SET_META, ("chain_head", f"{seq} {chain}"))
    return len(rows)


def head(connection: Connection) -> tuple[int, str]:
    """The last sealed (seq, chain digest); kept apart from the events, so that a cut tail shows.

    Raises:
        CorruptError: Somebody has written something else there.
    """
    stored = _meta(connection, "chain_head")
    if stored is None:
        return 0, GENESIS
    seq, _, chain = stored.partition(" ")
    if not (seq.isascii() and seq.isdigit() and len(chain) == len(GENESIS)):
        raise CorruptError(
            "the stored head of the events (meta, chain_head) has been altered: want a number and a digest",
            hint="`millrace system audit verify` shows whether the events are whole",
        )
    return int(seq), chain


def links(connection: Connection, since: int, subject: str | None, limit: int) -> list[tuple[int, SealedLink]]:
    """Sealed events after `since` in order, each with its row id."""
    sql = _READ
    values: list[Any] = [within_int64(max(since, 0))]
    if subject is not None:
        sql += " AND e.subject = ?"
        values.append(subject)
    rows = connection.execute(sql + " ORDER BY e.seq LIMIT ?", [*values, within_int64(limit)]).fetchall()
    return [
        (
            row[0],
            SealedLink(
                seq=row[1], at=row[2], actor=row[3], verb=row[4], subject=row[5], commitment=row[6], chain=row[7],
                salt=row[8], detail=None if row[9] is None else row[9].encode(),
            ),
        )
        for row in rows
    ]  # fmt: skip


def as_event(id: int, link: SealedLink) -> Event:
    """The event as readers see it; an erased detail is empty."""
    detail = {} if link.detail is None else msgspec.json.decode(link.detail)
    return Event(
        id=id, at=link.at, actor=link.actor, verb=link.verb, subject=link.subject, detail=detail, seq=link.seq,
        chain=link.chain,
    )  # fmt: skip


def _meta(connection: Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]
