"""The audit: whether events are whole, proofs for others, searches, exports, and how long details are kept."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from millrace.control.audit_checking import as_stretches, check_events
from millrace.control.authorisation import acting_principal
from millrace.control.dispatch import handles, local_principal
from millrace.control.heads import as_signed, ledger, parse_heads, sign_now, statement_digest, stored_heads
from millrace.control.services import Services
from millrace.core.errors import CorruptError, InputError, NotFoundError, UntrustedError
from millrace.core.operations import audit as ops
from millrace.core.types import Event
from millrace.core.units import parse_duration
from millrace.security import chain, merkle
from millrace.store import audit_sql
from millrace.store.audit_sql import ERASED, EventFilter, Row
from millrace.store.records_sql import SqlRecords

DAY_S = 86_400.0
ERASE_AT_ONCE = 20_000  # details in one transaction
MOST_FOUND = 10_000
MOST_NUMBER = (1 << 63) - 1  # of an event: what the records can be asked for


@handles(ops.VERIFY)
def verify(services: Services, body: ops.VerifyRequest) -> ops.AuditReport:
    """Every event against the chain, the stored head, and every signed head."""
    return check_events(ledger(services), services.signer, parse_heads(body.heads))


@handles(ops.PROVE)
def prove(services: Services, body: ops.ProveRequest) -> ops.AuditProof:
    """A few hashes that lead from an event to a signed head; where none reaches it, one is signed now."""
    records = ledger(services)
    records.seal()
    number = min(max(body.event, 0), MOST_NUMBER)
    row = next((row for rows in audit_sql.rows(records, number - 1, number) for row in rows), None)
    if row is None:
        raise NotFoundError(f"there is no event {body.event}", hint="`millrace system audit search` shows numbers")
    head = next((one for one in stored_heads(records) if one.size >= max(body.event, body.since or 0)), None)
    if head is None:
        signed = sign_now(services)
        head = as_signed(signed) if signed else None
    since = 1 if body.since is None else body.since
    if head is None or head.size < body.event or not 0 < since <= head.size:
        raise InputError(f"want a number of events up to {head.size if head else 0}, got {body.since}")
    path = _subtrees(records, head.size, merkle.inclusion_ranges(body.event - 1, head.size))
    grown = [] if body.since is None else merkle.consistency_ranges(body.since, head.size)
    salt, detail = (row[7], row[8]) if body.with_detail else (None, None)
    proof = ops.AuditProof(
        event=body.event, leaf=chain.link_bytes(*row[:6]).decode(), path=path, head=head, since=body.since,
        consistency=_subtrees(records, head.size, grown) if grown else [],
        salt=None if salt is None else salt.hex(), detail=detail,
    )  # fmt: skip
    _check_path(proof)
    return proof


def _subtrees(records: SqlRecords, size: int, ranges: Sequence[merkle.Range]) -> list[str]:
    leaves = (
        merkle.leaf_hash(chain.link_bytes(*row[:6]))
        for rows in audit_sql.rows(records, 0, size, has_details=False)
        for row in rows
    )
    try:
        return [root.hex() for root in merkle.subtree_roots(leaves, ranges)]
    except ValueError as error:
        raise CorruptError(f"events are missing: {error}", hint="`millrace system audit verify`") from None


@handles(ops.CHECK_PROOF)
def check_proof(services: Services, body: ops.CheckProofRequest) -> ops.CheckedProof:
    """Whether a proof holds; needs no events, and only the keys of whom to trust."""
    try:
        proof = msgspec.json.decode(body.proof, type=ops.AuditProof)
        seq, at, actor, verb, subject, promise = msgspec.json.decode(
            proof.leaf, type=tuple[int, float, str, str, str, str]
        )
        _check_path(proof)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"this is no proof: {error}", hint="`millrace system audit prove EVENT` makes one") from None
    if seq != proof.event:
        raise CorruptError(f"the proof is about event {seq}, not {proof.event}")
    key = services.signer.verify(statement_digest(proof.head), proof.head.signature.encode())
    if body.heads:
        _check_known(proof, parse_heads(body.heads))
    detail = None
    if proof.detail is not None:
        if chain.commitment(bytes.fromhex(proof.salt or ""), proof.detail.encode()) != promise:
            raise CorruptError(f"the detail in the proof is not that of event {seq}")
        detail = msgspec.json.decode(proof.detail)
    return ops.CheckedProof(
        event=seq, at=at, actor=actor, verb=verb, subject=subject, size=proof.head.size, key=key, detail=detail
    )


def _check_path(proof: ops.AuditProof) -> None:
    leaf, root = merkle.leaf_hash(proof.leaf.encode()), bytes.fromhex(proof.head.root)
    path = [bytes.fromhex(one) for one in proof.path]
    if not merkle.is_included(leaf, proof.event - 1, proof.head.size, path, root):
        raise CorruptError(
            f"event {proof.event} is not among those of the head over {proof.head.size}: it, or the proof, was altered",
            hint="`millrace system audit verify` shows what was altered, where the events are",
        )


def _check_known(proof: ops.AuditProof, heads: list[ops.SignedHead]) -> None:
    """The head is one of those that were kept, or grew out of one."""
    for head in heads:
        if statement_digest(head) == statement_digest(proof.head):
            return
        if head.size == proof.since:
            path = [bytes.fromhex(one) for one in proof.consistency]
            old, new = bytes.fromhex(head.root), bytes.fromhex(proof.head.root)
            if merkle.is_consistent(head.size, old, proof.head.size, new, path):
                return
    raise UntrustedError(
        f"the proof's head over {proof.head.size} events is none of those that you keep, nor grown out of one",
        hint="ask for a proof with --since SIZE of a head that you keep",
    )


@handles(ops.SEARCH)
def search(services: Services, body: ops.SearchRequest) -> list[ops.AuditEvent]:
    """Sealed events that fit, the newest first."""
    if not services.is_used:
        return []
    limit = max(0, min(body.limit, MOST_FOUND))
    before = None if body.before is None else min(body.before, MOST_NUMBER)
    return [_shown(row) for row in audit_sql.search(ledger(services), _filter(services, body), before, limit)]


@handles(ops.EXPORT)
def export(services: Services, body: ops.ExportRequest) -> Iterator[ops.ExportLine]:
    """Sealed events that fit, in order, and every signed head."""
    records = ledger(services)
    records.seal()
    wanted = _filter(services, body)
    return _lines(records, wanted, min(body.after, MOST_NUMBER))


def _lines(records: SqlRecords, wanted: EventFilter, after: int) -> Iterator[ops.ExportLine]:
    for row in audit_sql.export(records, wanted, after):
        yield ops.ExportLine(event=_shown(row))
    for head in stored_heads(records):
        yield ops.ExportLine(head=head)


def _shown(row: Row) -> ops.AuditEvent:
    seq, at, actor, verb, subject, promise, digest, salt, detail = row[:9]
    return ops.AuditEvent(
        seq=seq, at=at, actor=actor, verb=verb, subject=subject, commitment=promise, chain=digest,
        salt=salt.hex() if isinstance(salt, bytes) else None, detail=_readable(detail),
    )  # fmt: skip


def _readable(detail: Any) -> Any:
    """A detail as it was given; whatever stands there now, where somebody has altered it."""
    if detail is None:
        return None
    try:
        return msgspec.json.decode(detail)
    except (msgspec.MsgspecError, TypeError):
        return str(detail)


def _filter(services: Services, query: ops.EventQuery) -> EventFilter:
    now = services.clock.now()
    return EventFilter(
        actor=query.actor, verb=query.verb, subject=query.subject, text=query.text,
        since=None if query.since is None else parse_time(query.since, now),
        until=None if query.until is None else parse_time(query.until, now),
    )  # fmt: skip


def parse_time(text: str, now: float) -> float:
    """Seconds since 1970 of a date or time (ISO 8601; UTC where it names no zone), or of an age.

    Raises:
        InputError: It is neither.

    Example:
        >>> parse_time("1970-01-02", 0.0), parse_time("1970-01-01T00:00:10+00:00", 0.0), parse_time("2h", 7200.0)
        (86400.0, 10.0, 0.0)
    """
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        if text[-1:].isalpha():
            return now - parse_duration(text)
        raise InputError(f"want a date, a time such as 2026-01-31T12:00, or an age such as 24h, got {text!r}") from None
    return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()


# --------------------------------------------------------------------------- retention


@handles(ops.RETAIN)
def retain(services: Services, body: ops.RetentionRequest) -> ops.Erased:
    """Erase details and salts of events that are older; the events themselves stay."""
    if not body.days >= 0:
        raise InputError(f"want a number of days, got {body.days}")
    records = ledger(services)
    records.seal()
    found = audit_sql.details_before(records, services.clock.now() - body.days * DAY_S)
    if body.apply:
        erase(services, found, subject="audit:retention", reason={"retention_days": body.days})
    return ops.Erased(details=len(found), last_event=found[-1][0] if found else 0, applied=body.apply)


def erase(services: Services, found: Sequence[tuple[int, int]], subject: str, reason: dict[str, object]) -> None:
    """Erase details, and say so by events.

    Args:
        services: The home.
        found: (seq, id) of the events, in order of seq.
        subject: Of the events that say so.
        reason: Their detail, besides which details were erased.
    """
    records = ledger(services)
    for first in range(0, len(found), ERASE_AT_ONCE):
        some = found[first : first + ERASE_AT_ONCE]
        event = Event(
            at=services.clock.now(), actor=actor(), verb=ERASED, subject=subject,
            detail={**reason, "erased": as_stretches(seq for seq, _ in some), "outcome": "ok"},
        )  # fmt: skip
        records.erase_details([id for _, id in some], event)
    records.seal()


def actor() -> str:
    """Who is asking."""
    principal = acting_principal()
    return principal.id if principal else local_principal()
